"""Numbers of every kind and backend: against the definition, and where definitions get delicate."""

import math

import pytest
import torch

from nlkernels import nonlocal_attention
from nlkernels.ops._tiles import staged_tiles, tiles
from tests.helpers import KINDS, SERVED, SHORT, Case, assert_not_worse, operands, results

pytestmark = pytest.mark.usefixtures("poison")

pairs = pytest.mark.parametrize(("kind", "backend"), SERVED, ids=[f"{k}-{b}" for k, b in SERVED])
dtypes = pytest.mark.parametrize("dtype", list(SHORT), ids=list(SHORT.values()))

CASES = [
    Case(2, 1037, 65, 16, 16),
    Case(1, 127, 260, 40, 40),
    Case(3, 17, 16, 1, 1),
    Case(5, 63, 15, 80, 80),
    Case(1, 1, 127, 16, 16),
    Case(2, 65, 1, 3, 3),
    Case(1, 49, 49, 512, 512),
    Case(2, 130, 70, 64, 24),
    Case(1, 98, 49, 128, 256),
    Case(2, 33, 700, 5, 3),
]


def attention(kind, backend, **options):
    return lambda *qkv: nonlocal_attention(*qkv, kind=kind, backend=backend, **options)


@pytest.mark.parametrize("scale", [None, 0.0, -0.7, 2.5])
@pytest.mark.parametrize("kind", KINDS)
def test_reference_equals_independent_formula(kind, scale, device):
    query, key, value, _ = operands(Case(2, 9, 7, 5, 3), device=device)
    factor = (5**-0.5 if kind == "softmax" else 1.0) if scale is None else scale
    scores = torch.einsum("bnd,bmd->bnm", query, key) * factor
    if kind == "dot_product":
        weights = scores / 7
    elif kind == "relu":
        weights = torch.where(scores > 0, scores, 0) / 7
    else:
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    expected = torch.einsum("bnm,bmv->bnv", weights, value)
    got = nonlocal_attention(query, key, value, kind=kind, scale=scale, backend="reference")
    assert (got - expected).abs().max() <= 1e-12 * expected.abs().max()


@dtypes
@pytest.mark.parametrize("case", CASES, ids=str)
@pairs
def test_not_worse_than_pytorch(kind, backend, case, dtype, device):
    tensors = operands(case, dtype, device)
    truth = results(attention(kind, "reference"), [t.double() for t in tensors])
    same_dtype = results(attention(kind, "reference"), tensors)
    got = results(attention(kind, backend), tensors)
    for name in truth:
        factor = 2 if name == "out" else 3
        assert_not_worse(name, got[name], same_dtype[name], truth[name], factor)


@pairs
@pytest.mark.parametrize("workspace_mib", [0, 0.05, 1])
def test_tiling_changes_nothing_but_rounding(kind, backend, workspace_mib, device):
    tensors = operands(Case(3, 200, 333, 12, 16), device=device)
    expected = results(attention(kind, "reference"), tensors)
    got = results(attention(kind, backend, workspace_mib=workspace_mib), tensors)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    ("batch", "rows", "columns", "scores", "multiple"),
    [
        (1, 1, 1, 0, 1),
        (7, 100, 3, 650, 1),
        (3, 1000, 10, 2000, 1),
        (2, 17, 5, 0, 1),
        (0, 4, 4, 9, 1),
        (4, 0, 4, 9, 1),
        (2, 1000, 10, 3000, 128),
        (2, 1000, 10, 500, 128),
        (2, 300, 10, 3000, 128),
    ],
)
def test_tiles_cover_every_row_once_within_the_budget(batch, rows, columns, scores, multiple):
    seen = torch.zeros(batch, rows, dtype=torch.int)
    order = []
    for items, part in tiles(batch, rows, columns, scores, multiple):
        seen[items, part] += 1
        order.append((items.start, part.start))
        size = (items.stop - items.start) * (part.stop - part.start) * columns
        assert size <= max(scores, 16 * columns)
        if 128 <= multiple < scores // columns < rows:
            assert part.start % multiple == 0
    assert bool((seen == 1).all()) and order == sorted(order)


