"""The concatenation: schema, fakes, FLOPs, autograd and backend choice.

Saved for backward: query_score, key_score and value. The backend "reference" (plain autograd) is a
composite outside the operator.
"""

import torch
from torch.utils.flop_counter import register_flop_formula

from nlkernels import _cuda, _ext, _launch, _operations, _select
from nlkernels._spec import Problem
from nlkernels.ops import _autograd
from nlkernels.ops._library import define
from nlkernels.ops.concat import chunked, cpp, reference
from nlkernels.ops.concat.choice import TABLE
from nlkernels.ops.concat.problem import problem

NAME = "concat"
BACKENDS = ("reference", "chunked", "cpp", "triton", "cuda")
_INSIDE = {
    "chunked": chunked,
    "cpp": cpp,
    "triton": "nlkernels.ops.concat.triton",
    "cuda": "nlkernels.ops.concat.cuda",
}


def supports(backend: str, problem: Problem) -> list[str]:
    """Why `backend` cannot serve `problem`; an empty list when it can."""
    if backend not in BACKENDS:
        return [f"{NAME} has no backend {backend!r}"]
    if backend == "cpp":
        return _ext.unserved(problem)
    if backend == "cuda":
        return _cuda.unserved(problem)
    if backend != "triton":
        return []
    return _launch.unserved(problem)


def head(problem: Problem) -> tuple[int, ...]:
    """V, rounded up to a multiple of 16: what decides about a kernel's code."""
    return _operations.attention_head(problem)[1:]


def attend(
    query_score: torch.Tensor,
    key_score: torch.Tensor,
    value: torch.Tensor,
    backend: str = "auto",
) -> torch.Tensor:
    """The concatenation of operands that `problem.check_operands` has accepted."""
    if backend == "reference":
        return reference.attend(query_score, key_score, value)
    operands = _autograd.distinct(query_score, key_score, value)
    return _Concat.apply(*operands, backend)


@_autograd.signed
class _Concat(torch.autograd.Function):
    @staticmethod
    def forward(query_score, key_score, value, backend):
        return torch.ops.nlkernels.concat_forward(query_score, key_score, value, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        query_score, key_score, value, ctx.backend = inputs
        ctx.save_for_backward(query_score, key_score, value)

    @staticmethod
    def backward(ctx, grad):
        arguments = (grad, *ctx.saved_tensors, ctx.backend)
        if _autograd.differentiates_again():
            return *_ConcatBackward.apply(*arguments), None
        return *torch.ops.nlkernels.concat_backward(*arguments), None


class _ConcatBackward(torch.autograd.Function):
    @staticmethod
    def forward(grad, query_score, key_score, value, backend):
        return torch.ops.nlkernels.concat_backward(grad, query_score, key_score, value, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:4])

    @staticmethod
    def backward(ctx, d_query, d_key, d_value):
        grad, query_score, key_score, value = ctx.saved_tensors
        operands = (grad, query_score.unsqueeze(2), key_score.unsqueeze(2), value)
        cotangents = (d_query.unsqueeze(2), d_key.unsqueeze(2), d_value)
        d_grad, d_query, d_key, d_value = _autograd.double_backward(
            _of_columns, operands, 1.0, cotangents
        )
        return d_grad, d_query.squeeze(2), d_key.squeeze(2), d_value, None


def _of_columns(query, key, value, scale):
    """The definition of scores (B,N,1) and (B,M,1): `double_backward` works on attentions."""
    return reference.attend(query.squeeze(2), key.squeeze(2), value)


_operations.OPERATIONS[NAME] = _operations.Operation(
    BACKENDS,
    supports,
    _INSIDE,
    TABLE,
    describe=problem,
    head=head,
    suite="nlkernels.ops.concat.suite",
    function="nonlocal_concat",
)


@define("concat_forward(Tensor query_score, Tensor key_score, Tensor value, str backend) -> Tensor")
def _forward(query_score, key_score, value, backend):
    module = _select.module(NAME, backend, "forward", query_score, key_score, value)
    return module.forward(query_score, key_score, value)


@define(
    "concat_backward(Tensor grad, Tensor query_score, Tensor key_score, Tensor value, "
    "str backend) -> (Tensor, Tensor, Tensor)"
)
def _backward(grad, query_score, key_score, value, backend):
    module = _select.module(NAME, backend, "backward", query_score, key_score, value)
    return module.backward(grad, query_score, key_score, value)


@torch.library.register_fake("nlkernels::concat_forward")
def _(query_score, key_score, value, backend):
    return value.new_empty(value.shape[0], query_score.shape[1], value.shape[2])


@torch.library.register_fake("nlkernels::concat_backward")
def _(grad, query_score, key_score, value, backend):
    return tuple(t.new_empty(t.shape) for t in (query_score, key_score, value))


@register_flop_formula(torch.ops.nlkernels.concat_forward)
def _(query_score, key_score, value, *args, out_shape=None, **kwargs) -> int:
    (batch, rows), (_, keys, depth) = query_score, value
    return 4 * batch * (rows + keys) * depth


@register_flop_formula(torch.ops.nlkernels.concat_backward)
def _(grad, query_score, key_score, value, *args, out_shape=None, **kwargs) -> int:
    (batch, rows), (_, keys, depth) = query_score, value
    return 6 * batch * (rows + keys) * depth
