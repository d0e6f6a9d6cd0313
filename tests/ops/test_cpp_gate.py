"""The C++ kernels of context pooling: every path of them, and every instruction set."""

import pytest
import torch

from nlkernels import _ext, channel_gate, explain
from nlkernels._memory import MIB, PeakMemory
from nlkernels.ops.gate import cpp, op
from nlkernels.ops.gate.problem import frames_of
from nlkernels.ops.gate.suite import LAYOUTS
from tests.helpers import SHORT
from tests.ops import isas
from tests.ops.test_gate import NAMES, PLACES, SHAPES, assert_right, moved, results, run, tensors

pytestmark = pytest.mark.skipif(bool(_ext.missing()), reason=_ext.missing() or "never")

DTYPES = tuple(SHORT)
# Besides tails in positions and channels: several tiles and splits, tiles of few positions, runs
# that end in few positions, wide and narrow.
CASES = [
    *SHAPES,
    (2, 520, 2, 9, 14),
    (1, 2048, 3, 5, 7),
    (2, 64, 3, 40, 40),
    (1, 3, 2, 30, 31),
    (1, 1024, 1, 33, 20),
]

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
layouts = pytest.mark.parametrize("layout", LAYOUTS)
cases = pytest.mark.parametrize(
    ("shape", "layout"),
    [(shape, each) for shape in CASES for each in LAYOUTS[: 3 if len(shape) > 4 else 1]],
    ids=str,
)


def direct(x, weight, grad):
    """Results of the module itself, without dispatch."""
    out = cpp.forward(x, weight)
    return dict(zip(NAMES, (out, *cpp.backward(grad, x, weight, out)), strict=True))


def same_bits(got, expected):
    return all(torch.equal(got[name], expected[name]) for name in NAMES)


@pytest.mark.usefixtures("poison")
@dtypes
@cases
def test_not_worse_than_pytorch(shape, layout, dtype):
    for mean in (0.0, 4.0):
        given = tensors(shape, dtype, layout, mean=mean)
        assert assert_right(run("cpp"), given)["d_x"].stride() == given[0].stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=SHORT.get)
@pytest.mark.parametrize("deviation", [3, 10, 30])
@layouts
def test_logits_of_large_deviation(layout, deviation, dtype):
    for shape in ((2, 130, 4, 14, 14), (1, 64, 8, 28, 28), (3, 520, 2, 7, 7)):
        x, weight, grad = tensors(shape, dtype, layout)
        assert_right(run("cpp"), (x, weight * deviation, grad))


