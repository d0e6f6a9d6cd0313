"""Batch norms in Triton: statistics with the product, one pass for the norm, two for gradients.

product   every tile adds mean and squares of its channels as it is written (`pointwise/triton.py`);
          a second kernel puts the tiles' together, around the first tile's mean
forward   norm and residual in one pass
sums      what gradients of parameters need, added in equal runs of tiles whose number depends on
          sizes alone; a second kernel adds the runs in a fixed order: no atomics
gradient  z's gradient, another pass

Tiles lie as z does: maps along positions, rows along channels. Statistics are those of z as it is
rounded to its dtype; everything else is computed in float32.

Memory beyond inputs and outputs: for a product 8 C for each tile, of 64 positions or more, that an
item has; for sums 8 C a run, of which there are 1024 at most; C numbers for a parameter that is not
contiguous.

Unverified: no GPU has run these kernels.
"""

import torch
import triton
import triton.language as tl

from nlkernels import _launch
from nlkernels._launch import Config
from nlkernels.ops.norm import triton_tiles as each
from nlkernels.ops.norm.problem import like
from nlkernels.ops.norm.triton_sums import product, sums
from nlkernels.ops.norm.triton_tiles import candidates, run_best, strides, tiled

__all__ = ["KERNELS", "backward", "forward", "gradient", "product", "sums"]


def forward(
    z: torch.Tensor,
    moments: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    base: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """z, base (B,N,C), moments (2,C), gamma, beta (C,) -> (B,N,C), laid out like z."""
    out = like(z)
    parameters = (moments.contiguous(), gamma.contiguous(), beta.contiguous())
    added = out if base is None else base

    def run(config: Config) -> None:
        grid, sizes, constants = tiled(z, config, z, added)
        _launch.launch(
            _norm_forward,
            grid,
            z,
            added,
            out,
            *parameters,
            *strides(z, added, out),
            *sizes,
            eps,
            config=config,
            BASE=base is not None,
            **constants,
        )

    return run_best("norm_forward", z, run, out)


def gradient(
    grad: torch.Tensor,
    z: torch.Tensor,
    gamma: torch.Tensor,
    moments: torch.Tensor,
    means: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """The gradient of z, for the means (2,C) of what `sums` adds up; laid out like z."""
    return _gradient(grad, z, gamma, moments, means, 1.0, eps)


def backward(
    grad: torch.Tensor, z: torch.Tensor, gamma: torch.Tensor, moments: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of z, laid out like z, and the sums (2,C), where all of the batch is here."""
    found = sums(grad, z, moments, eps)
    share = 1 / max(1, z.shape[0] * z.shape[1])
    return _gradient(grad, z, gamma, moments, found, share, eps), found


def _gradient(grad, z, gamma, moments, totals, share, eps):
    """The gradient of z for the sums of all positions, of which a mean is `share`."""
    d_z = like(z)
    parameters = (moments.contiguous(), gamma.contiguous(), totals.contiguous())

    def run(config: Config) -> None:
        grid, sizes, constants = tiled(z, config, z, grad)
        _launch.launch(
            _norm_gradient,
            grid,
            grad,
            z,
            d_z,
            *parameters,
            *strides(grad, z, d_z),
            *sizes,
            share,
            eps,
            config=config,
            **constants,
        )

    return run_best("norm_gradient", z, run, d_z)


KERNELS = dict.fromkeys(("norm_forward", "norm_sums", "norm_gradient"), candidates)


@triton.jit
def _norm_forward(
    z,
    base,
    out,
    moments,
    gamma,
    beta,
    z_item,
    z_row,
    z_channel,
    base_item,
    base_row,
    base_channel,
    out_item,
    out_row,
    out_channel,
    positions,
    channels,
    eps,
    BASE: tl.constexpr,
    MAPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    item, position, channel = each.place(positions, channels, ROWS, COLUMNS)
    own = channel + tl.arange(0, COLUMNS)
    mean, inverse = each.statistics(moments, own, channels, eps)
    factor = tl.load(gamma + own, mask=own < channels, other=0.0).to(tl.float32)
    summand = tl.load(beta + own, mask=own < channels, other=0.0).to(tl.float32)
    total = each.read(
        z, item, position, channel, positions, channels, z_item, z_row, z_channel,
        MAPS, ROWS, COLUMNS, WIDE,
    )  # fmt: skip
    total = (total - each.along(mean, MAPS)) * each.along(inverse, MAPS)
    total = total * each.along(factor, MAPS) + each.along(summand, MAPS)
    if BASE:
        total += each.read(
            base, item, position, channel, positions, channels, base_item, base_row, base_channel,
            MAPS, ROWS, COLUMNS, WIDE,
        )  # fmt: skip
    each.write(
        out, total, item, position, channel, positions, channels, out_item, out_row, out_channel,
        MAPS, ROWS, COLUMNS, WIDE,
    )  # fmt: skip


@triton.jit
def _norm_gradient(
    grad,
    z,
    d_z,
    moments,
    gamma,
    totals,
    grad_item,
    grad_row,
    grad_channel,
    z_item,
    z_row,
    z_channel,
    d_item,
    d_row,
    d_channel,
    positions,
    channels,
    share,
    eps,
    MAPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    item, position, channel = each.place(positions, channels, ROWS, COLUMNS)
    own = channel + tl.arange(0, COLUMNS)
    inside = own < channels
    mean, inverse = each.statistics(moments, own, channels, eps)
    factor = tl.load(gamma + own, mask=inside, other=0.0).to(tl.float32) * inverse
    slope = tl.load(totals + own, mask=inside, other=0.0) * share
    level = tl.load(totals + channels + own, mask=inside, other=0.0) * share
    numbers = each.read(
        z, item, position, channel, positions, channels, z_item, z_row, z_channel,
        MAPS, ROWS, COLUMNS, WIDE,
    )  # fmt: skip
    d_out = each.read(
        grad, item, position, channel, positions, channels, grad_item, grad_row, grad_channel,
        MAPS, ROWS, COLUMNS, WIDE,
    )  # fmt: skip
    standard = (numbers - each.along(mean, MAPS)) * each.along(inverse, MAPS)
    d_out = d_out - each.along(level, MAPS) - standard * each.along(slope, MAPS)
    each.write(
        d_z, d_out * each.along(factor, MAPS), item, position, channel, positions, channels,
        d_item, d_row, d_channel, MAPS, ROWS, COLUMNS, WIDE,
    )  # fmt: skip
