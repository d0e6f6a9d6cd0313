"""Depthwise 3-D correlation in Triton: forward, input gradient and weight gradient. Unverified.

forward   out[c,p] = sum_o weight[c,o] x[c,p+o]             o: kt*kh*kw offsets around zero
backward  d_x[c,p] = sum_o weight[c,-o] grad[c,p+o]         the same kernel, FLIP
          d_weight[c,o] = sum_b,p grad[b,c,p] x[b,c,p+o]

A lane computes `Config.depth` positions of one column, that is neighbours along H: each number it
loads serves up to kh of them. `Config.rows` counts such columns of a tile, `Config.columns`
channels; neighbouring lanes hold neighbouring channels where x is channels_last_3d, else
neighbouring positions. Sums are float32; every number of a result is summed by one program.

Any batch and channel strides are read as they are, and positions that lie at one distance from each
other (NCDHW, channels_last_3d, slices of their batches and channels). Memory beyond inputs and
outputs, E bytes an element:
  x or grad : + E B C T H W for a copy of one whose positions lie otherwise, or of a grad whose
              layout is not that of x;
  forward   : + E C kt kh kw for weight in another order, where x is channels_last_3d or weight is
              not contiguous; the same in the backward;
  backward  : + 4 C kt kh kw (splits + 1) for float32 sums, with splits at most 1024 over
              kt ceil(C / columns), and at most one for each tile of B T H W positions.
"""

import torch
import triton
import triton.language as tl

from nlkernels import _launch, _tune
from nlkernels._launch import Config
from nlkernels.ops._positions import position_stride
from nlkernels.ops.region.problem import RegionProblem, is_channels_last, like

# About eight programs for each of the largest GPUs' multiprocessors.
PROGRAMS = 1024


