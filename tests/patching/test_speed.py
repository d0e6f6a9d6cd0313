"""Replaced blocks against the blocks themselves, side by side: forward and backward on a CPU."""

import copy
import statistics
import time

import pytest
import torch

from benchmarks import results
from nlkernels import replace_nonlocal
from nlkernels.patching.view import FEW_SCORES
from tests.patching import measure
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


# With 2.5 million scores; how much faster a block has to be that holds as many numbers as that.
@pytest.mark.gate
@pytest.mark.parametrize(
    ("system", "least", "rounds"),
    [
        ("alexhex7-gaussian", 1 / 1.05, 3),
        ("alexhex7-softmax", 1 / 1.05, 3),
        ("alexhex7-dot_product", 1.5, 3),
        ("alexhex7-concat", 1.5, 1),
        ("tsm-softmax", 1 / 1.05, 3),
        ("timm-softmax", 1 / 1.05, 3),
        ("rnl-region_softmax", 1.5, 1),
    ],
)
def test_every_system(system, least, rounds, monkeypatch):
    monkeypatch.delenv("NLKERNELS_BACKEND")
    shape = (4, 128, 28, 28) if system.startswith("timm") else (1, 128, 4, 28, 28)
    assert ratio(randomised(measure.SYSTEMS[system](128, [3, 7, 7])), shape, rounds) >= least


@pytest.mark.gate
def test_measurement(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "STAGES", {"small": ((16, 2, 6, 5), [3, 3, 3])})
    path = tmp_path / "patched.json"
    options = ["--systems", "slowfast-softmax,timm-softmax", "--rounds", "1", "--out", str(path)]
    assert measure.main(options) in (0, 1)  # others may be busy
    rows = results.load(path)["rows"]
    assert [row["case"] for row in rows] == ["slowfast/small"] * 2 + ["timm/small"] * 2
    assert {row["provider"] for row in rows} == {"original", "patched"}
    assert all(row["status"] == "ok" and row["peak_mib"] > 0 for row in rows)
    ratio = rows[0]["time_ms"]["p50"] / rows[1]["time_ms"]["p50"]
    assert rows[1]["speedup_over"]["best_other"] == pytest.approx(ratio, rel=1e-4)
    rows[1]["speedup_over"]["best_other"], rows[3]["speedup_over"]["best_other"] = 0.9, 0.96
    assert measure.slower(rows) == {"slowfast/small": 0.9}


def test_committed_measurements_are_no_slower():
    for path in results.RESULTS.glob("*/*-patched.json"):
        assert not measure.slower(results.load(path)["rows"]), path


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