@pytest.mark.parametrize("workspace_mib", [0, 0.1, 7, 40, 400, None])
@pytest.mark.parametrize(
    ("batch", "rows", "columns"), [(8, 784, 196), (8, 12544, 3136), (1, 1, 1), (3, 5000, 7)]
)
def test_workspace_of_the_staged_kernels_is_capped(batch, rows, columns, workspace_mib):
    cap = 2**20 * (40 if workspace_mib is None else workspace_mib)
    wide = columns + -columns % 8
    for itemsize, bytes_per_score in ((2, 2), (2, 4), (4, 8)):
        limit = max(128 * batch * wide * bytes_per_score, batch * rows * wide * itemsize // 8)
        limit = max(min(cap, limit), 16 * wide * bytes_per_score)
        for items, part in staged_tiles(
            batch, rows, columns, bytes_per_score, itemsize, workspace_mib
        ):
            scores = (items.stop - items.start) * (part.stop - part.start) * wide
            assert scores * bytes_per_score <= limit


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["reference", "chunked", "auto"])
@pytest.mark.parametrize(("batch", "queries"), [(0, 5), (2, 0)])
def test_empty_operands_give_empty_results(kind, backend, batch, queries, device):
    tensors = operands(Case(batch, queries, 4, 3, 2), device=device)
    got = results(attention(kind, backend), tensors)
    assert got["out"].shape == (batch, queries, 2)
    assert all(not got[name].any() for name in ("d_query", "d_key", "d_value"))


@pytest.mark.parametrize("backend", ["reference", "chunked", "auto"])
def test_no_keys_are_zeros_and_refused_by_softmax(backend, device):
    query, key, value, grad = operands(Case(2, 5, 0, 3, 2), device=device)
    for kind in ("dot_product", "relu"):
        got = results(attention(kind, backend), [query, key, value, grad])
        assert got["out"].shape == (2, 5, 2) and not got["out"].any() and not got["d_query"].any()
    with pytest.raises(ValueError, match="at least one key"):
        nonlocal_attention(query, key, value, backend=backend)


