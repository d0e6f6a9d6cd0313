"""Layers of replaced blocks that are no plain ones: with a forward of their own, parametrized,
wrapped or pruned; before and after the replacement."""

import copy

import pytest
import torch
from torch import nn

from nlkernels import NonLocalBlock3d, replace_nonlocal
from tests.patching.blocks import randomised
from tests.patching.packages.slowfast.models.nonlocal_helper import Nonlocal

SHAPE = (2, 8, 3, 6, 5)


def block(made=None):
    return randomised(Nonlocal(8, 4, (1, 2, 2)) if made is None else made).double()


def clip():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def replaced(module):
    replace_nonlocal(module, backend="chunked")
    return module


def tripled(layer):
    """The layer with a forward of its instance, as programs that move weights give it one."""
    own = layer.forward
    layer.forward = lambda x: 3 * own(x)


@pytest.mark.parametrize("name", ["conv_theta", "conv_out", "bn", "pool"])
def test_forwards_of_instances_run(name):
    theirs, ours = (block().eval() for _ in range(2))
    ours.load_state_dict(theirs.state_dict())
    replaced(ours)
    for each in (theirs, ours):
        tripled(each.get_submodule(name))
    torch.testing.assert_close(ours(clip()), theirs(clip()), rtol=1e-9, atol=1e-9)
    assert f"{name} has a forward of its own" in ours.explain(clip()).problem


def test_forwards_of_instances_may_be_there_before():
    model = nn.Sequential(block(), block()).eval()
    tripled(model[1].conv_theta)
    expected = model(clip())
    torch.testing.assert_close(replaced(model)(clip()), expected, rtol=1e-9, atol=1e-9)


def test_forwards_of_instances_of_our_own_blocks_run():
    own = randomised(NonLocalBlock3d(8, backend="chunked")).double().eval()
    other = copy.deepcopy(own)
    tripled(other.theta)
    with torch.no_grad():
        own.theta.weight.mul_(3)
        own.theta.bias.mul_(3)
    torch.testing.assert_close(other(clip()), own(clip()), rtol=1e-9, atol=1e-9)


def wrap(module, name, *more):
    parent, _, last = name.rpartition(".")
    parent = module.get_submodule(parent)
    setattr(parent, last, nn.Sequential(getattr(parent, last), *more))
