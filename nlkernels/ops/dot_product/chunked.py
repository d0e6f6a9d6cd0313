"""Dot-product attention in plain PyTorch, in whichever order of products costs fewer FLOPs.

linear     state = (scale / M) K^T V (D x V);  out = Q state;  dQ = dO state^T;
           dstate = (scale / M) Q^T dO;  dK = V dstate^T;  dV = K dstate
quadratic  tiles of the score matrix, as in nlkernels/ops/_quadratic.py

Only query, key and value are kept for the backward. The state is stored in the operands' dtype: its
products are summed in float32 and rounded, as those of every other matrix product are.

Memory beyond inputs and outputs, E bytes an element:
  linear    : D V E (forward), 2 D V E (backward) for each batch item; in float16, computed in
              float32, + 4 bytes for each element of the distinct operands and results;
  quadratic : what nlkernels/ops/_quadratic.py says.
"""

import torch

from nlkernels.ops import _quadratic
from nlkernels.ops._tiles import cast, compute_dtype


def flops(batch: int, queries: int, keys: int, depth: int, value_depth: int) -> tuple[int, int]:
    """FLOPs of the forward pass: (linear, quadratic)."""
    linear = 2 * batch * (queries + keys) * depth * value_depth
    return linear, _quadratic.flops(batch, queries, keys, depth, value_depth)


def backward_flops(
    batch: int, queries: int, keys: int, depth: int, value_depth: int
) -> tuple[int, int]:
    """FLOPs of the backward pass, the recomputed state or scores included: (linear, quadratic)."""
    linear = 2 * batch * (2 * queries + 3 * keys) * depth * value_depth
    return linear, _quadratic.backward_flops(batch, queries, keys, depth, value_depth)


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    workspace_mib: float | None = None,
) -> torch.Tensor:
    """Return out (B,N,V)."""
    batch, rows, depth = query.shape
    keys, value_depth = value.shape[1:]
    linear, quadratic = flops(batch, rows, keys, depth, value_depth)
    if linear > quadratic or keys == 0:
        return _quadratic.forward(query, key, value, scale, workspace_mib, rectify=False)
    q, k, v = cast(compute_dtype(query.dtype), query, key, value)
    out = v.new_empty(batch, rows, value_depth)
    return torch.bmm(q, _state(k, v, scale / keys), out=out).to(query.dtype)


def backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    workspace_mib: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query, key and value, in their dtypes."""
    batch, rows, depth = query.shape
    keys, value_depth = value.shape[1:]
    linear, quadratic = backward_flops(batch, rows, keys, depth, value_depth)
    if linear > quadratic or rows == 0 or keys == 0:
        return _quadratic.backward(grad, query, key, value, scale, workspace_mib, rectify=False)
    factor = scale / keys
    g, q, k, v = cast(compute_dtype(query.dtype), grad, query, key, value)
    d_query, d_key, d_value = (torch.empty_like(t) for t in (q, k, v))
    d_state = _state(q, g, factor)
    torch.bmm(g, _state(k, v, factor).mT, out=d_query)
    torch.bmm(v, d_state.mT, out=d_key)
    torch.bmm(k, d_state, out=d_value)
    return tuple(t.to(query.dtype) for t in (d_query, d_key, d_value))


def _state(rows: torch.Tensor, columns: torch.Tensor, factor: float) -> torch.Tensor:
    """factor rows^T columns, one matrix per batch item."""
    return torch.bmm(rows.mT, columns).mul_(factor)
