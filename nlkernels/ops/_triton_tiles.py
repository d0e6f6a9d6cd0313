"""Tiles of the attention kernels: their sizes, and how they are read and written.

Operands are read by pointer, or by descriptor where a copy engine takes them.
A descriptor's box spans one batch item, so what lies beyond an item's rows or channels reads as
zero and is never written, as the pointers' masks see to as well.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from nlkernels import _launch
from nlkernels._launch import Config
from nlkernels._spec import Problem

# float32 tiles of scores and of values where much shared memory fits them.
_SINGLE = (
    Config(128, 128, 32, warps=8, stages=3, descriptors=True),
    Config(64, 64, 32, stages=3, descriptors=True),
    Config(128, 64, 32, warps=8, stages=3),
)
# How an operand is read.
POINTER, ROW_MAJOR, CHANNEL_FIRST = 0, 1, 2


class Operand(NamedTuple):
    """What a kernel gets of one (items, rows, channels) tensor, and how it reads it."""

    source: torch.Tensor | TensorDescriptor
    strides: tuple[int, int, int]
    layout: int


def operand(tensor: torch.Tensor, rows: int, channels: int, config: Config) -> Operand:
    """A tensor read in tiles of (rows, channels), by descriptor where `config` and it allow."""
    if config.descriptors and _launch.has_descriptors(tensor.device):
        if not _launch.undescribable(tensor):
            box = [1, rows, channels]
            return Operand(TensorDescriptor.from_tensor(tensor, box), (0, 0, 0), ROW_MAJOR)
        if not _launch.undescribable(tensor, 1):
            box = [1, channels, rows]
            return Operand(TensorDescriptor.from_tensor(tensor.mT, box), (0, 0, 0), CHANNEL_FIRST)
    return Operand(tensor, tensor.stride(), POINTER)


def suited(candidates: list[Config], *operands: torch.Tensor) -> list[Config]:
    """The candidates made for these operands: with descriptors where all can be described."""
    described = not any(_launch.undescribable(t) and _launch.undescribable(t, 1) for t in operands)
    chosen = [config for config in candidates if config.descriptors == described]
    return chosen or candidates


def score_configs(problem: Problem, architecture: int) -> list[Config]:
    """How the scores kernel may be tiled; the first is the default."""
    hopper = _has_much_shared(architecture)
    if problem.dtype == torch.float32:
        if not hopper:
            return [Config(64, 64, 32, warps=8, stages=3)]
        return list(_SINGLE)
    if not hopper:
        return [Config(128, 128, 32, warps=8, stages=3), Config(128, 64, 32, stages=3)]
    return [
        Config(128, 256, 64, warps=8, stages=4, descriptors=True),
        Config(128, 128, 64, warps=8, stages=3, descriptors=True),
        Config(64, 256, 64, warps=8, stages=4, descriptors=True),
        Config(64, 128, 64, stages=4, descriptors=True),
        Config(128, 128, 64, warps=8, stages=3),
    ]


def value_configs(problem: Problem, architecture: int) -> list[Config]:
    """How the values kernel may be tiled; the first is the default."""
    hopper = _has_much_shared(architecture)
    if problem.dtype == torch.float32:
        if not hopper:
            return [Config(64, 64, 32, stages=3)]
        return list(_SINGLE)
    if not hopper:
        return [Config(128, 64, 64, warps=8, stages=3), Config(64, 64, 64, warps=8, stages=3)]
    narrow = [Config(128, 64, 128, warps=8, stages=3, descriptors=True)]
    return narrow * (problem.value_depth <= 64) + [
        Config(128, 128, 128, warps=8, stages=3, descriptors=True),
        Config(128, 128, 64, warps=8, stages=4, descriptors=True),
        Config(64, 128, 128, stages=2, descriptors=True),
        Config(128, 128, 64, warps=8, stages=3),
    ]


def d_score_configs(problem: Problem, architecture: int) -> list[Config]:
    """How the d_scores kernel may be tiled; the first is the default."""
    hopper = _has_much_shared(architecture)
    if problem.dtype == torch.float32:
        if not hopper:
            # 64 rows spill some bytes on one architecture or another.
            return [Config(32, 64, 32, stages=2)]
        return [
            Config(128, 64, 32, warps=8, stages=3, descriptors=True),
            Config(64, 64, 32, stages=3, descriptors=True),
            Config(128, 64, 32, warps=8, stages=3),
        ]
    if not hopper:
        return [Config(128, 64, 32, warps=8, stages=3), Config(64, 128, 32, warps=8, stages=3)]
    square = Config(128, 128, 64, warps=8, stages=4, descriptors=True)
    wide = Config(64, 256, 64, warps=8, stages=3, descriptors=True)
    # 256 keys in one tile spare the delta kernel.
    best = [wide, square] if 128 < problem.keys <= 256 else [square, wide]
    return [
        *best,
        Config(64, 128, 64, stages=3, descriptors=True),
        Config(128, 128, 32, warps=8, stages=3),
    ]


def arrangement(
    config: Config, depth: int, value_depth: int, dtype: torch.dtype
) -> dict[str, int | bool]:
    """Channels of a tile, and how many tiles of value channels there are.

    A thread accumulates 128 values of its 255 registers, 64 where addresses take their share, 32
    where products of float32 in pieces do.
    """
    streamed = 0 < config.depth < depth
    lanes = 32 * config.warps * (2 if config.specialised else 1)
    accumulators = 32 if dtype == torch.float32 else 128 if config.descriptors else 64
    values = min(padded_channels(value_depth), accumulators * lanes // config.rows)
    return {
        "DEPTH": config.depth if streamed else padded_channels(depth),
        "STREAMED": streamed,
        "VALUES": values,
        "VALUE_TILES": triton.cdiv(value_depth, values),
    }


def padded_channels(channels: int) -> int:
    """Channels of a tile that takes them all: a power of two, and enough for a tensor core."""
    return max(16, triton.next_power_of_2(channels))


def _has_much_shared(architecture: int) -> bool:
    """Whether programs may use more than 200 KB of shared memory: Hopper's tiles fit."""
    return _launch.SHARED_MEMORY.get(architecture, 0) > 200_000


