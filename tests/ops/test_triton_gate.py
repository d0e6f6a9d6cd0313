"""The Triton kernels of context pooling, in Triton's interpreter where there is no GPU."""

import pytest
import torch

pytest.importorskip("triton")

from nlkernels import _launch, channel_gate
from nlkernels._memory import MIB, PeakMemory
from nlkernels.ops.gate import op, suite
from nlkernels.ops.gate import triton as kernels
from nlkernels.ops.gate.problem import WIDEST, GateProblem, frames_of
from tests.helpers import DEVICE
from tests.ops import gate
from tests.ops.gate import DTYPES, direct, layouts, operands
from tests.ops.test_gate import NAMES, PLACES, assert_right, run

dtypes = pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=list(DTYPES))


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("mean", [0.0, 4.0])
@pytest.mark.parametrize(
    ("shape", "dtype", "layout"),
    [
        (*case, each)
        for case in gate.CASES
        for each in suite.LAYOUTS[: 3 if len(case[0]) > 4 else 1]
    ],
    ids=str,
)
def test_not_worse_than_pytorch(shape, dtype, layout, mean):
    gate.check_case("triton", shape, dtype, layout, mean)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("channels", [16, 200, 300, 1000, WIDEST])
def test_every_number_of_warps(channels):
    (config,) = kernels.KERNELS["gate_forward"](
        GateProblem(2, channels, 512, torch.float32, DEVICE), 90
    )
    assert config.rows * config.columns == 32 * config.warps * 32
    assert_right(run("triton"), operands((1, channels, 9), torch.bfloat16))


@pytest.mark.parametrize("architecture", [80, 89, 120])
def test_other_architectures(architecture):
    with _launch.pretend(architecture=architecture):
        assert_right(run("triton"), operands((2, 9, 2, 5, 3)))


@pytest.mark.parametrize("programs", [1, 6, 1024])
@layouts
def test_splits_change_nothing_but_rounding(programs, layout, monkeypatch):
    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    monkeypatch.setattr(kernels, "_HELD", 1)
    assert_right(run("triton"), operands((2, 30, 3, 5, 5), torch.float32, layout))


@pytest.mark.usefixtures("poison")
def test_more_splits_than_are_added_at_once(monkeypatch):
    monkeypatch.setattr(kernels, "_HELD", 1)
    assert_right(run("triton"), operands((1, 16, 8 * 45), torch.float32))


@pytest.mark.parametrize("how", PLACES)
def test_strides_do_not_matter_and_nothing_outside_is_read(how):
    gate.check_strides("triton", how)


def test_expanded_operands():
    gate.check_expanded("triton")


@pytest.mark.parametrize("layout", ["ncdhw", "frames"])
def test_64_bit_offsets_and_repeats_change_no_bit(layout):
    given = operands((2, 9, 2, 5, 3), torch.bfloat16, layout)
    narrow = direct(kernels, *given)
    for wide in (True, False):
        with _launch.pretend(wide=wide):
            again = direct(kernels, *given)
        assert all(torch.equal(again[name], narrow[name]) for name in NAMES)


def test_positions_beyond_32_bits_are_read_with_64_bit_offsets():
    x = torch.empty(2, 2048, 32, 256, 256, device="meta")
    asked = []
    collect = lambda kernel, grid, arguments, options: asked.append(options)  # noqa: E731
    with _launch.pretend(architecture=90, launcher=collect):
        kernels.backward(x.new_empty(2, 2048), x, x.new_empty(2048), x.new_empty(2, 2048))
    assert [options.get("WIDE") for options in asked] == [True, None, True]


def test_empty_batch_gives_empty_results():
    gate.check_empty("triton")


@pytest.mark.usefixtures("poison")
def test_extreme_values_stay_finite():
    gate.check_extremes("triton")


def test_sums_of_the_largest_numbers_stay_finite():
    gate.check_largest("triton")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_number_touches_its_item_only(value):
    gate.check_bad_number(kernels, value)


def test_gradients_of_gradients_are_the_definitions():
    def penalty(backend):
        inputs = [t.requires_grad_() for t in operands((2, 3, 2, 3, 2))[:2]]
        out = op.pool(*inputs, backend=backend)
        first = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), inputs)

    for got, want in zip(penalty("triton"), penalty("reference"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@layouts
@dtypes
def test_memory_is_what_is_documented(dtype, layout):
    x, weight, grad = operands((8, 64, 4, 14, 14), dtype, layout)
    size, scratch, positions = dtype.itemsize, 4096, 4 * 14 * 14
    with _launch.pretend(architecture=90, launcher=lambda *_: None):
        (config,) = kernels.KERNELS["gate_forward"](GateProblem.of(x, weight), 90)
        frames = frames_of(x)
        tiles = frames.count * -(-frames.positions // config.rows)
        parts = 4 * 8 * (min(tiles, 1024 // 8) * (64 + 3) + 64 + 3)
        with PeakMemory(DEVICE) as forward:
            out = kernels.forward(x, weight)
        assert forward.live_mib * MIB <= out.numel() * size + parts + scratch
        with PeakMemory(DEVICE) as backward:
            kernels.backward(grad, x, weight, out)
        extra = backward.live_mib * MIB - x.numel() * size
        assert extra <= parts + 8 * 8 * positions + 8 * 8 * 64 + scratch


@pytest.mark.parametrize("head", [(64,)])
def test_verification_accepts_the_kernels(head):
    from nlkernels import _trust

    for direction in ("forward", "backward"):
        device = torch.device(DEVICE)
        assert _trust.judge("gate", "triton", head, torch.float32, direction, device) == ""


def test_what_is_not_served_is_said():
    x, weight, _ = operands((1, WIDEST + 1, 2))
    with pytest.raises(NotImplementedError, match="at most 2048 channels, not 2049"):
        channel_gate(x, weight, transform=torch.tanh, backend="triton")
    with pytest.raises(NotImplementedError, match="not float64"):
        channel_gate(x.double(), weight.double(), transform=torch.tanh, backend="triton")
