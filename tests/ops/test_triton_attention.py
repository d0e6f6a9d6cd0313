"""The Triton backend of softmax seen from outside: autograd, compilation, layouts, promises."""

import itertools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from nlkernels import NonLocalBlock3d, explain, nonlocal_attention, set_nonlocal_backend
from tests.helpers import SHORT, Case, assert_not_worse, operands, results

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poison")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=[SHORT[d] for d in DTYPES])
# Fused, staged, and the O(N) form of wide channels.
CASES = [
    (Case(2, 70, 49, 40, 24), None),
    (Case(1, 150, 98, 64, 320), None),
    (Case(1, 130, 33, 288, 48), 0),
]
cases = pytest.mark.parametrize(("case", "workspace_mib"), CASES, ids=str)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def attention(**options):
    return lambda *qkv: nonlocal_attention(*qkv, backend="triton", **options)


def naive(**options):
    return lambda *qkv: nonlocal_attention(*qkv, backend="reference", **options)


@cases
@pytest.mark.parametrize("kind", ["softmax", "gaussian"])
@dtypes
def test_not_worse_than_pytorch(dtype, kind, case, workspace_mib, device):
    tensors = operands(case, dtype, device)
    if kind == "gaussian":  # unscaled scores of D channels: keep some of the weights comparable
        tensors[0] = tensors[0] / 4
    truth = results(naive(kind=kind), [t.double() for t in tensors])
    same = results(naive(kind=kind), tensors)
    got = results(attention(kind=kind, workspace_mib=workspace_mib), tensors)
    for name, value in truth.items():
        assert_not_worse(name, got[name], same[name], value, 2 if name == "out" else 3)
    assert got["out"].is_contiguous()


@pytest.mark.parametrize("workspace_mib", [0, None])
def test_opcheck(workspace_mib, device):
    query, key, value, grad = operands(Case(1, 5, 3, 8, 272), torch.float32, device)
    layouts = [(query, key, value), tuple(t.mT.contiguous().mT for t in (query, key, value))]
    options = (0.5, "triton", workspace_mib)
    for moved in layouts:
        arguments = (*moved, *options)
        torch.library.opcheck(torch.ops.nlkernels.softmax_forward.default, arguments)
        kept = torch.ops.nlkernels.softmax_forward(*arguments)
        arguments = (grad, *moved, *kept, *options)
        torch.library.opcheck(torch.ops.nlkernels.softmax_backward.default, arguments)


def test_fullgraph_compile_equals_eager_without_recompiling_for_new_sizes(device):
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    run = attention(scale=0.3)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    counted = torch.compile(run, fullgraph=True, backend=count, dynamic=True)
    for queries, keys in ((9, 7), (33, 7), (65, 20)):
        tensors = operands(Case(2, queries, keys, 8, 12), torch.float32, device)
        eager, got = results(run, tensors), results(compiled, tensors)
        for name in eager:
            assert torch.equal(got[name], eager[name])
        with torch.no_grad():
            counted(*tensors[:3])
    assert len(graphs) == 1


def test_export_keeps_one_operator(device):
    class Model(torch.nn.Module):
        def forward(self, query, key, value):
            return nonlocal_attention(query, key, value, backend="triton")

    inputs = tuple(operands(Case(2, 20, 9, 8, 8), torch.float32, device)[:3])
    program = torch.export.export(Model(), inputs)
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert [n for n in names if "nlkernels" in n] == ["nlkernels.softmax_forward.default"]
    assert torch.equal(program.module()(*inputs), Model()(*inputs))


def test_only_operands_output_and_statistics_are_saved(device):
    tensors = operands(Case(2, 50, 30, 16, 24), torch.bfloat16, device, requires_grad=True)[:3]
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.setdefault(t.data_ptr(), t.numel() * t.element_size()) and t, lambda t: t
    ):
        nonlocal_attention(*tensors, backend="triton")
    assert sum(saved.values()) == 2 * 2 * (50 * 16 + 30 * 16 + 30 * 24 + 50 * 24) + 2 * 2 * 50 * 4


@dtypes
def test_gradients_of_gradients_equal_the_definitions(dtype, device):
    def penalty(backend):
        tensors = operands(Case(2, 20, 15, 8, 6), dtype, device, requires_grad=True)[:3]
        out = nonlocal_attention(*tensors, backend=backend)
        first = torch.autograd.grad(out.square().sum(), tensors, create_graph=True)
        total = sum(g.float().square().sum() for g in first)
        return torch.autograd.grad(total, tensors)

    close = {"rtol": 1e-3, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.1}
    for got, want in zip(penalty("triton"), penalty("reference"), strict=True):
        torch.testing.assert_close(got, want, **close)


