"""Dot-product attention in plain PyTorch, in whichever order of products costs fewer FLOPs.

linear     state = (scale / M) K^T V (D x V);  out = Q state;  dQ = dO state^T;
           dstate = (scale / M) Q^T dO;  dK = V dstate^T;  dV = K dstate
quadratic  S = (scale / M) Q K^T;  out = S V, one tile of the score matrix at a time;
           dS = (scale / M) dO V^T;  dQ = dS K;  dK = dS^T Q;  dV = S^T dO

Only query, key and value are kept for the backward. The state is stored in the operands' dtype: its
products are summed in float32 and rounded, as those of every other matrix product are.

Memory beyond inputs and outputs, E bytes an element:
  linear    : D V E (forward), 2 D V E (backward) for each batch item;
  quadratic : tile of scores x E, two tiles in the backward, at most `workspace_mib` (10 on CPUs, 40
              on GPUs) or 16 rows; in bfloat16 + 4 M (D + V) + 6 M max(D, V) for the sums of
              one batch item;
  float16   : computed in float32, + 4 bytes for each element of the operands and results.
"""

import torch

from nlkernels.ops._tiles import (
    Buffer,
    ProductSum,
    compute_dtype,
    scores_per_tile,
    tiles,
)


def flops(batch: int, queries: int, keys: int, depth: int, value_depth: int) -> tuple[int, int]:
    """FLOPs of the forward pass: (linear, quadratic)."""
    linear = 2 * batch * (queries + keys) * depth * value_depth
    return linear, 2 * batch * queries * keys * (depth + value_depth)


def backward_flops(
    batch: int, queries: int, keys: int, depth: int, value_depth: int
) -> tuple[int, int]:
    """FLOPs of the backward pass, the recomputed state or scores included: (linear, quadratic)."""
    linear = 2 * batch * (2 * queries + 3 * keys) * depth * value_depth
    return linear, 2 * batch * queries * keys * (3 * depth + 2 * value_depth)


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    workspace_mib: float | None = None,
) -> torch.Tensor:
    """Return out (B,N,V)."""
    dtype = compute_dtype(query.dtype)
    if dtype != query.dtype:
        operands = (t.to(dtype) for t in (query, key, value))
        return forward(*operands, scale, workspace_mib).to(query.dtype)
    batch, rows, depth = query.shape
    keys, value_depth = value.shape[1:]
    out = value.new_empty(batch, rows, value_depth)
    if keys == 0:
        return out.zero_()
    factor = scale / keys
    linear, quadratic = flops(batch, rows, keys, depth, value_depth)
    if linear <= quadratic:
        return torch.bmm(query, _state(key, value, factor), out=out)
    scores = Buffer(dtype, query.device)
    for items, part in _tiles(query, value, 1, workspace_mib):
        q = query[items, part]
        block = torch.bmm(q, key[items].mT, out=scores.block(*q.shape[:2], keys)).mul_(factor)
        torch.bmm(block, value[items], out=out[items, part])
    return out


def backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    workspace_mib: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query, key and value, in their dtypes."""
    dtype = compute_dtype(query.dtype)
    if dtype != query.dtype:
        operands = (t.to(dtype) for t in (grad, query, key, value))
        d_query, d_key, d_value = backward(*operands, scale, workspace_mib)
        return d_query.to(query.dtype), d_key.to(key.dtype), d_value.to(value.dtype)
    d_query, d_key, d_value = (torch.empty_like(t) for t in (query, key, value))
    batch, rows, depth = query.shape
    keys, value_depth = value.shape[1:]
    if rows == 0 or keys == 0:
        return d_query.zero_(), d_key.zero_(), d_value.zero_()
    factor = scale / keys
    linear, quadratic = backward_flops(batch, rows, keys, depth, value_depth)
    if linear <= quadratic:
        d_state = _state(query, grad, factor)
        torch.bmm(grad, _state(key, value, factor).mT, out=d_query)
        torch.bmm(value, d_state.mT, out=d_key)
        torch.bmm(key, d_state, out=d_value)
        return d_query, d_key, d_value
    scores, d_scores = Buffer(dtype, query.device), Buffer(dtype, query.device)
    term = Buffer(dtype, query.device)
    key_sum, value_sum = (ProductSum(dtype, query.device, term) for _ in range(2))
    for items, part in _tiles(query, value, 2, workspace_mib):
        q, g = query[items, part], grad[items, part]
        shape = (*q.shape[:2], keys)
        ends = {"first": part.start == 0, "last": part.stop == rows}
        block = torch.bmm(q, key[items].mT, out=scores.block(*shape)).mul_(factor)
        d_block = torch.bmm(g, value[items].mT, out=d_scores.block(*shape)).mul_(factor)
        torch.bmm(d_block, key[items], out=d_query[items, part])
        key_sum.add(d_key[items], d_block.mT, q, 1.0, **ends)
        value_sum.add(d_value[items], block.mT, g, 1.0, **ends)
    return d_query, d_key, d_value


def _state(rows: torch.Tensor, columns: torch.Tensor, factor: float) -> torch.Tensor:
    """factor rows^T columns, one matrix per batch item."""
    return torch.bmm(rows.mT, columns).mul_(factor)


def _tiles(query: torch.Tensor, value: torch.Tensor, matrices: int, workspace_mib: float | None):
    budget = scores_per_tile(query.device, matrices * query.dtype.itemsize, workspace_mib)
    return tiles(query.shape[0], query.shape[1], value.shape[1], budget)
