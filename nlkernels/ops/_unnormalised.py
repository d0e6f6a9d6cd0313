"""Attention without a softmax as an operation: schema, fakes, FLOPs, autograd and backend choice.

`define` makes the operators of one kind. Saved for backward: query, key, value and, of a kind that
has one, the state that its forward returned. The backend "reference" (plain autograd) is a
composite outside the operator.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from nlkernels import _cuda, _ext, _launch, _operations, _select
from nlkernels._spec import Problem
from nlkernels.ops import _autograd, _library

BACKENDS = ("reference", "chunked", "cpp", "triton", "cuda")
# Kind -> its definition: (query, key, value, scale) -> out.
_DEFINITIONS: dict[str, Callable[..., torch.Tensor]] = {}
# Kinds whose forward returns a state.
_WITH_STATE: set[str] = set()


def attention(
    name: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    backend: str = "auto",
    workspace_mib: float | None = None,
) -> torch.Tensor:
    """Attention of kind `name`, of operands that `check_operands` has accepted."""
    if backend == "reference":
        return _DEFINITIONS[name](query, key, value, scale)
    operands = _autograd.distinct(query, key, value)
    keep = (_autograd.differentiates(*operands),) if name in _WITH_STATE else ()
    return _Attention.apply(*operands, name, keep, scale, backend, workspace_mib)[0]


def supports(name: str, backend: str, problem: Problem) -> list[str]:
    """Why `backend` cannot serve `problem` of kind `name`; an empty list when it can."""
    if backend == "sdpa":
        return ["scaled_dot_product_attention always applies a softmax"]
    if backend not in BACKENDS:
        return [f"{name} has no backend {backend!r}"]
    if backend == "cpp":
        return _ext.unserved(problem)
    if backend == "cuda":
        return _cuda.unserved(problem)
    return _unsupported_by_triton(problem) if backend == "triton" else []


def _unsupported_by_triton(problem: Problem) -> list[str]:
    return _launch.unserved(problem)


def define(
    name: str,
    definition: Callable[..., torch.Tensor],
    operation: _operations.Operation,
    flops: Callable[..., int],
    backward_flops: Callable[..., int],
    new_state: Callable[..., torch.Tensor] | None = None,
) -> None:
    """Register the operators `nlkernels::{name}_forward` and `nlkernels::{name}_backward`.

    Where there is a `new_state`, the forward also takes `keep`, whether a gradient will be asked
    for, and also returns a state, which the backward takes after the value.

    Args:
        name: of the kind.
        definition: (query, key, value, scale) -> out, differentiable by autograd.
        operation: what dispatch knows of it.
        flops: (batch, queries, keys, depth, value_depth) -> FLOPs of the forward pass.
        backward_flops: the same of the backward pass; with `state`, the shape of one.
        new_state: (query, key, value, keep) -> a tensor of the state's shape and dtype, whichever
            backend runs.
    """
    _DEFINITIONS[name] = definition
    _operations.OPERATIONS[name] = operation
    returned, taken, option = "Tensor", "", ""
    if new_state is not None:
        _WITH_STATE.add(name)
        returned, taken, option = "(Tensor, Tensor)", "Tensor state, ", ", bool keep"

    @_library.define(
        f"{name}_forward(Tensor query, Tensor key, Tensor value, float scale, str backend, "
        f"float? workspace_mib{option}) -> {returned}"
    )
    def forward(query, key, value, scale, backend, workspace_mib, *keep):
        module = _select.module(name, backend, "forward", query, key, value)
        return module.forward(query, key, value, scale, workspace_mib, *keep)

    @_library.define(
        f"{name}_backward(Tensor grad, Tensor query, Tensor key, Tensor value, {taken}float scale, "
        "str backend, float? workspace_mib) -> (Tensor, Tensor, Tensor)"
    )
    def backward(grad, query, key, value, *arguments):
        *state, scale, backend, workspace_mib = arguments
        module = _select.module(name, backend, "backward", query, key, value)
        return module.backward(grad, query, key, value, *state, scale, workspace_mib)

    @torch.library.register_fake(f"nlkernels::{name}_forward")
    def _(query, key, value, scale, backend, workspace_mib, *keep):
        out = value.new_empty(query.shape[0], query.shape[1], value.shape[2])
        return out if new_state is None else (out, new_state(query, key, value, *keep))

    @torch.library.register_fake(f"nlkernels::{name}_backward")
    def _(grad, query, key, value, *arguments):
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)

    @register_flop_formula(_operator(name, "forward"))
    def _(query, key, value, *args, out_shape=None, **kwargs) -> int:
        return flops(query[0], query[1], key[1], query[2], value[2])

    @register_flop_formula(_operator(name, "backward"))
    def _(grad, query, key, value, *args, out_shape=None, **kwargs) -> int:
        state = {} if new_state is None else {"state": args[0]}
        return backward_flops(query[0], query[1], key[1], query[2], value[2], **state)


def _operator(name: str, direction: str) -> Any:
    return getattr(torch.ops.nlkernels, f"{name}_{direction}")


@_autograd.signed
class _Attention(torch.autograd.Function):
    """Returns out and, of a kind that has one, the state; `keep` is empty for the others."""

    @staticmethod
    def forward(query, key, value, name, keep, scale, backend, workspace_mib):
        arguments = (query, key, value, scale, backend, workspace_mib, *keep)
        found = _operator(name, "forward")(*arguments)
        return found if keep else (found,)

    @staticmethod
    def setup_context(ctx, inputs, output):
        query, key, value, ctx.name, _, *ctx.options = inputs
        ctx.save_for_backward(query, key, value, *output[1:])
        ctx.mark_non_differentiable(*output[1:])
        # Zeros for the state are as large as it is.
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad, *_):
        if grad is None:
            return (None,) * 8
        query, key, value, *state = ctx.saved_tensors
        operands = (grad, query, key, value)
        if _autograd.differentiates_again():
            grads = _AttentionBackward.apply(*operands, ctx.name, tuple(state), *ctx.options)
        else:
            grads = _operator(ctx.name, "backward")(*operands, *state, *ctx.options)
        return *grads, None, None, None, None, None


class _AttentionBackward(torch.autograd.Function):
    @staticmethod
    def forward(grad, query, key, value, name, state, scale, backend, workspace_mib):
        arguments = (grad, query, key, value, *state, scale, backend, workspace_mib)
        return _operator(name, "backward")(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad, query, key, value, ctx.name, _, ctx.scale, _, _ = inputs
        ctx.save_for_backward(grad, query, key, value)

    @staticmethod
    def backward(ctx, *cotangents):
        grads = _autograd.double_backward(
            _DEFINITIONS[ctx.name], ctx.saved_tensors, ctx.scale, cotangents
        )
        return *grads, None, None, None, None, None