@pytest.mark.gate
@pytest.mark.parametrize("isa", isas.ISAS)
def test_every_instruction_set_of_this_machine(isa, monkeypatch):
    isas.use(isa, monkeypatch)
    for shape in CASES:
        for layout in LAYOUTS[: 3 if len(shape) > 4 else 1]:
            for dtype in DTYPES:
                assert_right(run("cpp"), tensors(shape, dtype, layout))
    for how in PLACES:
        x, weight, grad = tensors((2, 5, 3, 6, 4), torch.float16)
        assert_right(run("cpp"), [moved(x, how), weight, grad])


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    "layout",
    ["ncdhw", *(pytest.param(name, marks=pytest.mark.gate) for name in LAYOUTS if name != "ncdhw")],
)
def test_gradcheck_and_gradgradcheck(layout):
    x, weight, _ = tensors((2, 3, 2, 3, 2), layout=layout)
    inputs = (x.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(run("cpp"), inputs, nondet_tol=0)
    assert torch.autograd.gradgradcheck(run("cpp"), inputs, nondet_tol=0)


@dtypes
@pytest.mark.parametrize("channels", [5, 40])
@pytest.mark.parametrize("how", PLACES)
def test_strides_do_not_matter_and_nothing_outside_is_read(how, channels, dtype):
    x, weight, grad = tensors((2, channels, 3, 6, 7), dtype)
    weight, grad = (torch.stack((t, t), -1)[..., 0] for t in (weight, grad))
    assert_right(run("cpp"), [moved(x, how), weight, grad])


@pytest.mark.parametrize("how", ["window", "slice"])
def test_long_runs_inside_of_others(how):
    given = tensors((2, 20, 2, 3, 70), torch.float32)
    assert_right(run("cpp"), [moved(given[0], how), *given[1:]])


@dtypes
def test_unaligned_x(dtype):
    x, weight, grad = tensors((2, 40, 3, 6, 7), dtype)
    off = torch.cat([x.new_full((1,), float("nan")), x.flatten()])[1:].view(x.shape)
    assert same_bits(direct(off, weight, grad), direct(x, weight, grad))


def test_expanded_operands():
    x, weight, grad = tensors((1, 4, 3, 5, 4))
    spread = x[:, :, :, :1].expand(3, -1, -1, 5, -1)
    assert_right(run("cpp"), [spread, weight[:1].expand(4), grad.sum().expand(3, 4)])
    one = x[:, :1, :1, :1, :1].expand(2, 4, 3, 5, 4)
    assert_right(run("cpp"), [one, weight, grad.expand(2, 4)])


def test_empty_batch_gives_empty_results():
    got = direct(*tensors((0, 3, 2, 4, 4)))
    assert got["out"].shape == (0, 3) and got["d_x"].shape == (0, 3, 2, 4, 4)
    assert got["d_weight"].shape == (3,) and not got["d_weight"].any()


@pytest.mark.usefixtures("poison")
@layouts
@dtypes
def test_extreme_values_stay_finite(dtype, layout):
    x, weight, grad = tensors((4, 16, 3, 5, 7), dtype, layout)
    x[0] *= 1e4  # huge logits
    x[1] = 3.0  # all positions alike
    x[2, :, 1, 2, 3] = 60 * weight.sign()  # one position wins
    x[3] *= 1e-6  # all shares alike
    assert all(t.isfinite().all() for t in direct(x, weight, grad).values())
    assert_right(run("cpp"), [x[1:], weight, grad[1:]])


@layouts
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=SHORT.get)
def test_sums_of_the_largest_numbers_stay_finite(dtype, layout):
    x, weight, grad = tensors((2, 4, 5, 10, 20), dtype, layout)
    x = x.sign() * 1e36
    got = direct(x, weight * 0, grad)
    truth = results(run("reference"), *(t.double() for t in (x, weight * 0, grad)))
    # The weight's gradient is beyond float32; in out, numbers of both signs cancel.
    for name, largest in (("out", 1e36), ("d_x", truth["d_x"].abs().max())):
        error = (got[name].double() - truth[name]).abs().max()
        assert error <= 2 * torch.finfo(dtype).eps * largest


def test_constant_positions_give_their_value_and_the_mean_gradient():
    x, weight, grad = tensors((2, 9, 2, 3, 4))
    x = x[:, :, :1, :1, :1].expand_as(x)
    got = direct(x, weight, grad)
    torch.testing.assert_close(got["out"], x[:, :, 0, 0, 0])
    expected = (grad / 24)[..., None, None, None].expand_as(x)
    torch.testing.assert_close(got["d_x"], expected)
    assert got["d_weight"].abs().max() < 1e-13


def test_order_and_shift_change_nothing():
    x, weight, grad = tensors((3, 6, 4, 5, 2))
    whole = direct(x, weight, grad)
    order = torch.randperm(40)
    mixed = direct(x.flatten(2)[..., order], weight, grad)
    torch.testing.assert_close(mixed["out"], whole["out"])
    torch.testing.assert_close(mixed["d_x"], whole["d_x"].flatten(2)[..., order])
    # A direction that is the same at every position shifts all logits alike.
    shifted = direct(torch.cat((x, torch.ones_like(x[:, :1])), 1),
                     torch.cat((weight, weight.new_full((1,), 50.0))),
                     torch.cat((grad, grad[:, :1] * 0), 1))  # fmt: skip
    torch.testing.assert_close(shifted["out"][:, :-1], whole["out"])
    torch.testing.assert_close(shifted["d_weight"][:-1], whole["d_weight"])


