"""Prefix sums over rows in falling order of their scores, for `triton.py`: three kernels in a row.

Unverified: no GPU has run these kernels.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from nlkernels import _launch, _tune
from nlkernels._launch import Config
from nlkernels._spec import Problem

# The carry kernel takes this many chunks at a time, and channels.
_CARRY = Config(32, 16)


class Ranked(NamedTuple):
    """Scores (B, rows) in float32: as they came, falling, and the row of each falling one."""

    scores: torch.Tensor
    levels: torch.Tensor
    order: torch.Tensor


def prefix_sums(
    problem: Problem, ranked: Ranked, value: torch.Tensor, stairs: bool
) -> torch.Tensor:
    """G, and T if `stairs`, of the ranked rows of value (B,rows,V): (1 or 2,B,rows,V) in float32.

    They are those of values multiplied by `unit`. T stands one row before its own.
    """
    batch, rows, channels = value.shape
    prefixes = value.new_empty(1 + stairs, batch, rows, channels, dtype=torch.float32)
    wide = _launch.wide(value, prefixes[0])

    def run(config: Config) -> None:
        chunks = triton.cdiv(rows, config.rows)
        tiles = batch * chunks * triton.cdiv(channels, config.columns)
        sums, carries = value.new_empty(2, 2, batch, chunks, channels, dtype=torch.float32)
        tile = {
            "ROWS": config.rows,
            "COLUMNS": config.columns,
            "STEP": config.depth,
            "WIDE": wide,
        }
        source = value, ranked.order, ranked.levels
        sizes = rows, channels, *value.stride(), unit(rows)
        _launch.launch(_sums_kernel, (tiles,), *source, *sums, *sizes, config=config, **tile)
        _launch.launch(
            _carry_kernel,
            (batch * triton.cdiv(channels, _CARRY.columns),),
            ranked.levels,
            *sums,
            *carries,
            rows,
            channels,
            config=_CARRY,
            CHUNK=config.rows,
            ROWS=_CARRY.rows,
            COLUMNS=_CARRY.columns,
        )
        _launch.launch(
            _scan_kernel,
            (tiles,),
            *source,
            *carries,
            prefixes[0],
            prefixes[-1],
            int(stairs),
            *sizes,
            config=config,
            **tile,
        )

    candidates = scan_configs(problem, _launch.architecture(value.device))
    _tune.run_best("concat_scan", problem, value.device, candidates, run)
    return prefixes


def unit(rows: int) -> float:
    """Sums of so many values in this unit stay below the largest value; a power of two."""
    return 2.0 ** -rows.bit_length()


def scan_configs(problem: Problem, architecture: int) -> list[Config]:
    """Rows of a chunk, channels, and rows of a step: sums of sums of few numbers round little."""
    return [Config(64, min(64, max(16, triton.next_power_of_2(problem.value_depth))), 16)]


@triton.jit
def _sums_kernel(
    value,
    order,
    levels,
    totals,
    stairs,
    rows,
    channels,
    value_item,
    value_row,
    value_channel,
    unit,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    WIDE: tl.constexpr,
):
    item, chunk, part = place(rows, channels, ROWS, COLUMNS)
    column = part * COLUMNS + tl.arange(0, COLUMNS)
    value += item * value_item
    order += item * rows
    levels += item * rows
    # The last chunk's T is nobody's.
    after = tl.load(levels + tl.minimum(chunk * ROWS + ROWS, rows - 1))
    total = tl.zeros([COLUMNS], tl.float32)
    stair = tl.zeros([COLUMNS], tl.float32)
    for step in tl.static_range(0, ROWS, STEP):
        own = chunk * ROWS + step + tl.arange(0, STEP)
        values = unit * _load_rows(
            value, order, own, column, rows, channels, value_row, value_channel, WIDE
        )
        level = tl.load(levels + own, mask=own < rows, other=0.0)
        total += tl.sum(values, 0)
        stair += tl.sum(values * (level - after)[:, None], 0)
    at = (item * tl.cdiv(rows, ROWS) + chunk) * channels + column
    tl.store(totals + at, total, mask=column < channels)
    tl.store(stairs + at, stair, mask=column < channels)


@triton.jit
def _carry_kernel(
    levels,
    totals,
    stairs,
    totals_before,
    stairs_before,
    rows,
    channels,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    parts = tl.cdiv(channels, COLUMNS)
    item = (tl.program_id(0) // parts).to(tl.int64)
    column = tl.program_id(0) % parts * COLUMNS + tl.arange(0, COLUMNS)
    chunks = tl.cdiv(rows, CHUNK)
    levels += item * rows
    here = item * chunks * channels + column[None, :]
    total = tl.zeros([COLUMNS], tl.float32)
    total_before = tl.zeros([COLUMNS], tl.float32)
    stair = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, chunks, ROWS):
        chunk = start + tl.arange(0, ROWS)
        inside = (chunk < chunks)[:, None] & (column < channels)[None, :]
        # Prefix sums of what lies one chunk before, and two: nothing is subtracted again.
        after_one = inside & (chunk >= 1)[:, None]
        after_two = inside & (chunk >= 2)[:, None]
        at = here + chunk[:, None] * channels
        one = tl.load(totals + at - channels, mask=after_one, other=0.0)
        two = tl.load(totals + at - 2 * channels, mask=after_two, other=0.0)
        step = tl.load(stairs + at - channels, mask=after_one, other=0.0)
        top = tl.load(levels + (chunk - 1) * CHUNK, mask=(chunk >= 1) & (chunk < chunks), other=0.0)
        level = tl.load(levels + chunk * CHUNK, mask=chunk < chunks, other=0.0)
        wide = total_before[None, :] + tl.cumsum(two, 0)
        # Before the second chunk there is nothing to lower, were it by infinity.
        step += tl.where(after_two, (top - level)[:, None] * wide, 0.0)
        tl.store(totals_before + at, total[None, :] + tl.cumsum(one, 0), mask=inside)
        tl.store(stairs_before + at, stair[None, :] + tl.cumsum(step, 0), mask=inside)
        total += tl.sum(one, 0)
        total_before += tl.sum(two, 0)
        stair += tl.sum(step, 0)


@triton.jit(do_not_specialize=["wanted"])
def _scan_kernel(
    value,
    order,
    levels,
    totals_before,
    stairs_before,
    totals,
    stairs,
    wanted,
    rows,
    channels,
    value_item,
    value_row,
    value_channel,
    unit,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    WIDE: tl.constexpr,
):
    item, chunk, part = place(rows, channels, ROWS, COLUMNS)
    column = part * COLUMNS + tl.arange(0, COLUMNS)
    value += item * value_item
    order += item * rows
    levels += item * rows
    before = (item * tl.cdiv(rows, ROWS) + chunk) * channels + column
    total = tl.load(totals_before + before, mask=column < channels, other=0.0)
    stair = tl.load(stairs_before + before, mask=column < channels, other=0.0)
    totals += item * rows * channels
    stairs += item * rows * channels
    for step in tl.static_range(0, ROWS, STEP):
        own = chunk * ROWS + step + tl.arange(0, STEP)
        values = unit * _load_rows(
            value, order, own, column, rows, channels, value_row, value_channel, WIDE
        )
        prefix = total[None, :] + tl.cumsum(values, 0)
        total += tl.sum(values, 0)
        at = offsets(own, column, channels, 1, WIDE)
        inside = (own < rows)[:, None] & (column < channels)[None, :]
        tl.store(totals + at, prefix, mask=inside)
        # A number of the run, not of the kernel: one compiled kernel serves both.
        if wanted != 0:
            lowered = own + 1 < rows
            level = tl.load(levels + own, mask=lowered, other=0.0)
            below = tl.load(levels + own + 1, mask=lowered, other=0.0)
            steps = (level - below)[:, None] * prefix
            tl.store(stairs + at, stair[None, :] + tl.cumsum(steps, 0), mask=inside)
            stair += tl.sum(steps, 0)


@triton.jit
def place(rows, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Batch item, tile of rows and tile of channels of this program."""
    program = tl.program_id(0)
    parts = tl.cdiv(channels, COLUMNS)
    tiles = tl.cdiv(rows, ROWS)
    return (program // parts // tiles).to(tl.int64), program // parts % tiles, program % parts


@triton.jit
def offsets(row, column, row_stride, column_stride, WIDE: tl.constexpr):
    if WIDE:
        row = row.to(tl.int64)
        column = column.to(tl.int64)
    return row[:, None] * row_stride + column[None, :] * column_stride


@triton.jit
def _load_rows(
    value, order, own, column, rows, channels, row_stride, channel_stride, WIDE: tl.constexpr
):
    """Ranked rows of one batch item, in float32; zeros outside."""
    row = tl.load(order + own, mask=own < rows, other=0)
    if not WIDE:
        row = row.to(tl.int32)
    inside = (own < rows)[:, None] & (column < channels)[None, :]
    at = offsets(row, column, row_stride, channel_stride, WIDE)
    return tl.load(value + at, mask=inside, other=0.0).to(tl.float32)
