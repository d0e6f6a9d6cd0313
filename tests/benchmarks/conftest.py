"""What measurements in tests share."""

import gc

import pytest
import torch
import torch._dynamo  # by the first update otherwise, and looked through from then on


@pytest.fixture(scope="module")
def quick_steps():
    """Small steps without what takes most of their time on a busy machine.

    Threads wait for each other there; and each weighing looks through all objects of all imports.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)
