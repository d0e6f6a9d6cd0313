"""The CUDA kernels of context pooling: on a GPU, else in the emulation, their own sources."""

import pytest
import torch

from nlkernels import channel_gate
from nlkernels.ops.gate import cuda as kernels
from nlkernels.ops.gate import op, suite
from nlkernels.ops.gate.problem import WIDEST
from tests.helpers import DEVICE, SHORT
from tests.ops.cuda_kernels import ORDERS, kernels_run, running  # noqa: F401
from tests.ops.test_gate import NAMES, PLACES, assert_right, moved, results, run, tensors

pytestmark = [pytest.mark.gate, pytest.mark.usefixtures("kernels_run")]

DTYPES = {name: dtype for dtype, name in SHORT.items() if dtype != torch.float64}
# One, two and three axes of positions, one position, channels that leave tails and that do not;
# 32, 16 and 8 positions in a tile.
CASES = [
    ((2, 17, 3, 7, 3), "fp32"),
    ((2, 40, 2, 9, 14), "bf16"),
    ((3, 8, 1, 1, 1), "fp16"),
    ((2, 64, 3, 5), "bf16"),
    ((4, 5, 65), "fp16"),
    ((1, 520, 2, 3, 3), "fp32"),
    ((2, 1000, 2, 3, 3), "bf16"),
    ((1, WIDEST, 3, 7), "fp16"),
]
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
    [(*case, each) for case in CASES for each in suite.LAYOUTS[: 3 if len(case[0]) > 4 else 2]],
    ids=str,
)
def test_not_worse_than_pytorch(shape, dtype, layout, mean):
    given = operands(shape, DTYPES[dtype], layout, mean)
    assert assert_right(run("cuda"), given)["d_x"].stride() == given[0].stride()


@pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=list(DTYPES))
@pytest.mark.parametrize("head", [(256,), (2048,)], ids=str)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_suite_passes(head, direction, dtype):
    from nlkernels import _trust

    assert _trust.judge(op.NAME, "cuda", head, dtype, direction, torch.device(DEVICE)) == ""


@layouts
def test_the_order_of_threads_and_repeats_change_no_bit(layout):
    given = operands((2, 300, 2, 5, 9), torch.bfloat16, layout)
    first = direct(*given)
    for order in (*ORDERS, 0):
        with running(order):
            again = direct(*given)
        assert all(torch.equal(again[name], first[name]) for name in NAMES)


@pytest.mark.parametrize("batch", [1, 600])
@layouts
def test_splits_of_one_tile_and_of_several(batch, layout):
    assert_right(run("cuda"), operands((batch, 3, 2, 5, 9), torch.float32, layout))


@pytest.mark.parametrize("how", PLACES)
def test_strides_do_not_matter_and_nothing_outside_is_read(how):
    x, weight, grad = operands((2, 5, 2, 3, 4), torch.bfloat16)
    weight, grad = (torch.stack((t, t), -1)[..., 0] for t in (weight, grad))
    assert_right(run("cuda"), [moved(x, how), weight, grad])


def test_expanded_operands():
    x, weight, grad = operands((1, 4, 2, 3, 3))
    x = x[..., :1].expand(2, -1, -1, -1, 3)
    assert_right(run("cuda"), [x, weight[:1].expand(4), grad.sum().expand(2, 4)])


def test_empty_batch_gives_empty_results():
    got = results(run("cuda"), *operands((0, 3, 2, 4, 4)))
    assert got["out"].shape == (0, 3) and got["d_x"].shape == (0, 3, 2, 4, 4)
    assert got["d_weight"].shape == (3,) and not got["d_weight"].any()


@pytest.mark.usefixtures("poison")
@layouts
def test_extreme_values_stay_finite(layout):
    x, weight, grad = operands((4, 16, 2, 3, 7), layout=layout)
    x[0] *= 1e4  # huge logits
    x[1] = 3.0  # all positions alike
    x[2, :, 1, 2, 3] = 60 * weight.sign()  # one position wins
    x[3] *= 1e-6  # all shares alike
    got = results(run("cuda"), x, weight, grad)
    assert all(t.isfinite().all() for t in got.values())
    assert_right(run("cuda"), [x[1:], weight, grad[1:]])


def test_sums_of_the_largest_numbers_stay_finite():
    x, weight, grad = operands((1, 4, 5, 10, 20))
    x = x.sign() * 1e36
    got = results(run("cuda"), x, weight * 0, grad)
    truth = results(run("reference"), *(t.double() for t in (x, weight * 0, grad)))
    # The weight's gradient is beyond float32; in out, numbers of both signs cancel.
    for name, largest in (("out", 1e36), ("d_x", truth["d_x"].abs().max())):
        error = (got[name].double() - truth[name]).abs().max()
        assert error <= 2 * torch.finfo(x.dtype).eps * largest


@layouts
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_number_touches_its_item_only(value, layout):
    x, weight, grad = operands((3, 4, 2, 3, 5), layout=layout)
    weight[2] = abs(weight[2])
    clean = direct(x, weight, grad)
    x[1, 2, 1, 2, 2] = value
    dirty = direct(x, weight, grad)
    truth = results(run("reference"), x.double(), weight.double(), grad.double())
    assert torch.equal(dirty["out"].isnan(), truth["out"].isnan())
    for item in (0, 2):
        assert torch.equal(dirty["out"][item], clean["out"][item])
        assert torch.equal(dirty["d_x"][item], clean["d_x"][item])


def test_what_is_not_served_is_said():
    x, weight, _ = operands((1, WIDEST + 1, 2))
    with pytest.raises(NotImplementedError, match=f"at most {WIDEST} channels"):
        op.pool(x, weight, backend="cuda")
    with pytest.raises(NotImplementedError, match="not float64"):
        op.pool(x.double()[:, :4], weight.double()[:4], backend="cuda")
    assert channel_gate(x[:, :4], weight[:4], transform=lambda c: c, backend="cuda").shape[1] == 4
