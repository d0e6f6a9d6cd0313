"""Numbers of the C++ attention kernels: every order of products, dtype, size and layout."""

import math
import mmap

import pytest
import torch

from nlkernels import nonlocal_attention
from nlkernels.ops import _cpp
from tests.helpers import KINDS, Case, assert_not_worse, operands, results
from tests.ops import staged
from tests.ops.cpp_attention import (
    WAYS,
    assert_equal,
    dtypes,
    judge,
    made,
    naive,
    needs_compiler,
    parameters,
    run,
    scale_of,
    threads,
    truth,
    ways,
)

pytestmark = [needs_compiler, pytest.mark.usefixtures("poison")]

kinds = pytest.mark.parametrize("kind", KINDS)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
EXACT = {"rtol": 1e-11, "atol": 1e-13}


def attention(kind, **options):
    return lambda *qkv: nonlocal_attention(*qkv, kind=kind, backend="cpp", **options)


@pytest.mark.parametrize("case", [Case(2, 9, 7, 5, 3), Case(1, 2, 3, 9, 8)], ids=str)
@kinds
def test_gradcheck(kind, case):
    # Of dot_product, the first case takes the linear order and the second the other.
    inputs = operands(case, requires_grad=True)[:3]
    assert torch.autograd.gradcheck(attention(kind, scale=0.7), inputs, nondet_tol=0)
    assert torch.autograd.gradgradcheck(attention(kind, scale=0.7), inputs, nondet_tol=0)


@pytest.mark.parametrize(("way", "case", "dtype"), parameters())
def test_not_worse_than_pytorch(way, case, dtype):
    tensors, scale = made(case, dtype), scale_of(way, case.depth)
    judge(run(way, tensors, scale), way, tensors, scale)


# Blocks of 12 or 6 rows of which the last has few, superblocks of some blocks, many items at a
# time, keys that leave tails of vectors, and rows of scores that fill a cache by themselves.
SHAPES = [
    Case(1, 1, 1, 1, 1),
    Case(500, 3, 5, 7, 6),
    Case(70, 1, 33, 3, 18),
    Case(33, 40, 1, 5, 4),
    Case(3, 397, 49, 9, 20),
    Case(2, 1000, 31, 6, 7),
    Case(1, 7, 9000, 5, 3),
    Case(1, 3, 100_001, 2, 1),
    Case(1, 5003, 2, 3, 2),
]


@pytest.mark.parametrize("case", SHAPES, ids=str)
@ways
def test_cutting_into_blocks_changes_nothing_but_rounding(way, case):
    tensors = made(case, torch.float64)
    exact = naive(way, tensors, 0.3)
    for workspace_mib in (None, 0, 0.2, 1e9):
        got = run(way, tensors, 0.3, workspace_mib)
        for name, value in exact.items():
            torch.testing.assert_close(got[name], value, **EXACT)


@pytest.mark.parametrize("case", [Case(1, 12544, 48, 16, 16), Case(1, 48, 12544, 16, 16)], ids=str)
@ways
def test_sums_of_thousands_are_not_worse_than_pytorch(way, case):
    tensors, scale = made(case, torch.float32), scale_of(way, case.depth)
    judge(run(way, tensors, scale), way, tensors, scale)


@pytest.mark.parametrize("case", SHAPES, ids=str)
@ways
def test_bfloat16_of_every_cut(way, case):
    tensors = made(case, torch.bfloat16)
    got, exact = run(way, tensors, 0.3), truth(way, tensors, 0.3)
    for name, value in exact.items():
        largest = value.abs().max().item()
        torch.testing.assert_close(got[name].double(), value, rtol=0.03, atol=0.03 * largest)


@pytest.mark.parametrize(("batch", "queries"), [(0, 5), (2, 0)])
@kinds
def test_empty_operands_give_empty_results(kind, batch, queries):
    got = results(attention(kind), operands(Case(batch, queries, 4, 3, 2)))
    assert got["out"].shape == (batch, queries, 2)
    assert all(not got[name].any() for name in ("d_query", "d_key", "d_value"))


def test_no_keys_are_zeros_and_refused_by_softmax():
    query, key, value, grad = operands(Case(2, 5, 0, 3, 2))
    for kind in ("dot_product", "relu"):
        got = results(attention(kind), [query, key, value, grad])
        assert got["out"].shape == (2, 5, 2) and not got["out"].any() and not got["d_query"].any()
    with pytest.raises(ValueError, match="at least one key"):
        attention("softmax")(query, key, value)


@dtypes
@ways
@pytest.mark.parametrize(
    "case",
    [Case(1, 200, 196, 2048, 16), Case(1, 200, 196, 16, 2048), Case(1, 75, 2048, 24, 20)],
    ids=str,
)
def test_rows_that_would_lie_whole_ways_of_a_cache_apart(case, way, dtype):
    tensors, scale = made(case, dtype), scale_of(way, case.depth)
    judge(run(way, tensors, scale), way, tensors, scale)


