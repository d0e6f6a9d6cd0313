"""The C++ kernels of region aggregation: every path of them, and every instruction set."""

import itertools

import pytest
import torch

from nlkernels import _ext, region_aggregate
from nlkernels._memory import MIB, PeakMemory
from nlkernels.ops.region import cpp, op
from nlkernels.ops.region.problem import RegionProblem
from tests.helpers import SHORT
from tests.ops import isas
from tests.ops.test_region import (
    LAYOUTS,
    NAMES,
    assert_right,
    moved,
    results,
    run,
    tensors,
)

pytestmark = pytest.mark.skipif(bool(_ext.missing()), reason=_ext.missing() or "never")

# Frames, heights and widths of 1 and below the kernel's; rows, channels and columns that leave
# tails; kernels of more rows than registers hold; several tasks for one channel.
CASES = [
    ((1, 3, 2, 4, 3), (1, 1, 1)),
    ((2, 17, 3, 9, 8), (3, 7, 7)),
    ((1, 1, 3, 30, 33), (3, 7, 7)),
    ((3, 1, 1, 1, 7), (3, 7, 7)),
    ((2, 2, 4, 1, 1), (3, 3, 3)),
    ((1, 64, 2, 8, 1), (1, 3, 3)),
    ((2, 40, 2, 17, 5), (5, 3, 7)),
    ((1, 33, 3, 9, 20), (3, 9, 5)),
    ((1, 16, 2, 33, 4), (3, 15, 13)),
    ((2, 3, 2, 3, 2), (7, 11, 9)),
    ((1, 70, 5, 7, 7), (3, 3, 3)),
    ((1, 20, 3, 14, 14), (3, 7, 7)),
]

dtypes = pytest.mark.parametrize("dtype", list(SHORT), ids=list(SHORT.values()))
formats = pytest.mark.parametrize("layout", ["ncdhw", "channels_last"])


def direct(x, weight, grad):
    """Results of the module itself, without dispatch."""
    both = (cpp.forward(x, weight), *cpp.backward(grad, x, weight))
    return dict(zip(NAMES, both, strict=True))


@pytest.mark.usefixtures("poison")
@dtypes
@formats
@pytest.mark.parametrize(("shape", "kernel"), CASES, ids=str)
def test_not_worse_than_pytorch(shape, kernel, layout, dtype):
    x, *rest = tensors(shape, kernel, dtype, layout)
    got = assert_right(run("cpp"), (x, *rest))
    assert got["out"].stride() == got["d_x"].stride() == x.stride()


@pytest.mark.gate
@pytest.mark.parametrize("isa", isas.ISAS)
def test_every_instruction_set_of_this_machine(isa, monkeypatch):
    isas.use(isa, monkeypatch)
    for (shape, kernel), layout, dtype in itertools.product(
        CASES, ["ncdhw", "channels_last"], SHORT
    ):
        assert_right(run("cpp"), tensors(shape, kernel, dtype, layout))


