"""The staged backward of softmax attention: what the kernels of every language share.

  tile    P = exp2(c (Q K^T - top)) / total;  dP = dO V^T;  dS = scale P (dP - delta)
          P and dS go to a workspace in the operands' dtype
  library dV += P^T dO;  dK += dS^T Q;  dQ = dS K
with c = log2(e) scale and top, total the forward's statistics, or the tile's own where it holds all
keys: a single key then gets a dS of exactly 0. No atomics: every sum has one order.
The scale is multiplied into dS in float32, before its only rounding.

delta is sum_j P dP. Keys of one key tile sum it inside the tile kernel. More keys start from the
equal sum of dO out over channels, whose rounding does not cancel against dP's: with 16 bits, keys
and values of mean 1 and deviation 1 made dQ 5 times as wrong as PyTorch's, of mean 4 up to 22
times. So the tile kernel also writes each row's sums E of P (dP - delta) and F of P, 0 and 1 if
delta and the statistics were right, and where they are not, to the dtype's rounding, a last kernel
replaces P by P / F and dS by (dS - scale P E / F) / F: 8 bytes of traffic a score in 16 bits.
Statistics are not right where products were added in another order and are large: all of P would be
wrong by the rounding of the largest, as it is not in PyTorch's normalised weights.

Memory beyond inputs and outputs, E bytes an element, for R rows (of all its items) in a tile:
  workspace  : 2 E R padded(M), at most what `staged_tiles` allows;
  totals     : with 16 bits 4 M (D + V), the float32 dK and dV of one item, unless it is one tile.
In float16 a correction below half a step of dS's subnormals is lost: with 12544 keys and more, and
keys and values far from mean 0, dQ then misses the rule of 3x PyTorch's error (6x was seen).

The library copies grad, query and key of which neither rows nor channels have a stride of 1.
"""

from collections.abc import Callable

import torch

from nlkernels.ops._staged_products import Sum, multiply
from nlkernels.ops._tiles import Buffer, padded, staged_tiles

# A row is corrected where its errors add up to more than this part of the dtype's rounding of the
# sum of its magnitudes: many keys' roundings cancel in dQ, these errors do not.
CORRECTED_ABOVE = 1 / 64

# fill(weights, d_scores, grad, query, key, value, where): computes P and dS (I,R,M) of the rows
# that the slices `where` of batch items and rows name; the operands are those rows already.
Fill = Callable[..., None]


def backward(
    fill: Fill,
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    workspace_mib: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query, key and value, in their dtypes."""
    batch, rows, _ = query.shape
    keys = key.shape[1]
    d_query, d_key, d_value = (torch.empty_like(t) for t in (query, key, value))
    if rows == 0:
        return d_query, d_key.zero_(), d_value.zero_()
    size, device = query.element_size(), query.device
    workspace = Buffer(query.dtype, device)
    key_sum, value_sum = Sum(device), Sum(device)
    for items, part in staged_tiles(batch, rows, keys, 2 * size, size, workspace_mib):
        q, k, v, g = query[items, part], key[items], value[items], grad[items, part]
        weights, d_scores = workspace.block(2, *q.shape[:2], padded(keys))[..., :keys]
        fill(weights, d_scores, g, q, k, v, (items, part))
        ends = {"first": part.start == 0, "last": part.stop == rows}
        value_sum.add(d_value[items], weights.mT, g, **ends)
        key_sum.add(d_key[items], d_scores.mT, q, **ends)
        multiply(d_query[items, part], d_scores, k)
    return d_query, d_key, d_value
