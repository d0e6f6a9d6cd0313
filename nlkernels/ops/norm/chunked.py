"""Batch norms by torch's own kernels, on any device.

Memory beyond inputs and outputs, E bytes an element: E B N C for a gradient that lies otherwise
than z; A B N C (A bytes a sum) for the statistics of 16-bit numbers on a CPU, and the same and
elementwise intermediates for a gradient whose sums are those of several processes.
"""

import torch

from nlkernels.ops._tiles import accumulator_dtype
from nlkernels.ops.norm.problem import like


def moments(z: torch.Tensor) -> torch.Tensor:
    """Mean and biased variance (2,C) of the channels of z (B,N,C)."""
    if z.device.type == "cpu":
        # Torch's kernel adds one row after another there: its float32 is too short for many.
        wide = z.to(accumulator_dtype(z.dtype))
        variance, mean = torch.var_mean(wide, (0, 1), correction=0)
        return torch.stack([mean, variance])
    # Running statistics, which nobody reads, keep torch from rounding these to 16 bits.
    unread = z.new_zeros(2, z.shape[2], dtype=accumulator_dtype(z.dtype))
    return torch.stack(torch.ops.aten.batch_norm_update_stats(_map(z), *unread.unbind(), 0.0))


def forward(
    z: torch.Tensor,
    moments: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    base: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """z, base (B,N,C), moments (2,C), gamma, beta (C,) -> (B,N,C), laid out like z."""
    parameters = (gamma.to(moments.dtype), beta.to(moments.dtype))
    arguments = (*parameters, *moments.unbind(), False, 0.0, eps)
    out, *_ = torch.ops.aten.native_batch_norm(_map(z), *arguments)
    rows = _rows(out)
    return rows if base is None else rows.add_(base)


def sums(grad: torch.Tensor, z: torch.Tensor, moments: torch.Tensor, eps: float) -> torch.Tensor:
    """Grad, z (B,N,C) -> sums (2,C) of grad times the standardised z, and of grad."""
    ones = moments.new_ones(moments.shape[1])
    _, of_standard, of_grad = _gradients(grad, z, ones, moments, eps, [False, True, True])
    return torch.stack([of_standard, of_grad])


def gradient(
    grad: torch.Tensor,
    z: torch.Tensor,
    gamma: torch.Tensor,
    moments: torch.Tensor,
    means: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """The gradient of z, for the means (2,C) of what `sums` adds up; laid out like z."""
    dtype = moments.dtype
    (mean, variance), (slope, level) = moments, means
    inverse = _inverse(variance, eps)
    standard = (z.to(dtype) - mean) * inverse
    d_z = (grad.to(dtype) - level - standard * slope) * (gamma.to(dtype) * inverse)
    return like(z).copy_(d_z)


def backward(
    grad: torch.Tensor, z: torch.Tensor, gamma: torch.Tensor, moments: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of z, laid out like z, and the sums (2,C), where all of the batch is here."""
    d_z, *found = _gradients(grad, z, gamma, moments, eps, [True, True, True])
    return _rows(d_z), torch.stack(found)


def _gradients(grad, z, gamma, moments, eps, wanted):
    if grad.stride() != z.stride():
        # Where the two lie differently, torch 2.13 returns wrong numbers for one item.
        grad = like(z).copy_(grad)
    inverse = _inverse(moments[1], eps)
    d_z, of_standard, of_grad = torch.ops.aten.native_batch_norm_backward(
        _map(grad), _map(z), gamma.to(moments.dtype), None, None, moments[0], inverse, True, eps,
        wanted,
    )  # fmt: skip
    if grad.device.type == "cpu":
        # As in `moments`: one row after another.
        of_grad = grad.sum((0, 1), dtype=moments.dtype)
    return d_z, of_standard, of_grad


def _inverse(variance: torch.Tensor, eps: float) -> torch.Tensor:
    """1 / sqrt(variance + eps), rounded once: sums of gradients are multiplied by it."""
    return torch.rsqrt(variance.double() + eps).to(variance.dtype)


def _map(rows: torch.Tensor) -> torch.Tensor:
    """(B,N,C) -> (B,C,N,1,1), a view whose strides tell torch whether channels lie together."""
    batch, positions, channels = rows.shape
    item, position, channel = rows.stride()
    if batch == 1:
        # A view gives a single item any stride.
        item = positions * channels
    steps = (channels, channels) if channel == 1 and channels > 1 else (1, 1)
    return rows.as_strided((batch, channels, positions, 1, 1), (item, channel, position, *steps))


def _rows(features: torch.Tensor) -> torch.Tensor:
    """(B,C,N,1,1) -> (B,N,C), a view."""
    rows = features.flatten(2).mT
    if rows.shape[0] != 1:
        return rows
    # torch gives a single item another stride.
    return rows.as_strided(rows.shape, (rows.numel(), *rows.stride()[1:]))
