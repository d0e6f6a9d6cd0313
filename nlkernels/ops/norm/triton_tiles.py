"""Tiles of the norm's kernels: how they lie, what a program takes, and what it knows of channels.

A tile is (positions, channels) of rows and (channels, positions) of maps, so that neighbours in it
are neighbours in memory; operands of other strides are read as they lie.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from nlkernels import _launch, _tune
from nlkernels._launch import Config
from nlkernels.ops import _triton_tiles as tile
from nlkernels.ops.norm.problem import NormProblem, are_maps


def run_best(
    kernel: str, z: torch.Tensor, launch: Callable[[Config], None], result: torch.Tensor
) -> torch.Tensor:
    """The result, which `launch` writes with a configuration for z."""
    if z.numel() > 0:
        problem = NormProblem.of(z, z.shape[2], are_maps(z))
        configs = candidates(problem, _launch.architecture(z.device))
        _tune.run_best(kernel, problem, z.device, configs, launch)
    return result


def tiled(z: torch.Tensor, config: Config, *read: torch.Tensor) -> tuple:
    """Programs, sizes and constants of a launch over the tiles of z."""
    batch, positions, channels = z.shape
    tiles = triton.cdiv(positions, config.rows) * triton.cdiv(channels, config.columns)
    constants = {
        "MAPS": are_maps(z),
        "ROWS": config.rows,
        "COLUMNS": config.columns,
        "WIDE": _launch.wide(*(tensor[:1] for tensor in read)),
    }
    return (batch * tiles,), (positions, channels), constants


def strides(*tensors: torch.Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()]


def candidates(problem: NormProblem, architecture: int) -> list[Config]:
    """Positions by channels of a tile: sixteen bytes a lane of what lies together, twice over."""
    numbers = 2 * 32 * 4 * 16 // problem.dtype.itemsize
    if problem.maps:
        rows = min(numbers, 1024, triton.next_power_of_2(problem.positions))
        return [Config(rows, max(1, numbers // rows), stages=1)]
    columns = min(256, triton.next_power_of_2(problem.channels))
    return [Config(max(1, numbers // columns), columns, stages=1)]


@triton.jit
def place(positions, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Item, first position and first channel of a program's tile; channels are neighbours."""
    channel_tiles = tl.cdiv(channels, COLUMNS)
    program = tl.program_id(0)
    tiles = program // channel_tiles
    per_item = tl.cdiv(positions, ROWS)
    return tiles // per_item, tiles % per_item * ROWS, program % channel_tiles * COLUMNS


@triton.jit
def statistics(moments, own, channels, eps):
    """Mean, and 1 / sqrt(variance + eps), which sums are multiplied by: both rounded properly."""
    mean = tl.load(moments + own, mask=own < channels, other=0.0)
    variance = tl.load(moments + channels + own, mask=own < channels, other=1.0)
    return mean, tl.div_rn(tl.full(own.shape, 1.0, tl.float32), tl.sqrt_rn(variance + eps))


@triton.jit
def along(numbers, MAPS: tl.constexpr):
    """One number a channel, to be used with a tile."""
    if MAPS:
        numbers = numbers[:, None]
    else:
        numbers = numbers[None, :]
    return numbers


@triton.jit
def read(
    source,
    item,
    position,
    channel,
    positions,
    channels,
    item_stride,
    row_stride,
    channel_stride,
    MAPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """A tile of positions by channels, or of channels by positions, in float32; zero outside."""
    if MAPS:
        numbers = tile.load(
            source, 0, item, channel, position, channels, positions,
            item_stride, channel_stride, row_stride, COLUMNS, ROWS, WIDE,
        )  # fmt: skip
    else:
        numbers = tile.load(
            source, 0, item, position, channel, positions, channels,
            item_stride, row_stride, channel_stride, ROWS, COLUMNS, WIDE,
        )  # fmt: skip
    return numbers.to(tl.float32)


@triton.jit
def write(
    target,
    numbers,
    item,
    position,
    channel,
    positions,
    channels,
    item_stride,
    row_stride,
    channel_stride,
    MAPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Write such a tile, rounded, but nothing outside of the item."""
    if MAPS:
        tile.store(
            target, 0, numbers, item, channel, position, channels, positions,
            item_stride, channel_stride, row_stride, COLUMNS, ROWS, WIDE,
        )  # fmt: skip
    else:
        tile.store(
            target, 0, numbers, item, position, channel, positions, channels,
            item_stride, row_stride, channel_stride, ROWS, COLUMNS, WIDE,
        )  # fmt: skip
