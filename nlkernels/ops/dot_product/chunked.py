"""Dot-product attention in plain PyTorch, in whichever order of products costs fewer FLOPs.

linear     state = K^T V (D x V);  out = Q factor state;  dQ = dO (factor state)^T;
           dstate = factor Q^T dO;  dK = V dstate^T;  dV = K dstate
quadratic  tiles of the score matrix, as in nlkernels/ops/_quadratic.py

The factor is scale / M. Kept for the backward are query, key, value and, where
nlkernels/ops/dot_product/order.py says so, the state. The products' factors are in the operands'
dtype: sums are made in float32 and rounded, as those of every other matrix product are, and a state
that is kept holds the rounded ones. In 16 bits that rounding is the same for all positions: numbers
are within the 2x/3x rule, but sums of them over positions can be tens of times further off than
those of the plain form, where channels have a mean far from zero.

Memory beyond inputs and outputs, E bytes an element:
  linear    : D V E (forward), 2 D V E (backward) for each batch item, beside a state that is kept
              (4 D V, in float64 8 D V, an output of the forward); in float16, computed in float32,
              + 4 bytes for each element of the distinct operands and results;
  quadratic : what nlkernels/ops/_quadratic.py says.
"""

import torch

from nlkernels.ops import _quadratic
from nlkernels.ops._tiles import cast, compute_dtype
from nlkernels.ops.dot_product import order


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    workspace_mib: float | None = None,
    keep: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out (B,N,V) and the state that a backward is given, `order.new_state`."""
    batch, rows, depth = query.shape
    keys, value_depth = value.shape[1:]
    state = order.new_state(query, key, value, keep)
    linear, quadratic = order.flops(batch, rows, keys, depth, value_depth)
    if linear > quadratic or keys == 0:
        out = _quadratic.forward(query, key, value, scale, workspace_mib, rectify=False)
        return out, state
    q, k, v = cast(compute_dtype(query.dtype), query, key, value)
    out = v.new_empty(batch, rows, value_depth)
    sums = torch.bmm(k.mT, v)
    if state.numel() > 0:
        state.copy_(sums)
    return torch.bmm(q, sums.mul_(scale / keys), out=out).to(query.dtype), state


def backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    state: torch.Tensor,
    scale: float,
    workspace_mib: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query, key and value, in their dtypes; an empty state is summed."""
    batch, rows, depth = query.shape
    keys, value_depth = value.shape[1:]
    kept = state.numel() > 0
    linear, quadratic = order.backward_flops(batch, rows, keys, depth, value_depth, kept=kept)
    if linear > quadratic or rows == 0 or keys == 0:
        return _quadratic.backward(grad, query, key, value, scale, workspace_mib, rectify=False)
    factor = scale / keys
    g, q, k, v = cast(compute_dtype(query.dtype), grad, query, key, value)
    d_query, d_key, d_value = (torch.empty_like(t) for t in (q, k, v))
    d_state = torch.bmm(q.mT, g).mul_(factor)
    sums = state.to(k.dtype, copy=True) if kept else torch.bmm(k.mT, v)
    torch.bmm(g, sums.mul_(factor).mT, out=d_query)
    torch.bmm(v, d_state.mT, out=d_key)
    torch.bmm(k, d_state, out=d_value)
    return tuple(t.to(query.dtype) for t in (d_query, d_key, d_value))
