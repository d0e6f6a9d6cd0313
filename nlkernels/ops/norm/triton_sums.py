"""What a batch norm's kernels add up over all positions: statistics, and sums of gradients.

Tiles, and runs of tiles whose number depends on sizes alone, are added by a second kernel in a
fixed order: no atomics. Memory is stated in `triton.py`.

Unverified: no GPU has run these kernels.
"""

import torch
import triton
import triton.language as tl

from nlkernels import _launch
from nlkernels._launch import Config
from nlkernels.ops.norm import triton_tiles as each
from nlkernels.ops.norm.triton_tiles import run_best, strides, tiled
from nlkernels.ops.pointwise.triton import product_and_parts
from nlkernels.ops.pointwise.triton_outer import add_runs

# Some programs for each multiprocessor of the largest GPUs: sums are bound by memory.
PROGRAMS = 1024
# The kernel that puts statistics together: so many tiles of so many channels at a time.
_TOGETHER = Config(64, 16, warps=4, stages=1)


def product(
    features: torch.Tensor, weight: torch.Tensor, shift: torch.Tensor | None, maps: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (B,N,K), weight (C,K), shift (C,) -> z (B,N,C), moments (2,C)."""
    z, parts, rows = product_and_parts([(features, weight)], shift, None, maps)
    batch, positions, channels = z.shape
    moments = z.new_empty(2, channels, dtype=torch.float32)
    if batch * positions == 0:
        return z, moments.fill_(float("nan"))
    _launch.launch(
        _put_together,
        (triton.cdiv(channels, _TOGETHER.columns),),
        parts,
        moments,
        positions,
        channels,
        batch * parts.shape[1],
        1 / (batch * positions),
        config=_TOGETHER,
        TILE=rows,
        RUNS=_TOGETHER.rows,
        COLUMNS=_TOGETHER.columns,
    )
    return z, moments


def sums(grad: torch.Tensor, z: torch.Tensor, moments: torch.Tensor, eps: float) -> torch.Tensor:
    """Grad, z (B,N,C) -> sums (2,C) of grad times the standardised z, and of grad."""
    batch, positions, channels = z.shape
    # Written by the kernels, unless there is nothing to add.
    found = torch.empty_like(moments) if z.numel() > 0 else torch.zeros_like(moments)
    moments = moments.contiguous()

    def run(config: Config) -> None:
        _, sizes, constants = tiled(z, config, z, grad)
        tiles = triton.cdiv(channels, config.columns)
        steps = batch * triton.cdiv(positions, config.rows)
        per_run = triton.cdiv(steps, max(1, min(steps, PROGRAMS // tiles)))
        runs = triton.cdiv(steps, per_run)
        # One run is the result itself.
        parts = found if runs == 1 else found.new_empty(runs, 2, channels)
        _launch.launch(
            _norm_sums,
            (tiles * runs,),
            grad,
            z,
            moments,
            parts,
            *strides(grad, z),
            *sizes,
            steps,
            per_run,
            eps,
            config=config,
            **constants,
        )
        if runs > 1:
            add_runs(parts.flatten(1), *found.unbind())

    return run_best("norm_sums", z, run, found)


@triton.jit(do_not_specialize=["runs"])
def _put_together(
    parts,
    moments,
    positions,
    channels,
    runs,
    share,
    TILE: tl.constexpr,
    RUNS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Mean and biased variance of COLUMNS channels from the parts (runs, 2, C) of all tiles."""
    channel = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = channel < channels
    # Distances from a pivot are small where the mean is large: of the first tile's mean, then of
    # that of all tiles, so that no variance is a difference of large numbers.
    mean = tl.load(parts + channel, mask=inside, other=0.0)
    for turn in tl.static_range(2):
        level = tl.zeros([RUNS, COLUMNS], tl.float32)
        squares = tl.zeros([RUNS, COLUMNS], tl.float32)
        for start in range(0, runs, RUNS):
            run = start + tl.arange(0, RUNS)
            exists = (run < runs)[:, None] & inside[None, :]
            at = parts + 2 * run.to(tl.int64)[:, None] * channels + channel[None, :]
            distance = tl.load(at, mask=exists, other=0.0) - mean[None, :]
            count = tl.minimum(TILE, positions - run % tl.cdiv(positions, TILE) * TILE)
            weighed = tl.where(exists, count.to(tl.float32)[:, None] * distance, 0.0)
            level += weighed
            if turn == 1:
                squares += tl.load(at + channels, mask=exists, other=0.0) + weighed * distance
        offset = tl.sum(level, 0) * share
        if turn == 0:
            mean += offset
    variance = tl.sum(squares, 0) * share - offset * offset
    # No maximum: NaN stays NaN.
    variance = tl.where(variance < 0, 0.0, variance)
    tl.store(moments + channel, mean + offset, mask=inside)
    tl.store(moments + channels + channel, variance, mask=inside)


@triton.jit(do_not_specialize=["steps", "per_run"])
def _norm_sums(
    grad,
    z,
    moments,
    parts,
    grad_item,
    grad_row,
    grad_channel,
    z_item,
    z_row,
    z_channel,
    positions,
    channels,
    steps,
    per_run,
    eps,
    MAPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Both sums of COLUMNS channels over the tiles of one run."""
    channel = tl.program_id(0) % tl.cdiv(channels, COLUMNS) * COLUMNS
    run = tl.program_id(0) // tl.cdiv(channels, COLUMNS)
    own = channel + tl.arange(0, COLUMNS)
    mean, inverse = each.statistics(moments, own, channels, eps)
    per_item = tl.cdiv(positions, ROWS)
    HEIGHT: tl.constexpr = COLUMNS if MAPS else ROWS
    WIDTH: tl.constexpr = ROWS if MAPS else COLUMNS
    of_standard = tl.zeros([HEIGHT, WIDTH], tl.float32)
    of_grad = tl.zeros([HEIGHT, WIDTH], tl.float32)
    for step in tl.range(run * per_run, tl.minimum(steps, (run + 1) * per_run)):
        item = step // per_item
        position = step % per_item * ROWS
        numbers = each.read(
            z, item, position, channel, positions, channels, z_item, z_row, z_channel,
            MAPS, ROWS, COLUMNS, WIDE,
        )  # fmt: skip
        # Zero outside of an item.
        d_out = each.read(
            grad, item, position, channel, positions, channels, grad_item, grad_row, grad_channel,
            MAPS, ROWS, COLUMNS, WIDE,
        )  # fmt: skip
        of_standard += d_out * ((numbers - each.along(mean, MAPS)) * each.along(inverse, MAPS))
        of_grad += d_out
    AXIS: tl.constexpr = 1 if MAPS else 0
    to = parts + 2 * run.to(tl.int64) * channels + own
    tl.store(to, tl.sum(of_standard, AXIS), mask=own < channels)
    tl.store(to + channels, tl.sum(of_grad, AXIS), mask=own < channels)
