"""Batch normalisation of a map by its own statistics: torch's, or those of several processes.

Memory beyond inputs and outputs: a few numbers a channel; over processes, one copy of the map in
the type that sums have for each pass, and their elementwise intermediates.
"""

from typing import Any, NamedTuple

import torch
from torch import distributed

from nlkernels.ops._tiles import accumulator_dtype


class Statistics(NamedTuple):
    """Of each channel (C,), in at least float32, over all positions, items and processes.

    Attributes:
        mean: the mean.
        inverse: 1 / sqrt(biased variance + eps).
        var: the unbiased variance, as running statistics take it.
        count: how many numbers of a channel there were, (1,).
    """

    mean: torch.Tensor
    inverse: torch.Tensor
    var: torch.Tensor
    count: torch.Tensor


def normalise(
    z: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor, eps: float, group: Any
) -> tuple[torch.Tensor, Statistics]:
    """(z - mean) inverse gamma + beta of z (B,C,*positions), and its statistics.

    `group` is the processes whose batches count together; None is this one alone.
    """
    if group is not None:
        return _normalise_over(z, gamma, beta, eps, group)
    # With a momentum of 1 torch leaves the statistics of this batch in the running ones.
    mean, var = gamma.new_zeros(2, z.shape[1]).unbind()
    out, mean_, inverse = torch.ops.aten.native_batch_norm(
        z, gamma, beta, mean, var, True, 1.0, eps
    )
    return out, Statistics(mean_, inverse, var, z.new_empty(0))


def gradients(
    grad: torch.Tensor,
    z: torch.Tensor,
    gamma: torch.Tensor,
    found: Statistics,
    eps: float,
    group: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of z, gamma and beta for that of the normalised z."""
    if group is not None:
        return _gradients_over(grad, z, gamma, found, group)
    return torch.ops.aten.native_batch_norm_backward(
        grad, z, gamma, None, None, found.mean, found.inverse, True, eps, [True, True, True]
    )


def _normalise_over(z, gamma, beta, eps, group) -> tuple[torch.Tensor, Statistics]:
    wide = z.to(accumulator_dtype(z.dtype))
    axes = [axis for axis in range(z.dim()) if axis != 1]
    var, mean = torch.var_mean(wide, axes, correction=0)
    own = torch.cat([mean, var, mean.new_full((1,), z.numel() / z.shape[1])])
    every = own.new_empty(distributed.get_world_size(group), own.shape[0])
    distributed.all_gather(list(every.unbind()), own, group=group)
    means, variances = every[:, :-1].unflatten(1, (2, -1)).unbind(1)
    counts = every[:, -1:]
    count = counts.sum(0)
    mean = (counts * means).sum(0) / count
    var = (counts * (variances + (means - mean) ** 2)).sum(0) / count
    inverse = torch.rsqrt(var + eps)
    scale = gamma.to(wide.dtype) * inverse
    out = torch.addcmul(_lift(beta.to(wide.dtype), z), wide - _lift(mean, z), _lift(scale, z))
    return out.to(z.dtype), Statistics(mean, inverse, var * count / (count - 1), count)


def _gradients_over(grad, z, gamma, found, group):
    dtype = accumulator_dtype(z.dtype)
    axes = [axis for axis in range(z.dim()) if axis != 1]
    grad = grad.to(dtype)
    standard = (z.to(dtype) - _lift(found.mean, z)) * _lift(found.inverse, z)
    d_gamma, d_beta = (grad * standard).sum(axes), grad.sum(axes)
    sums = torch.stack([d_gamma, d_beta])
    distributed.all_reduce(sums, group=group)
    of_standard, of_grad = (_lift(each, z) for each in sums / found.count)
    scale = _lift(gamma.to(dtype) * found.inverse, z)
    d_z = scale * (grad - of_grad - standard * of_standard)
    return d_z.to(z.dtype), d_gamma.to(gamma.dtype), d_beta.to(gamma.dtype)


def _lift(channels: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    return channels.view(-1, *[1] * (z.dim() - 2))
