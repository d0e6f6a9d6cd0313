"""Softmax attention backward: tiles of P and dS from Triton, by the form of `staged_backward`.

Memory beyond inputs and outputs is that of `staged_backward`, and for R rows (of all its items) in
a tile
  delta : 4 B N + 12 R ceil(M / C) unless M <= C, the keys of a key tile (at least 64).

Unverified: no GPU has run these kernels.
"""

import functools

import torch
import triton
import triton.language as tl

from nlkernels import _launch, _tune
from nlkernels._launch import Config
from nlkernels._spec import Problem
from nlkernels.ops import _triton_tiles as tile
from nlkernels.ops._tiles import LOG2E, Buffer
from nlkernels.ops._triton_tiles import operand, suited
from nlkernels.ops.softmax import staged_backward
from nlkernels.ops.softmax.staged_backward import CORRECTED_ABOVE

# The kernels that only read and write.
_THIN = Config(16, 128, warps=4)


@triton.jit
def _delta_kernel(
    grad,
    out,
    delta,
    positions,
    rows,
    channels,
    grad_item,
    grad_row,
    grad_channel,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    own = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    grad_start = grad + own // rows * grad_item + own % rows * grad_row
    added = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in tl.range(0, channels, COLUMNS):
        channel = start + tl.arange(0, COLUMNS)
        present = (own < positions)[:, None] & (channel < channels)[None, :]
        at = grad_start[:, None] + channel.to(tl.int64)[None, :] * grad_channel
        g = tl.load(at, mask=present, other=0.0)
        o = tl.load(out + own[:, None] * channels + channel[None, :], mask=present, other=0.0)
        added += g.to(tl.float32) * o.to(tl.float32)
    tl.store(delta + own, tl.sum(added, 1), mask=own < positions)


@triton.jit
def _d_scores_kernel(
    query,
    key,
    grad,
    value,
    weights,
    d_scores,
    top,
    total,
    delta,
    errors,
    magnitudes,
    sums,
    positions,
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
    scale,
    QUERY: tl.constexpr,
    KEY: tl.constexpr,
    GRAD: tl.constexpr,
    VALUE: tl.constexpr,
    WEIGHTS: tl.constexpr,
    WITHIN: tl.constexpr,
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
    own = row + tl.arange(0, ROWS)
    position = item.to(tl.int64) * rows + own
    present = (column + tl.arange(0, COLUMNS) < keys)[None, :]
    if WITHIN:
        rising = tl.where(present, tl.where(factor < 0, -scores, scores), float("-inf"))
        rising -= tl.max(rising, 1)[:, None]
        w = tl.where(present, tl.exp2(rising * tl.abs(factor)), 0.0)
        w /= tl.sum(w, 1)[:, None]
    else:
        row_top = tl.load(top + position, mask=own < rows, other=0.0)[:, None]
        row_total = tl.load(total + position, mask=own < rows, other=1.0)[:, None]
        w = tl.where(present, tl.exp2((scores - row_top) * factor) / row_total, 0.0)
    tile.store(
        weights, WEIGHTS, w, item, row, column, rows, keys,
        weights_item, weights_row, 1, ROWS, COLUMNS, WIDE,
    )  # fmt: skip
    if WITHIN:
        ds = w * (d_weights - tl.sum(w * d_weights, 1)[:, None])
    else:
        row_delta = tl.load(delta + position, mask=own < rows, other=0.0)
        ds = w * (d_weights - row_delta[:, None])
        at = key_tile * positions + position
        tl.store(errors + at, tl.sum(ds, 1), mask=own < rows)
        tl.store(magnitudes + at, tl.sum(tl.abs(ds), 1), mask=own < rows)
        tl.store(sums + at, tl.sum(w, 1), mask=own < rows)
    tile.store(
        d_scores, WEIGHTS, ds * scale, item, row, column, rows, keys,
        weights_item, weights_row, 1, ROWS, COLUMNS, WIDE,
    )  # fmt: skip


@triton.jit
def _correct_kernel(
    weights,
    d_scores,
    errors,
    magnitudes,
    sums,
    positions,
    key_tiles,
    keys,
    weights_row,
    scale,
    tolerance,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    own = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    error = tl.zeros([ROWS], tl.float32)
    magnitude = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for key_tile in tl.range(0, key_tiles):
        at = key_tile * positions + own
        error += tl.load(errors + at, mask=own < positions, other=0.0)
        magnitude += tl.load(magnitudes + at, mask=own < positions, other=0.0)
        total += tl.load(sums + at, mask=own < positions, other=0.0)
    total = tl.where(own < positions, total, 1.0)
    off = tl.maximum(tl.abs(error) - tolerance * magnitude, tl.abs(total - 1.0) - tolerance)
    if tl.max(off, 0) > 0:
        share = (1.0 / total)[:, None]
        for start in tl.range(0, keys, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            at = own[:, None] * weights_row + column[None, :]
            present = (own < positions)[:, None] & (column < keys)[None, :]
            w = tl.load(weights + at, mask=present, other=0.0).to(tl.float32)
            ds = tl.load(d_scores + at, mask=present, other=0.0).to(tl.float32)
            w *= share
            ds = share * (ds - w * error[:, None] * scale)
            tl.store(weights + at, w.to(weights.dtype.element_ty), mask=present)
            tl.store(d_scores + at, ds.to(d_scores.dtype.element_ty), mask=present)


KERNELS = {"softmax_d_scores": tile.d_score_configs}


def backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    stats: torch.Tensor,
    scale: float,
    workspace_mib: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query, key and value, in their dtypes."""
    tiles = _Tiles(Problem.of(query, key, value), grad, out, stats, scale)
    return staged_backward.backward(tiles.fill, grad, query, key, value, workspace_mib)


class _Tiles:
    """Fills the workspace, tile after tile."""

    def __init__(
        self,
        problem: Problem,
        grad: torch.Tensor,
        out: torch.Tensor,
        stats: torch.Tensor,
        scale: float,
    ) -> None:
        self._problem, self._grad, self._out, self._scale = problem, grad, out, scale
        self._stats = stats
        self._sums = Buffer(torch.float32, grad.device)

    def fill(
        self,
        weights: torch.Tensor,
        d_scores: torch.Tensor,
        grad: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        where: tuple[slice, slice],
    ) -> None:
        """Compute P and dS of the rows `where` says, which the operands already are."""
        items, rows, keys = weights.shape
        positions = items * rows
        candidates = tile.d_score_configs(self._problem, _launch.architecture(grad.device))
        candidates = suited(candidates, query, key, grad, value)
        top, total = self._stats[(slice(None), *where)].flatten(1)

        def run(config: Config) -> None:
            key_tiles = triton.cdiv(keys, config.columns)
            within = key_tiles == 1
            # One key tile reads and writes neither.
            delta = total if within else self._delta[where].flatten()
            sums = [total] * 3 if within else self._sums.block(3, key_tiles, positions)
            q, g = (operand(t, config.rows, config.depth, config) for t in (query, grad))
            k, v = (operand(t, config.columns, config.depth, config) for t in (key, value))
            w, s = (operand(t, config.rows, config.columns, config) for t in (weights, d_scores))
            _launch.launch(
                _d_scores_kernel,
                (items * triton.cdiv(rows, config.rows) * key_tiles,),
                q.source,
                k.source,
                g.source,
                v.source,
                w.source,
                s.source,
                top,
                total,
                delta,
                *sums,
                positions,
                rows,
                keys,
                query.shape[2],
                value.shape[2],
                *q.strides,
                *k.strides,
                *g.strides,
                *v.strides,
                *w.strides[:2],
                self._scale * LOG2E,
                self._scale,
                config=config,
                QUERY=q.layout,
                KEY=k.layout,
                GRAD=g.layout,
                VALUE=v.layout,
                WEIGHTS=w.layout,
                WITHIN=within,
                ROWS=config.rows,
                COLUMNS=config.columns,
                DEPTH=config.depth,
                WIDE=_launch.wide(query, key, grad, value, weights),
                PRECISION=_launch.precision(query.dtype),
            )
            if not within:
                self._correct(weights, d_scores, sums)

        _tune.run_best("softmax_d_scores", self._problem, grad.device, candidates, run)

    @functools.cached_property
    def _delta(self) -> torch.Tensor:
        """(B,N), computed for all rows when it is first asked for."""
        batch, rows, channels = self._out.shape
        delta = self._out.new_empty(batch, rows, dtype=torch.float32)
        _launch.launch(
            _delta_kernel,
            (triton.cdiv(batch * rows, _THIN.rows),),
            self._grad,
            self._out,
            delta,
            batch * rows,
            rows,
            channels,
            *self._grad.stride(),
            config=_THIN,
            ROWS=_THIN.rows,
            COLUMNS=_THIN.columns,
        )
        return delta

    def _correct(self, weights: torch.Tensor, d_scores: torch.Tensor, sums: torch.Tensor) -> None:
        _, key_tiles, positions = sums.shape
        _launch.launch(
            _correct_kernel,
            (triton.cdiv(positions, _THIN.rows),),
            weights,
            d_scores,
            *sums,
            positions,
            key_tiles,
            weights.shape[2],
            weights.stride(1),
            self._scale,
            CORRECTED_ABOVE * torch.finfo(weights.dtype).eps,
            config=_THIN,
            ROWS=_THIN.rows,
            COLUMNS=_THIN.columns,
        )
