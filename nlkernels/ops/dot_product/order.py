"""Which order of products dot-product attention takes, and whether its state is kept: from sizes.

The state K^T V (B,D,V), neither scaled nor divided, is what the linear order sums over keys. The
forward returns it, in the type that sums have, for a backward that need not sum it again, where

  - a gradient is asked for: `keep`;
  - the forward takes the linear order, and then so does the backward: with the state at hand it
    costs 2 (N + M) D V, of which (N + M) D V <= N M (D + V) is known;
  - it takes at most a quarter of the bytes of query, key and value, 4 A D V <= E (N D + M (D + V))
    with A bytes a sum (4, or 8 in float64) and E bytes an element: what is kept for the backward is
    little beside what has to be kept.

Everywhere else the state has no items: (0,D,V). A step of training that is compiled for any sizes
is traced once for those that keep their state, and once for those that do not.
"""

import torch

from nlkernels.ops import _quadratic
from nlkernels.ops._tiles import accumulator_dtype

# The operands' bytes over those of the largest state that is kept.
_SHARE = 4


def flops(batch: int, queries: int, keys: int, depth: int, value_depth: int) -> tuple[int, int]:
    """FLOPs of the forward pass: (linear, quadratic)."""
    linear = 2 * batch * (queries + keys) * depth * value_depth
    return linear, _quadratic.flops(batch, queries, keys, depth, value_depth)


def backward_flops(
    batch: int, queries: int, keys: int, depth: int, value_depth: int, *, kept: bool
) -> tuple[int, int]:
    """FLOPs of the backward pass, scores and a state that was not kept included: as `flops`."""
    products = 2 * queries + (2 if kept else 3) * keys
    linear = 2 * batch * products * depth * value_depth
    return linear, _quadratic.backward_flops(batch, queries, keys, depth, value_depth)


def keeps_state(
    batch: int, queries: int, keys: int, depth: int, value_depth: int, dtype: torch.dtype
) -> bool:
    """Whether a forward whose gradient is asked for returns its state."""
    linear, quadratic = flops(1, queries, keys, depth, value_depth)
    state = depth * value_depth * accumulator_dtype(dtype).itemsize
    operands = (queries * depth + keys * (depth + value_depth)) * dtype.itemsize
    return 0 < linear <= quadratic and _SHARE * state <= operands


def new_state(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, keep: bool
) -> torch.Tensor:
    """The state that a forward of these operands returns, uninitialised: (B,D,V) or (0,D,V)."""
    (batch, queries, depth), (_, keys, value_depth) = query.shape, value.shape
    kept = keep and keeps_state(batch, queries, keys, depth, value_depth, query.dtype)
    wide = accumulator_dtype(query.dtype)
    return query.new_empty(batch if kept else 0, depth, value_depth, dtype=wide)
