"""One tensor as several operands, as region blocks pass it: compiled, cast and kept once."""

import pytest
import torch

from nlkernels import nonlocal_attention, nonlocal_concat
from nlkernels._memory import MIB, PeakMemory
from nlkernels.ops._tiles import cast
from tests.helpers import KINDS, Case, operands

kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.mark.parametrize("shared", ["query is key", "all are one"])
@kinds
def test_one_tensor_as_several_operands_compiles(kind, shared):
    torch._dynamo.reset()

    def run(x, y):
        value = x if shared == "all are one" else y
        return nonlocal_attention(x, x, value, kind=kind, backend="chunked", scale=0.5)

    x, y = (torch.randn(2, 9, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    eager, got = run(x, y), compiled(x, y)
    torch.testing.assert_close(got, eager, rtol=1e-12, atol=1e-12)
    (expected,), (found,) = (torch.autograd.grad(t.square().sum(), x) for t in (eager, got))
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("shared", "compiled"),
    [(2, False), (3, False), (3, True)],
    ids=["two", "three", "three-compiled"],
)
@kinds
def test_one_tensor_as_several_operands_is_kept_and_cast_once(kind, shared, compiled, device):
    case = Case(1, 256, 256, 256, 256)
    one, _, other, grad = operands(case, torch.float16, device, requires_grad=True)
    tensors = [one, one, one if shared == 3 else other]

    def run(*tensors):
        return nonlocal_attention(*tensors, kind=kind, backend="chunked", workspace_mib=0.1)

    if compiled:
        torch._dynamo.reset()
        run = torch.compile(run, fullgraph=True, backend="aot_eager")
    run(*tensors)  # what compiling takes is not counted
    distinct, size, saved = 4 - shared, one.numel() * 2, {}

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        PeakMemory(device) as forward,
    ):
        out = run(*tensors)
    statistics = 0 if kind in ("dot_product", "relu") else size + 2 * 4 * 256
    assert sum(saved.values()) == distinct * size + statistics
    # float32 copies, out in both dtypes, and what a tile takes, or two states of D x V.
    slack = 0.1 * MIB + statistics - size * bool(statistics) + MIB / 16
    slack += 2 * 4 * 256 * 256 * (kind == "dot_product")
    assert forward.live_mib * MIB <= distinct * 2 * size + 2 * size + size + slack
    with PeakMemory(device) as backward:
        torch.autograd.grad(out, one, grad)
    # Likewise with the gradient; three gradients in float32 and in float16.
    assert backward.live_mib * MIB <= (distinct + 1) * 2 * size + 9 * size + slack


def test_one_tensor_as_both_scores_of_a_concatenation_compiles():
    torch._dynamo.reset()

    def run(score, value):
        return nonlocal_concat(score, score, value, backend="chunked")

    score = torch.randn(2, 9, dtype=torch.float64, requires_grad=True)
    value = torch.randn(2, 9, 4, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    eager, got = run(score, value), compiled(score, value)
    torch.testing.assert_close(got, eager, rtol=1e-12, atol=1e-12)
    expected, found = (torch.autograd.grad(t.square().sum(), (score, value)) for t in (eager, got))
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


def test_views_of_one_tensor_are_cast_once():
    one, other = torch.ones(2, 3, 4, dtype=torch.float16), torch.ones(2, 3, 4, dtype=torch.float16)
    a, b, c, d, e = cast(torch.float32, one, other, one.view(2, 3, 4), one.mT, one[:, :2])
    assert a is c and len({t.data_ptr() for t in (a, b, d, e)}) == 4
    assert cast(torch.float16, one, one)[1] is one
