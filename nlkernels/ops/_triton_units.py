"""Units of float16: powers of two, one for each batch item, in which products neither overflow nor
fade.

A product of two operands' rows is at most D max|a| max|b|. In units that bound is 2^14 to 2^15,
whereas float16 ends at 65504 and keeps all its digits down to 2^-14. Maxima are taken over finite
elements: an infinite or NaN row leaves the others as they are.
"""

import torch
import triton
import triton.language as tl

from nlkernels import _launch
from nlkernels._launch import Config

# The most parts of an item whose maxima are found by different programs.
_PARTS = 64
_THIN = Config(16, 128, warps=4)


@triton.jit(do_not_specialize=["parts"])
def _peaks_kernel(
    tensor,
    peaks,
    parts,
    rows,
    channels,
    item_stride,
    row_stride,
    channel_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    item = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    start = tensor + item.to(tl.int64) * item_stride
    found = tl.zeros([ROWS, COLUMNS], tl.float32)
    for row in tl.range(part * ROWS, rows, parts * ROWS):
        own = row + tl.arange(0, ROWS)
        row_at = own.to(tl.int64)[:, None] * row_stride
        for first in tl.range(0, channels, COLUMNS):
            channel = first + tl.arange(0, COLUMNS)
            at = start + row_at + channel.to(tl.int64)[None, :] * channel_stride
            present = (own < rows)[:, None] & (channel < channels)[None, :]
            size = tl.abs(tl.load(at, mask=present, other=0.0).to(tl.float32))
            found = tl.maximum(found, tl.where(size < float("inf"), size, 0.0))
    tl.store(peaks + tl.program_id(0), tl.max(tl.max(found, 1), 0))


@triton.jit(do_not_specialize=["first_parts", "second_parts"])
def _units_kernel(first, second, units, first_parts, second_parts, factor, PARTS: tl.constexpr):
    item, part = tl.program_id(0), tl.arange(0, PARTS)
    first_peaks = tl.load(first + item * first_parts + part, mask=part < first_parts, other=0.0)
    second_peaks = tl.load(second + item * second_parts + part, mask=part < second_parts, other=0.0)
    bound = tl.max(first_peaks, 0) * tl.max(second_peaks, 0) * factor
    # 2^e <= bound < 2^(e + 1), where e is -60 at least, so that products with 1 / unit are finite.
    bits = bound.to(tl.int32, bitcast=True) & 0x7F800000
    bits = tl.minimum(tl.maximum(bits, (127 - 60) << 23), 254 << 23)
    tl.store(units + 4 * item, (bits - (14 << 23)).to(tl.float32, bitcast=True))


def units(first: torch.Tensor, second: torch.Tensor, factor: float) -> torch.Tensor:
    """Units of factor first @ second^T, for operands (B,rows,channels).

    Returns:
        (B, 4), of which the first column holds the units: kernels that begin at another item still
        get an aligned address.

    Memory: at most 528 bytes a batch item.
    """
    batch, _, channels = first.shape
    peaks = [_peaks(tensor) for tensor in (first, second)]
    found = first.new_empty(batch, 4, dtype=torch.float32)
    _launch.launch(
        _units_kernel,
        (batch,),
        *peaks,
        found,
        *(parts.shape[1] for parts in peaks),
        abs(factor) * channels,
        config=_THIN,
        PARTS=_PARTS,
    )
    return found


def _peaks(tensor: torch.Tensor) -> torch.Tensor:
    """Largest finite magnitudes (B, parts)."""
    batch, rows, channels = tensor.shape
    parts = min(_PARTS, triton.cdiv(rows, _THIN.rows))
    peaks = tensor.new_empty(batch, parts, dtype=torch.float32)
    _launch.launch(
        _peaks_kernel,
        (batch * parts,),
        tensor,
        peaks,
        parts,
        rows,
        channels,
        *tensor.stride(),
        config=_THIN,
        ROWS=_THIN.rows,
        COLUMNS=_THIN.columns,
    )
    return peaks
