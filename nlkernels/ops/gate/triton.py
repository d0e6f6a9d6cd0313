"""Context pooling in Triton: x is read once forward and once backward, d_x is written once.

For tiles of positions with all their channels in registers, l_p = weight . x_p, and the largest
logit so far subtracted ("online" softmax, a_p = exp(l_p - top), in a unit that keeps P of them
below 1 in sum, so that no sum of theirs exceeds the largest x):

forward   read      sums += a_p x_p, total += a_p                       a program: item, split of P
          combine   context = sum over splits of sums / sum of totals
backward  read      u_p = grad . x_p - grad . context;  sums += a_p u_p x_p, error += a_p u_p
          combine   e = sum of errors / sum of totals;  d_weight = sum of sums / totals - e context
          write     d_x_p = a_p / total (grad + (u_p - e) weight)       does not read x

The mean of u is taken from the u themselves (e), whose rounding then cancels, and a_p is normalised
by the backward's own total: nothing depends on two kernels rounding alike. Splits are added in the
order of their positions. Sums are float32.

Any strides of items and channels are read as they are, and positions that lie at one distance from
each other, or do so within each frame (NCDHW, channels_last, frames seen as a clip, slices of
them). Memory beyond inputs and outputs, E bytes an element, P positions, S splits (S B at most
1024 or B, and at most one for each tile of positions):
  forward   : 4 B (S (C + 3) + C + 3) for parts and the float32 context;
  backward  : the same, + 8 B P for l and u, + 8 B C for copies of grad and context;
  strides   : + E B C P for a copy of x whose positions lie otherwise.

Unverified: no GPU has run these kernels.
"""

import torch
import triton
import triton.language as tl

from nlkernels import _launch, _tune
from nlkernels._launch import Config
from nlkernels.ops._tiles import LOG2E as _LOG2E
from nlkernels.ops.gate.problem import Frames, GateProblem, frames_of, like, unit_of

LOG2E = tl.constexpr(_LOG2E)
# About eight programs for each of the largest GPUs' multiprocessors.
PROGRAMS = 1024
# The kernel that adds up splits: so many of them at a time, by so many channels.
_COMBINED = Config(32, 64, warps=4, stages=1)
# Numbers of a tile in a thread's registers: twice as many spill in 16 bits at 2048 channels.
_HELD = 32


