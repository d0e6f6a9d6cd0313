"""Printing a block or a gate never fails, whatever it cannot say."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nlkernels import ChannelGate, NonLocalBlock3d

SIZE = {"input_size": (2, 4, 4)}


def test_unknown_backend_in_the_environment(monkeypatch):
    made = NonLocalBlock3d(8, **SIZE)
    assert "N x M = 32 x 8" in repr(made)
    monkeypatch.setenv("NLKERNELS_BACKEND", "fastest")
    assert "output still zero" in repr(made) and "N x M" not in repr(made)


@pytest.mark.parametrize("make", [lambda: NonLocalBlock3d(8, **SIZE), lambda: ChannelGate(8)])
def test_values_that_cannot_be_read(make):
    real = make()
    with FakeTensorMode():
        fake = make()
        for made in (real, fake):
            assert "backend=auto" in repr(made) and "zero" not in repr(made)
    assert "zero" not in repr(fake) and "still zero" in repr(real)


@pytest.mark.parametrize("make", [lambda: NonLocalBlock3d(8, **SIZE), lambda: ChannelGate(8)])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_dtypes_of_storage(make, dtype):
    made = make()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.data = parameter.data.to(dtype)
    assert "backend=auto" in repr(made) and "N x M" not in repr(made)


def test_size_that_no_longer_fits():
    made = NonLocalBlock3d(8, **SIZE)
    made.pool_size = (4, 4, 4)
    assert "pool=(4, 4, 4)" in repr(made) and "N x M" not in repr(made)
