"""The CUDA kernels of the concatenation: on a GPU, else in the emulation, their own sources."""

import pytest
import torch

from nlkernels.ops.concat import cuda as kernels
from nlkernels.ops.concat import op, suite
from tests import concat
from tests.concat import NAMES, naive
from tests.helpers import DEVICE, SHORT, assert_not_worse
from tests.ops.cuda_kernels import ORDERS, kernels_run, running  # noqa: F401
from tests.ops.staged import DTYPES, LAYOUTS, Peak

pytestmark = [pytest.mark.gate, pytest.mark.usefixtures("kernels_run", "poison")]

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
# B, N, M, V: chunks of 64 steps and blocks of 64 channels that are full, that leave tails, and one.
CASES = [
    (4, 1, 63, 3),
    (2, 17, 65, 40),
    (1, 63, 65, 64),
    (1, 64, 64, 65),
    (4, 65, 1, 16),
    (2, 150, 333, 130),
]


def operands(sizes, dtype=torch.float32, shift=0.0):
    return concat.operands(sizes, dtype, DEVICE, shift)


def direct(query_score, key_score, value, grad):
    """Results of the module itself, without dispatch."""
    out = kernels.forward(query_score, key_score, value)
    grads = kernels.backward(grad, query_score, key_score, value)
    return dict(zip(NAMES, (out, *grads), strict=True))


def check(tensors):
    """The 2x/3x rule, and results that are laid out as the operator's fakes say."""
    got = direct(*tensors)
    same, truth = naive(*tensors), naive(*(t.double() for t in tensors))
    for name, result in got.items():
        assert_not_worse(name, result, same[name], truth[name], 2 if name == "out" else 3)
        assert result.is_contiguous()
    return got


@dtypes
@pytest.mark.parametrize("sizes", CASES, ids=str)
def test_not_worse_than_pytorch(sizes, dtype):
    check(operands(sizes, dtype))


@dtypes
@pytest.mark.parametrize("head", [(64,), (256,)], ids=str)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_suite_passes(head, direction, dtype):
    from nlkernels import _trust

    assert suite.HEADS.count(head) == 1
    assert _trust.judge(op.NAME, "cuda", head, dtype, direction, torch.device(DEVICE)) == ""


@pytest.mark.parametrize("sign", ["signed", "positive"])
@pytest.mark.parametrize("shift", [0.0, 100.0, 1000.0, -3.0])
def test_shifted_scores_and_values_of_one_sign(sign, shift):
    tensors = operands((1, 263, 517, 16), shift=shift)
    if sign == "positive":
        tensors[2:] = (t.abs() for t in tensors[2:])
    check(tensors)


@pytest.mark.parametrize("scores", ["tied", "zero", "all equal", "never above zero"])
def test_sums_of_zero_are_left_out_and_ties_are_not(scores):
    tensors = operands((2, 47, 90, 16))
    change = {
        "tied": lambda t: t.round(),
        "all equal": lambda t: torch.full_like(t, 0.7),
        "never above zero": lambda t: -t.abs(),
        "zero": lambda t: torch.zeros_like(t).copysign(t),
    }[scores]
    tensors[:2] = (change(t) for t in tensors[:2])
    got = check(tensors)
    if scores in ("never above zero", "zero"):
        assert not any(result.any() for result in got.values())


@dtypes
def test_huge_scores(dtype):
    tensors = operands((2, 17, 140, 16), dtype)
    tensors[0], tensors[1] = tensors[0].sign() * 1e4, tensors[1] * 2500
    check(tensors)


@dtypes
def test_the_largest_values_stay_finite(dtype):
    query_score, key_score, value, _ = operands((1, 5, 70, 16), dtype)
    largest = 3e38 if dtype == torch.float32 else torch.finfo(dtype).max
    query_score.fill_(0.25)
    key_score.fill_(0.25)
    out = kernels.forward(query_score, key_score, value.fill_(largest))
    torch.testing.assert_close(out, value[:, :5] / 2)


def test_strides_do_not_matter_and_nothing_outside_is_read():
    query_score, key_score, value, grad = operands((2, 8, 24, 8), torch.bfloat16)
    expected = direct(query_score, key_score, value, grad)
    for layout, moved in LAYOUTS.items():
        scores = (moved(torch.stack([t, t], 2))[..., 0] for t in (query_score, key_score))
        got = direct(*scores, moved(value), moved(grad))
        for name in NAMES:
            assert torch.equal(got[name], expected[name]), (layout, name)


def test_expanded_operands():
    one = operands((1, 9, 24, 5))
    for tensors in (
        [*(t.expand(2, *t.shape[1:]) for t in one[:3]), one[3][:, :1, :1].expand(2, 9, 5)],
        [one[0][:, :1].expand(1, 9), one[1], one[2][..., :1].expand(1, 24, 5), one[3]],
    ):
        got, expected = direct(*tensors), direct(*(t.contiguous() for t in tensors))
        assert all(torch.equal(got[name], expected[name]) for name in NAMES)


