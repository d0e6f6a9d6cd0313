"""Attention without a softmax in one Triton kernel: a pass over the keys for a tile of queries.

    w_ij = factor query_i . key_j, rectified for kind "relu";  out_i = sum_j w_ij value_j

with factor = scale / M in float32, before the only rounding of a weight. Products and sums are
float32; in float16 weights are kept in units, see `_triton_units`. Wide query and key are read in
pieces; channels of value that do not fit beside the scores go to further programs, each of which
computes the scores again.

Memory beyond inputs and outputs: none; in float16 at most 528 bytes a batch item.

Unverified: no GPU has run these kernels.
"""

import torch
import triton
import triton.language as tl

from nlkernels import _launch, _tune
from nlkernels._launch import Config
from nlkernels._spec import Problem
from nlkernels.ops import _triton_tiles as tile
from nlkernels.ops._triton_tiles import arrangement, operand, padded_channels, suited
from nlkernels.ops._triton_units import units

# By the larger of D and V, up to: the configuration of operands that descriptors read, and the one
# of any others. They come from compilation alone, as those of the softmax kernel do.
_WIDE = 2**31
_DESCRIBED = {
    2: {
        128: Config(128, 128, 0, 8, 2, True),
        256: Config(128, 64, 0, 8, 2, True),
        _WIDE: Config(128, 64, 64, 8, 3, True),
    },
    4: {_WIDE: Config(32, 32, 32, 8, 2, True)},
}
_POINTERS = {
    2: {
        128: Config(128, 32, 0, 8, 2),
        256: Config(64, 64, 64, 8, 3),
        _WIDE: Config(32, 64, 64, 8, 2),
    },
    4: {_WIDE: Config(32, 32, 32, 8, 2)},
}
_POINTERS_OF_HOPPER = {128: Config(64, 64, 0, 4, 2), _WIDE: Config(64, 64, 64, 8, 3)}


@triton.jit
def _fused_kernel(
    query,
    key,
    value,
    out,
    units,
    rows,
    keys,
    depth,
    channels,
    query_item,
    query_row,
    query_channel,
    key_item,
    key_row,
    key_channel,
    value_item,
    value_row,
    value_channel,
    out_item,
    factor,
    RECTIFY: tl.constexpr,
    IN_UNITS: tl.constexpr,
    QUERY: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    STREAMED: tl.constexpr,
    VALUES: tl.constexpr,
    VALUE_TILES: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0)
    row = program % tl.cdiv(rows, ROWS) * ROWS
    program = program // tl.cdiv(rows, ROWS)
    channel = program % VALUE_TILES * VALUES
    item = program // VALUE_TILES
    if IN_UNITS:
        unit = tl.load(units + 4 * item)
        factor = factor / unit
    if not STREAMED:
        q = tile.load(
            query, QUERY, item, row, 0, rows, depth,
            query_item, query_row, query_channel, ROWS, DEPTH, WIDE,
        )  # fmt: skip
    sums = tl.zeros([ROWS, VALUES], tl.float32)
    for column in tl.range(0, keys, COLUMNS):
        scores = tl.zeros([ROWS, COLUMNS], tl.float32)
        if STREAMED:
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
        else:
            k = tile.load(
                key, KEY, item, column, 0, keys, depth,
                key_item, key_row, key_channel, COLUMNS, DEPTH, WIDE,
            )  # fmt: skip
            scores = tl.dot(q, k.trans(), scores, input_precision=PRECISION)
        weights = scores * factor
        if RECTIFY:
            weights = tl.where(weights <= 0, 0.0, weights)
        # An infinite query times the zeros beyond the last key is NaN.
        present = (column + tl.arange(0, COLUMNS) < keys)[None, :]
        weights = tl.where(present, weights, 0.0)
        v = tile.load(
            value, VALUE, item, column, channel, keys, channels,
            value_item, value_row, value_channel, COLUMNS, VALUES, WIDE,
        )  # fmt: skip
        sums = tl.dot(weights.to(v.dtype), v, sums, input_precision=PRECISION)
    if IN_UNITS:
        sums *= unit
    tile.store(
        out, 0, sums, item, row, channel, rows, channels,
        out_item, channels, 1, ROWS, VALUES, WIDE,
    )  # fmt: skip


def candidates(problem: Problem, architecture: int) -> list[Config]:
    """Configurations of the fused kernel for one problem; the last takes any strides."""
    width = padded_channels(max(problem.depth, problem.value_depth))
    size = problem.dtype.itemsize
    if _launch.SHARED_MEMORY.get(architecture, 0) <= 200_000 or architecture < 90:
        return [_narrowest(_POINTERS[size], width)]
    pointers = _POINTERS_OF_HOPPER if size == 2 else _POINTERS[4]
    return [_narrowest(_DESCRIBED[size], width), _narrowest(pointers, width)]


def _narrowest(table: dict[int, Config], width: int) -> Config:
    return table[min(bound for bound in table if width <= bound)]


def forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, *, rectify: bool
) -> torch.Tensor:
    """Return out (B,N,V); zeros without keys."""
    problem = Problem.of(query, key, value)
    out = value.new_empty(problem.batch, problem.queries, problem.value_depth)
    if problem.keys == 0 or out.numel() == 0:
        return out.zero_()
    factor = scale / problem.keys
    in_units = query.dtype == torch.float16
    unit = units(query, key, factor) if in_units else None

    def run(config: Config) -> None:
        channels = arrangement(config, problem.depth, problem.value_depth, query.dtype)
        q = operand(query, config.rows, channels["DEPTH"], config)
        k = operand(key, config.columns, channels["DEPTH"], config)
        v = operand(value, config.columns, channels["VALUES"], config)
        row_tiles = triton.cdiv(problem.queries, config.rows)
        _launch.launch(
            _fused_kernel,
            (row_tiles * channels["VALUE_TILES"] * problem.batch,),
            q.source,
            k.source,
            v.source,
            out,
            out if unit is None else unit,
            problem.queries,
            problem.keys,
            problem.depth,
            problem.value_depth,
            *q.strides,
            *k.strides,
            *v.strides,
            out.stride(0),
            factor,
            config=config,
            RECTIFY=rectify,
            IN_UNITS=in_units,
            QUERY=q.layout,
            KEY=k.layout,
            VALUE=v.layout,
            ROWS=config.rows,
            COLUMNS=config.columns,
            **channels,
            WIDE=_launch.wide(query, key, value, out),
            PRECISION=_launch.precision(query.dtype),
        )

    shipped = suited(candidates(problem, _launch.architecture(query.device)), query, key, value)
    _tune.run_best("quadratic_fused", problem, query.device, shipped, run)
    return out
