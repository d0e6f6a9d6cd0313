"""Where the tests of CUDA kernels run them: on a GPU, else in the emulation."""

import contextlib
from collections.abc import Iterator

import pytest

from nlkernels import _cuda
from nlkernels._ext import ExtensionError
from tests.cuda import emulated
from tests.helpers import DEVICE

# A GPU chooses its own order, the emulation runs threads up, down and in a random order.
ORDERS = (0,) if DEVICE == "cuda" else (0, 1, 7)


@contextlib.contextmanager
def running(order: int = 0) -> Iterator[None]:
    """Within the context the kernels run on tensors of DEVICE.

    Args:
        order: of a block's threads in the emulation.
    """
    if DEVICE == "cuda":
        if obstacle := _cuda.CUDA.missing():
            pytest.skip(obstacle)
        yield
        return
    try:
        emulated.module()
    except ExtensionError as error:
        pytest.skip(f"the emulation cannot be compiled: {error}")
    with emulated.emulation(order):
        yield


@pytest.fixture
def kernels_run() -> Iterator[None]:
    """The kernels run on tensors of DEVICE."""
    with running():
        yield