def test_the_order_of_threads_and_repeats_change_no_bit():
    tensors = operands((2, 70, 124, 70), torch.bfloat16)
    first = direct(*tensors)
    for order in (*ORDERS, 0):
        with running(order):
            again = direct(*tensors)
        assert all(torch.equal(again[name], first[name]) for name in NAMES)


def test_items_do_not_depend_on_each_other():
    query_score, key_score, value, _ = operands((3, 70, 64, 5))
    out = kernels.forward(query_score, key_score, value)
    for item in range(3):
        one = kernels.forward(*(t[item : item + 1] for t in (query_score, key_score, value)))
        assert torch.equal(one[0], out[item])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_query_score_touches_its_row_only(bad):
    tensors = operands((2, 70, 124, 5))
    clean = direct(*tensors)
    tensors[0][1, 7] = bad
    dirty, truth = direct(*tensors), naive(*tensors)
    for name in NAMES:
        assert torch.equal(dirty[name][0], clean[name][0]), name
        assert torch.equal(dirty[name].isfinite(), truth[name].isfinite()), name
    # Of the same item: it takes another place among the others, so sums are grouped otherwise.
    rows = torch.arange(70, device=DEVICE) != 7
    for name in ("out", "d_query_score"):
        torch.testing.assert_close(dirty[name][1, rows], clean[name][1, rows], rtol=1e-5, atol=1e-5)
    if bad != bad:
        assert dirty["out"][1, 7].isnan().all() and dirty["d_value"][1].isnan().all()


@pytest.mark.parametrize("keys", [124, 1])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_key_score_touches_its_batch_item_only(bad, keys):
    tensors = operands((2, 70, keys, 5))
    clean = direct(*tensors)
    tensors[1][1, keys // 2] = bad
    tensors[0][1, 3] = -20.0
    dirty, truth = direct(*tensors), naive(*tensors)
    for name in NAMES:
        assert torch.equal(dirty[name][0], clean[name][0]), name
        assert torch.equal(dirty[name].isfinite(), truth[name].isfinite()), name
    if bad != bad:
        assert dirty["out"][1].isnan().all()


def test_several_bad_scores_stay_inside_and_in_their_batch_item():
    tensors = operands((2, 70, 124, 5))
    clean = direct(*tensors)
    for scores in tensors[:2]:
        scores[1, ::3] = float("nan")
        scores[1, 1::6] = float("inf")
        scores[1, 4::6] = float("-inf")
    dirty = direct(*tensors)
    assert dirty["out"][1].isnan().all()
    for name in NAMES:
        assert torch.equal(dirty[name][0], clean[name][0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_value_touches_the_rows_that_weigh_it_in_its_channel(bad):
    query_score, key_score, value, grad = operands((2, 70, 124, 5))
    key_score[1, 9] = 0.1
    clean = direct(query_score, key_score, value, grad)
    value[1, 9, 4] = bad
    dirty = direct(query_score, key_score, value, grad)
    weighed = torch.zeros(2, 70, 5, dtype=torch.bool, device=DEVICE)
    weighed[1, :, 4] = query_score[1] + key_score[1, 9] > 0
    assert weighed.any() and not weighed[1, :, 4].all()
    assert not dirty["out"][weighed].isfinite().any()
    assert torch.equal(dirty["out"][~weighed], clean["out"][~weighed])
    # The scores' gradients are over channels, and the value's is not its own.
    rows = weighed.any(2)
    assert torch.equal(dirty["d_query_score"][~rows], clean["d_query_score"][~rows])
    assert torch.equal(dirty["d_value"], clean["d_value"])


@pytest.mark.parametrize("sizes", [(0, 5, 4, 3), (2, 0, 4, 3), (2, 5, 0, 3)], ids=str)
def test_empty_operands_give_zeros(sizes):
    tensors = operands(sizes)
    got = direct(*tensors)
    shapes = [t.shape for t in (tensors[3], *tensors[:3])]
    assert [result.shape for result in got.values()] == shapes
    assert not any(result.any() for result in got.values())


@dtypes
@pytest.mark.parametrize("sizes", [(2, 300, 2000, 64), (3, 65, 64, 17)], ids=str)
def test_memory_is_what_the_docstring_says(sizes, dtype):
    batch, queries, keys, channels = sizes
    *inputs, grad = operands(sizes, dtype)
    steps = queries + keys
    with Peak(*inputs) as forward:
        out = kernels.forward(*inputs)
    with Peak(*inputs, grad) as backward:
        grads = kernels.backward(grad, *inputs)
    scores = batch * (20 * steps + 8 * -(-steps // 64) * channels)
    products = 4 * batch * max(queries, keys) * -(-channels // 64)
    assert forward.bytes - out.nbytes <= scores + 1024
    assert backward.bytes - sum(t.nbytes for t in grads) <= scores + products + 1024