@pytest.mark.usefixtures("poison")
@formats
@pytest.mark.parametrize("channels", [2, pytest.param(9, marks=pytest.mark.gate)])
def test_gradcheck_and_gradgradcheck(channels, layout):
    x, weight, _ = tensors((2, channels, 3, 3, 2), (3, 1, 3), layout=layout)
    inputs = (x.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(run("cpp"), inputs, nondet_tol=0)
    assert torch.autograd.gradgradcheck(run("cpp"), inputs, nondet_tol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("channels", [5, 24])
@pytest.mark.parametrize("how", LAYOUTS)
def test_strides_do_not_matter_and_nothing_outside_is_read(how, channels, dtype):
    x, weight, grad = tensors((2, channels, 3, 6, 5), (3, 3, 3), dtype)
    assert_right(run("cpp"), [moved(x, how), moved(weight[None], how)[0], moved(grad, how)])
    assert_right(run("cpp"), [moved(x, how), weight, grad])


@pytest.mark.parametrize("channels", [4, 32])
def test_expanded_operands(channels):
    x, weight, grad = tensors((1, channels, 3, 5, 4), (3, 3, 3))
    x, grad = x.expand(3, -1, -1, -1, -1), grad.new_ones(()).expand(3, *grad.shape[1:])
    assert_right(run("cpp"), [x, weight[:1].expand(channels, -1, -1, -1), grad])
    one = x[:1, :1].expand(2, channels, -1, -1, -1)
    assert_right(run("cpp"), [one, weight, one])


@pytest.mark.parametrize("shape", [(0, 3, 2, 4, 4), (2, 3, 0, 4, 4), (2, 3, 2, 4, 0)], ids=str)
def test_empty_x_gives_empty_results(shape):
    got = results(run("cpp"), *tensors(shape, (3, 3, 3)))
    assert got["out"].shape == got["d_x"].shape == shape
    assert got["d_weight"].shape == (3, 3, 3, 3) and not got["d_weight"].any()


@formats
@dtypes
@pytest.mark.parametrize("shape", [(2, 40, 3, 9, 14), (1, 2, 3, 40, 9)], ids=str)
def test_repeats_and_threads_change_no_bit(shape, dtype, layout):
    operands = tensors(shape, (3, 7, 7), dtype, layout)
    threads = torch.get_num_threads()
    first = direct(*operands)
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            again = direct(*operands)
            assert all(torch.equal(again[name], first[name]) for name in NAMES)
    finally:
        torch.set_num_threads(threads)


def pairs(shape, kernel, at):
    """For each tap: the position of x that it reads for the output at `at`; None outside."""
    for tap in itertools.product(*map(range, kernel)):
        place = tuple(p + o - k // 2 for p, o, k in zip(at, tap, kernel, strict=True))
        inside = all(0 <= p < n for p, n in zip(place, shape[2:], strict=True))
        yield tap, place if inside else None


@formats
@pytest.mark.parametrize("channels", [3, 20])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("at", [(0, 0, 0), (2, 4, 3), (1, 2, 5)], ids=str)
def test_a_bad_number_reaches_exactly_what_depends_on_it(at, bad, channels, layout):
    shape, kernel = (1, channels, 3, 5, 6), (3, 3, 5)
    x, weight, grad = tensors(shape, kernel, torch.float32, layout)
    clean = direct(x, weight, grad)
    near = torch.zeros(shape, dtype=torch.bool)
    taps = torch.zeros(weight.shape, dtype=torch.bool)
    for tap, place in pairs(shape, kernel, at):
        if place is not None:
            near[(0, 1, *place)] = True
            taps[(1, *tap)] = True
    bad_x, bad_grad = x.clone(), grad.clone()
    bad_x[(0, 1, *at)] = bad_grad[(0, 1, *at)] = bad
    # Offsets of pairs that x at `at` takes part in are those of grad at `at`, negated.
    for operands, name, reached in (
        ((bad_x, weight, grad), "out", near),
        ((bad_x, weight, grad), "d_weight", taps.flip(1, 2, 3)),
        ((x, weight, bad_grad), "d_x", near),
        ((x, weight, bad_grad), "d_weight", taps),
    ):
        dirty = direct(*operands)[name]
        assert torch.equal(dirty.isfinite(), ~reached), name
        torch.testing.assert_close(dirty[~reached], clean[name][~reached], rtol=1e-5, atol=1e-5)


@formats
@pytest.mark.parametrize("channels", [3, 20])
def test_an_infinite_weight_meets_no_zeros_outside(channels, layout):
    shape, kernel = (2, channels, 3, 5, 6), (3, 3, 5)
    x, weight, grad = tensors(shape, kernel, torch.float32, layout)
    weight[1, 2, 0, 4] = float("inf")
    got = direct(x, weight, grad)
    for name, source in (("out", x), ("d_x", grad)):
        reached = torch.zeros(shape, dtype=torch.bool)
        if name == "out":
            reached[:, 1, :-1, 1:, :-2] = True
        else:
            reached[:, 1, 1:, :-1, 2:] = True
        assert torch.equal(got[name].isinf(), reached), name
        assert not got[name].isnan().any() and source.isfinite().all()


def test_one_channel_of_a_large_map_is_several_tasks():
    x, weight, grad = tensors((1, 1, 2, 120, 130), (3, 5, 5), torch.float32)
    assert_right(run("cpp"), (x, weight, grad))


@pytest.mark.gate
@formats
@dtypes
def test_memory_is_what_is_documented(dtype, layout):
    shape, kernel = (2, 64, 4, 20, 20), (3, 5, 5)
    x, weight, grad = tensors(shape, kernel, dtype, layout)
    wide, taps = max(dtype.itemsize, 4), 75
    lanes, threads = 64 // wide, torch.get_num_threads()
    row = max((4 * 22 + 2 * lanes) + 2 * (22 + 2), (4 * 20 + 1) * lanes * (layout != "ncdhw"))
    scratch = wide * (row * (2 * 20 + 4) + lanes * taps) + 256
    with PeakMemory() as forward:
        cpp.forward(x, weight)
    assert forward.live_mib * MIB <= x.numel() * dtype.itemsize + threads * scratch
    with PeakMemory() as backward:
        cpp.backward(grad, x, weight)
    outputs = (x.numel() + weight.numel()) * dtype.itemsize
    scratch += 8 * lanes * taps
    sums = 8 * 32 * 64 * taps
    assert backward.live_mib * MIB <= outputs + threads * scratch + sums


def test_what_is_not_served_is_said(monkeypatch):
    x, weight, _ = tensors((1, 2, 1, 2, 2), (1, 1, 1))
    problem = RegionProblem.of(x, weight)
    assert op.supports("cpp", problem) == []
    assert "CPUs only" in op.supports("cpp", problem._replace(device="cuda"))[0]
    assert "not int32" in op.supports("cpp", problem._replace(dtype=torch.int32))[0]
    monkeypatch.setattr(_ext, "missing", lambda: "no compiler: install g++")
    with pytest.raises(NotImplementedError, match="no compiler: install g"):
        region_aggregate(x, weight, backend="cpp")