def forward(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(B,C,*positions), (C,) -> (B,C)."""
    x, frames = _readable(x)
    sums, _ = _read(x, frames, weight.contiguous())
    return sums.to(x.dtype)


def backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, context: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of x and weight, in their dtypes."""
    d_x = like(x)
    x, frames = _readable(x)
    positions = frames.count * frames.positions
    scores = x.new_empty(x.shape[0], 2, positions, dtype=torch.float32)
    grad, weight = grad.contiguous(), weight.contiguous()
    sums, stats = _read(x, frames, weight, grad, context.contiguous(), scores)
    _write(d_x, grad, weight, scores, stats)
    return d_x, sums.sum(dim=0).to(weight.dtype)


def _readable(x: torch.Tensor) -> tuple[torch.Tensor, Frames]:
    frames = frames_of(x)
    if frames is None:
        x = x.contiguous()
        frames = frames_of(x)
    return x, frames


def _read(x, frames, weight, grad=None, context=None, scores=None):
    """Sums (B,C) and statistics (B,3) of the items; with grad those of the backward, and scores."""
    batch, channels = x.shape[:2]
    problem = GateProblem.of(x, weight)
    parts = []

    def run(config: Config) -> None:
        per_frame = triton.cdiv(frames.positions, config.rows)
        tiles = frames.count * per_frame
        per_split = triton.cdiv(tiles, max(1, min(tiles, PROGRAMS // max(1, batch))))
        splits = triton.cdiv(tiles, per_split)
        parts[:] = [x.new_empty(batch, splits, size, dtype=torch.float32) for size in (channels, 3)]
        _launch.launch(
            _gate_read,
            (batch * splits,),
            x,
            weight,
            *((weight, weight, parts[1]) if grad is None else (grad, context, scores)),
            *parts,
            x.stride(0),
            x.stride(1),
            frames.frame_stride,
            frames.position_stride,
            channels,
            frames.positions,
            per_frame,
            tiles,
            per_split,
            splits,
            unit_of(frames.count * frames.positions),
            config=config,
            ROWS=config.rows,
            CHANNELS=config.columns,
            BACKWARD=grad is not None,
            WIDE=_launch.wide(x[:1]),
        )

    name = "gate_forward" if grad is None else "gate_backward"
    candidates = KERNELS[name](problem, _launch.architecture(x.device))
    _tune.run_best(name, problem, x.device, candidates, run)
    return _combine(*parts, context if context is None else context.float())


def _combine(parts, part_stats, context) -> tuple[torch.Tensor, torch.Tensor]:
    """Add up splits; for the backward take the mean error times the context off."""
    batch, splits, channels = parts.shape
    sums, stats = parts.new_empty(batch, channels), parts.new_empty(batch, 3)
    tiles = triton.cdiv(channels, _COMBINED.columns)
    _launch.launch(
        _gate_combine,
        (batch * tiles,),
        parts,
        part_stats,
        parts if context is None else context,
        sums,
        stats,
        channels,
        splits,
        config=_COMBINED,
        SPLITS=_COMBINED.rows,
        CHANNELS=_COMBINED.columns,
    )
    return sums, stats


def _write(d_x, grad, weight, scores, stats) -> None:
    """d_x from the logits and products of every position."""
    batch, channels = d_x.shape[:2]
    frames = frames_of(d_x)

    def run(config: Config) -> None:
        per_frame = triton.cdiv(frames.positions, config.rows)
        tiles = frames.count * per_frame * triton.cdiv(channels, config.columns)
        _launch.launch(
            _gate_write,
            (batch * tiles,),
            d_x,
            grad,
            weight,
            scores,
            stats,
            d_x.stride(0),
            d_x.stride(1),
            frames.frame_stride,
            frames.position_stride,
            channels,
            frames.count,
            frames.positions,
            unit_of(frames.count * frames.positions),
            config=config,
            ROWS=config.rows,
            CHANNELS=config.columns,
            WIDE=_launch.wide(d_x[:1]),
        )

    problem = GateProblem.of(d_x, weight)
    candidates = KERNELS["gate_write"](problem, _launch.architecture(d_x.device))
    _tune.run_best("gate_write", problem, d_x.device, candidates, run)


def _reading(problem: GateProblem, architecture: int) -> list[Config]:
    """All channels of as many positions as the registers hold."""
    channels = max(16, triton.next_power_of_2(problem.channels))
    warps = 4 if channels <= 128 else 8 if channels <= 512 else 16
    rows = 32 * warps * _HELD // channels
    return [Config(min(rows, triton.next_power_of_2(problem.positions)), channels, 0, warps, 1)]


def _writing(problem: GateProblem, architecture: int) -> list[Config]:
    """Tiles that are long where neighbours in memory are."""
    rows, columns = (16, 256) if problem.channels_last else (256, 16)
    return [Config(rows, columns, 0, 4, 1)]


KERNELS = {"gate_forward": _reading, "gate_backward": _reading, "gate_write": _writing}


@triton.jit(do_not_specialize=["per_frame", "tiles", "per_split", "splits"])
def _gate_read(
    x,
    weight,
    grad,
    context,
    scores,
    parts,
    part_stats,
    x_item,
    x_channel,
    x_frame,
    x_position,
    channels,
    positions,
    per_frame,
    tiles,
    per_split,
    splits,
    unit,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BACKWARD: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The tiles of one split of one item."""
    program = tl.program_id(0)
    item = (program // splits).to(tl.int64)
    split = program % splits
    channel = tl.arange(0, CHANNELS)
    present = channel < channels
    factors = tl.load(weight + channel, mask=present, other=0.0).to(tl.float32)
    if BACKWARD:
        row = item * channels + channel
        grads = tl.load(grad + row, mask=present, other=0.0).to(tl.float32)
        expected = tl.sum(grads * tl.load(context + row, mask=present, other=0.0).to(tl.float32), 0)
        # Logits, and a run of all positions further the products with grad.
        every = tiles // per_frame * positions
        scores += item * 2 * every
    row = tl.arange(0, ROWS)
    x_row, x_column = row, channel
    if WIDE:
        x_row, x_column = row.to(tl.int64), channel.to(tl.int64)
    x += item * x_item
    inner = x_row[:, None] * x_position + x_column[None, :] * x_channel

    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    error = tl.zeros([1], tl.float32)
    sums = tl.zeros([CHANNELS], tl.float32)
    for tile in range(split * per_split, tl.minimum(tiles, (split + 1) * per_split)):
        frame = tile // per_frame
        start = tile % per_frame * ROWS
        inside = start + row < positions
        place = frame.to(tl.int64) * x_frame + start.to(tl.int64) * x_position
        numbers = tl.load(x + place + inner, mask=inside[:, None] & present[None, :], other=0.0).to(
            tl.float32
        )
        logits = tl.sum(numbers * factors[None, :], 1)
        if BACKWARD:
            above = tl.sum(numbers * grads[None, :], 1) - expected
            position = frame * positions + start + row
            tl.store(scores + position, logits, mask=inside)
            tl.store(scores + every + position, above, mask=inside)
        logits = tl.where(inside, logits, float("-inf"))
        largest = tl.maximum(top, tl.max(logits, 0))
        # Where every logit so far is -inf, nothing may be subtracted: -inf - -inf is NaN.
        origin = tl.where(largest == float("-inf"), 0.0, largest)
        fade = tl.exp2((top - origin) * LOG2E)
        shares = tl.exp2((logits - origin) * LOG2E) * unit
        total = total * fade + tl.sum(shares, 0)
        if BACKWARD:
            shares = tl.where(inside, shares * above, 0.0)
            error = error * fade + tl.sum(shares, 0)
        sums = sums * fade + tl.sum(numbers * shares[:, None], 0)
        top = largest

    part = item * splits + split
    tl.store(parts + part * channels + channel, sums, mask=present)
    one = tl.arange(0, 1)
    tl.store(part_stats + part * 3 + one, top)
    tl.store(part_stats + part * 3 + 1 + one, total)
    tl.store(part_stats + part * 3 + 2 + one, error)


@triton.jit(do_not_specialize=["splits"])
def _gate_combine(
    parts,
    part_stats,
    context,
    sums,
    stats,
    channels,
    splits,
    SPLITS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """CHANNELS sums of one item: its splits', in steps of SPLITS. Parts are below 2**31 numbers."""
    tiles = tl.cdiv(channels, CHANNELS)
    item = tl.program_id(0) // tiles
    channel = tl.program_id(0) % tiles * CHANNELS + tl.arange(0, CHANNELS)
    present = channel < channels
    part_stats += item * splits * 3
    parts += item * splits * channels

    tops = tl.full([SPLITS], float("-inf"), tl.float32)
    for start in range(0, splits, SPLITS):
        split = start + tl.arange(0, SPLITS)
        part_top = tl.load(part_stats + split * 3, mask=split < splits, other=float("-inf"))
        tops = tl.maximum(tops, part_top)
    top = tl.max(tops, 0)
    origin = tl.where(top == float("-inf"), 0.0, top)

    totals = tl.zeros([SPLITS], tl.float32)
    errors = tl.zeros([SPLITS], tl.float32)
    added = tl.zeros([SPLITS, CHANNELS], tl.float32)
    for start in range(0, splits, SPLITS):
        split = start + tl.arange(0, SPLITS)
        there = split < splits
        part_top = tl.load(part_stats + split * 3, mask=there, other=float("-inf"))
        share = tl.exp2((part_top - origin) * LOG2E)
        totals += share * tl.load(part_stats + split * 3 + 1, mask=there, other=0.0)
        errors += share * tl.load(part_stats + split * 3 + 2, mask=there, other=0.0)
        part = tl.load(
            parts + split[:, None] * channels + channel[None, :],
            mask=there[:, None] & present[None, :],
            other=0.0,
        )
        added += share[:, None] * part
    total = tl.sum(totals, 0)
    error = tl.sum(errors, 0) / total

    # The forward has no error, and no context yet.
    correction = tl.load(context + item * channels + channel, mask=present, other=0.0)
    correction = tl.where(error == 0.0, 0.0, error * correction)
    tl.store(sums + item * channels + channel, tl.sum(added, 0) / total - correction, mask=present)
    first = tl.program_id(0) % tiles == 0
    tl.store(stats + item * 3, origin, mask=first)
    tl.store(stats + item * 3 + 1, total, mask=first)
    tl.store(stats + item * 3 + 2, error, mask=first)


@triton.jit(do_not_specialize=["frames"])
def _gate_write(
    d_x,
    grad,
    weight,
    scores,
    stats,
    x_item,
    x_channel,
    x_frame,
    x_position,
    channels,
    frames,
    positions,
    unit,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """ROWS positions of one frame by CHANNELS."""
    program = tl.program_id(0)
    parts = tl.cdiv(channels, CHANNELS)
    per_frame = tl.cdiv(positions, ROWS)
    start = program % per_frame * ROWS
    program = program // per_frame
    channel = program % parts * CHANNELS + tl.arange(0, CHANNELS)
    program = program // parts
    frame = program % frames
    item = (program // frames).to(tl.int64)
    row = start + tl.arange(0, ROWS)
    present, inside = channel < channels, row < positions

    scores += item * 2 * frames * positions + frame * positions
    logits = tl.load(scores + row, mask=inside, other=0.0)
    above = tl.load(scores + frames * positions + row, mask=inside, other=0.0)
    origin = tl.load(stats + item * 3)
    total = tl.load(stats + item * 3 + 1)
    error = tl.load(stats + item * 3 + 2)
    share = tl.exp2((logits - origin) * LOG2E) * unit / total
    above = (above - error) * share

    grads = tl.load(grad + item * channels + channel, mask=present, other=0.0).to(tl.float32)
    factors = tl.load(weight + channel, mask=present, other=0.0).to(tl.float32)
    numbers = share[:, None] * grads[None, :] + above[:, None] * factors[None, :]
    if WIDE:
        row, channel = row.to(tl.int64), channel.to(tl.int64)
    d_x += item * x_item + frame.to(tl.int64) * x_frame
    tl.store(
        d_x + row[:, None] * x_position + channel[None, :] * x_channel,
        numbers.to(d_x.dtype.element_ty),
        mask=inside[:, None] & present[None, :],
    )