def forward(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(B,C,T,H,W), (C,kt,kh,kw) -> (B,C,T,H,W)."""
    return _correlate(_flattenable(x), weight, like(x), flip=False)


def backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of x and weight, in their dtypes."""
    d_x, x = like(x), _flattenable(x)
    if position_stride(grad) is None or is_channels_last(grad) != is_channels_last(x):
        grad = like(x).copy_(grad)
    return _correlate(grad, weight, d_x, flip=True), _weight_gradient(grad, x, weight)


def _correlate(x, weight, out, flip: bool) -> torch.Tensor:
    channels_last = is_channels_last(x)
    taps = weight.flatten(1)
    taps = taps.t().contiguous().t() if channels_last else taps.contiguous()
    batch, channels, frames, height, width = x.shape
    problem = RegionProblem.of(x, weight)
    wide = _launch.wide(x, out)

    def run(config: Config) -> None:
        columns = frames * -(-height // config.depth) * width
        tiles = -(-columns // config.rows) * -(-channels // config.columns)
        _launch.launch(
            _correlate_kernel,
            (tiles * batch if x.numel() else 0,),
            x,
            taps,
            out,
            *_strides(x),
            *taps.stride(),
            *_strides(out),
            channels,
            frames,
            height,
            width,
            config=config,
            **_constants(weight, config, channels_last, wide),
            FLIP=flip,
        )

    candidates = _forward_candidates(problem, _launch.architecture(x.device))
    _tune.run_best("region_forward", problem, x.device, candidates, run)
    return out


def _weight_gradient(grad, x, weight) -> torch.Tensor:
    batch, channels, frames, height, width = x.shape
    kernel = weight.shape[1:]
    problem = RegionProblem.of(x, weight)
    wide = _launch.wide(x, grad)
    sums = []

    def run(config: Config) -> None:
        columns = frames * -(-height // config.depth) * width
        tiles = -(-columns // config.rows) * batch
        parts = -(-channels // config.columns) * kernel[0]
        per_split = -(-tiles // max(1, min(tiles, PROGRAMS // parts)))
        splits = -(-tiles // max(1, per_split))
        sums[:] = [x.new_empty(splits, channels, *kernel, dtype=torch.float32)]
        _launch.launch(
            _weight_gradient_kernel,
            (splits * parts,),
            x,
            grad,
            sums[0],
            *_strides(x),
            *_strides(grad),
            tiles,
            per_split,
            channels,
            frames,
            height,
            width,
            config=config,
            **_constants(weight, config, is_channels_last(x), wide),
        )

    candidates = _weight_candidates(problem, _launch.architecture(x.device))
    _tune.run_best("region_weight_grad", problem, x.device, candidates, run)
    return sums[0].sum(dim=0).to(weight.dtype)


def _candidates(problem: RegionProblem, tallest: int, numbers: int) -> list[Config]:
    """Tiles for the two most promising heights of a lane's column, in two sizes each.

    In channels_last_3d a lane has `numbers` neighbouring channels.
    """
    heights = sorted((1, 2, 4, 7, 8), key=lambda tall: _cost(problem, tall))
    configs = []
    for tall in [tall for tall in heights if tall <= tallest][:2]:
        columns = _power(problem.frames * -(-problem.height // tall) * problem.width)
        if problem.channels_last:
            # A line of 128 bytes.
            wide = min(128 // problem.dtype.itemsize, _power(problem.channels))
            for warps in (4, 8):
                rows = min(columns, 32 * warps * numbers // wide)
                configs.append(Config(rows, wide, tall, warps, 1))
        else:
            for lanes in (256, 128):
                rows = min(columns, lanes)
                wide = min(_power(problem.channels), lanes // rows)
                configs.append(Config(rows, wide, tall, lanes // 32, 1))
    return list(dict.fromkeys(configs))


def _cost(problem: RegionProblem, tall: int) -> int:
    """Instructions of one image column: about four for each number loaded, one for each product."""
    kh = problem.kernel[1]
    return -(-problem.height // tall) * (4 * (tall + kh - 1) + tall * kh)


def _power(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


def _forward_candidates(problem: RegionProblem, architecture: int) -> list[Config]:
    return _candidates(problem, 8, 16 // problem.dtype.itemsize)


def _weight_candidates(problem: RegionProblem, architecture: int) -> list[Config]:
    # Two float32 channels: with four, sums and gradients spill on sm_90.
    return _candidates(problem, 7, 2 if problem.dtype == torch.float32 else 8)


KERNELS = {"region_forward": _forward_candidates, "region_weight_grad": _weight_candidates}


def _constants(weight, config: Config, channels_last: bool, wide: bool) -> dict:
    _, kt, kh, kw = weight.shape
    return {
        "KT": kt,
        "KH": kh,
        "KW": kw,
        "ROWS": config.rows,
        "COLUMNS": config.columns,
        "TALL": config.depth,
        "CHANNELS_LAST": channels_last,
        "WIDE": wide,
    }


def _flattenable(x: torch.Tensor) -> torch.Tensor:
    return x if position_stride(x) is not None else like(x).copy_(x)


def _strides(x: torch.Tensor) -> tuple[int, int, int | None]:
    return x.stride(0), x.stride(1), position_stride(x)


@triton.jit
def _correlate_kernel(
    x,
    taps,
    out,
    x_batch,
    x_channel,
    x_position,
    taps_channel,
    taps_tap,
    out_batch,
    out_channel,
    out_position,
    channels,
    frames,
    height,
    width,
    KT: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TALL: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    FLIP: tl.constexpr,
):
    columns = frames * tl.cdiv(height, TALL) * width
    tiles = tl.cdiv(columns, ROWS)
    program = tl.program_id(0)
    rest = program // tiles
    parts = tl.cdiv(channels, COLUMNS)
    item = (rest // parts).to(tl.int64)
    channel = _along(rest % parts, COLUMNS, CHANNELS_LAST, WIDE)
    column = _along(program % tiles, ROWS, not CHANNELS_LAST, WIDE)
    t, h, w = _place(column, height, width, TALL)
    inside = (column < columns) & (channel < channels)
    x += item * x_batch + channel * x_channel
    taps += channel * taps_channel
    out += item * out_batch + channel * out_channel

    sums = ()
    for _ in tl.static_range(TALL):
        sums += (tl.zeros(inside.shape, tl.float32),)
    for pair in range(KT * KW):
        i = pair // KW
        k = pair % KW
        # The taps of one frame and one column, from top to bottom.
        factors = ()
        for j in tl.static_range(KH):
            tap = (i * KH + j) * KW + k
            if FLIP:
                tap = KT * KH * KW - 1 - tap
            factor = tl.load(taps + tap * taps_tap, mask=channel < channels, other=0.0)
            factors += (factor.to(tl.float32),)
        frame = t + i - KT // 2
        across = w + k - KW // 2
        beside = inside & (frame >= 0) & (frame < frames) & (across >= 0) & (across < width)
        for j in tl.static_range(TALL + KH - 1):
            down = h + j - KH // 2
            position = (frame * height + down) * width + across
            number = tl.load(
                x + position * x_position,
                mask=beside & (down >= 0) & (down < height),
                other=0.0,
            ).to(tl.float32)
            added = ()
            for row in tl.static_range(TALL):
                if row <= j and j - row < KH:
                    added += (sums[row] + number * factors[j - row],)
                else:
                    added += (sums[row],)
            sums = added
    for row in tl.static_range(TALL):
        position = (t * height + h + row) * width + w
        tl.store(
            out + position * out_position,
            sums[row].to(out.dtype.element_ty),
            mask=inside & (h + row < height),
        )


@triton.jit
def _weight_gradient_kernel(
    x,
    grad,
    partial,
    x_batch,
    x_channel,
    x_position,
    grad_batch,
    grad_channel,
    grad_position,
    tiles,
    per_split,
    channels,
    frames,
    height,
    width,
    KT: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TALL: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
):
    columns = frames * tl.cdiv(height, TALL) * width
    per_item = tl.cdiv(columns, ROWS)
    program = tl.program_id(0)
    i = program % KT
    rest = program // KT
    parts = tl.cdiv(channels, COLUMNS)
    split = rest // parts
    channel = _along(rest % parts, COLUMNS, CHANNELS_LAST, WIDE)
    x += channel * x_channel
    grad += channel * grad_channel
    partial += (split.to(tl.int64) * channels + channel) * (KT * KH * KW)
    first = split * per_split
    last = tl.minimum(first + per_split, tiles)

    for k in range(KW):
        sums = ()
        for _ in tl.static_range(KH):
            sums += (
                tl.zeros((channel + _along(0, ROWS, not CHANNELS_LAST, False)).shape, tl.float32),
            )
        for tile in range(first, last):
            item = (tile // per_item).to(tl.int64)
            column = _along(tile % per_item, ROWS, not CHANNELS_LAST, WIDE)
            t, h, w = _place(column, height, width, TALL)
            inside = (column < columns) & (channel < channels)
            middle = (t * height + h) * width + w
            below = ()
            for row in tl.static_range(TALL):
                number = tl.load(
                    grad + item * grad_batch + (middle + row * width) * grad_position,
                    mask=inside & (h + row < height),
                    other=0.0,
                )
                below += (number.to(tl.float32),)
            frame = t + i - KT // 2
            across = w + k - KW // 2
            beside = inside & (frame >= 0) & (frame < frames) & (across >= 0) & (across < width)
            for j in tl.static_range(TALL + KH - 1):
                down = h + j - KH // 2
                position = (frame * height + down) * width + across
                number = tl.load(
                    x + item * x_batch + position * x_position,
                    mask=beside & (down >= 0) & (down < height),
                    other=0.0,
                ).to(tl.float32)
                added = ()
                for tap in tl.static_range(KH):
                    if tap <= j and j - tap < TALL:
                        added += (sums[tap] + number * below[j - tap],)
                    else:
                        added += (sums[tap],)
                sums = added
        for j in tl.static_range(KH):
            total = tl.sum(sums[j], axis=0 if CHANNELS_LAST else 1, keep_dims=True)
            tl.store(partial + (i * KH + j) * KW + k, total, mask=channel < channels)


@triton.jit
def _along(tile, SIZE: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr):
    """Indices of a tile along the last dimension, or along the first; the other has size 1."""
    index = tl.arange(0, SIZE)
    if WIDE:
        index = index.to(tl.int64)
    index += tile * SIZE
    return index[None, :] if LAST else index[:, None]


@triton.jit
def _place(column, height, width, TALL: tl.constexpr):
    """Frame, first row and column in the frame of columns of TALL positions."""
    blocks = tl.cdiv(height, TALL)
    return column // (blocks * width), column // width % blocks * TALL, column % width
