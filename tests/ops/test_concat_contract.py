"""The concatenation's operator contract: tracing, autograd, casts, memory, FLOPs, errors."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import nlkernels
from nlkernels import _ext, explain, nonlocal_concat
from nlkernels._memory import MIB, PeakMemory
from nlkernels.ops.concat import chunked
from tests.concat import NAMES, operands, results, run

SMALL = (2, 9, 7, 4)


def leaves(device="cpu", case=SMALL):
    return [t.requires_grad_() for t in operands(case, device=device)[:3]]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    "case",
    [
        (1, 3, 20, 1),
        pytest.param((2, 9, 7, 3), marks=pytest.mark.gate),
        pytest.param((1, 30, 3, 2), marks=pytest.mark.gate),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_gradcheck_and_gradgradcheck(backend, case, device):
    assert torch.autograd.gradcheck(run(backend), leaves(device, case), nondet_tol=0)
    assert torch.autograd.gradgradcheck(run(backend), leaves(device, case), nondet_tol=0)


@pytest.mark.parametrize("wanted", ["111", "100", "010"])
def test_third_order_gradients_equal_the_definitions(wanted):
    def third(backend):
        inputs = [
            t.detach().requires_grad_(flag == "1") for t, flag in zip(leaves(), wanted, strict=True)
        ]
        wrt = [t for t in inputs if t.requires_grad]
        total = nonlocal_concat(*inputs, backend=backend).pow(3).sum()
        for _ in range(2):
            grads = torch.autograd.grad(total, wrt, create_graph=True)
            total = sum(g.square().sum() for g in grads)
        return torch.autograd.grad(total, wrt)

    for got, want in zip(third("chunked"), third("reference"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_opcheck():
    tensors = operands(SMALL)
    for layout in (tensors, [t.movedim(-1, 0).contiguous().movedim(0, -1) for t in tensors]):
        *inputs, grad = layout
        torch.library.opcheck(torch.ops.nlkernels.concat_forward.default, (*inputs, "chunked"))
        torch.library.opcheck(
            torch.ops.nlkernels.concat_backward.default, (grad, *inputs, "chunked")
        )


@pytest.mark.parametrize("backend", ["auto", "chunked", "reference"])
def test_fullgraph_compile_equals_eager_without_recompiling_for_new_sizes(backend):
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def double(query_score, key_score, value):
        return nonlocal_concat(query_score * 2, key_score, value, backend=backend)

    compiled = torch.compile(double, fullgraph=True, backend="aot_eager", dynamic=True)
    traced = torch.compile(double, fullgraph=True, backend=count, dynamic=True)
    for queries, keys in ((9, 7), (33, 7), (65, 20)):
        tensors = operands((2, queries, keys, 4))
        expected, got = results(double, *tensors), results(compiled, *tensors)
        for name in NAMES:
            torch.testing.assert_close(got[name], expected[name], rtol=1e-11, atol=1e-12)
        with torch.no_grad():
            traced(*tensors[:3])
    assert len(graphs) == 1


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_casts_operands_and_keeps_sums_wide(dtype, device):
    tensors = operands((2, 40, 300, 32), torch.float32, device)
    low = [t.to(dtype) for t in tensors]
    expected = results(run("chunked"), *low)

    def cast(*inputs):
        with torch.autocast(device, dtype=dtype):
            return nonlocal_concat(*inputs, backend="chunked")

    got = results(cast, *tensors[:3], low[3])
    assert got["out"].dtype == dtype and torch.equal(got["out"], expected["out"])
    for name in NAMES[1:]:
        assert got[name].dtype == torch.float32
        assert torch.equal(got[name], expected[name].float())
    with torch.autocast(device, dtype=dtype):
        inside = results(run("chunked"), *low)
        mixed = nonlocal_concat(low[0], tensors[1], tensors[2])
        wide = nonlocal_concat(*(t.double() for t in tensors[:3]))
    assert all(torch.equal(inside[name], expected[name]) for name in NAMES)
    assert mixed.dtype == dtype and wide.dtype == torch.float64


@pytest.mark.parametrize("wanted", ["100", "010", "001", "110", "011"])
def test_any_subset_may_require_gradients(wanted, device):
    *inputs, grad = operands(SMALL, device=device)
    full = results(run("chunked"), *inputs, grad)
    for tensor, flag in zip(inputs, wanted, strict=True):
        tensor.requires_grad_(flag == "1")
    nonlocal_concat(*inputs, backend="chunked").backward(grad)
    for tensor, name in zip(inputs, NAMES[1:], strict=True):
        assert torch.equal(tensor.grad, full[name]) if tensor.requires_grad else tensor.grad is None


def test_no_grad_and_inference_mode(device):
    tensors = leaves(device)
    expected = nonlocal_concat(*tensors, backend="chunked").detach()
    with torch.no_grad():
        plain = nonlocal_concat(*tensors, backend="chunked")
    with torch.inference_mode():
        inference = nonlocal_concat(*tensors, backend="chunked")
    assert not plain.requires_grad and torch.equal(plain, expected)
    assert inference.is_inference() and torch.equal(inference, expected)


def test_functorch_grad_works_and_vmap_and_jvp_say_no():
    query_score, key_score, value, _ = operands(SMALL)

    def loss(query_score):
        return nonlocal_concat(query_score, key_score, value, backend="chunked").sum()

    grad = torch.func.grad(loss)(query_score)
    ones = torch.ones(2, 9, 4, dtype=torch.float64)
    expected = results(run("reference"), query_score, key_score, value, ones)["d_query_score"]
    torch.testing.assert_close(grad, expected, rtol=1e-11, atol=1e-12)
    with pytest.raises(RuntimeError, match="vmap"):
        torch.vmap(lambda q: nonlocal_concat(q, key_score, value))(query_score.expand(3, 2, 9))
    with pytest.raises((RuntimeError, NotImplementedError), match="jvp"):
        torch.func.jvp(loss, (query_score,), (query_score,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("backend", ["chunked", "auto"])
def test_operands_are_all_that_is_saved(backend, dtype, device):
    tensors = [t.requires_grad_() for t in operands((2, 50, 30, 16), dtype, device)[:3]]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        nonlocal_concat(*tensors, backend=backend)
    assert [t.data_ptr() for t in saved] == [t.data_ptr() for t in tensors]


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        ("rows", torch.float32),
        ("rows", torch.bfloat16),
        ("channels", torch.float32),
        *(
            pytest.param(layout, dtype, marks=pytest.mark.gate)
            for layout, dtype in (
                ("rows", torch.float16),
                ("rows", torch.float64),
                ("channels", torch.half),
            )
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "case",
    [
        (3, 1200, 900, 24),
        # Few keys: the sums of blocks weigh as much as the tables.
        (64, 100, 50, 256),
        *(
            pytest.param(case, marks=pytest.mark.gate)
            for case in (
                (1, 3000, 50, 128),
                (2, 100, 3000, 64),
                (1, 9000, 900, 1),
                (512, 1, 1, 1024),
                (1024, 4, 4, 512),
            )
        ),
    ],
    ids=str,
)
def test_memory_stays_within_the_documented_bound(layout, case, dtype, device, monkeypatch):
    monkeypatch.setattr(chunked, "TILE", 2**14)
    batch, queries, keys, depth = case
    query_score, key_score, value, grad = operands(case, dtype, device)
    if layout == "channels":
        value, grad = (t.mT.contiguous().mT for t in (value, grad))
    size, wide = dtype.itemsize, max(dtype.itemsize, 4)
    either = 160 * batch * (queries + keys) + wide * max(chunked.TILE, depth)
    with PeakMemory(device) as forward:
        out = nonlocal_concat(query_score, key_score, value, backend="chunked")
    extra = forward.live_mib * MIB - out.numel() * size
    blocks = 12 * batch * depth * (math.sqrt(keys + 1) + 2)
    assert extra <= 2 * batch * (keys + 1) * depth * wide + blocks + keys * depth * size + either
    with PeakMemory(device) as backward:
        grads = torch.ops.nlkernels.concat_backward(grad, query_score, key_score, value, "chunked")
    extra = backward.live_mib * MIB - sum(g.numel() * size for g in grads)
    rows = keys + 2 + math.ceil(queries / chunked.GROUP)
    copied = layout == "channels" or size < wide
    item = (rows + copied * queries) * depth * wide
    blocks = 12 * batch * depth * (math.sqrt(rows) + 2)
    assert extra <= 2 * batch * rows * depth * wide + blocks + item + either


def test_repeated_steps_leave_no_memory_behind():
    tensors = operands((2, 200, 100, 16), torch.float32)
    results(run("chunked"), *tensors)
    with PeakMemory() as once:
        results(run("chunked"), *tensors)
    with PeakMemory() as often:
        for _ in range(20):
            results(run("chunked"), *tensors)
    assert often.live_mib == once.live_mib


def test_flops_are_counted():
    tensors = leaves(case=(2, 9, 7, 3))
    with FlopCounterMode(display=False) as forward:
        out = nonlocal_concat(*tensors, backend="chunked")
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert forward.get_total_flops() == 4 * 2 * (9 + 7) * 3
    assert backward.get_total_flops() == 6 * 2 * (9 + 7) * 3


def test_explain_gives_a_reason_for_every_backend(monkeypatch):
    tensors = operands(SMALL)[:3]
    explanation = explain("nonlocal_concat", *tensors)
    assert explanation.backend == ("chunked" if _ext.missing() else "cpp")
    assert set(explanation.reasons) == {"reference", "chunked", "cpp", "triton", "cuda"}
    assert "concat: B=2 N=9 M=7 V=4 float64 on cpu" in str(explanation)
    assert explain("nonlocal_concat", *tensors, backend="reference").backend == "reference"
    monkeypatch.setenv("NLKERNELS_BACKEND", "reference")
    assert explain("nonlocal_concat", *tensors).backend == "reference"
    for backend, reason in (("sdpa", "no backend 'sdpa'"), ("triton", "not float64")):
        for call in (nonlocal_concat, lambda *t, **o: explain("nonlocal_concat", *t, **o)):
            with pytest.raises(
                NotImplementedError, match=f"^nonlocal_concat: expected .*{reason}.*; use backend="
            ):
                call(*tensors, backend=backend)


def test_kernels_can_be_verified():
    report = nlkernels.verify("concat", "chunked", device="cpu")
    assert report.ok and {check.verdict for check in report.checks} == {"ok"}


A, B, V = torch.zeros(2, 9), torch.zeros(2, 7), torch.zeros(2, 7, 3)


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        (([1.0], B, V), TypeError, "query_score to be a tensor, got list; convert"),
        ((A.to_sparse(), B, V), TypeError, "dense tensor, got torch.sparse_coo; .*to_dense"),
        ((A[..., None], B, V), ValueError, r"query_score of 2 dim.*, got \(2, 9, 1\) .*; a score"),
        ((A, B[0], V), ValueError, r"key_score of 2 dimensions .* got \(7,\) float32 on cpu; add"),
        ((A, B, V[..., None]), ValueError, r"value of 3 dimensions .* got \(2, 7, 3, 1\)"),
        ((A.int(), B.int(), V.int()), TypeError, "one dtype out of float16.* int32.*; cast them"),
        ((A, B.double(), V), TypeError, r"key_score \(2, 7\) float64 on cpu, .*; cast them"),
        ((A, B, V.to("meta")), ValueError, "on one device, got .* on meta; move them"),
        ((A[:1], B, V), ValueError, "all share B"),
        ((A, B, V[:, :5]), ValueError, "key_score and value share M"),
        ((A, B, V[..., :0]), ValueError, "at least one channel, got .*; V must be 1 or more"),
    ],
)
def test_errors_say_what_was_expected_what_came_and_what_to_do(tensors, error, message):
    with pytest.raises(error, match=f"^nonlocal_concat: expected .*{message}"):
        nonlocal_concat(*tensors)
    with pytest.raises(error, match=message):
        explain("nonlocal_concat", *tensors)


def test_unknown_backends_and_options_are_named():
    with pytest.raises(ValueError, match=r"nonlocal_concat: expected backend .* 'chunked'"):
        nonlocal_concat(A, B, V, backend="chunk")
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        nonlocal_concat(A, B, V, scale=1.0)
