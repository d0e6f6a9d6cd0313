"""Max pooling in Triton: one pass over x forward, one pass over the winners backward.

A program takes a tile of rows by numbers that are neighbours in the result: channels of positions
in channels_last_3d, lines of W otherwise, as winners are packed.

forward   reads the numbers of windows in (T, H, W) order, takes a later one where it is larger or
          NaN, and packs the numbers of the winners in registers
backward  d_x[winner] += grad; where channels are neighbours whole tiles of d_x are read and
          written, whose sectors all hold winners, otherwise the winners alone

Windows do not overlap: every number of d_x belongs to one program, and there are no atomics. Any
strides are read as they are. Memory beyond inputs and outputs: none.

Unverified: no GPU has run these kernels.
"""

import torch
import triton
import triton.language as tl

from nlkernels import _launch, _tune
from nlkernels._launch import Config
from nlkernels.ops.pool import problem
from nlkernels.ops.pool.problem import PoolProblem

# Windows of so many numbers are unrolled: their loads are in flight together.
UNROLLED = tl.constexpr(16)


def forward(x: torch.Tensor, window: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(B,C,T,H,W) -> pooled (B,C,T',H',W') and winners."""
    out, winners = problem.like(x, window), problem.winners_like(x, window)
    asked = PoolProblem.of(x, window)
    wide = _launch.wide(x, out)

    def run(config: Config) -> None:
        grid, sizes, constants = _tiled(out, asked, config, wide)
        strides = _strides(x, asked, window)
        _launch.launch(
            _pool_forward,
            grid,
            x,
            out,
            winners,
            *strides,
            *x.stride()[2:],
            *sizes,
            config=config,
            **constants,
        )

    if out.numel() > 0:
        configs = _candidates(asked, _launch.architecture(x.device))
        _tune.run_best("pool_forward", asked, x.device, configs, run)
    return out, winners


def backward(
    grad: torch.Tensor, winners: torch.Tensor, d_x: torch.Tensor, window: list[int]
) -> torch.Tensor:
    """d_x (B,C,T,H,W), with the gradients of the pooled numbers added to their winners."""
    asked = PoolProblem.of(d_x, window)
    wide = _launch.wide(grad, d_x)
    added = []

    def run(config: Config) -> None:
        # Where the kernel is timed it runs again and again, but adds once.
        target = torch.empty_like(d_x) if added else d_x
        grid, sizes, constants = _tiled(grad, asked, config, wide)
        _launch.launch(
            _pool_backward,
            grid,
            grad,
            winners,
            target,
            *_strides(grad, asked, (1, 1, 1)),
            *_strides(target, asked, window),
            *target.stride()[2:],
            *sizes,
            config=config,
            **constants,
            WHOLE=asked.channels_last,
        )
        added.append(True)

    if grad.numel() > 0:
        configs = _candidates(asked, _launch.architecture(d_x.device))
        _tune.run_best("pool_backward", asked, d_x.device, configs, run)
    return d_x


def _tiled(pooled: torch.Tensor, asked: PoolProblem, config: Config, wide: bool) -> tuple:
    """Programs, sizes and constants of a launch for pooled numbers (B,C,T',H',W')."""
    batch, channels, frames, height, width = pooled.shape
    if asked.channels_last:
        axes, columns = (width, height, frames), channels
    else:
        axes, columns = (height, frames, channels), width
    rows = batch * axes[0] * axes[1] * axes[2]
    tiles = triton.cdiv(rows, config.rows) * triton.cdiv(columns, config.columns)
    constants = {
        "KT": asked.window[0],
        "KH": asked.window[1],
        "KW": asked.window[2],
        "EACH": 8 // problem.bits(asked.window),
        "ROWS": config.rows,
        "COLUMNS": config.columns,
        "WIDE": wide,
    }
    return (tiles,), (*axes, rows, columns), constants


def _strides(x: torch.Tensor, asked: PoolProblem, window: tuple[int, ...]) -> tuple[int, ...]:
    """Distances between windows along the axes of a row, from the inner one on; of its numbers."""
    t, h, w = (s * k for s, k in zip(x.stride()[2:], window, strict=True))
    batch, channel = x.stride()[:2]
    return (w, h, t, batch, channel) if asked.channels_last else (h, t, channel, batch, w)


def _candidates(asked: PoolProblem, architecture: int) -> list[Config]:
    """Sixteen bytes of channels a lane where these are neighbours, else lines of W."""
    each = 8 // problem.bits(asked.window)
    if asked.channels_last:
        columns = min(256, triton.next_power_of_2(asked.channels))
        numbers = 32 * 4 * 16 // asked.dtype.itemsize
    else:
        columns = min(128, triton.next_power_of_2(max(1, asked.width // asked.window[2])))
        numbers = 32 * 4 * 4
    columns = max(each, columns)
    return [Config(numbers // columns, columns, warps=4, stages=1)]


KERNELS = {"pool_forward": _candidates, "pool_backward": _candidates}


@triton.jit
def _pool_forward(
    x,
    out,
    winners,
    x_inner,
    x_middle,
    x_outer,
    x_item,
    x_column,
    x_t,
    x_h,
    x_w,
    inner,
    middle,
    outer,
    rows,
    columns,
    KT: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    EACH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    row, column, inside = _tile(rows, columns, ROWS, COLUMNS, WIDE)
    x += _place(row, inner, middle, outer, x_inner, x_middle, x_outer, x_item) + column * x_column
    best = tl.load(x, mask=inside, other=0.0).to(tl.float32)
    winner = tl.zeros([ROWS, COLUMNS], tl.int32)
    if KT * KH * KW <= UNROLLED:
        for tap in tl.static_range(1, KT * KH * KW):
            best, winner = _further(x, best, winner, inside, tap, x_t, x_h, x_w, KH, KW)
    else:
        for tap in range(1, KT * KH * KW):
            best, winner = _further(x, best, winner, inside, tap, x_t, x_h, x_w, KH, KW)
    # Results have no gaps: their rows follow each other.
    tl.store(out + row * columns + column, best.to(out.dtype.element_ty), mask=inside)
    if EACH > 1:
        shift = tl.arange(0, EACH) * (8 // EACH)
        winner = tl.reshape(winner, [ROWS, COLUMNS // EACH, EACH]) << shift[None, None, :]
        winner = tl.sum(winner, 2)
    place, within = _bytes(row, rows, columns, EACH, COLUMNS, WIDE)
    tl.store(winners + place, winner.to(tl.uint8), mask=within)


@triton.jit
def _pool_backward(
    grad,
    winners,
    d_x,
    grad_inner,
    grad_middle,
    grad_outer,
    grad_item,
    grad_column,
    x_inner,
    x_middle,
    x_outer,
    x_item,
    x_column,
    x_t,
    x_h,
    x_w,
    inner,
    middle,
    outer,
    rows,
    columns,
    KT: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    EACH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
    WHOLE: tl.constexpr,
):
    row, column, inside = _tile(rows, columns, ROWS, COLUMNS, WIDE)
    grad += _place(row, inner, middle, outer, grad_inner, grad_middle, grad_outer, grad_item)
    d_x += _place(row, inner, middle, outer, x_inner, x_middle, x_outer, x_item) + column * x_column
    added = tl.load(grad + column * grad_column, mask=inside, other=0.0).to(tl.float32)
    place, within = _bytes(row, rows, columns, EACH, COLUMNS, WIDE)
    winner = tl.load(winners + place, mask=within, other=0).to(tl.int32)
    if EACH > 1:
        shift = tl.arange(0, EACH) * (8 // EACH)
        winner = (winner[:, :, None] >> shift[None, None, :]) & (2 ** (8 // EACH) - 1)
        winner = tl.reshape(winner, [ROWS, COLUMNS])
    if not WHOLE:
        at = d_x + _offset(winner.to(row.dtype), x_t, x_h, x_w, KH, KW)
        number = tl.load(at, mask=inside, other=0.0).to(tl.float32) + added
        tl.store(at, number.to(d_x.dtype.element_ty), mask=inside)
    elif KT * KH * KW <= UNROLLED:
        for tap in tl.static_range(KT * KH * KW):
            _rewrite(d_x, added, winner, inside, tap, x_t, x_h, x_w, KH, KW)
    else:
        for tap in range(KT * KH * KW):
            _rewrite(d_x, added, winner, inside, tap, x_t, x_h, x_w, KH, KW)


@triton.jit
def _tile(rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr):
    """Rows (ROWS,1), columns (1,COLUMNS) of this program, and which of them there are."""
    parts = tl.cdiv(columns, COLUMNS)
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    row = (program // parts * ROWS + tl.arange(0, ROWS))[:, None]
    column = (program % parts * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    return row, column, (row < rows) & (column < columns)


@triton.jit
def _place(row, inner, middle, outer, by_inner, by_middle, by_outer, by_item):
    """Where the first windows of rows start."""
    start = row % inner * by_inner
    row = row // inner
    start += row % middle * by_middle
    row = row // middle
    return start + row % outer * by_outer + row // outer * by_item


@triton.jit
def _bytes(row, rows, columns, EACH: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr):
    """Where the bytes of a tile's winners are, and which of them there are."""
    first = tl.program_id(0) % tl.cdiv(columns, COLUMNS) * (COLUMNS // EACH)
    byte = (first + tl.arange(0, COLUMNS // EACH))[None, :]
    count = tl.cdiv(columns, EACH)
    return row * count + byte, (row < rows) & (byte < count)


@triton.jit
def _offset(tap, x_t, x_h, x_w, KH: tl.constexpr, KW: tl.constexpr):
    """Distance of a window's number from its first one."""
    return tap // (KH * KW) * x_t + tap // KW % KH * x_h + tap % KW * x_w


@triton.jit
def _further(x, best, winner, inside, tap, x_t, x_h, x_w, KH: tl.constexpr, KW: tl.constexpr):
    """The maximum and its number once one more number is seen."""
    number = tl.load(x + _offset(tap, x_t, x_h, x_w, KH, KW), mask=inside, other=0.0)
    number = number.to(tl.float32)
    larger = (number > best) | (number != number)
    return tl.where(larger, number, best), tl.where(larger, tap, winner)


@triton.jit
def _rewrite(d_x, added, winner, inside, tap, x_t, x_h, x_w, KH: tl.constexpr, KW: tl.constexpr):
    """Read and write the numbers of all windows that have this place in them."""
    at = d_x + _offset(tap, x_t, x_h, x_w, KH, KW)
    number = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    number = tl.where(winner == tap, number + added, number)
    tl.store(at, number.to(d_x.dtype.element_ty), mask=inside)
