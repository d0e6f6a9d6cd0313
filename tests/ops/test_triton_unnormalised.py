"""The Triton backend of kinds without a softmax from outside: autograd, compilation, refusals."""

import pytest
import torch

pytest.importorskip("triton")

from nlkernels import explain, nonlocal_attention
from nlkernels._spec import Problem
from nlkernels.ops.dot_product import op as dot_product
from tests.helpers import Case, results
from tests.ops import staged

pytestmark = pytest.mark.usefixtures("poison")

kinds = pytest.mark.parametrize("kind", ["relu", "dot_product"])


def attention(kind, **options):
    return lambda *qkv: nonlocal_attention(*qkv, kind=kind, backend="triton", **options)


# Short, or the linear order of dot_product would cost less.
SEEN = Case(2, 12, 9, 40, 24)


@kinds
def test_opcheck(kind, device):
    query, key, value, grad = staged.made(Case(1, 5, 3, 8, 272), torch.float32, device)
    for moved in ((query, key, value), tuple(t.mT.contiguous().mT for t in (query, key, value))):
        arguments = (*moved, 0.5, "triton", None)
        operators = (getattr(torch.ops.nlkernels, f"{kind}_{d}") for d in ("forward", "backward"))
        forward, backward = operators
        has_state = kind == "dot_product"
        keep = (True,) if has_state else ()
        torch.library.opcheck(forward.default, (*arguments, *keep))
        state = forward(*arguments, *keep)[1:] if has_state else ()
        torch.library.opcheck(backward.default, (grad, *moved, *state, 0.5, "triton", None))


@kinds
def test_fullgraph_compile_and_export_keep_one_operator(kind, device):
    class Model(torch.nn.Module):
        def forward(self, query, key, value):
            return nonlocal_attention(query, key, value, kind=kind, backend="triton")

    torch._dynamo.reset()
    tensors = staged.made(SEEN, torch.float32, device)
    compiled = torch.compile(attention(kind), fullgraph=True, backend="aot_eager")
    eager, got = results(attention(kind), tensors), results(compiled, tensors)
    assert all(torch.equal(got[name], eager[name]) for name in eager)
    program = torch.export.export(Model(), tuple(tensors[:3]))
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert [n for n in names if "nlkernels" in n] == [f"nlkernels.{kind}_forward.default"]


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_runs_the_kernels_in_its_dtype(dtype, kind, device):
    tensors = staged.made(SEEN, torch.float32, device)
    expected = attention(kind)(*(t.to(dtype) for t in tensors[:3]))
    with torch.autocast(device, dtype=dtype):
        got = attention(kind)(*tensors[:3])
    assert got.dtype == dtype and torch.equal(got, expected)


@kinds
def test_keys_may_be_permuted_values_added_and_batches_split(kind, device):
    query, key, value, _ = staged.made(SEEN, torch.float32, device)
    run, close = attention(kind), {"rtol": 1e-4, "atol": 1e-5}
    plain = run(query, key, value)
    order = torch.randperm(9, device=device)
    parts = torch.cat([run(*(t[i : i + 1] for t in (query, key, value))) for i in range(2)])
    torch.testing.assert_close(run(query, key[:, order], value[:, order]), plain, **close)
    torch.testing.assert_close(plain + run(query, key, 2 * value), run(query, key, 3 * value))
    torch.testing.assert_close(parts, plain, **close)


def test_what_is_not_served_is_refused_with_the_reason():
    tensors = staged.made(Case(1, 9, 7, 4, 4), torch.float64)[:3]
    with pytest.raises(NotImplementedError, match="not float64"):
        nonlocal_attention(*tensors, kind="relu", backend="triton")
    tensors = staged.made(Case(1, 300, 200, 4, 4), torch.float32)[:3]
    with pytest.raises(NotImplementedError, match="linear order cost fewer FLOPs"):
        nonlocal_attention(*tensors, kind="dot_product", backend="triton")
    short = Problem(1, 30, 20, 64, 64, torch.float32, "cpu")
    assert dot_product.supports("triton", short) == []
    assert explain("nonlocal_attention", *tensors, kind="relu").backend in ("cpp", "chunked")