def layouts(tensor):
    """The same numbers in other memory: channel-first, sliced, offset, expanded over the batch."""
    batch, rows, depth = tensor.shape
    sliced = tensor.new_zeros(batch, 2 * rows, depth + 3)
    sliced[:, ::2, 1 : depth + 1] = tensor
    offset = tensor.new_zeros(tensor.numel() + 1)[1:].view_as(tensor).copy_(tensor)
    return {
        "channel_first": tensor.mT.contiguous().mT,
        "sliced": sliced[:, ::2, 1 : depth + 1],
        "offset": offset,
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["fp64", "bf16"])
@pytest.mark.parametrize("layout", ["channel_first", "sliced", "offset"])
@pytest.mark.parametrize("case", [Case(2, 70, 33, 8, 12), Case(2, 9, 33, 16, 12)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_strides_do_not_matter(kind, case, layout, dtype, device):
    tensors = operands(case, dtype, device)
    moved = [layouts(t)[layout] for t in tensors]
    expected = results(attention(kind, "chunked"), tensors)
    got = results(attention(kind, "chunked"), moved)
    same = results(attention(kind, "reference"), tensors)
    truth = results(attention(kind, "reference"), [t.double() for t in tensors])
    for name in expected:
        assert_not_worse(name, got[name], same[name], truth[name], 2 if name == "out" else 3)
    assert got["out"].is_contiguous()


@pytest.mark.parametrize("kind", KINDS)
def test_expanded_operands_and_gradients(kind, device):
    query, key, value, _ = operands(Case(1, 20, 9, 4, 4), device=device)
    tensors = [t.expand(3, -1, -1) for t in (query, key, value)]
    grad = torch.ones((), dtype=torch.float64, device=device).expand(3, 20, 4)
    expected = results(attention(kind, "reference"), [*tensors, grad])
    got = results(attention(kind, "chunked"), [*tensors, grad])
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-11, atol=1e-13)


def extreme(name, dtype, device):
    query, key, value, grad = operands(Case(1, 24, 40, 32, 32), dtype, device)
    if name == "large":
        query, key = query.sign() * 1e4, key.sign() * 1e4
    elif name == "equal_rows":
        query, key = torch.ones_like(query), torch.ones_like(key)
    elif name == "one_huge_logit":
        query, key = query.clone(), key.clone()
        query[0, 3], key[0, 5] = 50.0, 50.0
    elif name == "denormal":
        tiny = torch.finfo(dtype).tiny / 4
        query, value = query.sign() * tiny, value.sign() * tiny
    elif name == "large_values":
        value = value.sign() * 1e4
    return [query, key, value, grad]


@dtypes
@pytest.mark.parametrize(
    "name", ["large", "equal_rows", "one_huge_logit", "denormal", "large_values"]
)
@pairs
def test_extreme_values_stay_finite_and_right(kind, backend, name, dtype, device):
    tensors = extreme(name, dtype, device)
    truth = results(attention(kind, "reference"), [t.double() for t in tensors])
    wide = torch.float32 if dtype == torch.float16 else dtype
    same = results(attention(kind, "reference"), [t.to(wide) for t in tensors])
    got = results(attention(kind, backend), tensors)
    for key, value in truth.items():
        overflows = value.abs() > torch.finfo(dtype).max
        assert bool((got[key].isfinite() | overflows).all()), f"{key} is not finite"
        if name == "large" and (key != "out" or backend == "auto"):
            continue  # saturated: gradients below every resolution; auto may run torch's kernel
        keep = ~overflows
        assert_not_worse(
            key, got[key][keep], same[key].to(dtype)[keep], value[keep], 2 if key == "out" else 3
        )


@pytest.mark.parametrize("backend", ["chunked", "auto"])
@pytest.mark.parametrize("kind", ["softmax", "gaussian"])
def test_softmax_is_invariant_to_a_shift_of_the_scores(kind, backend, device):
    query, key, value, _ = operands(Case(2, 30, 20, 8, 8), torch.float32, device)
    shift = key + torch.randn(2, 1, 8, device=device)
    plain = nonlocal_attention(query, key, value, kind=kind, backend=backend)
    shifted = nonlocal_attention(query, shift, value, kind=kind, backend=backend)
    assert torch.allclose(plain, shifted, atol=2e-5)


@pairs
def test_keys_may_be_permuted_and_batches_split(kind, backend, device):
    query, key, value, _ = operands(Case(4, 30, 24, 8, 8), torch.float32, device)
    run = attention(kind, backend)
    plain = run(query, key, value)
    order = torch.randperm(24)
    permuted = run(query, key[:, order], value[:, order])
    parts = torch.cat([run(*(t[i : i + 1] for t in (query, key, value))) for i in range(4)])
    assert torch.allclose(plain, permuted, atol=1e-5)
    assert torch.allclose(plain, parts, atol=1e-5)


@pairs
def test_values_are_additive(kind, backend, device):
    query, key, value, _ = operands(Case(2, 30, 20, 8, 8), torch.float32, device)
    run = attention(kind, backend)
    total = run(query, key, value) + run(query, key, 2 * value)
    assert torch.allclose(total, run(query, key, 3 * value), atol=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("queries", [300, 12], ids=["linear", "quadratic"])
@pairs
def test_bad_query_row_touches_its_own_row_only(kind, backend, queries, bad, device):
    tensors = operands(Case(2, queries, 40, 16, 16), torch.float32, device)
    clean = attention(kind, backend)(*tensors[:3])
    tensors[0][1, 7] = bad
    dirty = attention(kind, backend)(*tensors[:3])
    rows = torch.ones(2, queries, dtype=torch.bool)
    rows[1, 7] = False
    assert torch.equal(dirty[rows], clean[rows])
    assert dirty[1, 7].isnan().any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pairs
def test_bad_key_row_stays_in_its_batch_item(kind, backend, bad, device):
    tensors = operands(Case(2, 30, 40, 16, 16), torch.float32, device)
    clean = attention(kind, backend)(*tensors[:3])
    tensors[0][1] = tensors[0][1].abs()  # a product of minus infinity is rectified to zero
    tensors[1][1, 7] = bad
    dirty = attention(kind, backend)(*tensors[:3])
    assert torch.equal(dirty[0], clean[0]) and not dirty[1].isfinite().any()


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_relu_has_no_slope_at_zero_and_lets_nan_pass(backend, device):
    query, key, value, grad = (t.abs() for t in operands(Case(1, 6, 5, 4, 3), device=device))
    query[0, 1], query[0, 2], query[0, 3] = 0.0, -1.0, math.nan
    got = results(attention("relu", backend), [query, key, value, grad])
    assert not got["out"][0, 1:3].any() and not got["d_query"][0, 1:3].any()
    assert got["out"][0, 3].isnan().all() and got["d_query"][0, 3].all()
    assert got["out"][0, 4:].isfinite().all() and got["d_query"][0, 4:].all()


@pytest.mark.usefixtures("repeatable")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pairs
def test_repeats_are_bitwise_equal(kind, backend, dtype, device):
    tensors = operands(Case(3, 300, 70, 32, 32), dtype, device)
    run = attention(kind, backend, workspace_mib=0.05)
    first = results(run, tensors)
    for _ in range(20):
        again = results(run, tensors)
        assert all(torch.equal(again[name], first[name]) for name in first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["softmax", "gaussian"])
def test_sdpa_is_torchs_own_kernel(kind, dtype, device):
    tensors = operands(Case(3, 70, 40, 64, 64), dtype, device)
    scale = 64**-0.5 if kind == "softmax" else 1.0

    def direct(query, key, value):
        heads = (t.unsqueeze(1) for t in (query, key, value))
        return torch.nn.functional.scaled_dot_product_attention(*heads, scale=scale).squeeze(1)

    expected, got = results(direct, tensors), results(attention(kind, "sdpa"), tensors)
    for name, value in expected.items():
        # The row's logarithm passes through the scores' unit on its way to the CPU's backward.
        rounding = 2e-5 if dtype == torch.float32 else 1e-2
        close = 0 if name == "out" else rounding
        torch.testing.assert_close(got[name], value, rtol=close, atol=close)
