"""The concatenation's numbers: against the definition, and where definitions get delicate."""

import math

import pytest
import torch

from nlkernels import nonlocal_concat
from nlkernels.ops.concat import chunked
from tests.concat import BACKENDS, NAMES, operands, results, run
from tests.helpers import SHORT, assert_not_worse

pytestmark = pytest.mark.usefixtures("poison")

# On CPUs "auto" is "chunked".
backends = pytest.mark.parametrize(
    "backend", ["chunked", pytest.param("auto", marks=pytest.mark.gate)]
)
dtypes = pytest.mark.parametrize("dtype", list(SHORT), ids=list(SHORT.values()))

# B, N, M, V: 1, powers of two and their neighbours, squares (blocks of the sums that end evenly).
CASES = [
    (3, 17, 16, 1),
    (5, 63, 15, 80),
    (1, 1, 127, 16),
    (2, 65, 1, 3),
    (2, 64, 2, 5),
    (1, 1, 1, 1),
    (2, 2, 700, 24),
    pytest.param((2, 1037, 65, 16), marks=pytest.mark.gate),
    pytest.param((1, 127, 260, 40), marks=pytest.mark.gate),
    pytest.param((1, 49, 48, 512), marks=pytest.mark.gate),
]
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: "x".join(map(str, case)))


def assert_right(aggregate, tensors):
    """Hold output and gradients to the 2x/3x rule, beside the definition in the same dtype."""
    truth = results(run("reference"), *(t.double() for t in tensors))
    same = results(run("reference"), *tensors)
    got = results(aggregate, *tensors)
    for name in NAMES:
        factor = 2 if name == "out" else 3
        assert_not_worse(name, got[name], same[name], truth[name], factor)
    return got


@cases
def test_reference_equals_independent_formula(case, device):
    query_score, key_score, value, _ = operands(case, device=device)
    weights = (query_score[:, :, None] + key_score[:, None]).clamp(min=0) / case[2]
    expected = torch.einsum("bnm,bmv->bnv", weights, value)
    got = nonlocal_concat(query_score, key_score, value, backend="reference")
    assert (got - expected).abs().max() <= 1e-12 * expected.abs().max()


@dtypes
@cases
@backends
def test_not_worse_than_pytorch(backend, case, dtype, device):
    got = assert_right(run(backend), operands(case, dtype, device))
    assert all(t.is_contiguous() for t in got.values())


@pytest.mark.parametrize("shift", [0.0, 100.0, -100.0, 1000.0, -1000.0])
@backends
def test_error_is_below_the_definitions_however_far_the_scores_lie_from_zero(
    backend, shift, device
):
    query_score, key_score, value, grad = operands((2, 900, 500, 64), torch.float32, device)
    tensors = (query_score + shift, key_score - shift, value, grad)
    truth = results(run("reference"), *(t.double() for t in tensors))
    same = results(run("reference"), *tensors)
    for name, got in results(run(backend), *tensors).items():
        error, allowed = ((t.double() - truth[name]).norm() for t in (got, same[name]))
        assert error <= allowed, name


@dtypes
@pytest.mark.parametrize("step", [0.5, 4.0, math.inf], ids=["many", "most", "all"])
@backends
def test_equal_scores_and_sums_of_exactly_zero(backend, step, dtype, device):
    query_score, key_score, value, grad = operands((2, 150, 90, 8), dtype, device)
    if step == math.inf:
        query_score, key_score = torch.ones_like(query_score), -torch.ones_like(key_score)
        key_score[1] = 2
    else:
        query_score, key_score = ((t / step).round() * step for t in (query_score, key_score))
    assert (query_score[:, :, None] == -key_score[:, None]).any()
    got = assert_right(run(backend), (query_score, key_score, value, grad))
    if step == math.inf:
        assert all(not got[name][0].any() for name in NAMES)


@pytest.mark.parametrize("constant", ["query_score", "key_score"])
@backends
def test_constant_rows(backend, constant, device):
    tensors = operands((2, 1500, 300, 8), torch.float32, device)
    tensors[constant == "key_score"].fill_(0.25)
    assert_right(run(backend), tensors)


def extreme(name, dtype, device):
    query_score, key_score, value, grad = operands((1, 130, 70, 16), dtype, device)
    largest = 6e4 if dtype == torch.float16 else 1e30
    if name == "large":
        query_score, key_score = query_score.sign() * largest, key_score.sign() * largest
        value = value / largest
    elif name == "one_huge_score":
        query_score[0, 3], key_score[0, 5] = largest, -largest
        value = value / largest
    elif name == "denormal":
        tiny = torch.finfo(dtype).tiny / 4
        query_score, key_score = query_score.sign() * tiny, key_score.sign() * tiny
    elif name == "large_values":
        value = value.sign() * 1e4
    return [query_score, key_score, value, grad]


