"""The end of a block, z = x + norm(weight y + bias): the output projection, a norm, the residual.

A norm that only scales and shifts each channel, as a batch norm in evaluation does, goes into the
weight: one product writes z. Statistics of the batch are taken with the product; norm and residual
are one more pass, the gradient of the product two (see `nlkernels/ops/norm`).

Saved for backward: y, which attention keeps too, and parameters; by the statistics of the batch
also the product, C numbers a position, unless `keep` is False: it is then computed again.

Memory beyond inputs and outputs, E bytes an element: E C V for the weight with its factors; by the
statistics of the batch E B C N in the forward, and in the backward as much, and once more for a
product that is computed again; and what `nlkernels/ops/pointwise` and `nlkernels/ops/norm` state.
"""

from typing import Any, NamedTuple

import torch

from nlkernels.ops._autograd import differentiated, differentiates_again, signed
from nlkernels.ops._tiles import accumulator_dtype
from nlkernels.ops.block import reference, statistics
from nlkernels.ops.block.layout import map_of, rows_of
from nlkernels.ops.pointwise import op as _pointwise  # noqa: F401 - its operators
from nlkernels.ops.region.problem import is_channels_last

Optional = torch.Tensor | None


class Norm(NamedTuple):
    """What stands between the output projection and the residual connection.

    Attributes:
        gamma, beta: factor and summand of each channel (C,); None for no norm.
        mean, var: fixed statistics (C,); None for none, or those of the batch.
        eps: added to the variance.
        batch: whether the statistics are those of the batch.
        group: the processes whose batches count together; None is this one alone.
    """

    gamma: Optional = None
    beta: Optional = None
    mean: Optional = None
    var: Optional = None
    eps: float = 0.0
    batch: bool = False
    group: Any = None


