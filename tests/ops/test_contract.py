"""The operator contract, for every operation: tracing, autograd, casts, memory, FLOPs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nlkernels import nonlocal_attention
from nlkernels._memory import MIB, PeakMemory
from tests.helpers import KINDS, SERVED, Case, operands, results

kinds = pytest.mark.parametrize("kind", KINDS)
pairs = pytest.mark.parametrize(
    ("kind", "backend"),
    [(k, b) for k, b in SERVED if b == "chunked"] + [("softmax", "sdpa"), ("gaussian", "sdpa")],
)
SMALL = Case(2, 9, 7, 4, 4)
# Kinds that keep no output and no statistics.
UNNORMALISED = ("dot_product", "relu")


def leaves(device="cpu", case=SMALL):
    return operands(case, device=device, requires_grad=True)[:3]


def low_level(kind, backend, tensors):
    """Arguments of the two low-level operators of a kind."""
    query, key, value, grad = tensors
    options = (0.5, backend, None)
    name = kind if kind in UNNORMALISED else "softmax"
    forward, backward = (
        getattr(torch.ops.nlkernels, f"{name}_{d}") for d in ("forward", "backward")
    )
    arguments = (query, key, value, *options, *([True] if kind == "dot_product" else []))
    found = forward(*arguments)
    kept = {"dot_product": found[1:], "relu": ()}.get(kind, found)
    return [(forward, arguments), (backward, (grad, query, key, value, *kept, *options))]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("case", [Case(2, 9, 7, 5, 3), Case(1, 40, 3, 2, 2)], ids=str)
@pytest.mark.parametrize("backend", ["reference", "chunked"])
@kinds
def test_gradcheck_and_gradgradcheck(kind, backend, case, device):
    def run(*tensors):
        return nonlocal_attention(*tensors, kind=kind, backend=backend, scale=0.7)

    assert torch.autograd.gradcheck(run, leaves(device, case), nondet_tol=0)
    assert torch.autograd.gradgradcheck(run, leaves(device, case), nondet_tol=0)


@pytest.mark.parametrize("wanted", ["111", "100"])
@kinds
def test_third_order_gradients_equal_the_definitions(kind, wanted):
    def third(backend):
        inputs = [
            t.detach().requires_grad_(flag == "1") for t, flag in zip(leaves(), wanted, strict=True)
        ]
        wrt = [t for t in inputs if t.requires_grad]
        out = nonlocal_attention(*inputs, kind=kind, backend=backend)
        total = out.pow(3).sum()
        for _ in range(2):
            grads = torch.autograd.grad(total, wrt, create_graph=True)
            total = sum(g.square().sum() for g in grads)
        return torch.autograd.grad(total, wrt)

    for got, want in zip(third("chunked"), third("reference"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_double_backward_ignores_autocast():
    def penalty():
        query, key, value = (t.detach().float().requires_grad_() for t in leaves())
        with torch.autocast("cpu", enabled=False):
            out = nonlocal_attention(query, key, value, backend="chunked")
        (first,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
        return torch.autograd.grad(first.square().sum(), (query, key, value))

    plain = penalty()
    with torch.autocast("cpu", torch.bfloat16):
        cast = penalty()
    for got, want in zip(cast, plain, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_double_backward_is_tiled_like_the_rest(monkeypatch):
    from nlkernels.ops import _autograd

    def penalty(backend):
        query, key, value = leaves(case=Case(2, 50, 20, 4, 3))
        out = nonlocal_attention(query, key, value, backend=backend)
        first = torch.autograd.grad(out.square().sum(), (query, key, value), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), (query, key, value))

    expected = penalty("reference")
    monkeypatch.setattr(_autograd, "scores_per_tile", lambda *_: 20 * 17)
    for got, want in zip(penalty("chunked"), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


@pairs
def test_opcheck(kind, backend):
    tensors = operands(SMALL)
    for op, arguments in low_level(kind, backend, tensors):
        torch.library.opcheck(op.default, arguments)
    moved = [t.mT.contiguous().mT for t in tensors]
    if backend != "sdpa":
        for op, arguments in low_level(kind, backend, moved):
            torch.library.opcheck(op.default, arguments)


@pytest.mark.parametrize("backend", ["auto", "chunked", "reference"])
@kinds
def test_fullgraph_compile_equals_eager_without_recompiling_for_new_sizes(kind, backend):
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def run(query, key, value):
        return nonlocal_attention(query * 2, key, value, kind=kind, backend=backend)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for queries, keys in ((9, 7), (33, 7), (65, 20)):
        tensors = leaves(case=Case(2, queries, keys, 4, 3))
        eager, got = run(*tensors), compiled(*tensors)
        torch.testing.assert_close(got, eager, rtol=1e-12, atol=1e-12)
        for a, b in zip(
            torch.autograd.grad(got.square().sum(), tensors),
            torch.autograd.grad(eager.square().sum(), tensors),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    torch._dynamo.reset()
    traced = torch.compile(run, fullgraph=True, backend=count, dynamic=True)
    with torch.no_grad():
        for queries in (9, 33, 65):
            traced(*operands(Case(2, queries, 7, 4, 3))[:3])
    assert len(graphs) == 1


def test_a_changing_scale_breaks_no_graph():
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda scale, *qkv: nonlocal_attention(*qkv, scale=scale),
        fullgraph=True,
        backend="aot_eager",
    )
    tensors = operands(SMALL)[:3]
    for scale in (0.3, 0.4, -1.0):
        expected = nonlocal_attention(*tensors, scale=scale)
        torch.testing.assert_close(compiled(scale, *tensors), expected)


@pytest.mark.parametrize("scale", [0.7, -0.7, 0.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_statistics_are_one_logarithm_whichever_backend_made_them(dtype, scale):
    query, key, value, grad = operands(Case(2, 40, 30, 16, 16), dtype)
    scores = query.double() @ key.double().mT * scale
    truth = torch.logsumexp(scores, -1)
    expected = None
    for forward in ("chunked", "sdpa"):
        out, stats = torch.ops.nlkernels.softmax_forward(query, key, value, scale, forward, None)
        assert stats.dtype == torch.promote_types(dtype, torch.float32)
        close = 0.05 if dtype == torch.bfloat16 else 1e-5
        top, total = stats.double()
        torch.testing.assert_close(scale * top + total.log(), truth, rtol=0, atol=close)
        if dtype == torch.bfloat16:
            continue
        for backward in ("chunked", "sdpa"):
            grads = torch.ops.nlkernels.softmax_backward(
                grad, query, key, value, out, stats, scale, backward, None
            )
            expected = grads if expected is None else expected
            for got, want in zip(grads, expected, strict=True):
                torch.testing.assert_close(got, want, rtol=5 * close, atol=5 * close)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("backend", ["chunked", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@kinds
def test_scale_zero_gives_zero_gradients(kind, dtype, backend, device):
    tensors = operands(Case(2, 60, 30, 16, 16), dtype, device)
    got = results(lambda *t: nonlocal_attention(*t, kind=kind, scale=0.0, backend=backend), tensors)
    assert not got["d_query"].any() and not got["d_key"].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@kinds
def test_autocast_casts_operands_and_keeps_sums_wide(kind, dtype, device):
    tensors = operands(Case(2, 40, 300, 32, 32), torch.float32, device)
    low = [t.to(dtype) for t in tensors]
    expected = results(lambda *t: nonlocal_attention(*t, kind=kind, backend="chunked"), low)

    def run(*qkv):
        with torch.autocast(device, dtype=dtype):
            return nonlocal_attention(*qkv, kind=kind, backend="chunked")

    got = results(run, [*tensors[:3], low[3]])
    assert got["out"].dtype == dtype
    assert torch.equal(got["out"], expected["out"])
    for name in ("d_query", "d_key", "d_value"):
        assert got[name].dtype == torch.float32
        assert torch.equal(got[name], expected[name].float())


def test_backward_inside_autocast_equals_backward_outside(device):
    tensors = operands(Case(2, 40, 300, 32, 32), torch.bfloat16, device)
    run = lambda *t: nonlocal_attention(*t, backend="chunked")  # noqa: E731
    outside = results(run, tensors)
    with torch.autocast(device, dtype=torch.bfloat16):
        inside = results(run, tensors)
    assert all(torch.equal(inside[name], outside[name]) for name in outside)


def test_autocast_lets_mixed_dtypes_in_and_float64_pass(device):
    query, key, value, _ = operands(SMALL, torch.float32, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        mixed = nonlocal_attention(query.bfloat16(), key, value.half())
        wide = nonlocal_attention(query.double(), key.double(), value.double())
    assert mixed.dtype == torch.bfloat16 and wide.dtype == torch.float64
    with pytest.raises(TypeError, match="one dtype"):
        nonlocal_attention(query.bfloat16(), key, value)


@pytest.mark.parametrize("wanted", ["100", "010", "001", "110", "011"])
@kinds
def test_any_subset_may_require_gradients(kind, wanted, device):
    tensors = operands(SMALL, device=device)
    full = results(lambda *t: nonlocal_attention(*t, kind=kind, backend="chunked"), tensors)
    inputs = [
        t.detach().requires_grad_(flag == "1") for t, flag in zip(tensors[:3], wanted, strict=True)
    ]
    out = nonlocal_attention(*inputs, kind=kind, backend="chunked")
    out.backward(tensors[3])
    for tensor, name in zip(inputs, ("d_query", "d_key", "d_value"), strict=True):
        if tensor.requires_grad:
            assert torch.equal(tensor.grad, full[name])
        else:
            assert tensor.grad is None


@kinds
def test_no_grad_and_inference_mode(kind, device):
    tensors = leaves(device)
    expected = nonlocal_attention(*tensors, kind=kind, backend="chunked").detach()
    with torch.no_grad():
        plain = nonlocal_attention(*tensors, kind=kind, backend="chunked")
    with torch.inference_mode():
        inference = nonlocal_attention(*tensors, kind=kind, backend="chunked")
    assert not plain.requires_grad and torch.equal(plain, expected)
    assert inference.is_inference() and torch.equal(inference, expected)


@kinds
def test_functorch_grad_works_and_vmap_and_jvp_say_no(kind):
    query, key, value = (t.detach() for t in leaves())

    def loss(query):
        return nonlocal_attention(query, key, value, kind=kind, backend="chunked").square().sum()

    expected = results(
        lambda *t: nonlocal_attention(*t, kind=kind, backend="reference"),
        [query, key, value, 2 * nonlocal_attention(query, key, value, kind=kind)],
    )["d_query"]
    torch.testing.assert_close(torch.func.grad(loss)(query), expected, rtol=1e-11, atol=1e-12)
    with pytest.raises(RuntimeError, match="vmap"):
        torch.vmap(lambda q: nonlocal_attention(q, key, value, kind=kind))(query.expand(3, 2, 9, 4))
    with pytest.raises((RuntimeError, NotImplementedError), match="jvp"):
        torch.func.jvp(loss, (query,), (query,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("backend", ["chunked", "auto"])
@kinds
def test_only_operands_output_and_statistics_are_saved(kind, backend, dtype, device):
    tensors = operands(Case(2, 50, 30, 16, 16), dtype, device, requires_grad=True)[:3]
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.setdefault(t.data_ptr(), t.numel() * t.element_size()) and t, lambda t: t
    ):
        nonlocal_attention(*tensors, kind=kind, backend=backend)
    size = dtype.itemsize
    expected = 2 * (50 + 30 + 30) * 16 * size
    if kind not in UNNORMALISED:
        expected += 2 * 50 * 16 * size + 2 * 2 * 50 * 4
    if kind == "dot_product" and dtype == torch.float32:  # in bfloat16 more than a quarter
        expected += 2 * 16 * 16 * 4
    assert sum(saved.values()) == expected


LARGE = [Case(3, 1200, 900, 16, 24), Case(1, 2000, 1000, 4, 512), Case(1, 2000, 1, 512, 512)]


# Short rows: the quadratic order of dot_product is the one with tiles. It shares them with relu.
MEMORY = [
    *(("softmax", case, ()) for case in LARGE),
    ("dot_product", Case(40, 60, 64, 64, 96), ()),
    *(("relu", case, pytest.mark.gate) for case in LARGE),
]


@pytest.mark.parametrize("workspace_mib", [0, 1, None])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize(
    ("kind", "case"),
    [pytest.param(kind, case, marks=marks, id=f"{kind}-{case}") for kind, case, marks in MEMORY],
)
def test_memory_stays_within_the_documented_bound(kind, case, dtype, workspace_mib, device):
    batch, rows, keys, depth, value_depth = vars(case).values()
    tensors = operands(case, dtype, device, requires_grad=True)
    wide = max(dtype.itemsize, 4)
    inner = 4 if dtype == torch.float16 else dtype.itemsize
    per_score = 2 * wide + (inner if inner != wide else 0)
    if kind in UNNORMALISED:
        per_score = 2 * inner
    budget = {"cpu": 10, "cuda": 40}[device] if workspace_mib is None else workspace_mib
    tile = max(budget * MIB, 16 * keys * per_score)
    sums = 0
    if dtype == torch.bfloat16:
        sums = 4 * keys * (depth + value_depth) + 6 * keys * max(depth, value_depth)
    operand_items = batch * (rows * (depth + value_depth) + keys * (depth + value_depth))
    half = dtype == torch.float16
    copies = 4 * operand_items if half else 0  # query, key and value, out
    grad_copies = copies + 4 * (operand_items - batch * rows * value_depth) if half else 0
    out_bytes = batch * rows * value_depth * dtype.itemsize
    stats_bytes = 0 if kind in UNNORMALISED else 2 * batch * rows * wide
    # A few numbers a row of a tile, and torch's scratch.
    tile_rows = min(batch * rows, max(16, tile // (keys * per_score)))
    row_bytes = 6 * 8 * tile_rows + MIB // 2
    if dtype == torch.bfloat16 and device == "cpu" and torch.cpu._is_amx_tile_supported():
        row_bytes += 2 * max(keys, tile_rows) * max(depth, value_depth)
    with PeakMemory(device) as forward:
        out = nonlocal_attention(
            *tensors[:3], kind=kind, backend="chunked", workspace_mib=workspace_mib
        )
    extra = forward.live_mib * MIB - out_bytes - stats_bytes
    assert extra <= tile + copies + row_bytes
    with PeakMemory(device) as backward:
        grads = torch.autograd.grad(out, tensors[:3], tensors[3])
    grad_bytes = sum(g.numel() * g.element_size() for g in grads)
    extra = backward.live_mib * MIB - grad_bytes
    assert extra <= tile + sums + grad_copies + row_bytes
    whole = batch * rows * keys * per_score
    if workspace_mib == 0 and keys > 100:
        assert forward.live_mib * MIB - out_bytes <= whole / 4 + copies


def test_repeated_steps_leave_no_memory_behind():
    tensors = operands(Case(2, 200, 100, 16, 16), torch.float32, requires_grad=True)

    def step():
        out = nonlocal_attention(*tensors[:3], backend="chunked")
        torch.autograd.grad(out, tensors[:3], tensors[3])

    step()
    with PeakMemory() as once:
        step()
    with PeakMemory() as often:
        for _ in range(20):
            step()
    assert often.live_mib == once.live_mib


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("softmax", 2 * 2 * 9 * 7 * (5 + 3)),
        ("dot_product", 2 * 2 * (9 + 7) * 5 * 3),
        ("relu", 2 * 2 * 9 * 7 * (5 + 3)),
    ],
)
def test_flops_are_counted(kind, expected):
    tensors = operands(Case(2, 9, 7, 5, 3), requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        out = nonlocal_attention(*tensors[:3], kind=kind, backend="chunked")
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert forward.get_total_flops() == expected
    quadratic = 2 * 2 * 9 * 7 * (3 * 5 + 2 * 3)
    linear = 2 * 2 * (2 * 9 + 2 * 7) * 5 * 3  # with the state that was kept
    assert backward.get_total_flops() == (linear if kind == "dot_product" else quadratic)
