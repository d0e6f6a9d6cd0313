"""Batch norm by the statistics of a batch, which is that of one process or shared by several.

Memory beyond inputs and outputs: what `nlkernels/ops/norm` states, and a few numbers a channel.
"""

from typing import Any, NamedTuple

import torch
from torch import distributed

from nlkernels.ops.norm import op as _norm  # noqa: F401 - its operators

Optional = torch.Tensor | None


class Statistics(NamedTuple):
    """Over all positions, items and processes.

    Attributes:
        moments: mean and biased variance of each channel, (2, C), in at least float32.
        count: how many numbers of a channel there were, (1,); empty for those of one process.
    """

    moments: torch.Tensor
    count: torch.Tensor

    def unbiased(self, numbers: int) -> torch.Tensor:
        """Variance as running statistics take it, where this process has so many numbers."""
        count = self.count if self.count.numel() > 0 else numbers
        return self.moments[1] * (count / (count - 1))


def product(
    y: torch.Tensor, weight: torch.Tensor, shift: Optional, maps: bool, group: Any, backend: str
) -> tuple[torch.Tensor, Statistics]:
    """z = weight y + shift as (B,N,C), and its statistics.

    `group` is the processes whose batches count together; None is this one alone.
    """
    z, moments = torch.ops.nlkernels.norm_product(y, weight, shift, maps, backend)
    if group is None:
        return z, Statistics(moments, moments.new_empty(0))
    return z, _over(moments, z.shape[0] * z.shape[1], group)


def normalise(
    z: torch.Tensor,
    base: Optional,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    found: Statistics,
    eps: float,
    backend: str,
) -> torch.Tensor:
    """base + gamma (z - mean) / sqrt(variance + eps) + beta of z and base (B,N,C)."""
    return torch.ops.nlkernels.norm_forward(z, found.moments, gamma, beta, base, eps, backend)


def gradients(
    grad: torch.Tensor,
    z: torch.Tensor,
    gamma: torch.Tensor,
    found: Statistics,
    eps: float,
    group: Any,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of z, gamma and beta for that of the normalised z, these of this process alone."""
    if group is None:
        d_z, sums = torch.ops.nlkernels.norm_backward(grad, z, gamma, found.moments, eps, backend)
    else:
        sums = torch.ops.nlkernels.norm_sums(grad, z, found.moments, eps, backend)
        every = sums.clone()
        distributed.all_reduce(every, group=group)
        d_z = torch.ops.nlkernels.norm_gradient(
            grad, z, gamma, found.moments, every / found.count, eps, backend
        )
    return d_z, *sums.to(gamma.dtype).unbind()


def _over(moments: torch.Tensor, count: int, group: Any) -> Statistics:
    """Statistics of all processes from those of each."""
    own = torch.cat([moments.flatten(), moments.new_full((1,), count)])
    every = own.new_empty(distributed.get_world_size(group), own.shape[0])
    distributed.all_gather(list(every.unbind()), own, group=group)
    means, variances = every[:, :-1].unflatten(1, (2, -1)).unbind(1)
    counts = every[:, -1:]
    total = counts.sum(0)
    mean = (counts * means).sum(0) / total
    variance = (counts * (variances + (means - mean) ** 2)).sum(0) / total
    return Statistics(torch.stack([mean, variance]), total)