def merge(
    y: torch.Tensor,
    x: Optional,
    sizes: tuple[int, ...],
    weight: torch.Tensor,
    bias: Optional,
    norm: Norm,
    keep: bool = True,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x + norm(weight y + bias), and the statistics of the batch.

    Args:
        y: (B, N, V), what attention returned.
        x: (B, C, T, H, W), of the same dtype; None adds nothing, and returns rows' layout.
        sizes: (T, H, W).
        weight: of the output projection, (C, V).
        bias: of it, (C,) or None.
        norm: see `Norm`.
        keep: keep the product for the backward of a norm by the statistics of the batch.
        backend: of the products.

    Returns:
        (B, C, T, H, W), laid out as x; mean and unbiased variance (C,) of the batch, empty where
        it has no part in the norm.
    """
    tensors = (y, x, weight, bias, norm.gamma, norm.beta, norm.mean, norm.var)
    options = (tuple(sizes), norm.eps, norm.batch, norm.group, keep, backend)
    out, mean, var, *_ = _Merge.apply(*tensors, *options)
    return out, mean, var


@signed
class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(
        y, x, weight, bias, gamma, beta, mean, var, sizes, eps, batch, group, keep, backend
    ):
        maps = x is None or not is_channels_last(x)
        if not batch:
            weight, shift = _folded(weight, bias, gamma, beta, mean, var, eps)
            base = None if x is None else rows_of(x)
            out = _product(y, weight, shift, base, maps, backend)
            return map_of(out, sizes), *(y.new_empty(0) for _ in range(5))
        base = None if x is None else rows_of(x)
        z, found = statistics.product(y, weight, _wide(bias), maps, group, backend)
        out = statistics.normalise(z, base, gamma, beta, found, eps, backend)
        mean, var = found.moments[0].clone(), found.unbiased(z.shape[0] * z.shape[1])
        kept = z if keep else z.new_empty(0)
        return map_of(out, sizes), mean, var, *found, kept

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.sizes, ctx.eps, ctx.batch, ctx.group, _, ctx.backend = inputs
        ctx.mark_non_differentiable(*output[1:])
        # Zeros for the kept product are as large as it is.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output[3:])

    @staticmethod
    def backward(ctx, grad, *_):
        if grad is None:
            return (None,) * 14
        y, x, weight, bias, gamma, beta, mean, var, *found, kept = ctx.saved_tensors
        if differentiates_again():
            arguments = (y, x, weight, bias, gamma, beta, mean, var, ctx.sizes, ctx.eps, ctx.batch)
            if ctx.group is not None:
                raise NotImplementedError(
                    "NonLocalBlock: expected one backward pass through statistics of several "
                    "processes, got create_graph=True; use a batch norm of one process"
                )
            return *differentiated(_defined, arguments, grad), None, None, None
        none = (None,) * 8
        d_x = grad if ctx.needs_input_grad[1] else None
        maps = x is None or not is_channels_last(x)
        if not ctx.batch:
            d_y, *of_parameters = _fixed(ctx, grad, y, weight, bias, gamma, beta, mean, var)
            return d_y, d_x, *of_parameters, *none
        wants = ctx.needs_input_grad
        if not any((wants[0], *wants[2:6])):
            return None, d_x, None, None, None, None, *none
        if kept.numel() == 0:
            kept = _product(y, weight, _wide(bias), None, maps, ctx.backend)
        d_rows, d_gamma, d_beta = statistics.gradients(
            rows_of(grad), kept, gamma, statistics.Statistics(*found), ctx.eps, ctx.group,
            ctx.backend,
        )  # fmt: skip
        d_y = d_weight = d_bias = None
        if wants[0]:
            d_y = _product(d_rows, weight.mT, None, None, False, ctx.backend)
        if wants[2] or wants[3]:
            d_weight, d_bias = torch.ops.nlkernels.pointwise_outer(d_rows, y, ctx.backend)
            d_weight, d_bias = d_weight.to(weight.dtype), d_bias.to(weight.dtype)
        d_bias = None if bias is None else d_bias
        return d_y, d_x, d_weight, d_bias, d_gamma, d_beta, *none


def _fixed(ctx, grad, y, weight, bias, gamma, beta, mean, var) -> tuple[Optional, ...]:
    """Gradients of y and the parameters, where the norm is a factor and a summand."""
    rows = rows_of(grad)
    d_y = None
    if ctx.needs_input_grad[0]:
        folded, _ = _folded(weight, bias, gamma, beta, mean, var, ctx.eps)
        d_y = _product(rows, folded.mT, None, None, False, ctx.backend)
    if not any(ctx.needs_input_grad[2:6]):
        return d_y, None, None, None, None
    outer, sums = torch.ops.nlkernels.pointwise_outer(rows, y, ctx.backend)
    scale = _scale(gamma, var, ctx.eps)
    d_gamma = d_beta = None
    if gamma is not None:
        # The norm's input less its mean, summed with the gradient.
        centred = (outer * weight).sum(1)
        offset = 0 if bias is None else bias
        centred = centred + sums * (offset if mean is None else offset - mean)
        inverse = 1 if var is None else torch.rsqrt(_wide(var) + ctx.eps)
        d_gamma, d_beta = (centred * inverse).to(gamma.dtype), sums.to(beta.dtype)
    d_weight = (outer if scale is None else outer * scale[:, None]).to(weight.dtype)
    d_bias = None if bias is None else (sums if scale is None else sums * scale).to(bias.dtype)
    return d_y, d_weight, d_bias, d_gamma, d_beta


def _folded(weight, bias, gamma, beta, mean, var, eps) -> tuple[torch.Tensor, Optional]:
    """Weight and shift of the output projection and the norm behind it, in one."""
    scale = _scale(gamma, var, eps)
    if scale is None:
        return weight, _wide(bias)
    shift = scale.new_zeros(scale.shape) if bias is None else _wide(bias)
    shift = scale * (shift if mean is None else shift - mean) + beta
    return (weight * scale[:, None]).to(weight.dtype), shift


def _scale(gamma, var, eps) -> Optional:
    if gamma is None or var is None:
        return _wide(gamma)
    return _wide(gamma) * torch.rsqrt(_wide(var) + eps)


def _wide(tensor: Optional) -> Optional:
    return None if tensor is None else tensor.to(accumulator_dtype(tensor.dtype))


def _product(features, weight, shift, base, maps, backend) -> torch.Tensor:
    return torch.ops.nlkernels.pointwise(features, weight, shift, base, maps, backend)


def _defined(y, x, weight, bias, gamma, beta, mean, var, sizes, eps, batch):
    """The definition, whose result has x's shape."""
    z = reference.merge(y, None, weight, bias, gamma, beta, mean, var, eps, batch)
    z = z.unflatten(2, sizes)
    return z if x is None else x + z