@triton.jit
def offsets(
    row,
    column,
    row_stride,
    column_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Offsets of a (ROWS, COLUMNS) tile inside a batch item."""
    rows = row + tl.arange(0, ROWS)
    columns = column + tl.arange(0, COLUMNS)
    if WIDE:
        rows = rows.to(tl.int64)
        columns = columns.to(tl.int64)
    return rows[:, None] * row_stride + columns[None, :] * column_stride


@triton.jit
def inside(row, column, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Which elements of a (ROWS, COLUMNS) tile lie inside a (rows, columns) matrix."""
    in_rows = row + tl.arange(0, ROWS) < rows
    in_columns = column + tl.arange(0, COLUMNS) < columns
    return in_rows[:, None] & in_columns[None, :]


@triton.jit
def load(
    source,
    LAYOUT: tl.constexpr,
    item,
    row,
    column,
    rows,
    columns,
    item_stride,
    row_stride,
    column_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The (ROWS, COLUMNS) tile of a batch item that starts at (row, column); zero outside."""
    if LAYOUT == 1:
        tile = source.load([item, row, column]).reshape(ROWS, COLUMNS)
    elif LAYOUT == 2:
        tile = source.load([item, column, row]).reshape(COLUMNS, ROWS).trans()
    else:
        start = source + item.to(tl.int64) * item_stride
        at = offsets(row, column, row_stride, column_stride, ROWS, COLUMNS, WIDE)
        tile = tl.load(
            start + at, mask=inside(row, column, rows, columns, ROWS, COLUMNS), other=0.0
        )
    return tile


@triton.jit
def store(
    target,
    LAYOUT: tl.constexpr,
    tile,
    item,
    row,
    column,
    rows,
    columns,
    item_stride,
    row_stride,
    column_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Write a (ROWS, COLUMNS) tile of a batch item, rounded, but nothing outside it."""
    if LAYOUT == 1:
        tile = rounded(target, LAYOUT, tile)
        target.store([item, row, column], tile.reshape(1, ROWS, COLUMNS))
    else:
        start = target + item.to(tl.int64) * item_stride
        at = offsets(row, column, row_stride, column_stride, ROWS, COLUMNS, WIDE)
        # Behind the addresses: before them, a kernel takes seven registers more (Triton 3.6.0).
        tile = rounded(target, LAYOUT, tile)
        tl.store(start + at, tile, mask=inside(row, column, rows, columns, ROWS, COLUMNS))


@triton.jit
def rounded(target, LAYOUT: tl.constexpr, tile):
    """A tile in the dtype of what it is written to."""
    if LAYOUT == 1:
        tile = tile.to(target.dtype)
    else:
        tile = tile.to(target.dtype.element_ty)
    return tile
