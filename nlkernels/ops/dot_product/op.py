"""The dot-product operation: schema, fakes, FLOPs, autograd and backend choice.

Saved for backward: query, key and value. The backend "reference" (plain autograd) is a composite
outside the operator.
"""

import torch
from torch.utils.flop_counter import register_flop_formula

from nlkernels import _operations, _select
from nlkernels._spec import Problem
from nlkernels.ops import _autograd
from nlkernels.ops._library import define
from nlkernels.ops.dot_product import chunked, reference
from nlkernels.ops.dot_product.choice import TABLE

NAME = "dot_product"
BACKENDS = ("reference", "chunked")
_INSIDE = {"chunked": chunked}


def supports(backend: str, problem: Problem) -> list[str]:
    """Why `backend` cannot serve `problem`; an empty list when it can."""
    if backend == "sdpa":
        return ["scaled_dot_product_attention always applies a softmax"]
    return [] if backend in BACKENDS else [f"dot_product has no backend {backend!r}"]


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    backend: str = "auto",
    workspace_mib: float | None = None,
) -> torch.Tensor:
    """Dot-product attention of operands that `check_operands` has accepted."""
    if backend == "reference":
        return reference.attention(query, key, value, scale)
    return _DotProduct.apply(query, key, value, scale, backend, workspace_mib)


class _DotProduct(torch.autograd.Function):
    @staticmethod
    def forward(query, key, value, scale, backend, workspace_mib):
        return torch.ops.nlkernels.dot_product_forward(
            query, key, value, scale, backend, workspace_mib
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        query, key, value, *ctx.options = inputs
        ctx.save_for_backward(query, key, value)

    @staticmethod
    def backward(ctx, grad):
        arguments = (grad, *ctx.saved_tensors, *ctx.options)
        if _autograd.differentiates_again():
            return *_DotProductBackward.apply(*arguments), None, None, None
        return *torch.ops.nlkernels.dot_product_backward(*arguments), None, None, None


class _DotProductBackward(torch.autograd.Function):
    @staticmethod
    def forward(grad, query, key, value, scale, backend, workspace_mib):
        return torch.ops.nlkernels.dot_product_backward(
            grad, query, key, value, scale, backend, workspace_mib
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad, query, key, value, ctx.scale, _, _ = inputs
        ctx.save_for_backward(grad, query, key, value)

    @staticmethod
    def backward(ctx, *cotangents):
        grads = _autograd.double_backward(
            reference.attention, ctx.saved_tensors, ctx.scale, cotangents
        )
        return *grads, None, None, None


_operations.OPERATIONS[NAME] = _operations.Operation(BACKENDS, supports, _INSIDE, TABLE)


@define(
    "dot_product_forward(Tensor query, Tensor key, Tensor value, float scale, str backend, "
    "float? workspace_mib) -> Tensor"
)
def _forward(query, key, value, scale, backend, workspace_mib):
    module = _select.module(NAME, backend, "forward", query, key, value)
    return module.forward(query, key, value, scale, workspace_mib)


@define(
    "dot_product_backward(Tensor grad, Tensor query, Tensor key, Tensor value, float scale, "
    "str backend, float? workspace_mib) -> (Tensor, Tensor, Tensor)"
)
def _backward(grad, query, key, value, scale, backend, workspace_mib):
    module = _select.module(NAME, backend, "backward", query, key, value)
    return module.backward(grad, query, key, value, scale, workspace_mib)


@torch.library.register_fake("nlkernels::dot_product_forward")
def _(query, key, value, scale, backend, workspace_mib):
    return value.new_empty(query.shape[0], query.shape[1], value.shape[2])


@torch.library.register_fake("nlkernels::dot_product_backward")
def _(grad, query, key, value, scale, backend, workspace_mib):
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


@register_flop_formula(torch.ops.nlkernels.dot_product_forward)
def _(query, key, value, *args, out_shape=None, **kwargs) -> int:
    return min(chunked.flops(query[0], query[1], key[1], query[2], value[2]))


@register_flop_formula(torch.ops.nlkernels.dot_product_backward)
def _(grad, query, key, value, *args, out_shape=None, **kwargs) -> int:
    return min(chunked.backward_flops(query[0], query[1], key[1], query[2], value[2]))
