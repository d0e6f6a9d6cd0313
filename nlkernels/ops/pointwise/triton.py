"""Pointwise products in Triton: maps and rows are read where they lie, all sources in one launch.

product   a tile of positions and channels adds the steps of one source after another, then shift
          and base, in float32, and is rounded once; it is computed the way round in which the
          result lies, so that a map is stored along positions and rows along channels; means and
          squares of a tile's channels are taken of it, where they are asked for, as it is rounded
outer     see `triton_outer.py`

Operands are read by descriptor (TMA) where a copy engine takes them, in either order of positions
and channels, and by pointer along whichever of the two has stride 1 elsewhere. float32 is
multiplied as torch's switch says, in three TF32 products unless one is allowed.

Memory beyond inputs and outputs:
  product : none, but 4 P for a shift that is not contiguous; with parts of statistics, which are
            results too, 8 P for each tile of 64 or 128 positions;
  outer   : what `triton_outer.py` states, 8.1 MiB at most.

Unverified: no GPU has run these kernels.
"""

import torch
import triton
import triton.language as tl

from nlkernels import _launch, _tune
from nlkernels._launch import Config
from nlkernels.ops import _triton_tiles as tile
from nlkernels.ops._triton_tiles import Operand, operand
from nlkernels.ops.pointwise.problem import PointwiseProblem, Sources, like
from nlkernels.ops.pointwise.triton_outer import candidates as _outer_candidates
from nlkernels.ops.pointwise.triton_outer import has_much_shared, outer, suited

__all__ = ["KERNELS", "outer", "product"]

# Sources of one launch.
MOST = 3


def product(
    sources: Sources,
    shift: torch.Tensor | None = None,
    base: torch.Tensor | None = None,
    maps: bool = False,
) -> torch.Tensor:
    """Features (B,N,C), weights (P,C), shift (P,), base (B,N,P) -> (B,N,P), as maps or rows."""
    return _product(sources, shift, base, maps, False)[0]


