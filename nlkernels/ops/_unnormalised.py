"""Attention without a softmax as an operation: schema, fakes, FLOPs, autograd and backend choice.

`define` makes the operators of one kind. Saved for backward: query, key and value. The backend
"reference" (plain autograd) is a composite outside the operator.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from nlkernels import _ext, _launch, _operations, _select
from nlkernels._spec import Problem
from nlkernels.ops import _autograd, _library

BACKENDS = ("reference", "chunked", "cpp", "triton")
# Kind -> its definition: (query, key, value, scale) -> out.
_DEFINITIONS: dict[str, Callable[..., torch.Tensor]] = {}


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
    return _Attention.apply(*operands, name, scale, backend, workspace_mib)


def supports(name: str, backend: str, problem: Problem) -> list[str]:
    """Why `backend` cannot serve `problem` of kind `name`; an empty list when it can."""
    if backend == "sdpa":
        return ["scaled_dot_product_attention always applies a softmax"]
    if backend not in BACKENDS:
        return [f"{name} has no backend {backend!r}"]
    if backend == "cpp":
        return _ext.unserved(problem)
    return _unsupported_by_triton(problem) if backend == "triton" else []


def _unsupported_by_triton(problem: Problem) -> list[str]:
    return _launch.unserved(problem)


def define(
    name: str,
    definition: Callable[..., torch.Tensor],
    operation: _operations.Operation,
    flops: Callable[..., int],
    backward_flops: Callable[..., int],
) -> None:
    """Register the operators `nlkernels::{name}_forward` and `nlkernels::{name}_backward`.

    Args:
        name: of the kind.
        definition: (query, key, value, scale) -> out, differentiable by autograd.
        operation: what dispatch knows of it.
        flops: (batch, queries, keys, depth, value_depth) -> FLOPs of the forward pass.
        backward_flops: the same of the backward pass.
    """
    _DEFINITIONS[name] = definition
    _operations.OPERATIONS[name] = operation

    @_library.define(
        f"{name}_forward(Tensor query, Tensor key, Tensor value, float scale, str backend, "
        "float? workspace_mib) -> Tensor"
    )
    def forward(query, key, value, scale, backend, workspace_mib):
        module = _select.module(name, backend, "forward", query, key, value)
        return module.forward(query, key, value, scale, workspace_mib)

    @_library.define(
        f"{name}_backward(Tensor grad, Tensor query, Tensor key, Tensor value, float scale, "
        "str backend, float? workspace_mib) -> (Tensor, Tensor, Tensor)"
    )
    def backward(grad, query, key, value, scale, backend, workspace_mib):
        module = _select.module(name, backend, "backward", query, key, value)
        return module.backward(grad, query, key, value, scale, workspace_mib)

    @torch.library.register_fake(f"nlkernels::{name}_forward")
    def _(query, key, value, scale, backend, workspace_mib):
        return value.new_empty(query.shape[0], query.shape[1], value.shape[2])

    @torch.library.register_fake(f"nlkernels::{name}_backward")
    def _(grad, query, key, value, scale, backend, workspace_mib):
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)

    @register_flop_formula(_operator(name, "forward"))
    def _(query, key, value, *args, out_shape=None, **kwargs) -> int:
        return flops(query[0], query[1], key[1], query[2], value[2])

    @register_flop_formula(_operator(name, "backward"))
    def _(grad, query, key, value, *args, out_shape=None, **kwargs) -> int:
        return backward_flops(query[0], query[1], key[1], query[2], value[2])


def _operator(name: str, direction: str) -> Any:
    return getattr(torch.ops.nlkernels, f"{name}_{direction}")


@_autograd.signed
class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(query, key, value, name, scale, backend, workspace_mib):
        return _operator(name, "forward")(query, key, value, scale, backend, workspace_mib)

    @staticmethod
    def setup_context(ctx, inputs, output):
        query, key, value, ctx.name, *ctx.options = inputs
        ctx.save_for_backward(query, key, value)

    @staticmethod
    def backward(ctx, grad):
        operands = (grad, *ctx.saved_tensors)
        if _autograd.differentiates_again():
            grads = _AttentionBackward.apply(*operands, ctx.name, *ctx.options)
        else:
            grads = _operator(ctx.name, "backward")(*operands, *ctx.options)
        return *grads, None, None, None, None


class _AttentionBackward(torch.autograd.Function):
    @staticmethod
    def forward(grad, query, key, value, name, scale, backend, workspace_mib):
        return _operator(name, "backward")(grad, query, key, value, scale, backend, workspace_mib)

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad, query, key, value, ctx.name, ctx.scale, _, _ = inputs
        ctx.save_for_backward(grad, query, key, value)

    @staticmethod
    def backward(ctx, *cotangents):
        grads = _autograd.double_backward(
            _DEFINITIONS[ctx.name], ctx.saved_tensors, ctx.scale, cotangents
        )
        return *grads, None, None, None, None
