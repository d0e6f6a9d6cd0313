"""Softmax attention in plain PyTorch, one tile of the score matrix at a time, on any device.

forward   S = Q K^T;  top = max S;  P = exp2(log2(e) scale (S - top));  total = sum P;
          out = (P / total) V
backward  P = forward's P / sum P;  E = P dO V^T;  dS = E - P sum E;  dQ = scale dS K;
          dK = scale dS^T Q;  dV = P^T dO

Two things are computed again rather than taken from the forward, because their rounding then
cancels: the rows' statistics, and sum E (rather than the equal sum of dO out).

Only query, key, value, out and stats = (top, total) are kept in between; other backends need the
last two. exp2 takes a quarter of exp's time in torch's float32 CPU kernels.

Memory beyond inputs and outputs, E bytes an element and A = max(E, 4):
  tile      : forward A + E bytes a score, backward 2 A + E, less E where A = E; in all at most
              `workspace_mib` (10 on CPUs, 40 on GPUs), or 16 rows where those take more;
  backward  : in bfloat16 + 4 M (D + V) + 6 M max(D, V) for the float32 sums of one batch item,
              unless the item is one tile;
  float16   : computed in float32, + 4 bytes for each element of the operands and results;
  always    : a few numbers for each row of a tile, and torch's scratch of at most 0.5 MiB; on CPUs
              with AMX also, in bfloat16, its packed copy of one factor: 2 max(M, rows) max(D, V).
"""

from collections.abc import Iterator

import torch

from nlkernels.ops._tiles import (
    LOG2E,
    Buffer,
    ProductSum,
    accumulator_dtype,
    cast,
    compute_dtype,
    scores_per_tile,
    tiles,
)


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    workspace_mib: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out (B,N,V) and stats (2,B,N): each row's extreme product, and its sum."""
    dtype = compute_dtype(query.dtype)
    if dtype != query.dtype:
        out, stats = forward(*cast(dtype, query, key, value), scale, workspace_mib)
        return out.to(query.dtype), stats
    batch, rows, _ = query.shape
    out = value.new_empty(batch, rows, value.shape[2])
    stats = query.new_empty(2, batch, rows, dtype=accumulator_dtype(dtype))
    tile = _Tile(dtype, query.device, matrices=1)
    for items, part in tile.parts(query, key, workspace_mib):
        scores = tile.product(0, query[items, part], key[items])
        weights = _softmax(scores, scale, stats[:, items, part])
        torch.bmm(tile.narrow(weights), value[items], out=out[items, part])
    return out, stats


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
    dtype = compute_dtype(query.dtype)
    if dtype != query.dtype:
        operands = cast(dtype, grad, query, key, value)
        d_query, d_key, d_value = backward(*operands, out, stats, scale, workspace_mib)
        return d_query.to(query.dtype), d_key.to(key.dtype), d_value.to(value.dtype)
    rows, device = query.shape[1], query.device
    d_query, d_key, d_value = (torch.empty_like(t) for t in (query, key, value))
    if rows == 0:
        return d_query, d_key.zero_(), d_value.zero_()
    tile, term = _Tile(dtype, device, matrices=2), Buffer(dtype, device)
    key_sum, value_sum = ProductSum(dtype, device, term), ProductSum(dtype, device, term)
    for items, part in tile.parts(query, key, workspace_mib):
        q, g = query[items, part], grad[items, part]
        ends = {"first": part.start == 0, "last": part.stop == rows}
        weights = _softmax(tile.product(0, q, key[items]), scale)
        value_sum.add(d_value[items], tile.narrow(weights).mT, g, 1.0, **ends)
        weighted = tile.product(1, g, value[items]).mul_(weights)
        delta = weighted.sum(dim=-1, keepdim=True)
        d_scores = tile.narrow(weighted.addcmul_(weights, delta, value=-1))
        key_sum.add(d_key[items], d_scores.mT, q, scale, **ends)
        torch.bmm(d_scores, key[items], out=d_query[items, part]).mul_(scale)
    return d_query, d_key, d_value


def _softmax(scores: torch.Tensor, scale: float, stats: torch.Tensor | None = None) -> torch.Tensor:
    """Turn products into weights in place; write the rows' (extreme, sum) to `stats` (2, ...).

    The largest score is subtracted before scaling, where equal scores are still equal: scaled sums
    of large products differ by their rounding, which exp2 would magnify.
    """
    top = scores.amax(dim=-1, keepdim=True) if scale >= 0 else scores.amin(dim=-1, keepdim=True)
    total = scores.sub_(top).mul_(scale * LOG2E).exp2_().sum(dim=-1, keepdim=True)
    if stats is not None:
        stats[0].copy_(top.squeeze(-1))
        stats[1].copy_(total.squeeze(-1))
    return scores.div_(total)


class _Tile:
    """Buffers of one tile: `matrices` in at least float32, one in the dtype of the products."""

    def __init__(self, dtype: torch.dtype, device: torch.device, matrices: int) -> None:
        wide = accumulator_dtype(dtype)
        self._wide = [Buffer(wide, device) for _ in range(matrices)]
        self._narrow = Buffer(dtype, device) if dtype != wide else None
        self._bytes = matrices * wide.itemsize + (dtype.itemsize if dtype != wide else 0)

    def parts(
        self, query: torch.Tensor, key: torch.Tensor, workspace_mib: float | None
    ) -> Iterator[tuple[slice, slice]]:
        """(batch slice, row slice) of every tile."""
        budget = scores_per_tile(query.device, self._bytes, workspace_mib)
        return tiles(query.shape[0], query.shape[1], key.shape[1], budget)

    def product(self, matrix: int, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """rows @ columns^T in one of the matrices, ready for arithmetic in place."""
        shape = (rows.shape[0], rows.shape[1], columns.shape[1])
        wide = self._wide[matrix].block(*shape)
        if self._narrow is None:
            return torch.bmm(rows, columns.mT, out=wide)
        if rows.device.type == "cuda" and torch.version.hip is None:
            # Other backends' backward computes these products again, unrounded, and would not
            # agree with statistics of rounded ones; CPUs have no such product.
            return torch.bmm(rows, columns.mT, out_dtype=wide.dtype, out=wide)
        return wide.copy_(torch.bmm(rows, columns.mT, out=self._narrow.block(*shape)))

    def narrow(self, wide: torch.Tensor) -> torch.Tensor:
        """A matrix in the dtype of the products; in 16 bits, valid until the next product."""
        return wide if self._narrow is None else self._narrow.block(*wide.shape).copy_(wide)
