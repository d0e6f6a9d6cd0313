"""The CUDA kernels of context pooling: on a GPU, else in the emulation, their own sources."""

import pytest
import torch

from nlkernels import channel_gate
from nlkernels.ops.gate import cuda as kernels
from nlkernels.ops.gate import op, suite
from nlkernels.ops.gate.problem import WIDEST
from tests.helpers import DEVICE
from tests.ops import gate
from tests.ops.cuda_kernels import ORDERS, kernels_run, running  # noqa: F401
from tests.ops.gate import DTYPES, direct, layouts, operands
from tests.ops.test_gate import NAMES, PLACES, assert_right, run

pytestmark = [pytest.mark.gate, pytest.mark.usefixtures("kernels_run")]

# 32, 16 and 8 positions in a tile.
CASES = [*gate.CASES, ((2, 1000, 2, 3, 3), "bf16"), ((1, WIDEST, 3, 7), "fp16")]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("mean", [0.0, 4.0])
@pytest.mark.parametrize(
    ("shape", "dtype", "layout"),
    [(*case, each) for case in CASES for each in suite.LAYOUTS[: 3 if len(case[0]) > 4 else 2]],
    ids=str,
)
def test_not_worse_than_pytorch(shape, dtype, layout, mean):
    gate.check_case("cuda", shape, dtype, layout, mean)


@pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=list(DTYPES))
@pytest.mark.parametrize("head", [(256,), (2048,)], ids=str)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_suite_passes(head, direction, dtype):
    from nlkernels import _trust

    assert _trust.judge(op.NAME, "cuda", head, dtype, direction, torch.device(DEVICE)) == ""


@layouts
def test_the_order_of_threads_and_repeats_change_no_bit(layout):
    given = operands((2, 300, 2, 5, 9), torch.bfloat16, layout)
    first = direct(kernels, *given)
    for order in (*ORDERS, 0):
        with running(order):
            again = direct(kernels, *given)
        assert all(torch.equal(again[name], first[name]) for name in NAMES)


@pytest.mark.parametrize("batch", [1, 600])
@layouts
def test_splits_of_one_tile_and_of_several(batch, layout):
    assert_right(run("cuda"), operands((batch, 3, 2, 5, 9), torch.float32, layout))


@pytest.mark.parametrize("how", PLACES)
def test_strides_do_not_matter_and_nothing_outside_is_read(how):
    gate.check_strides("cuda", how)


def test_expanded_operands():
    gate.check_expanded("cuda")


def test_empty_batch_gives_empty_results():
    gate.check_empty("cuda")


@pytest.mark.usefixtures("poison")
@layouts
def test_extreme_values_stay_finite(layout):
    gate.check_extremes("cuda", layout)


def test_sums_of_the_largest_numbers_stay_finite():
    gate.check_largest("cuda")


@layouts
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_number_touches_its_item_only(value, layout):
    gate.check_bad_number(kernels, value, layout)


def test_what_is_not_served_is_said():
    x, weight, _ = operands((1, WIDEST + 1, 2))
    with pytest.raises(NotImplementedError, match=f"at most {WIDEST} channels"):
        op.pool(x, weight, backend="cuda")
    with pytest.raises(NotImplementedError, match="not float64"):
        op.pool(x.double()[:, :4], weight.double()[:4], backend="cuda")
    assert channel_gate(x[:, :4], weight[:4], transform=lambda c: c, backend="cuda").shape[1] == 4