@dtypes
@pytest.mark.parametrize("name", ["large", "one_huge_score", "denormal", "large_values"])
@backends
def test_extreme_values_stay_finite_and_right(backend, name, dtype, device):
    tensors = extreme(name, dtype, device)
    truth = results(run("reference"), *(t.double() for t in tensors))
    wide = torch.promote_types(dtype, torch.float32)
    same = results(run("reference"), *(t.to(wide) for t in tensors))
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    for key, got in results(run(backend), *tensors).items():
        if name == "denormal" and key in ("out", "d_value"):
            assert (got.double() - truth[key]).abs().max() <= 8 * smallest
            continue
        keep = truth[key].abs() <= torch.finfo(dtype).max
        assert got[keep].isfinite().all(), f"{key} is not finite"
        rounded = same[key].to(dtype)
        assert_not_worse(key, got[keep], rounded[keep], truth[key][keep], 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("size", [1e37, 1e-37])
@pytest.mark.parametrize("name", ["value", "grad"])
@pytest.mark.parametrize("case", [(2, 300, 300, 4), (1, 900, 20, 4), (1, 20, 900, 4)], ids=str)
def test_sums_of_huge_and_tiny_numbers_are_right(case, name, size, dtype, device):
    query_score, key_score, value, grad = operands(case, device=device)
    # Means of both are of their size, sums of all are infinite in float32.
    large, other = (t.abs().clamp(0.5, 1.5) for t in (value, grad))
    if name == "value":
        value, grad = large * size, other
    else:
        value, grad = large, other * size
    scores = (t.sigmoid() * 1e-2 for t in (query_score, key_score))
    tensors = [t.to(dtype) for t in (*scores, value, grad)]
    truth = results(run("reference"), *(t.double() for t in tensors))
    for key, got in results(run("chunked"), *tensors).items():
        fits = truth[key].abs() <= torch.finfo(dtype).max
        assert got[~fits].isinf().all(), key
        # Every term below the normal numbers is rounded to one step of them.
        step = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
        allowed = (8 * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps) * truth[key].abs()
        allowed += max(case) * step
        assert ((got.double() - truth[key]).abs() <= allowed)[fits].all(), key


def test_a_bad_number_and_a_huge_one_change_no_other_item(device):
    query_score, key_score, value, grad = operands((3, 200, 40, 8), torch.float32, device)
    clean = results(run("chunked"), query_score, key_score, value, grad)
    value[0, 3], grad[1, 5] = 3e38, math.nan
    dirty = results(run("chunked"), query_score, key_score, value, grad)
    assert all(torch.equal(dirty[name][2], clean[name][2]) for name in NAMES)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("case", [(0, 5, 4, 2), (2, 0, 4, 2), (2, 5, 0, 2)], ids=str)
def test_empty_operands_give_empty_results_and_no_keys_give_zeros(backend, case, device):
    got = results(run(backend), *operands(case, device=device))
    batch, queries, keys, depth = case
    assert got["out"].shape == (batch, queries, depth)
    assert got["d_value"].shape == (batch, keys, depth)
    assert all(not t.any() for t in got.values())


def moved(tensor, how):
    """The same numbers in other memory."""
    if how == "transposed":
        return tensor.movedim(-1, 0).contiguous().movedim(0, -1)
    around = tensor.new_full([2 * size + 1 for size in tensor.shape], math.nan)
    place = around[tuple(slice(1, None, 2) for _ in tensor.shape)]
    return place.copy_(tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("how", ["transposed", "sliced"])
@backends
def test_strides_do_not_matter(backend, how, dtype, device):
    tensors = operands((2, 70, 33, 12), dtype, device)
    expected = results(run(backend), *tensors)
    got = results(run(backend), *(moved(t, how) for t in tensors))
    assert all(torch.equal(got[name], expected[name]) for name in NAMES)
    assert got["out"].is_contiguous()


@backends
def test_expanded_operands(backend, device):
    query_score, key_score, value, grad = operands((1, 20, 9, 4), device=device)
    tensors = [t.expand(3, *t.shape[1:]) for t in (query_score, key_score, value)]
    got = assert_right(run(backend), [*tensors, grad.new_ones(()).expand(3, 20, 4)])
    assert torch.equal(got["out"][0], got["out"][2])
    column = query_score[:, :1]
    assert_right(
        run(backend), [column.expand(1, 20), key_score, value[..., :1].expand(1, 9, 4), grad]
    )


@backends
def test_keys_may_be_permuted_and_batches_split(backend, device):
    query_score, key_score, value, _ = operands((4, 30, 24, 8), torch.float32, device)
    plain = run(backend)(query_score, key_score, value)
    order = torch.randperm(24)
    permuted = run(backend)(query_score, key_score[:, order], value[:, order])
    torch.testing.assert_close(permuted, plain, rtol=1e-5, atol=1e-6)
    for item in range(4):
        alone = run(backend)(*(t[item : item + 1] for t in (query_score, key_score, value)))
        assert torch.equal(alone[0], plain[item])


@backends
def test_values_are_additive_and_scores_scale(backend, device):
    query_score, key_score, value, _ = operands((2, 30, 20, 8), device=device)
    out = run(backend)(query_score, key_score, value)
    other = run(backend)(query_score, key_score, value.flip(1))
    both = run(backend)(query_score, key_score, value + 2 * value.flip(1))
    torch.testing.assert_close(both, out + 2 * other, rtol=1e-11, atol=1e-12)
    scaled = run(backend)(3 * query_score, 3 * key_score, value)
    torch.testing.assert_close(scaled, 3 * out, rtol=1e-11, atol=1e-12)


BAD = [math.nan, math.inf, -math.inf]


def spoiled(backend, position, index, bad, device):
    """Results without and with one bad number in an operand."""
    tensors = operands((2, 200, 40, 8), torch.float32, device)
    clean = results(run(backend), *tensors)
    tensors[position][index] = bad
    return clean, results(run(backend), *tensors), tensors


@pytest.mark.parametrize("bad", BAD)
@backends
def test_a_bad_query_score_touches_its_own_row_only(backend, bad, device):
    clean, dirty, _ = spoiled(backend, 0, (1, 7), bad, device)
    others = torch.arange(200, device=device) != 7
    assert torch.equal(dirty["out"][0], clean["out"][0])
    assert torch.equal(dirty["out"][1, others], clean["out"][1, others])
    assert torch.equal(dirty["d_query_score"][0], clean["d_query_score"][0])
    assert torch.equal(dirty["d_query_score"][1, others], clean["d_query_score"][1, others])
    assert torch.equal(dirty["d_value"][0], clean["d_value"][0])
    if bad == -math.inf:
        assert not dirty["out"][1, 7].any() and not dirty["d_query_score"][1, 7]
        assert dirty["d_value"].isfinite().all()
    else:
        assert not dirty["out"][1, 7].isfinite().any()
        assert not dirty["d_value"][1].isfinite().any()


@pytest.mark.parametrize("bad", BAD)
@backends
def test_a_bad_key_score_stays_in_its_batch_item(backend, bad, device):
    clean, dirty, _ = spoiled(backend, 1, (1, 7), bad, device)
    others = torch.arange(40, device=device) != 7
    assert all(torch.equal(dirty[name][0], clean[name][0]) for name in NAMES)
    torch.testing.assert_close(dirty["d_value"][1, others], clean["d_value"][1, others])
    if bad == -math.inf:
        assert all(dirty[name].isfinite().all() for name in NAMES)
        assert not dirty["d_value"][1, 7].any() and not dirty["d_key_score"][1, 7]
    else:
        assert not dirty["out"][1].isfinite().any()
        assert not dirty["d_value"][1, 7].isfinite().any()


@pytest.mark.parametrize("bad", BAD)
@backends
def test_a_bad_value_touches_the_queries_that_see_it_only(backend, bad, device):
    clean, dirty, tensors = spoiled(backend, 2, (1, 7), bad, device)
    sees = torch.zeros(2, 200, dtype=torch.bool, device=device)
    sees[1] = tensors[0][1] + tensors[1][1, 7] > 0
    assert sees[1].any() and not sees[1].all()
    for name in ("out", "d_query_score"):
        assert torch.equal(dirty[name][~sees], clean[name][~sees])
        assert not dirty[name][sees].isfinite().any()
    assert torch.equal(dirty["d_value"], clean["d_value"])


@pytest.mark.parametrize("bad", BAD)
@backends
def test_a_bad_gradient_touches_the_keys_that_see_it_only(backend, bad, device):
    clean, dirty, tensors = spoiled(backend, 3, (1, 7), bad, device)
    sees = torch.zeros(2, 40, dtype=torch.bool, device=device)
    sees[1] = tensors[0][1, 7] + tensors[1][1] > 0
    assert sees[1].any() and not sees[1].all()
    for name in ("d_key_score", "d_value"):
        assert torch.equal(dirty[name][~sees], clean[name][~sees])
        assert not dirty[name][sees].isfinite().any()


@pytest.mark.parametrize("query", [*BAD, 0.5])
@pytest.mark.parametrize("key", [*BAD, 0.5])
@backends
def test_what_is_not_finite_in_the_definition_is_not_finite(backend, query, key, device):
    query_score, key_score, value, grad = operands((1, 9, 7, 3), torch.float32, device)
    query_score[0, ::4], key_score[0, ::3] = query, key
    tensors = (query_score, key_score, value, grad)
    expected = results(run("reference"), *tensors)
    got = results(run(backend), *tensors)
    for name in ("out", "d_value"):
        assert torch.equal(got[name].isfinite(), expected[name].isfinite()), name


@pytest.mark.usefixtures("repeatable")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@backends
def test_repeats_are_bitwise_equal(backend, dtype, device):
    tensors = operands((3, 700, 130, 32), dtype, device)
    first = results(run(backend), *tensors)
    for _ in range(20):
        again = results(run(backend), *tensors)
        assert all(torch.equal(again[name], first[name]) for name in NAMES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_tiles_and_groups_change_nothing_but_rounding(dtype, monkeypatch, device):
    tensors = operands((3, 200, 90, 12), dtype, device)
    monkeypatch.setattr(chunked, "TILE", 100)
    monkeypatch.setattr(chunked, "GROUP", 3)
    assert_right(run("chunked"), tensors)