@dtypes
@pytest.mark.parametrize("layout", staged.LAYOUTS)
@ways
def test_strides_change_no_bit(way, layout, dtype):
    tensors = made(Case(2, 50, 33, 40, 24), dtype)
    moved = [staged.LAYOUTS[layout](t) for t in tensors]
    expected, got = run(way, tensors, 0.3), run(way, moved, 0.3)
    assert_equal(got, expected)
    assert got["out"].is_contiguous()
    for name, tensor in zip(staged.NAMES[1:], moved, strict=False):
        assert got[name].stride() == torch.empty_like(tensor).stride(), name


@ways
def test_expanded_negated_and_shared_operands(way):
    query, key, value, _ = made(Case(1, 20, 9, 4, 4), torch.float64)
    shared = [query.expand(3, -1, -1), key.expand(3, -1, -1), value[:, :1].expand(3, 9, -1)]
    tensors = [*shared, torch.ones((), dtype=torch.float64).expand(3, 20, 4)]
    for name, expected in naive(way, tensors, 0.4).items():
        torch.testing.assert_close(run(way, tensors, 0.4)[name], expected, **EXACT)


@kinds
def test_a_view_that_negates_and_one_operand_for_all(kind):
    # Tensors with the negative bit hold the numbers with the other sign.
    query, key, value, grad = made(Case(2, 9, 9, 6, 6), torch.float64)
    negated = torch.complex(value, key).conj().imag
    assert negated.is_neg()
    tensors = [query, negated, value, grad]
    expected = results(attention(kind), [query, -key, value, grad])
    got = results(attention(kind), tensors)
    assert_equal(got, expected)
    same = attention(kind)(query, query, query)
    torch.testing.assert_close(
        same, nonlocal_attention(query, query, query, kind=kind, backend="reference"), **EXACT
    )


@ways
def test_offsets_beyond_32_bits(way):
    far, no_reserve = 2**31 + 1000, 0x4000  # Linux's; mmap names it since Python 3.13
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    memory = mmap.mmap(-1, 2 * (far + 4096), flags=flags)  # untouched pages take no memory
    buffer = torch.frombuffer(memory, dtype=torch.bfloat16)
    tensors = made(Case(2, 2, 3, 4, 2), torch.bfloat16)
    places = [(16, far, 1), (far, 5, 1), (200, 10, far), (50, 7, far)]
    moved = [
        buffer.as_strided(t.shape, strides, 500 * i).copy_(t)
        for i, (t, strides) in enumerate(zip(tensors, places, strict=True))
    ]
    assert_equal(run(way, moved, 0.5), run(way, tensors, 0.5))


@dtypes
@pytest.mark.parametrize("scale", [0.0, -0.7, 2.5])
@ways
def test_scales(way, scale, dtype):
    tensors = made(Case(2, 60, 31, 16, 16), dtype)
    got = run(way, tensors, scale)
    judge(got, way, tensors, scale)
    if scale == 0:
        assert not got["d_query"].any() and not got["d_key"].any()


def extreme(name, dtype):
    query, key, value, grad = made(Case(1, 60, 41, 32, 33), dtype)
    if name == "large":
        query, key = query.sign() * 1e4, key.sign() * 1e4
    elif name == "equal_rows":
        query, key = torch.ones_like(query), torch.ones_like(key)
    elif name == "one_huge_logit":
        query, key = query.clone(), key.clone()
        query[0, 3], key[0, 5] = 50.0, 50.0
    elif name == "subnormal":
        tiny = torch.finfo(dtype).tiny / 4
        query, value = query.sign() * tiny, value.sign() * tiny
    elif name == "large_values":
        value = value.sign() * 1e4
    return [query, key, value, grad]


EXTREMES = ["large", "equal_rows", "one_huge_logit", "subnormal", "large_values"]


@dtypes
@pytest.mark.parametrize("name", EXTREMES)
@ways
def test_extreme_values_stay_finite_and_right(way, name, dtype):
    tensors, scale = extreme(name, dtype), scale_of(way, 32)
    exact = truth(way, tensors, scale)
    wide = torch.float32 if dtype == torch.float16 else dtype
    same = naive(way, [t.to(wide) for t in tensors], scale)
    got = run(way, tensors, scale)
    for key, value in exact.items():
        overflows = value.abs() > torch.finfo(dtype).max
        assert bool((got[key].isfinite() | overflows).all()), f"{key} is not finite"
        if name == "large" and key != "out":
            continue  # saturated: gradients below every resolution
        if name == "equal_rows" and way == "linear":
            # PyTorch's scores are exact here.
            close = 1e-2 if dtype == torch.bfloat16 else 2e-3
            torch.testing.assert_close(got[key], value.to(dtype), rtol=close, atol=close)
            continue
        if name == "subnormal" and dtype == torch.bfloat16:
            # Zeros for AVX512_BF16: an error of as much as the operands are.
            largest = (value.abs().max() + torch.finfo(dtype).tiny) * 1.02
            assert bool((got[key].abs() <= largest).all())
            continue
        keep = ~overflows
        assert_not_worse(
            key, got[key][keep], same[key].to(dtype)[keep], value[keep], 2 if key == "out" else 3
        )


