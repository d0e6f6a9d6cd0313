"""Attention without a softmax in tiles of weights from Triton, multiplied by torch's library.

  forward   W = factor Q K^T, rectified for kind "relu";  out = W V
  backward  W and dS = factor dO V^T, 0 where a rectified W <= 0, from one kernel;
            dV += W^T dO;  dK += dS^T Q;  dQ = dS K

with factor = scale / M in float32, before the only rounding of W and dS, which go to a workspace in
the operands' dtype; in float16 in units, see `_triton_units`. No atomics: every sum has one order.

Memory beyond inputs and outputs, E bytes an element, for R rows (of all its I items) in a tile:
  workspace  : E R padded(M) forward, 2 E R padded(M) backward, at most what `staged_tiles` allows;
  totals     : backward in 16 bits 4 M (D + V), the float32 dK and dV of one item, unless it is one
               tile;
  float16    : 4 R V forward, 4 I M (D + V) + 4 R D backward for results in units, and at most 1056
               bytes a batch item.

The library copies grad, query, key and value of which neither rows nor channels have a stride of 1.

Unverified: no GPU has run these kernels.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from nlkernels import _launch, _tune
from nlkernels._launch import Config
from nlkernels._spec import Problem
from nlkernels.ops import _triton_tiles as tile
from nlkernels.ops._staged_products import Sum
from nlkernels.ops._tiles import Buffer, padded, staged_tiles
from nlkernels.ops._triton_tiles import operand, suited
from nlkernels.ops._triton_units import units


@triton.jit
def _weights_kernel(
    query,
    key,
    grad,
    value,
    weights,
    d_scores,
    units,
    d_units,
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
    grad_item,
    grad_row,
    grad_channel,
    value_item,
    value_row,
    value_channel,
    weights_item,
    weights_row,
    factor,
    BACKWARD: tl.constexpr,
    RECTIFY: tl.constexpr,
    IN_UNITS: tl.constexpr,
    QUERY: tl.constexpr,
    KEY: tl.constexpr,
    GRAD: tl.constexpr,
    VALUE: tl.constexpr,
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
    column = program % tl.cdiv(keys, COLUMNS) * COLUMNS
    item = program // tl.cdiv(keys, COLUMNS)
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
    w = scores * (factor / tl.load(units + 4 * item) if IN_UNITS else factor)
    if RECTIFY:
        w = tl.where(w <= 0, 0.0, w)
    tile.store(
        weights, WEIGHTS, w, item, row, column, rows, keys,
        weights_item, weights_row, 1, ROWS, COLUMNS, WIDE,
    )  # fmt: skip
    if BACKWARD:
        d_weights = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in tl.range(0, channels, DEPTH):
            g = tile.load(
                grad, GRAD, item, row, start, rows, channels,
                grad_item, grad_row, grad_channel, ROWS, DEPTH, WIDE,
            )  # fmt: skip
            v = tile.load(
                value, VALUE, item, column, start, keys, channels,
                value_item, value_row, value_channel, COLUMNS, DEPTH, WIDE,
            )  # fmt: skip
            d_weights = tl.dot(g, v.trans(), d_weights, input_precision=PRECISION)
        ds = d_weights * (factor / tl.load(d_units + 4 * item) if IN_UNITS else factor)
        if RECTIFY:
            ds = tl.where(w <= 0, 0.0, ds)
        tile.store(
            d_scores, WEIGHTS, ds, item, row, column, rows, keys,
            weights_item, weights_row, 1, ROWS, COLUMNS, WIDE,
        )  # fmt: skip


def _weights_configs(problem: Problem, architecture: int) -> list[Config]:
    return _ends(tile.score_configs(problem, architecture))


def _d_scores_configs(problem: Problem, architecture: int) -> list[Config]:
    return _ends(tile.d_score_configs(problem, architecture))


def _ends(configs: list[Config]) -> list[Config]:
    """The default, and where it takes descriptors the one of other operands, which is the last."""
    return [configs[0], *configs[-1:]] if configs[0].descriptors else configs[:1]


CANDIDATES = {"quadratic_weights": _weights_configs, "quadratic_d_scores": _d_scores_configs}


class _Call(NamedTuple):
    """What every tile of one pass shares. Units are None but in float16."""

    problem: Problem
    factor: float
    rectify: bool
    unit: torch.Tensor | None
    d_unit: torch.Tensor | None


class _Product:
    """Sums of the matrix products of tiles, out of their units."""

    def __init__(self, device: torch.device) -> None:
        self._sum, self._wide = Sum(device), Buffer(torch.float32, device)

    def add(
        self,
        out: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        unit: torch.Tensor | None,
        *,
        first: bool = True,
        last: bool = True,
    ) -> None:
        """Add a @ b; after the tile that is `last`, `out` holds the sum, times the unit."""
        if unit is None:
            self._sum.add(out, a, b, first=first, last=last)
            return
        wide = self._wide.block(*out.shape)
        self._sum.add(wide, a, b, first=first, last=last)
        if last:
            out.copy_(wide.mul_(unit[:, :1, None]))


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    workspace_mib: float | None = None,
    *,
    rectify: bool,
) -> torch.Tensor:
    """Return out (B,N,V); zeros without keys."""
    problem = Problem.of(query, key, value)
    batch, rows, keys = problem.batch, problem.queries, problem.keys
    out = value.new_empty(batch, rows, problem.value_depth)
    if keys == 0 or out.numel() == 0:
        return out.zero_()
    call = _call(problem, scale, rectify, query, key)
    size, product = query.element_size(), _Product(query.device)
    workspace = Buffer(query.dtype, query.device)
    for items, part in staged_tiles(batch, rows, keys, size, size, workspace_mib):
        q, k = query[items, part], key[items]
        weights = workspace.block(*q.shape[:2], padded(keys))[:, :, :keys]
        _fill(call, items, weights, q, k)
        product.add(out[items, part], weights, value[items], _of(call.unit, items))
    return out


def backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    workspace_mib: float | None = None,
    *,
    rectify: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query, key and value, in their dtypes."""
    problem = Problem.of(query, key, value)
    batch, rows, keys = problem.batch, problem.queries, problem.keys
    d_query, d_key, d_value = (torch.empty_like(t) for t in (query, key, value))
    if 0 in (batch, rows, keys):
        return d_query.zero_(), d_key.zero_(), d_value.zero_()
    call = _call(problem, scale, rectify, query, key, grad, value)
    size, device = query.element_size(), query.device
    workspace = Buffer(query.dtype, device)
    query_product, key_sum, value_sum = (_Product(device) for _ in range(3))
    for items, part in staged_tiles(batch, rows, keys, 2 * size, size, workspace_mib):
        q, k, v, g = query[items, part], key[items], value[items], grad[items, part]
        weights, d_scores = workspace.block(2, *q.shape[:2], padded(keys))[..., :keys]
        _fill(call, items, weights, q, k, d_scores, g, v)
        unit, d_unit = _of(call.unit, items), _of(call.d_unit, items)
        ends = {"first": part.start == 0, "last": part.stop == rows}
        value_sum.add(d_value[items], weights.mT, g, unit, **ends)
        key_sum.add(d_key[items], d_scores.mT, q, d_unit, **ends)
        query_product.add(d_query[items, part], d_scores, k, d_unit)
    return d_query, d_key, d_value


