"""The channel gate's operator contract: tracing, autograd, casts, memory, FLOPs, errors."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nlkernels import _ext, channel_gate, explain
from nlkernels._memory import MIB, PeakMemory
from nlkernels.ops.gate import chunked, op
from nlkernels.ops.gate.suite import LAYOUTS, laid_out
from tests.ops.test_gate import NAMES, assert_right, backends, layouts, moved, results, run, tensors


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    ("backend", "layout"), [("reference", "ncdhw"), *(("chunked", each) for each in LAYOUTS)]
)
def test_gradcheck_and_gradgradcheck(backend, layout, device):
    x, weight, _ = tensors((2, 2, 2, 3, 1), layout=layout, device=device)
    bias = weight.new_full((1,), 0.3)

    def gate(x, weight, bias):
        return channel_gate(x, weight, bias, transform=torch.tanh, backend=backend)

    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    assert torch.autograd.gradcheck(gate, inputs, nondet_tol=0)
    assert torch.autograd.gradgradcheck(gate, inputs, nondet_tol=0)


@pytest.mark.parametrize("wanted", ["11", "10", "01"])
def test_third_order_gradients_equal_the_definitions(wanted):
    def third(backend):
        inputs = [
            t.requires_grad_(flag == "1")
            for t, flag in zip(tensors((2, 3, 2, 4, 3))[:2], wanted, strict=True)
        ]
        wrt = [t for t in inputs if t.requires_grad]
        total = op.pool(*inputs, backend=backend).pow(3).sum()
        for _ in range(2):
            grads = torch.autograd.grad(total, wrt, create_graph=True)
            total = sum(g.square().sum() for g in grads)
        return torch.autograd.grad(total, wrt)

    for got, want in zip(third("chunked"), third("reference"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@layouts
def test_opcheck(layout):
    x, weight, grad = tensors((2, 3, 3, 4, 5), layout=layout)
    for each in (x, moved(x, "window"), moved(x, "transposed")):
        torch.library.opcheck(torch.ops.nlkernels.gate_forward.default, (each, weight, "chunked"))
        torch.library.opcheck(
            torch.ops.nlkernels.gate_backward.default, (grad, each, weight, grad, "chunked")
        )


@layouts
def test_fullgraph_compile_equals_eager_without_recompiling_for_new_sizes(layout):
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def gate(x, weight):
        return channel_gate(x * 2, weight, weight[:1], transform=torch.tanh)

    compiled = torch.compile(gate, fullgraph=True, backend="aot_eager", dynamic=True)
    traced = torch.compile(gate, fullgraph=True, backend=count, dynamic=True)
    for shape in ((2, 3, 4, 5, 6), (3, 3, 7, 8, 6), (2, 3, 4, 9, 5)):
        x, weight, _ = tensors(shape, layout=layout)
        expected, got = results(gate, x, weight, x), results(compiled, x, weight, x)
        for name in NAMES:
            torch.testing.assert_close(got[name], expected[name], rtol=1e-12, atol=1e-12)
        assert got["out"].stride() == expected["out"].stride()
        with torch.no_grad():
            traced(x, weight)
    assert len(graphs) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_casts_the_operands_of_the_context(dtype, device):
    x, weight, _ = tensors((2, 8, 3, 6, 5), torch.float32, device=device)
    contexts = []

    def transform(context):
        contexts.append(context)
        return context

    with torch.autocast(device, dtype=dtype):
        out = channel_gate(x, weight, transform=transform, backend="chunked")
        wide = channel_gate(x.double(), weight.double(), transform=transform)
    expected = op.pool(x.to(dtype), weight.to(dtype), backend="chunked")
    assert torch.equal(contexts[0], expected) and contexts[0].dtype == dtype
    assert out.dtype == torch.float32 and wide.dtype == torch.float64
    assert torch.equal(out, x + expected[..., None, None, None])


def test_any_operand_may_go_without_a_gradient_and_modes_agree(device):
    x, weight, grad = tensors((2, 3, 3, 4, 4), device=device)
    full = results(run("chunked"), x, weight, grad)
    for position, name in enumerate(("d_x", "d_weight")):
        inputs = [t.detach().requires_grad_(i == position) for i, t in enumerate((x, weight))]
        op.pool(*inputs, backend="chunked").backward(grad)
        assert torch.equal(inputs[position].grad, full[name])
        assert inputs[1 - position].grad is None
    with torch.inference_mode():
        assert torch.equal(op.pool(x, weight, backend="chunked"), full["out"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["fp64", "bf16"])
@backends
def test_bias_changes_nothing_and_gets_the_gradient_zero(backend, dtype, device):
    x, weight, grad = tensors((2, 3, 3, 4, 4), dtype, device=device)
    bias = weight.new_full((1,), 3.0).requires_grad_()
    out = op.pool(x, weight, bias, backend)
    assert torch.equal(out, op.pool(x, weight, None, backend))
    out.backward(grad)
    assert torch.equal(bias.grad, torch.zeros_like(bias))


def test_functorch_grad_works_and_vmap_says_no():
    x, weight, grad = tensors((2, 3, 2, 3, 3))
    got = torch.func.grad(lambda x: op.pool(x, weight).sum())(x)
    expected = results(run("reference"), x, weight, torch.ones_like(grad))["d_x"]
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)
    with pytest.raises(RuntimeError, match="vmap"):
        torch.vmap(lambda x: op.pool(x, weight))(x.expand(3, *x.shape))


@pytest.mark.usefixtures("repeatable")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@backends
def test_repeats_are_bitwise_equal(backend, dtype, device):
    operands = tensors((3, 32, 4, 14, 14), dtype, device=device)
    first = results(run(backend), *operands)
    for _ in range(20):
        again = results(run(backend), *operands)
        assert all(torch.equal(again[name], first[name]) for name in NAMES)


@pytest.mark.parametrize("tile", [64, 1000, 2**22])
@layouts
def test_tiles_change_nothing_but_rounding(tile, layout, monkeypatch, device):
    monkeypatch.setattr(chunked, "TILE_BYTES", tile)
    for dtype in (torch.float64, torch.bfloat16):
        assert_right(run("chunked"), tensors((2, 6, 3, 5, 4), dtype, layout, device))


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float16, marks=pytest.mark.gate, id="fp16"),
        pytest.param(torch.bfloat16, id="bf16"),
        pytest.param(torch.float32, id="fp32"),
        pytest.param(torch.float64, marks=pytest.mark.gate, id="fp64"),
    ],
)
@pytest.mark.parametrize("layout", [*LAYOUTS, "transposed"])
def test_memory_stays_within_the_documented_bound(layout, dtype, device, monkeypatch):
    monkeypatch.setattr(chunked, "TILE_BYTES", 2**16)
    x, weight, grad = tensors((3, 64, 2, 28, 28), dtype, device=device)
    x = moved(x, layout) if layout == "transposed" else laid_out(x, layout)
    channels, positions = 64, 2 * 28 * 28
    wide, half = max(dtype.itemsize, 4), dtype.itemsize == 2
    tile = min(positions, 2**16 // (wide * channels))
    item = x[0].numel() * dtype.itemsize * (layout == "transposed")
    most = wide * (3 * tile + 4 * channels) + 4 * channels * tile * half + item
    scratch = 4096
    with PeakMemory(device) as forward:
        context = op.pool(x, weight, backend="chunked")
    assert forward.live_mib * MIB <= context.numel() * dtype.itemsize + most + scratch
    with PeakMemory(device) as backward:
        torch.ops.nlkernels.gate_backward(grad, x, weight, context, "chunked")
    most += wide * (2 * positions + 2 * tile + 8 * channels) + 2 * wide * grad.numel()
    assert backward.live_mib * MIB <= x.numel() * dtype.itemsize + most + scratch


def test_operands_and_context_are_all_that_is_saved():
    x, weight, _ = tensors((2, 3, 3, 4, 4))
    bias = weight.new_zeros(1)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        op.pool(x.requires_grad_(), weight, bias)
    assert [t.shape for t in saved] == [x.shape, (3,), (1,), (2, 3)]
    assert [t.data_ptr() for t in saved[:3]] == [t.data_ptr() for t in (x, weight, bias)]


def test_repeated_steps_leave_no_memory_behind():
    operands = tensors((2, 8, 3, 14, 14), torch.float32)
    results(run("chunked"), *operands)
    with PeakMemory() as once:
        results(run("chunked"), *operands)
    with PeakMemory() as often:
        for _ in range(20):
            results(run("chunked"), *operands)
    assert often.live_mib == once.live_mib


def test_flops_are_counted():
    x, weight, grad = tensors((2, 3, 4, 5, 6))
    with FlopCounterMode(display=False) as counter:
        results(run("chunked"), x, weight, grad)
    assert counter.get_total_flops() == (4 + 10) * x.numel()


def test_explain_gives_a_reason_for_every_backend():
    x, weight, _ = tensors((2, 3, 4, 5, 6), layout="channels_last")
    explanation = explain("channel_gate", x, weight, weight[:1], transform=torch.tanh)
    assert explanation.backend == ("chunked" if _ext.missing() else "cpp")
    assert set(explanation.reasons) == {"reference", "chunked", "cpp", "triton", "cuda"}
    assert "B=2 C=3 positions=120 float64 channels last on cpu" in str(explanation)
    with pytest.raises(NotImplementedError, match=r"channel_gate: expected .* use backend="):
        channel_gate(x, weight, transform=torch.tanh, backend="sdpa")
    with pytest.raises(NotImplementedError, match="float64"):
        explain("channel_gate", x, weight, backend="triton")


def test_environment_names_the_backend(monkeypatch):
    x, weight, _ = tensors((2, 3, 4, 5, 6))
    monkeypatch.setenv("NLKERNELS_BACKEND", "reference")
    assert explain("channel_gate", x, weight).backend == "reference"
    assert explain("channel_gate", x, weight, backend="chunked").backend == "chunked"


X, WEIGHT, BIAS = torch.zeros(2, 3, 4, 5, 6), torch.zeros(3), torch.zeros(1)


@pytest.mark.parametrize(
    ("x", "weight", "bias", "error", "message"),
    [
        ([1.0], WEIGHT, BIAS, TypeError, "expected x to be a tensor, got list; convert"),
        (X, WEIGHT, 0.5, TypeError, "expected bias to be a tensor, got float; convert"),
        (X.to_sparse(), WEIGHT, None, TypeError, "dense tensor, got torch.sparse_coo; .*to_dense"),
        (X[0, 0, 0], WEIGHT, None, ValueError, r"1 to 3 axes of positions, got \(5, 6\)"),
        (X[None], WEIGHT, None, ValueError, r"got \(1, 2, 3, 4, 5, 6\) .* add or flatten"),
        (X, WEIGHT[:2], BIAS, ValueError, r"weight \(2,\) float32 .* flatten it"),
        (X, WEIGHT.view(1, 3, 1, 1, 1), None, ValueError, r"weight \(1, 3, 1, 1, 1\)"),
        (X, WEIGHT, WEIGHT, ValueError, r"bias \(1,\) or None, .* bias \(3,\)"),
        (X[:, :0], WEIGHT[:0], None, ValueError, "C of at least 1"),
        (X.int(), WEIGHT.int(), None, TypeError, "one dtype out of float16.* int32"),
        (X, WEIGHT.double(), None, TypeError, "weight .* float64 on cpu; cast them"),
        (X, WEIGHT, BIAS.to("meta"), ValueError, "on one device, got .* meta; move them"),
        (X[:, :, :0], WEIGHT, None, ValueError, "at least one position, got .* drop the call"),
    ],
)
def test_errors_say_what_was_expected_what_came_and_what_to_do(x, weight, bias, error, message):
    with pytest.raises(error, match=f"channel_gate: .*{message}"):
        channel_gate(x, weight, bias, transform=torch.tanh)
    with pytest.raises(error, match=message):
        explain("channel_gate", x, weight, bias)


def test_transform_and_backend_are_checked():
    with pytest.raises(TypeError, match="expected transform to be callable, got int"):
        channel_gate(X, WEIGHT, transform=3)
    with pytest.raises(ValueError, match=r"transform to return \(2, 3\), got \(2,\) float32"):
        channel_gate(X, WEIGHT, transform=lambda context: context[:, 0])
    with pytest.raises(ValueError, match=r"channel_gate: expected backend .* 'chunked'"):
        channel_gate(X, WEIGHT, transform=torch.tanh, backend="chunk")