@layouts
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_number_touches_its_item_only(value, layout):
    x, weight, grad = tensors((3, 4, 3, 6, 5), torch.float32, layout)
    weight[2] = abs(weight[2])
    clean = direct(x, weight, grad)
    x[1, 2, 1, 3, 2] = value
    dirty = direct(x, weight, grad)
    truth = results(run("reference"), x.double(), weight.double(), grad.double())
    assert torch.equal(dirty["out"].isnan(), truth["out"].isnan())
    for item in (0, 2):
        assert torch.equal(dirty["out"][item], clean["out"][item])
        assert torch.equal(dirty["d_x"][item], clean["d_x"][item])


@dtypes
@layouts
def test_repeats_threads_and_other_items_change_no_bit(layout, dtype):
    given = tensors((3, 130, 4, 30, 31), dtype, layout)
    first = direct(*given)
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3, 16):
            torch.set_num_threads(number)
            assert same_bits(direct(*given), first), number
    finally:
        torch.set_num_threads(threads)
    x, weight, grad = given
    for item in range(3):
        alone = direct(x[item : item + 1], weight, grad[item : item + 1])
        assert torch.equal(alone["out"][0], first["out"][item])
        assert torch.equal(alone["d_x"][0], first["d_x"][item])


@pytest.mark.gate
@dtypes
@pytest.mark.parametrize("layout", [*LAYOUTS, "window"])
@pytest.mark.parametrize("shape", [(8, 64, 4, 14, 14), (1, 1024, 8, 14, 14)], ids=str)
def test_memory_is_what_the_docstring_says(shape, layout, dtype):
    x, weight, grad = tensors(shape, dtype, "ncdhw" if layout == "window" else layout)
    x = moved(x, layout) if layout == "window" else x
    batch, channels, positions = *shape[:2], x[0, 0].numel()
    size, wide, threads = dtype.itemsize, 4 if dtype.itemsize == 2 else 8, torch.get_num_threads()
    tile = max(16, min(256, 2**18 // (channels * size)))
    # A run of positions ends with a tile.
    runs = 1 if frames_of(x) is None else frames_of(x).count
    tiles = runs * -(-positions // runs // 16 * 16 // 16)
    splits = min(128, tiles, size * channels * positions // 2**20 + 1 + runs)
    scratch = threads * (
        64 * channels + 2 * wide * channels + (layout == "window") * size * channels * (tile + 16)
    )
    parts = batch * splits * (wide * channels + 24) + scratch + 64 * (6 + 4 * threads)
    with PeakMemory("cpu") as forward:
        out = cpp.forward(x, weight)
    assert 0 < forward.live_mib * MIB - out.nbytes <= parts
    with PeakMemory("cpu") as backward:
        d_x, d_weight = cpp.backward(grad, x, weight, out)
    extra = backward.live_mib * MIB - d_x.nbytes - d_weight.nbytes
    assert 0 < extra <= parts + batch * (2 * wide * positions + 8 * channels + 24)


def test_opcheck():
    x, weight, grad = tensors((2, 3, 2, 3, 2))
    operators = torch.ops.nlkernels
    torch.library.opcheck(operators.gate_forward.default, (x, weight, "cpp"))
    arguments = (grad, x, weight, cpp.forward(x, weight), "cpp")
    torch.library.opcheck(operators.gate_backward.default, arguments)


def test_why_it_does_not_run(monkeypatch):
    x, weight, _ = tensors((1, 3, 4))
    assert explain("channel_gate", x, weight, backend="cpp").backend == "cpp"
    problem = op.GateProblem.of(x, weight)
    assert op.supports("cpp", problem._replace(device="cuda")) == ["its kernels run on CPUs only"]
    monkeypatch.setattr(_ext, "missing", lambda: "there is no compiler; install g++")
    with pytest.raises(NotImplementedError, match="there is no compiler; install g"):
        channel_gate(x, weight, transform=torch.tanh, backend="cpp")
