"""Softmax attention forward in three Triton kernels, with the weights of a tile in a workspace.

For each tile of batch items and query rows:
  scores   S = Q K^T;  t = extreme of S in a row of one key tile;  W = exp2(c (S - t)), kept in
           the operands' dtype and, but in float16, in units that keep sums of W V finite; and
           sum W of that row, before its rounding
  combine  top = extreme of t;  total = sum of exp2(c (t - top)) sum W
  values   out = sum over key tiles of exp2(c (t - top)) (W V) / total
with c = log2(e) scale. Every key tile's product is rescaled in float32 before it is added, so
nothing but W is rounded to 16 bits and tiles may differ by any factor. Sums are taken before
rounding: `stats` are then those of the weights that the backward computes again, and the rounding
of single weights, of either sign, averages out as it does in PyTorch's own rounded weights.

Memory beyond inputs and outputs, E bytes an element, for R rows (of all its items) in a tile:
  workspace   : E R padded(M), at most what `staged_tiles` allows;
  statistics  : 8 R ceil(M / C), C the keys of a key tile (at least 64).

Unverified: no GPU has run these kernels.
"""

import torch
import triton
import triton.language as tl

from nlkernels import _launch, _tune
from nlkernels._launch import Config
from nlkernels._spec import Problem
from nlkernels.ops import _triton_tiles as tile
from nlkernels.ops._tiles import LOG2E, Buffer, padded, staged_tiles
from nlkernels.ops._triton_tiles import operand, suited

# The combine kernel takes this many rows, and key tiles at a time.
_COMBINE = Config(64, 16, warps=4)


