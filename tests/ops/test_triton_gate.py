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
from tests.ops.test_gate import NAMES, PLACES, assert_right, moved, results, run, tensors

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# One, two and three axes of positions, one position, channels that leave tails and that do not.
CASES = [
    ((2, 17, 3, 7, 3), "fp32"),
    ((2, 40, 2, 9, 14), "bf16"),
    ((3, 8, 1, 1, 1), "fp16"),
    ((2, 64, 3, 5), "bf16"),
    ((4, 5, 65), "fp16"),
    ((1, 520, 2, 3, 3), "fp32"),
]

dtypes = pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=list(DTYPES))
layouts = pytest.mark.parametrize("layout", suite.LAYOUTS)


def operands(shape, dtype=torch.float32, layout="ncdhw", mean=0.0):
    return tensors(shape, dtype, layout, DEVICE, mean)


def direct(x, weight, grad):
    """Results of the module itself, without dispatch."""
    out = kernels.forward(x, weight)
    return dict(zip(NAMES, (out, *kernels.backward(grad, x, weight, out)), strict=True))


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("mean", [0.0, 4.0])
@pytest.mark.parametrize(
    ("shape", "dtype", "layout"),
    [(*case, each) for case in CASES for each in suite.LAYOUTS[: 3 if len(case[0]) > 4 else 1]],
    ids=str,
)
def test_not_worse_than_pytorch(shape, dtype, layout, mean):
    given = operands(shape, DTYPES[dtype], layout, mean)
    assert assert_right(run("triton"), given)["d_x"].stride() == given[0].stride()


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
    x, weight, grad = operands((2, 5, 2, 3, 4), torch.bfloat16)
    weight, grad = (torch.stack((t, t), -1)[..., 0] for t in (weight, grad))
    assert_right(run("triton"), [moved(x, how), weight, grad])


def test_expanded_operands():
    x, weight, grad = operands((1, 4, 2, 3, 3))
    x = x[..., :1].expand(2, -1, -1, -1, 3)
    assert_right(run("triton"), [x, weight[:1].expand(4), grad.sum().expand(2, 4)])


@pytest.mark.parametrize("layout", ["ncdhw", "frames"])
def test_64_bit_offsets_and_repeats_change_no_bit(layout):
    given = operands((2, 9, 2, 5, 3), torch.bfloat16, layout)
    narrow = direct(*given)
    for wide in (True, False):
        with _launch.pretend(wide=wide):
            again = direct(*given)
        assert all(torch.equal(again[name], narrow[name]) for name in NAMES)


def test_positions_beyond_32_bits_are_read_with_64_bit_offsets():
    x = torch.empty(2, 2048, 32, 256, 256, device="meta")
    asked = []
    collect = lambda kernel, grid, arguments, options: asked.append(options)  # noqa: E731
    with _launch.pretend(architecture=90, launcher=collect):
        kernels.backward(x.new_empty(2, 2048), x, x.new_empty(2048), x.new_empty(2, 2048))
    assert [options.get("WIDE") for options in asked] == [True, None, True]


def test_empty_batch_gives_empty_results():
    got = results(run("triton"), *operands((0, 3, 2, 4, 4)))
    assert got["out"].shape == (0, 3) and got["d_x"].shape == (0, 3, 2, 4, 4)
    assert got["d_weight"].shape == (3,) and not got["d_weight"].any()


@pytest.mark.usefixtures("poison")
def test_extreme_values_stay_finite():
    x, weight, grad = operands((4, 16, 2, 3, 7))
    x[0] *= 1e4  # huge logits
    x[1] = 3.0  # all positions alike
    x[2, :, 1, 2, 3] = 60 * weight.sign()  # one position wins
    x[3] *= 1e-6  # all shares alike
    got = results(run("triton"), x, weight, grad)
    assert all(t.isfinite().all() for t in got.values())
    assert_right(run("triton"), [x[1:], weight, grad[1:]])


def test_sums_of_the_largest_numbers_stay_finite():
    x, weight, grad = operands((1, 4, 5, 10, 20))
    x = x.sign() * 1e36
    got = results(run("triton"), x, weight * 0, grad)
    truth = results(run("reference"), *(t.double() for t in (x, weight * 0, grad)))
    # The weight's gradient is beyond float32; in out, numbers of both signs cancel.
    for name, largest in (("out", 1e36), ("d_x", truth["d_x"].abs().max())):
        error = (got[name].double() - truth[name]).abs().max()
        assert error <= 2 * torch.finfo(x.dtype).eps * largest


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_number_touches_its_item_only(value):
    x, weight, grad = operands((3, 4, 2, 3, 5))
    weight[2] = abs(weight[2])
    clean = direct(x, weight, grad)
    x[1, 2, 1, 2, 2] = value
    dirty = direct(x, weight, grad)
    truth = results(run("reference"), x.double(), weight.double(), grad.double())
    assert torch.equal(dirty["out"].isnan(), truth["out"].isnan())
    for item in (0, 2):
        assert torch.equal(dirty["out"][item], clean["out"][item])
        assert torch.equal(dirty["d_x"][item], clean["d_x"][item])


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