@dtypes
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@ways
def test_infinite_scores_are_those_of_the_definition(way, bad, dtype):
    # All numbers positive: no infinities of both signs meet where the definition has them once.
    tensors = [t.abs() + 0.1 for t in made(Case(1, 7, 35, 3, 5), dtype)]
    for operand, place in ((0, (0, 4, 1)), (1, (0, 34, 2)), (2, (0, 9, 0)), (3, (0, 5, 2))):
        dirty = [t.clone() for t in tensors]
        dirty[operand][place] = bad
        got, exact = run(way, dirty, 0.5), truth(way, dirty, 0.5)
        for name, value in exact.items():
            assert torch.equal(got[name].isnan(), value.isnan()), (operand, name)
            assert torch.equal(got[name].isposinf(), value.isposinf()), (operand, name)
            assert torch.equal(got[name].isneginf(), value.isneginf()), (operand, name)


@dtypes
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("operand", range(4), ids=["query", "key", "value", "grad"])
@ways
def test_a_bad_row_reaches_exactly_what_depends_on_it(way, operand, bad, dtype):
    tensors = made(Case(3, 45, 39, 17, 21), dtype)
    clean = run(way, tensors, 0.3)
    tensors[operand][1, 36] = bad
    dirty, exact = run(way, tensors, 0.3), truth(way, tensors, 0.3)
    for name, value in exact.items():
        good = value.isfinite()
        assert torch.equal(dirty[name].isfinite(), good), name
        assert torch.equal(dirty[name][::2], clean[name][::2]), name
        if not (way == "relu" and operand < 2):  # there an infinity may decide a score's sign
            assert torch.equal(dirty[name][good], clean[name][good]), name


def test_relu_has_no_slope_at_zero_and_lets_nan_pass():
    query, key, value, grad = (t.abs() for t in made(Case(1, 6, 5, 4, 3), torch.float64))
    query[0, 1], query[0, 2], query[0, 3] = 0.0, -1.0, math.nan
    got = run("relu", [query, key, value, grad], 1.0)
    assert not got["out"][0, 1:3].any() and not got["d_query"][0, 1:3].any()
    assert got["out"][0, 3].isnan().all() and got["d_query"][0, 3].all()
    assert got["out"][0, 4:].isfinite().all() and got["d_query"][0, 4:].all()


@ways
def test_invariances(way):
    query, key, value, grad = made(Case(4, 30, 24, 8, 9), torch.float32)
    plain = run(way, [query, key, value, grad], 0.4)
    order = torch.randperm(24)
    moved = run(way, [query, key[:, order], value[:, order], grad], 0.4)
    parts = [run(way, [t[i : i + 1] for t in (query, key, value, grad)], 0.4) for i in range(4)]
    tripled = run(way, [query, key, 3 * value, grad], 0.4)
    torch.testing.assert_close(moved["out"], plain["out"], **CLOSE)
    torch.testing.assert_close(moved["d_value"], plain["d_value"][:, order], **CLOSE)
    assert_equal({n: torch.cat([part[n] for part in parts]) for n in plain}, plain)
    torch.testing.assert_close(tripled["out"], 3 * plain["out"], **CLOSE)
    if way == "softmax":
        shifted = run(way, [query, key + torch.randn(4, 1, 8), value, grad], 0.4)
        for name in ("out", "d_query", "d_value"):
            torch.testing.assert_close(shifted[name], plain[name], **CLOSE)


@dtypes
@pytest.mark.parametrize("case", [Case(3, 400, 70, 33, 50), Case(40, 30, 20, 16, 8)], ids=str)
@ways
def test_repeats_threads_and_workspaces_change_no_bit(way, case, dtype):
    tensors = made(case, dtype)
    first = run(way, tensors, 0.3)
    for count, workspace_mib in (
        (1, 0),
        (2, 0),
        (3, 0.3),
        (3, None),
        (5, None),
        (1, None),
        (2, 0.3),
        (2, 1e9),
    ):
        with threads(count):
            assert_equal(run(way, tensors, 0.3, workspace_mib), first)
    for _ in range(13):
        assert_equal(run(way, tensors, 0.3), first)


@pytest.mark.parametrize("scale", [0.7, -0.7, 0.0])
@dtypes
def test_statistics_are_those_of_other_backends(dtype, scale):
    query, key, value, grad = made(Case(2, 40, 30, 16, 16), dtype)
    _, stats = _cpp.forward(_cpp.SOFTMAX, query, key, value, scale, None)
    assert stats.dtype == torch.promote_types(dtype, torch.float32)
    top, total = stats.double()
    exact = torch.logsumexp(query.double() @ key.double().mT * scale, -1)
    torch.testing.assert_close(scale * top + total.log(), exact, rtol=0, atol=1e-5)
    arguments = (query, key, value, scale)
    out, stats = torch.ops.nlkernels.softmax_forward(*arguments, "cpp", None)
    operators = (grad, query, key, value, out, stats, scale)
    grads = torch.ops.nlkernels.softmax_backward(*operators, "chunked", None)
    judge(dict(zip(staged.NAMES[1:], grads, strict=True)), "softmax", [*arguments[:3], grad], scale)


def test_every_way_is_here():
    assert [way.affinity for way in WAYS.values()] == list(range(4))