def product_and_parts(
    sources: Sources, shift: torch.Tensor | None, base: torch.Tensor | None, maps: bool
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The product, and statistics of its tiles as it is rounded.

    Returns:
        (B,N,P); mean and sum of squared distances from it of each tile's channels, (B,S,2,P) for S
        tiles of an item; the positions of a tile, of which an item's last one may have less.
    """
    return _product(sources, shift, base, maps, True)


def _product(sources, shift, base, maps, moments):
    assert len(sources) <= MOST
    features, (channels, _) = sources[0][0], sources[0][1].shape
    out = like(features, channels, maps)
    depth = sum(weight.shape[1] for _, weight in sources)
    problem = PointwiseProblem.of(features, depth, channels)
    # Those of the last run are those of the result: a kernel that is timed runs several times.
    found = [(out.new_empty(0, dtype=torch.float32), 1)]
    pairs = [(rows, weight.unsqueeze(0)) for rows, weight in sources]
    target, added = (t if t is None or not maps else t.mT for t in (out, base))
    touched = [t for pair in pairs for t in pair] + [target] + [added] * (added is not None)
    # Stands for what a launch has not, and is not read.
    absent = Operand(out, (0, 0, 0), tile.POINTER)

    def run(config: Config) -> None:
        rows, columns = config.rows, config.columns
        runs = triton.cdiv(problem.positions, rows)
        tiles = runs * triton.cdiv(channels, columns)
        if moments:
            sizes = (problem.batch, runs, 2, channels)
            found[0] = out.new_empty(sizes, dtype=torch.float32), rows
        height, width = (columns, rows) if maps else (rows, columns)
        read, strides = [], []
        for own, others in pairs:
            read += [operand(own, rows, config.depth, config)]
            read += [operand(others, columns, config.depth, config)]
            strides += [others.shape[2], *read[-2].strides, *read[-1].strides[1:]]
        read += [absent, absent] * (MOST - len(pairs))
        strides += [0] * 6 * (MOST - len(pairs))
        to = operand(target, height, width, config)
        of = absent if added is None else operand(added, height, width, config)
        _launch.launch(
            _product_kernel,
            (problem.batch * tiles,),
            *(each.source for each in read),
            of.source,
            to.source,
            out if shift is None else shift.contiguous(),
            found[0][0] if moments else out,
            *strides,
            *of.strides,
            *to.strides[:2],
            problem.positions,
            channels,
            config=config,
            SOURCES=len(sources),
            MAPS=maps,
            SHIFT=shift is not None,
            BASE=base is not None,
            MOMENTS=moments,
            FIRST=read[0].layout,
            FIRST_WEIGHT=read[1].layout,
            SECOND=read[2].layout,
            SECOND_WEIGHT=read[3].layout,
            THIRD=read[4].layout,
            THIRD_WEIGHT=read[5].layout,
            BASE_LAYOUT=of.layout,
            OUT=to.layout,
            ROWS=rows,
            COLUMNS=columns,
            DEPTH=config.depth,
            WIDE=_launch.wide(*(tensor[:1] for tensor in touched)),
            PRECISION=_launch.precision(problem.dtype),
        )

    shipped = _candidates(problem, _launch.architecture(features.device))
    shipped = suited(shipped, *touched)
    _tune.run_best("pointwise_product", problem, features.device, shipped, run)
    return out, *found[0]


def _candidates(problem: PointwiseProblem, architecture: int) -> list[Config]:
    """Positions by channels of a tile; the last one is for operands of any strides."""
    hopper, few = has_much_shared(architecture), problem.channels <= 64
    if problem.dtype == torch.float32:
        # A thread has 32 sums: products in three pieces take most of its registers.
        wide = [Config(128, 64, 32, warps=8, stages=3, descriptors=True)]
        return wide * hopper + [Config(64, 64, 32, warps=8, stages=3)]
    if few:
        best = Config(128, 64, 64, stages=4, descriptors=True)
        return [best if hopper else Config(128, 64, 32, stages=3), Config(64, 64, 32, stages=3)]
    if not hopper:
        return [Config(128, 128, 32, warps=8, stages=3), Config(64, 128, 32, warps=8, stages=3)]
    return [
        # Two programs fit on a multiprocessor: one multiplies while the other writes.
        Config(128, 128, 64, warps=8, stages=3, descriptors=True),
        Config(128, 256, 64, warps=8, stages=3, descriptors=True),
        Config(64, 128, 32, warps=8, stages=3),
    ]


KERNELS = {"pointwise_product": _candidates, "pointwise_outer": _outer_candidates}


@triton.jit
def _product_kernel(
    first,
    first_weight,
    second,
    second_weight,
    third,
    third_weight,
    base,
    out,
    shift,
    parts,
    first_depth,
    first_item,
    first_row,
    first_channel,
    first_weight_row,
    first_weight_channel,
    second_depth,
    second_item,
    second_row,
    second_channel,
    second_weight_row,
    second_weight_channel,
    third_depth,
    third_item,
    third_row,
    third_channel,
    third_weight_row,
    third_weight_channel,
    base_item,
    base_row,
    base_column,
    out_item,
    out_row,
    positions,
    channels,
    SOURCES: tl.constexpr,
    MAPS: tl.constexpr,
    SHIFT: tl.constexpr,
    BASE: tl.constexpr,
    MOMENTS: tl.constexpr,
    FIRST: tl.constexpr,
    FIRST_WEIGHT: tl.constexpr,
    SECOND: tl.constexpr,
    SECOND_WEIGHT: tl.constexpr,
    THIRD: tl.constexpr,
    THIRD_WEIGHT: tl.constexpr,
    BASE_LAYOUT: tl.constexpr,
    OUT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Programs that read the same positions are neighbours: features come from memory once, while
    # the weights, which are small, stay in the cache that all programs share.
    channel_tiles = tl.cdiv(channels, COLUMNS)
    program = tl.program_id(0)
    channel = program % channel_tiles * COLUMNS
    program = program // channel_tiles
    position = program % tl.cdiv(positions, ROWS) * ROWS
    item = program // tl.cdiv(positions, ROWS)
    HEIGHT: tl.constexpr = COLUMNS if MAPS else ROWS
    WIDTH: tl.constexpr = ROWS if MAPS else COLUMNS

    total = tl.zeros([HEIGHT, WIDTH], tl.float32)
    total = _add(
        total, first, first_weight, item, position, channel, positions, channels, first_depth,
        first_item, first_row, first_channel, first_weight_row, first_weight_channel,
        FIRST, FIRST_WEIGHT, MAPS, ROWS, COLUMNS, DEPTH, WIDE, PRECISION,
    )  # fmt: skip
    if SOURCES > 1:
        total = _add(
            total, second, second_weight, item, position, channel, positions, channels,
            second_depth, second_item, second_row, second_channel, second_weight_row,
            second_weight_channel, SECOND, SECOND_WEIGHT, MAPS, ROWS, COLUMNS, DEPTH, WIDE,
            PRECISION,
        )  # fmt: skip
    if SOURCES > 2:
        total = _add(
            total, third, third_weight, item, position, channel, positions, channels, third_depth,
            third_item, third_row, third_channel, third_weight_row, third_weight_channel,
            THIRD, THIRD_WEIGHT, MAPS, ROWS, COLUMNS, DEPTH, WIDE, PRECISION,
        )  # fmt: skip
    if SHIFT:
        own = channel + tl.arange(0, COLUMNS)
        summand = tl.load(shift + own, mask=own < channels, other=0.0).to(tl.float32)
        total += summand[:, None] if MAPS else summand[None, :]
    if MAPS:
        row, column, rows, columns = channel, position, channels, positions
    else:
        row, column, rows, columns = position, channel, positions, channels
    if BASE:
        total += tile.load(
            base, BASE_LAYOUT, item, row, column, rows, columns,
            base_item, base_row, base_column, HEIGHT, WIDTH, WIDE,
        ).to(tl.float32)  # fmt: skip
    total = tile.rounded(out, OUT, total)
    if MOMENTS:
        _add_up(
            parts, total.to(tl.float32), item, position, channel, positions, channels,
            MAPS, ROWS, COLUMNS,
        )  # fmt: skip
    tile.store(
        out, OUT, total, item, row, column, rows, columns, out_item, out_row, 1,
        HEIGHT, WIDTH, WIDE,
    )  # fmt: skip


@triton.jit
def _add_up(
    parts,
    total,
    item,
    position,
    channel,
    positions,
    channels,
    MAPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write mean and squared distances of the channels of a tile, of the positions that exist."""
    AXIS: tl.constexpr = 1 if MAPS else 0
    inside = position + tl.arange(0, ROWS) < positions
    inside = inside[None, :] if MAPS else inside[:, None]
    count = tl.minimum(ROWS, positions - position).to(tl.float32)
    mean = tl.sum(tl.where(inside, total, 0.0), AXIS) / count
    distance = tl.where(inside, total - (mean[:, None] if MAPS else mean[None, :]), 0.0)
    # The mean is rounded: what it is off by would count as variance where it is large.
    off = tl.sum(distance, AXIS)
    squares = tl.sum(distance * distance, AXIS) - off * off / count
    own = channel + tl.arange(0, COLUMNS)
    run = item.to(tl.int64) * tl.cdiv(positions, ROWS) + position // ROWS
    to = parts + 2 * run * channels + own
    tl.store(to, mean + off / count, mask=own < channels)
    tl.store(to + channels, squares, mask=own < channels)


@triton.jit
def _add(
    total,
    features,
    weight,
    item,
    position,
    channel,
    positions,
    channels,
    depth,
    features_item,
    features_row,
    features_channel,
    weight_row,
    weight_channel,
    FEATURES: tl.constexpr,
    WEIGHT: tl.constexpr,
    MAPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """total + features weight^T of one source's tile, transposed for a map."""
    for start in tl.range(0, depth, DEPTH):
        f = tile.load(
            features, FEATURES, item, position, start, positions, depth,
            features_item, features_row, features_channel, ROWS, DEPTH, WIDE,
        )  # fmt: skip
        # All items share the weights.
        w = tile.load(
            weight, WEIGHT, item * 0, channel, start, channels, depth,
            0, weight_row, weight_channel, COLUMNS, DEPTH, WIDE,
        )  # fmt: skip
        if MAPS:
            total = tl.dot(w, f.trans(), total, input_precision=PRECISION)
        else:
            total = tl.dot(f, w.trans(), total, input_precision=PRECISION)
    return total
