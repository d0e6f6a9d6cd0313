"""Replaced blocks against the blocks themselves, side by side: forward and backward on a CPU."""

import copy
import statistics
import time

import pytest
import torch

from nlkernels import replace_nonlocal
from nlkernels.patching.view import FEW_SCORES
from tests.patching.blocks import randomised
from tests.patching.packages.ops.rnl import NONLocalBlock3D as Regions
from tests.patching.packages.slowfast.models.nonlocal_helper import Nonlocal


def ratio(theirs, shape, rounds=5):
    """Their processor time of a step over ours, on one thread: other programs count little."""
    ours = copy.deepcopy(theirs)
    replace_nonlocal(ours)
    x, grad = torch.randn(shape), torch.randn(shape)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = {theirs: [], ours: []}
        for block in (theirs, ours) * (rounds + 1):
            start = time.process_time()
            block(x.clone().requires_grad_()).backward(grad)
            times[block].append(time.process_time() - start)
    finally:
        torch.set_num_threads(threads)
    first, second = (statistics.median(times[block][1:]) for block in (theirs, ours))
    return first / second


@pytest.mark.gate
@pytest.mark.parametrize(
    ("make", "least"),
    [
        pytest.param(lambda: Nonlocal(512, 256, (1, 2, 2)), 1 / 1.05, id="softmax"),
        pytest.param(lambda: Nonlocal(512, 256, (1, 2, 2), "dot_product"), 1.5, id="dot_product"),
    ],
)
def test_long_clips_are_faster(make, least, monkeypatch):
    monkeypatch.delenv("NLKERNELS_BACKEND")
    assert ratio(randomised(make()), (1, 512, 4, 28, 28)) >= least


@pytest.mark.gate
def test_regions_are_faster(monkeypatch):
    monkeypatch.delenv("NLKERNELS_BACKEND")
    assert ratio(randomised(Regions(128, 2, [3, 7, 7], False)), (1, 128, 4, 14, 14)) >= 1.5


def test_few_scores_are_left_to_the_block_itself(monkeypatch):
    monkeypatch.delenv("NLKERNELS_BACKEND")
    block = randomised(Nonlocal(8, 4))
    few, many = torch.randn(1, 8, 2, 8, 8), torch.randn(1, 8, 2, 20, 20)
    assert 128**2 <= FEW_SCORES["softmax"] < 800**2
    expected = block(few)
    replace_nonlocal(block)
    assert torch.equal(block(few), expected)
    view = block.nonlocal_view(block)
    assert view.few(few) and not view.few(many)
    assert "own forward" in block.explain(few).problem
    block.set_backend("chunked")
    assert not view.few(few) and "own forward" not in block.explain(few).problem
