"""Adding the parts of a softmax attention whose keys were split over programs.

For the splits s of a row, c = scale * log2(e), and the unnormalised sums that each split computed:

    top   = max_s top_s;  share_s = exp2(c (top_s - top));  total = sum_s share_s total_s
    out   = sum_s share_s sums_s / total                   (min instead of max where scale < 0)

Parts are added in the order of their keys. No memory beyond inputs and outputs.

No GPU has run this kernel yet: unverified.
"""

import torch
import triton
import triton.language as tl

from nlkernels import _launch
from nlkernels._launch import Config

# One arrangement: it reads 20 MiB at most each for parts and result, once.
CONFIG = Config(rows=16, columns=256, warps=4, stages=1)


@triton.jit(do_not_specialize=["rows", "splits"])
def add_parts(
    parts,
    part_stats,
    out,
    stats,
    factor,
    unit,
    rows,
    channels,
    splits,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHANNEL_TILES: tl.constexpr,
    SIGN: tl.constexpr,
):
    """ROWS x CHANNELS of the result. Parts are too small for 32-bit offsets to overflow."""
    program = tl.program_id(0)
    row = (program // CHANNEL_TILES) * ROWS + tl.arange(0, ROWS)
    channel = (program % CHANNEL_TILES) * CHANNELS + tl.arange(0, CHANNELS)
    inside = row < rows
    stored = inside[:, None] & (channel < channels)[None, :]
    at = row[:, None] * channels + channel[None, :]

    top = tl.full([ROWS], float("-inf"), tl.float32)
    for split in range(splits):
        part_top = tl.load(part_stats + split * 2 * rows + row, mask=inside, other=0.0)
        top = tl.maximum(top, -part_top if SIGN < 0 else part_top)
    # As in the kernel that wrote the parts.
    origin = tl.where(top == float("-inf"), 0.0, top)
    if SIGN == 0:
        origin = tl.zeros([ROWS], tl.float32)

    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, CHANNELS], tl.float32)
    for split in range(splits):
        place = part_stats + split * 2 * rows + row
        part_top = tl.load(place, mask=inside, other=0.0)
        part_top = -part_top if SIGN < 0 else part_top
        share = tl.exp2((part_top - origin) * factor)
        share = tl.where(part_top == float("-inf"), 0.0, share)
        total += share * tl.load(place + rows, mask=inside, other=1.0)
        part = tl.load(parts + split * rows * channels + at, mask=stored, other=0.0)
        sums += share[:, None] * part

    sums = sums * (1.0 / (total * unit))[:, None]
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=stored)
    inside = inside & (program % CHANNEL_TILES == 0)
    tl.store(stats + row, -top if SIGN < 0 else top, mask=inside)
    tl.store(stats + rows + row, total, mask=inside)


def combine(
    parts: torch.Tensor,
    part_stats: torch.Tensor,
    out: torch.Tensor,
    stats: torch.Tensor,
    factor: float,
    sign: int,
    unit: float,
) -> None:
    """Write out (B,N,V) and stats (2,B,N) from parts (S,B,N,V) and part_stats (S,2,B,N).

    Args:
        parts: sums of weighted values, in units of `unit`.
        part_stats: each part's extreme product and its sum of weights.
        out: result.
        stats: result.
        factor: |c|.
        sign: of the scale.
        unit: factor of the weights in parts, a power of two.
    """
    splits, *_, channels = parts.shape
    rows = out.shape[0] * out.shape[1]
    width = min(CONFIG.columns, max(16, triton.next_power_of_2(channels)))
    tiles = triton.cdiv(channels, width)
    _launch.launch(
        add_parts,
        (triton.cdiv(rows, CONFIG.rows) * tiles,),
        parts,
        part_stats,
        out,
        stats,
        factor,
        unit,
        rows,
        channels,
        splits,
        config=CONFIG,
        ROWS=CONFIG.rows,
        CHANNELS=width,
        CHANNEL_TILES=tiles,
        SIGN=sign,
    )