@triton.jit
def _scores_kernel(
    query,
    key,
    weights,
    tops,
    sums,
    positions,
    rows,
    keys,
    depth,
    query_item,
    query_row,
    query_channel,
    key_item,
    key_row,
    key_channel,
    weights_item,
    weights_row,
    factor,
    unit,
    FALLING: tl.constexpr,
    QUERY: tl.constexpr,
    KEY: tl.constexpr,
    WEIGHTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row_tiles = tl.cdiv(rows, ROWS)
    program = tl.program_id(0)
    row = program % row_tiles * ROWS
    program = program // row_tiles
    key_tile = program % tl.cdiv(keys, COLUMNS)
    item = program // tl.cdiv(keys, COLUMNS)
    column = key_tile * COLUMNS
    scores = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in tl.range(0, depth, DEPTH):
        q = tile.load(
            query, QUERY, item, row, start, rows, depth,
            query_item, query_row, query_channel, ROWS, DEPTH, WIDE,
        )  # fmt: skip
        k = tile.load(
            key, KEY, item, column, start, keys, depth,
            key_item, key_row, key_channel, COLUMNS, DEPTH, WIDE,
        )  # fmt: skip
        scores = tl.dot(q, k.trans(), scores, input_precision=PRECISION)
    present = (column + tl.arange(0, COLUMNS) < keys)[None, :]
    # Products that are all infinite, the wrong way, weigh nothing; their difference is NaN.
    if FALLING:
        top = tl.min(tl.where(present, scores, float("inf")), 1)
        origin = tl.where(top == float("inf"), 0.0, top)
    else:
        top = tl.max(tl.where(present, scores, float("-inf")), 1)
        origin = tl.where(top == float("-inf"), 0.0, top)
    exponentials = tl.where(present, tl.exp2((scores - origin[:, None]) * factor), 0.0)
    total = tl.sum(exponentials, 1)
    tile.store(
        weights, WEIGHTS, exponentials * unit, item, row, column, rows, keys,
        weights_item, weights_row, 1, ROWS, COLUMNS, WIDE,
    )  # fmt: skip
    own = row + tl.arange(0, ROWS)
    at = key_tile * positions + item.to(tl.int64) * rows + own
    tl.store(tops + at, top, mask=own < rows)
    tl.store(sums + at, total, mask=own < rows)


@triton.jit
def _combine_kernel(
    tops,
    sums,
    top,
    total,
    positions,
    key_tiles,
    factor,
    FALLING: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    own = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    # Beyond the last row and key tile the last ones are read again.
    position = tl.minimum(own, positions - 1)[None, :]
    first = tl.arange(0, COLUMNS)[:, None]
    extreme = tl.full([ROWS], float("inf") if FALLING else float("-inf"), tl.float32)
    for start in tl.range(0, key_tiles, COLUMNS):
        key_tile = tl.minimum(start + first, key_tiles - 1)
        tile_top = tl.load(tops + key_tile * positions + position)
        if FALLING:
            extreme = tl.minimum(extreme, tl.min(tile_top, 0))
        else:
            extreme = tl.maximum(extreme, tl.max(tile_top, 0))
    added = tl.zeros([ROWS], tl.float32)
    for start in tl.range(0, key_tiles, COLUMNS):
        at = tl.minimum(start + first, key_tiles - 1) * positions + position
        scaled = tl.load(sums + at) * tl.exp2((tl.load(tops + at) - extreme[None, :]) * factor)
        added += tl.sum(tl.where(start + first < key_tiles, scaled, 0.0), 0)
    tl.store(top + own, extreme, mask=own < positions)
    tl.store(total + own, added, mask=own < positions)


@triton.jit
def _values_kernel(
    weights,
    value,
    tops,
    top,
    total,
    out,
    positions,
    rows,
    keys,
    channels,
    weights_item,
    weights_row,
    value_item,
    value_row,
    value_channel,
    out_item,
    factor,
    unit,
    WEIGHTS: tl.constexpr,
    VALUE: tl.constexpr,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    channel_tiles = tl.cdiv(channels, COLUMNS)
    program = tl.program_id(0)
    channel = program % channel_tiles * COLUMNS
    program = program // channel_tiles
    row = program % tl.cdiv(rows, ROWS) * ROWS
    item = program // tl.cdiv(rows, ROWS)
    own = row + tl.arange(0, ROWS)
    position = item.to(tl.int64) * rows + own
    row_top = tl.load(top + position, mask=own < rows, other=0.0)
    row_total = tl.load(total + position, mask=own < rows, other=1.0)
    added = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in tl.range(0, keys, DEPTH):
        w = tile.load(
            weights, WEIGHTS, item, row, start, rows, keys,
            weights_item, weights_row, 1, ROWS, DEPTH, WIDE,
        )  # fmt: skip
        v = tile.load(
            value, VALUE, item, start, channel, keys, channels,
            value_item, value_row, value_channel, DEPTH, COLUMNS, WIDE,
        )  # fmt: skip
        tile_top = tl.load(tops + start // SPAN * positions + position, mask=own < rows, other=0.0)
        rescale = tl.exp2((tile_top - row_top) * factor)
        added += tl.dot(w, v, input_precision=PRECISION) * rescale[:, None]
    result = added / (row_total * unit)[:, None]
    tile.store(
        out, 0, result, item, row, channel, rows, channels,
        out_item, channels, 1, ROWS, COLUMNS, WIDE,
    )  # fmt: skip


KERNELS = {
    "softmax_scores": tile.score_configs,
    "softmax_values": tile.value_configs,
}


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    workspace_mib: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out (B,N,V) and stats (2,B,N)."""
    problem = Problem.of(query, key, value)
    batch, rows, keys = problem.batch, problem.queries, problem.keys
    out = value.new_empty(batch, rows, problem.value_depth)
    stats = query.new_empty(2, batch, rows, dtype=torch.float32)
    size = query.element_size()
    workspace = Buffer(query.dtype, query.device)
    buffer = Buffer(torch.float32, query.device)
    for items, part in staged_tiles(batch, rows, keys, size, size, workspace_mib):
        q, k, v = query[items, part], key[items], value[items]
        shape = q.shape[0], q.shape[1], padded(keys)
        weights = workspace.block(*shape)[:, :, :keys]
        span, tile_stats = _scores(problem, q, k, scale, weights, buffer)
        own = stats[:, items, part].flatten(1)
        _combine(tile_stats, own, scale)
        _values(problem, weights, v, tile_stats[0], own, out[items, part], span, scale)
    return out, stats


def _scores(
    problem: Problem,
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float,
    weights: torch.Tensor,
    buffer: Buffer,
) -> tuple[int, torch.Tensor]:
    """Fill `weights`; return the keys of a key tile and statistics (2, key tiles, positions)."""
    items, rows, depth = query.shape
    keys = key.shape[1]
    candidates = suited(tile.score_configs(problem, _launch.architecture(query.device)), query, key)
    used = 0

    def run(config: Config) -> None:
        nonlocal used
        used = config.columns
        tops, sums = _statistics(buffer, keys, used, items * rows)
        q = operand(query, config.rows, config.depth, config)
        k = operand(key, config.columns, config.depth, config)
        w = operand(weights, config.rows, config.columns, config)
        tiles = triton.cdiv(rows, config.rows) * tops.shape[0]
        _launch.launch(
            _scores_kernel,
            (items * tiles,),
            q.source,
            k.source,
            w.source,
            tops,
            sums,
            items * rows,
            rows,
            keys,
            depth,
            *q.strides,
            *k.strides,
            *w.strides[:2],
            scale * LOG2E,
            _unit(problem),
            config=config,
            FALLING=scale < 0,
            QUERY=q.layout,
            KEY=k.layout,
            WEIGHTS=w.layout,
            ROWS=config.rows,
            COLUMNS=config.columns,
            DEPTH=config.depth,
            WIDE=_launch.wide(query, key, weights),
            PRECISION=_launch.precision(query.dtype),
        )

    _tune.run_best("softmax_scores", problem, query.device, candidates, run)
    return used, _statistics(buffer, keys, used, items * rows)


def _unit(problem: Problem) -> float:
    """Unit of the stored weights: sums of so many weighted values stay below the largest value.

    float16 has no values large enough to need it, and too few exponents to bear it.
    """
    return 1.0 if problem.dtype == torch.float16 else 2.0 ** -problem.keys.bit_length()


def _statistics(buffer: Buffer, keys: int, span: int, positions: int) -> torch.Tensor:
    return buffer.block(2, triton.cdiv(keys, span), positions)


def _combine(statistics: torch.Tensor, stats: torch.Tensor, scale: float) -> None:
    (tops, sums), (top, total) = statistics, stats
    key_tiles, positions = tops.shape
    _launch.launch(
        _combine_kernel,
        (triton.cdiv(positions, _COMBINE.rows),),
        tops,
        sums,
        top,
        total,
        positions,
        key_tiles,
        scale * LOG2E,
        config=_COMBINE,
        FALLING=scale < 0,
        ROWS=_COMBINE.rows,
        COLUMNS=_COMBINE.columns,
    )


def _values(
    problem: Problem,
    weights: torch.Tensor,
    value: torch.Tensor,
    tops: torch.Tensor,
    stats: torch.Tensor,
    out: torch.Tensor,
    span: int,
    scale: float,
) -> None:
    items, rows, channels = out.shape
    top, total = stats

    def run(config: Config) -> None:
        depth = min(config.depth, span)
        w = operand(weights, config.rows, depth, config)
        v = operand(value, depth, config.columns, config)
        tiles = triton.cdiv(rows, config.rows) * triton.cdiv(channels, config.columns)
        _launch.launch(
            _values_kernel,
            (items * tiles,),
            w.source,
            v.source,
            tops,
            top,
            total,
            out,
            items * rows,
            rows,
            weights.shape[2],
            channels,
            *w.strides[:2],
            *v.strides,
            out.stride(0),
            scale * LOG2E,
            _unit(problem),
            config=config,
            WEIGHTS=w.layout,
            VALUE=v.layout,
            SPAN=span,
            ROWS=config.rows,
            COLUMNS=config.columns,
            DEPTH=depth,
            WIDE=_launch.wide(weights, value, out),
            PRECISION=_launch.precision(value.dtype),
        )

    candidates = suited(tile.value_configs(problem, _launch.architecture(value.device)), value)
    _tune.run_best("softmax_values", problem, value.device, candidates, run)