@pytest.mark.parametrize("wanted", list(itertools.product("01", repeat=3))[1:7])
def test_any_subset_may_require_gradients(wanted, device):
    tensors = operands(Case(2, 20, 15, 8, 6), torch.float32, device)
    full = results(attention(), tensors)
    inputs = [
        t.detach().requires_grad_(flag == "1") for t, flag in zip(tensors[:3], wanted, strict=True)
    ]
    attention()(*inputs).backward(tensors[3])
    for tensor, name in zip(inputs, ("d_query", "d_key", "d_value"), strict=True):
        if tensor.requires_grad:
            assert torch.equal(tensor.grad, full[name])
        else:
            assert tensor.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_runs_the_kernels_in_its_dtype(dtype, device):
    tensors = operands(Case(2, 40, 50, 16, 16), torch.float32, device)
    expected = results(attention(), [t.to(dtype) for t in tensors])

    def run(*qkv):
        with torch.autocast(device, dtype=dtype):
            return nonlocal_attention(*qkv, backend="triton")

    got = results(run, [*tensors[:3], tensors[3].to(dtype)])
    assert got["out"].dtype == dtype and torch.equal(got["out"], expected["out"])
    assert torch.equal(got["d_key"], expected["d_key"].float())


def test_checkpointing_inference_mode_and_no_grad_change_nothing(device):
    tensors = operands(Case(2, 40, 30, 16, 16), torch.float32, device)
    plain = results(attention(), tensors)
    kept = results(lambda *qkv: checkpoint(attention(), *qkv, use_reentrant=False), tensors)
    assert all(torch.equal(kept[name], plain[name]) for name in plain)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(attention()(*tensors[:3]), plain["out"])


@pytest.mark.usefixtures("repeatable")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("value_depth", [32, 272], ids=["fused", "staged"])
def test_twenty_repeats_are_bitwise_equal(value_depth, dtype, device):
    # The interpreter has no order that could change; where there is one, many programs run.
    sizes = (8, 1500, 700) if device == "cuda" else (1, 20, 70)
    tensors = operands(Case(*sizes, 16, value_depth), dtype, device)
    first = results(attention(workspace_mib=0.05), tensors)
    for _ in range(20):
        again = results(attention(workspace_mib=0.05), tensors)
        assert all(torch.equal(again[name], first[name]) for name in first)


@pytest.mark.parametrize("value_depth", [8, 264], ids=["fused", "staged"])
def test_softmax_ignores_a_shift_and_the_order_of_keys_and_adds_values(value_depth, device):
    query, key, value, _ = operands(Case(4, 30, 24, 8, value_depth), torch.float32, device)
    run = attention()
    plain = run(query, key, value)
    order = torch.randperm(24, device=device)
    shift = torch.randn(4, 1, 8, device=device)
    parts = torch.cat([run(*(t[i : i + 1] for t in (query, key, value))) for i in range(4)])
    torch.testing.assert_close(run(query, key + shift, value), plain, **CLOSE)
    torch.testing.assert_close(run(query, key[:, order], value[:, order]), plain, **CLOSE)
    torch.testing.assert_close(plain + run(query, key, 2 * value), run(query, key, 3 * value))
    torch.testing.assert_close(parts, plain, **CLOSE)


def test_a_block_runs_on_it(device):
    torch.manual_seed(1)
    block = NonLocalBlock3d(16).to(device)
    torch.nn.init.ones_(block.norm.weight)  # else its output is zero
    clip = torch.randn(2, 16, 3, 6, 6, device=device)
    results = {}
    for backend in ("reference", "triton"):
        set_nonlocal_backend(block, backend)
        block.zero_grad()
        out = block(clip)
        out.square().mean().backward()
        results[backend] = [out, *(p.grad.clone() for p in block.parameters())]
    for got, want in zip(results["triton"], results["reference"], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_what_it_does_not_serve_is_refused_with_the_reason():
    tensors = operands(Case(1, 9, 7, 4, 4))[:3]
    with pytest.raises(NotImplementedError, match="float64"):
        nonlocal_attention(*tensors, backend="triton")


def test_auto_never_takes_the_interpreter():
    tensors = [t.float() for t in operands(Case(1, 9, 7, 4, 4))[:3]]
    assert explain("nonlocal_attention", *tensors).backend != "triton"