def _call(
    problem: Problem,
    scale: float,
    rectify: bool,
    query: torch.Tensor,
    key: torch.Tensor,
    grad: torch.Tensor | None = None,
    value: torch.Tensor | None = None,
) -> _Call:
    factor, unit, d_unit = scale / problem.keys, None, None
    if problem.dtype == torch.float16:
        unit = units(query, key, factor)
        d_unit = None if grad is None else units(grad, value, factor)
    return _Call(problem, factor, rectify, unit, d_unit)


def _of(unit: torch.Tensor | None, items: slice) -> torch.Tensor | None:
    return None if unit is None else unit[items]


def _fill(
    call: _Call,
    where: slice,
    weights: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    d_scores: torch.Tensor | None = None,
    grad: torch.Tensor | None = None,
    value: torch.Tensor | None = None,
) -> None:
    """Compute W, and dS when there is a gradient, of the items `where` says."""
    items, rows, keys = weights.shape
    backward = d_scores is not None
    # What a forward has not is not read.
    d_scores, grad, value = (d_scores, grad, value) if backward else (weights, query, key)
    unit, d_unit = (_of(each, where) for each in (call.unit, call.d_unit))
    unit = weights if unit is None else unit
    d_unit = unit if d_unit is None else d_unit
    name = "quadratic_d_scores" if backward else "quadratic_weights"

    def run(config: Config) -> None:
        q, g = (operand(t, config.rows, config.depth, config) for t in (query, grad))
        k, v = (operand(t, config.columns, config.depth, config) for t in (key, value))
        w, s = (operand(t, config.rows, config.columns, config) for t in (weights, d_scores))
        tiles = triton.cdiv(rows, config.rows) * triton.cdiv(keys, config.columns)
        _launch.launch(
            _weights_kernel,
            (items * tiles,),
            q.source,
            k.source,
            g.source,
            v.source,
            w.source,
            s.source,
            unit,
            d_unit,
            rows,
            keys,
            query.shape[2],
            value.shape[2],
            *q.strides,
            *k.strides,
            *g.strides,
            *v.strides,
            *w.strides[:2],
            call.factor,
            config=config,
            BACKWARD=backward,
            RECTIFY=call.rectify,
            IN_UNITS=call.unit is not None,
            QUERY=q.layout,
            KEY=k.layout,
            GRAD=g.layout,
            VALUE=v.layout,
            WEIGHTS=w.layout,
            ROWS=config.rows,
            COLUMNS=config.columns,
            DEPTH=config.depth,
            WIDE=_launch.wide(query, key, grad, value, weights),
            PRECISION=_launch.precision(query.dtype),
        )

    shipped = CANDIDATES[name](call.problem, _launch.architecture(query.device))
    shipped = suited(shipped, query, key, grad, value)
    _tune.run_best(name, call.problem, query.device, shipped, run)
