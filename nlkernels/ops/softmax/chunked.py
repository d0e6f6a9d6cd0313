"""Softmax attention in plain PyTorch, one tile of the score matrix at a time, on any device.

forward   S = Q K^T;  P = exp2(log2(e) scale (S - max S));  out = (P / sum P) V;
          lse = log2(e) scale max S + log2(sum P)
backward  P = forward's P / sum P;  E = P dO V^T;  dS = E - P sum E;  dQ = scale dS K;
          dK = scale dS^T Q;  dV = P^T dO

Two things are computed again rather than taken from the forward, because their rounding then cancels:
the rows' sums (rather than P = exp2(S - lse)) and sum E (rather than the equal sum of dO out).

Only query, key, value, out and lse are kept in between; other backends need the last two.
`lse` is in base 2: exp2 takes a quarter of exp's time in torch's float32 CPU kernels.

Memory beyond inputs and outputs, E bytes an element and A = max(E, 4):
  tile      : scores x (A + E), twice that in the backward; A for A + E when A = E. At most
              `workspace_mib` (12 on CPUs, 40 on GPUs), or 16 rows if those are larger;
  backward  : in 16-bit dtypes + 6 M (D + V) for one batch item's float32 sums, unless the item
              is one tile;
  float16   : computed in float32, + 4 bytes for each element of the operands and results.
"""

import math

import torch

from nlkernels.ops._tiles import (
    Buffer,
    ProductSum,
    accumulator_dtype,
    compute_dtype,
    product,
    scores_per_tile,
    tiles,
)

LOG2E = math.log2(math.e)


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    workspace_mib: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out (B,N,V) and lse (B,N), the base-2 logarithm of each row's sum."""
    dtype = compute_dtype(query.dtype)
    if dtype != query.dtype:
        out, lse = forward(query.to(dtype), key.to(dtype), value.to(dtype), scale, workspace_mib)
        return out.to(query.dtype), lse
    batch, rows, _ = query.shape
    out = value.new_empty(batch, rows, value.shape[2])
    lse = query.new_empty(batch, rows, dtype=accumulator_dtype(dtype))
    scores = _Scores(dtype, query.device)
    sizes = (batch, rows, key.shape[1])
    for items, part in _tiles(dtype, sizes, query.device, 1, workspace_mib):
        weights, lse[items, part] = _softmax(scores.wide(query[items, part], key[items]), scale)
        torch.bmm(scores.narrow(weights), value[items], out=out[items, part])
    return out, lse


def backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    workspace_mib: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query, key and value, in their dtypes."""
    dtype = compute_dtype(query.dtype)
    if dtype != query.dtype:
        operands = (t.to(dtype) for t in (grad, query, key, value, out))
        d_query, d_key, d_value = backward(*operands, lse, scale, workspace_mib)
        return d_query.to(query.dtype), d_key.to(key.dtype), d_value.to(value.dtype)
    rows, device = query.shape[1], query.device
    d_query, d_key, d_value = (torch.empty_like(t) for t in (query, key, value))
    if rows == 0:
        return d_query, d_key.zero_(), d_value.zero_()
    scores, d_scores = _Scores(dtype, device), _Scores(dtype, device)
    key_sum, value_sum = ProductSum(dtype, device), ProductSum(dtype, device)
    sizes = (query.shape[0], rows, key.shape[1])
    for items, part in _tiles(dtype, sizes, device, 2, workspace_mib):
        q, g = query[items, part], grad[items, part]
        ends = {"first": part.start == 0, "last": part.stop == rows}
        weights, _ = _softmax(scores.wide(q, key[items]), scale)
        weighted = d_scores.wide(g, value[items]).mul_(weights)
        delta = weighted.sum(dim=-1, keepdim=True)
        narrow = d_scores.narrow(weighted.addcmul_(weights, delta, value=-1))
        product(narrow, key[items], scale, d_query[items, part])
        key_sum.add(d_key[items], narrow.mT, q, scale, **ends)
        value_sum.add(d_value[items], scores.narrow(weights).mT, g, 1.0, **ends)
    return d_query, d_key, d_value


def _softmax(scores: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn products into weights in place; also return each row's base-2 lse.

    The largest score is subtracted before scaling, where equal scores are still equal: scaled sums
    of large products differ by their rounding, which exp2 would magnify.
    """
    top = scores.amax(dim=-1, keepdim=True) if scale >= 0 else scores.amin(dim=-1, keepdim=True)
    total = scores.sub_(top).mul_(scale * LOG2E).exp2_().sum(dim=-1, keepdim=True)
    return scores.div_(total), (top * (scale * LOG2E) + total.log2()).squeeze(-1)


def _tiles(dtype: torch.dtype, sizes: tuple[int, int, int], device, matrices: int, workspace_mib):
    wide = accumulator_dtype(dtype)
    bytes_per_score = wide.itemsize + (dtype.itemsize if dtype != wide else 0)
    return tiles(*sizes, scores_per_tile(device, matrices * bytes_per_score, workspace_mib))


class _Scores:
    """A tile of scores as the matrix product gives it, and its copy in at least float32."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        wide = accumulator_dtype(dtype)
        self._product = Buffer(dtype, device)
        self._wide = Buffer(wide, device) if wide != dtype else None

    def wide(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """rows @ columns^T, ready for arithmetic in place."""
        shape = (rows.shape[0], rows.shape[1], columns.shape[1])
        self._narrow = torch.bmm(rows, columns.mT, out=self._product.block(*shape))
        return self._narrow if self._wide is None else self._wide.block(*shape).copy_(self._narrow)

    def narrow(self, wide: torch.Tensor) -> torch.Tensor:
        """The tile in the dtype of the matrix products."""
        return wide if self._wide is None else self._narrow.copy_(wide)
