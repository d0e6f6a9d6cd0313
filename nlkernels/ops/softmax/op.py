"""The softmax operation: schema, fakes, FLOPs, autograd and backend choice.

`softmax_forward` and `softmax_backward` are opaque to torch.compile; the backend is chosen inside
them, so no guard or recompilation depends on it. The backends "reference" (plain autograd) and, on
GPUs, "sdpa" (torch's own autograd) are composites outside the operator.

Saved for backward: query, key, value, out and stats (2,B,N), whichever backend made them: each
row's extreme product top (the largest, or the smallest where scale < 0) and its sum total of
exp2(log2(e) scale (S - top)). Their common logarithm, one number, would round large scores away.
"""

import torch
from torch.utils.flop_counter import register_flop_formula

from nlkernels import _cuda, _ext, _launch, _operations, _select
from nlkernels._spec import Problem
from nlkernels.ops import _autograd
from nlkernels.ops._library import define
from nlkernels.ops._tiles import accumulator_dtype
from nlkernels.ops.softmax import chunked, cpp, reference, sdpa
from nlkernels.ops.softmax.choice import TABLE

NAME = "softmax"
BACKENDS = ("reference", "chunked", "cpp", "triton", "cuda", "sdpa")
# By name where a module can only be imported when its package is there.
_INSIDE = {
    "chunked": chunked,
    "cpp": cpp,
    "triton": "nlkernels.ops.softmax.triton",
    "cuda": "nlkernels.ops.softmax.cuda",
    "sdpa": sdpa,
}


def supports(backend: str, problem: Problem) -> list[str]:
    """Why `backend` cannot serve `problem`; an empty list when it can."""
    if backend not in BACKENDS:
        return [f"softmax has no backend {backend!r}"]
    if backend == "cpp":
        return _ext.unserved(problem)
    if backend == "triton":
        return _unsupported_by_triton(problem)
    if backend == "cuda":
        return _cuda.unserved(problem)
    return sdpa.unsupported(problem) if backend == "sdpa" else []


def _unsupported_by_triton(problem: Problem) -> list[str]:
    return _launch.unserved(problem)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    backend: str = "auto",
    workspace_mib: float | None = None,
) -> torch.Tensor:
    """Softmax attention of operands that `check_operands` has accepted."""
    if key.shape[1] == 0:
        raise ValueError(
            "nonlocal_attention: expected at least one key for a softmax, got M = 0; "
            "a softmax over nothing is undefined, drop the call"
        )
    if backend == "auto" and query.is_cuda:
        backend = _select.outside(NAME, query, key, value)
    if backend == "reference":
        return reference.attention(query, key, value, scale)
    if backend == "sdpa" and query.is_cuda:
        return sdpa.composite(query, key, value, scale)
    operands = _autograd.distinct(query, key, value)
    return _Softmax.apply(*operands, scale, backend, workspace_mib)[0]


@_autograd.signed
class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(query, key, value, scale, backend, workspace_mib):
        return torch.ops.nlkernels.softmax_forward(query, key, value, scale, backend, workspace_mib)

    @staticmethod
    def setup_context(ctx, inputs, output):
        query, key, value, *ctx.options = inputs
        ctx.save_for_backward(query, key, value, *output)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, grad, _):
        arguments = (grad, *ctx.saved_tensors, *ctx.options)
        if _autograd.differentiates_again():
            return *_SoftmaxBackward.apply(*arguments), None, None, None
        return *torch.ops.nlkernels.softmax_backward(*arguments), None, None, None


class _SoftmaxBackward(torch.autograd.Function):
    @staticmethod
    def forward(grad, query, key, value, out, stats, scale, backend, workspace_mib):
        return torch.ops.nlkernels.softmax_backward(
            grad, query, key, value, out, stats, scale, backend, workspace_mib
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad, query, key, value, _, _, ctx.scale, _, _ = inputs
        ctx.save_for_backward(grad, query, key, value)

    @staticmethod
    def backward(ctx, *cotangents):
        grads = _autograd.double_backward(
            reference.attention, ctx.saved_tensors, ctx.scale, cotangents
        )
        return *grads, None, None, None, None, None


_operations.OPERATIONS[NAME] = _operations.Operation(
    BACKENDS, supports, _INSIDE, TABLE, suite="nlkernels.ops.softmax.suite"
)


@define(
    "softmax_forward(Tensor query, Tensor key, Tensor value, float scale, str backend, "
    "float? workspace_mib) -> (Tensor, Tensor)"
)
def _forward(query, key, value, scale, backend, workspace_mib):
    module = _select.module(NAME, backend, "forward", query, key, value)
    return module.forward(query, key, value, scale, workspace_mib)


@define(
    "softmax_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, "
    "Tensor stats, float scale, str backend, float? workspace_mib) -> (Tensor, Tensor, Tensor)"
)
def _backward(grad, query, key, value, out, stats, scale, backend, workspace_mib):
    module = _select.module(NAME, backend, "backward", query, key, value)
    return module.backward(grad, query, key, value, out, stats, scale, workspace_mib)


@torch.library.register_fake("nlkernels::softmax_forward")
def _(query, key, value, scale, backend, workspace_mib):
    batch, rows, _ = query.shape
    stats = query.new_empty(2, batch, rows, dtype=accumulator_dtype(query.dtype))
    return value.new_empty(batch, rows, value.shape[2]), stats


@torch.library.register_fake("nlkernels::softmax_backward")
def _(grad, query, key, value, out, stats, scale, backend, workspace_mib):
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


@register_flop_formula(torch.ops.nlkernels.softmax_forward)
def _(query, key, value, *args, out_shape=None, **kwargs) -> int:
    (batch, rows, depth), (_, keys, value_depth) = query, value
    return 2 * batch * rows * keys * (depth + value_depth)


@register_flop_formula(torch.ops.nlkernels.softmax_backward)
def _(grad, query, key, value, *args, out_shape=None, **kwargs) -> int:
    (batch, rows, depth), (_, keys, value_depth) = query, value
    return 2 * batch * rows * keys * (3 * depth + 2 * value_depth)
