"""The concatenation in CUDA: exact, and linear in N and M but for sorting the scores. Unverified.

A query of score a sees the keys whose threshold -key_score lies below a. Queries and keys are
sorted together by a and threshold (torch.sort, stable); where they are equal the query comes first,
as it does not see that key. Walking up these stairs,

  G  the sum of the values passed,    S  the sum of (here - threshold) value over the values passed

a query's out is S / M, and nothing cancels, as no factor is negative. The backward walks up for
d_query_score = grad . G / M, then down, with the grads of the queries passed in the place of
values, for d_value = S / M and d_key_score = value . G / M. Rows are read where they lie, in two of
three kernels, and results written once; no table of prefix sums is kept.

Sums are float32 within chunks of 64 steps and float64 between them, in a fixed order that depends
on N, M and the ranks only: results are bitwise repeatable and those of a batch item its own. They
are taken in a unit in which none exceeds the largest value.

Scores that are NaN or infinite rank with the largest finite ones of their sign, NaN as positive.
They make NaN or Inf of what the definition does: for a query its row of out and its batch item's
d_value, for a key its batch item's out and its own row of d_value.

Memory beyond inputs and outputs, in bytes, with L = N + M:
  forward   : 20 B L for scores, 8 B ceil(L / 64) V for sums of chunks;
  backward  : the same, + 4 B max(N, M) ceil(V / 64) for products;
and what torch's sort takes for itself. Any strides are read as they are.

Source: `csrc/cuda/concat.cu`.
"""

from typing import NamedTuple

import torch

from nlkernels import _cuda
from nlkernels._ext import DTYPES


class _Sorted(NamedTuple):
    """Scores (B,N+M) in float32, queries first: as they came, their levels in order, and whose."""

    scores: torch.Tensor
    levels: torch.Tensor
    order: torch.Tensor


def forward(
    query_score: torch.Tensor, key_score: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """(B,N), (B,M), (B,M,V) -> (B,N,V)."""
    (batch, keys, channels), queries = value.shape, query_score.shape[1]
    out = value.new_empty(batch, queries, channels)
    if 0 in (batch, queries, keys):
        return out.zero_()
    ranked = _sorted(query_score, key_score)
    _walk(ranked, queries, keys, value, out=out)
    return out


def backward(
    grad: torch.Tensor, query_score: torch.Tensor, key_score: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query_score, key_score and value, in their dtypes."""
    given = query_score, key_score, value
    if any(t.numel() == 0 for t in given):
        return tuple(t.new_zeros(t.shape) for t in given)
    d_query, d_key, d_value = (t.new_empty(t.shape) for t in given)
    queries, keys = query_score.shape[1], key_score.shape[1]
    ranked = _sorted(query_score, key_score)
    _walk(ranked, queries, keys, value, other=grad, dots=d_query)
    _walk(ranked, queries, keys, grad, out=d_value, other=value, dots=d_key, keys_read=True)
    return d_query, d_key, d_value


def _sorted(query_score: torch.Tensor, key_score: torch.Tensor) -> _Sorted:
    queries = query_score.shape[1]
    scores = torch.cat((query_score.float(), key_score.float()), dim=1)
    levels = scores.nan_to_num(nan=torch.finfo(torch.float32).max)
    levels[:, queries:].neg_()
    # -0 becomes 0: a tie for every way of sorting.
    return _Sorted(scores, *torch.sort(levels.add_(0.0), dim=1, stable=True))


def _walk(
    ranked: _Sorted,
    queries: int,
    keys: int,
    source: torch.Tensor,
    out: torch.Tensor | None = None,
    other: torch.Tensor | None = None,
    dots: torch.Tensor | None = None,
    keys_read: bool = False,
) -> None:
    """Fill out (B,readers,V), and dots (B,readers) with the products of other and G."""
    module = _cuda.module(source)
    batch, sources, channels = source.shape
    sizes = (batch, sources, keys if keys_read else queries, channels)
    of_sources = ranked.scores[:, :queries] if keys_read else ranked.scores[:, queries:]
    tops = of_sources.amax(dim=1)
    sums = source.new_empty(module.concat_sums(sizes, dots is not None), dtype=torch.float32)
    module.concat_walk(
        _cuda.stream(source),
        DTYPES[source.dtype],
        sizes,
        tuple(t.data_ptr() for t in (ranked.levels, ranked.order, ranked.scores, tops)),
        keys_read,
        keys,
        _cuda.operand(source),
        0 if out is None else out.data_ptr(),
        (0, 0, 0, 0) if other is None else _cuda.operand(other),
        0 if dots is None else dots.data_ptr(),
        sums.data_ptr(),
    )
