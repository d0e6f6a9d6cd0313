"""Attention without a softmax in plain PyTorch, one tile of the score matrix at a time.

forward   S = factor Q K^T;  W = S, or max(S, 0) where rectified;  out = W V
backward  dS = factor dO V^T, and 0 where a rectified S <= 0;  dQ = dS K;  dK = dS^T Q;  dV = W^T dO

The factor is scale / M. A rectified NaN stays NaN and lets the gradient pass, as in torch.relu.

Memory beyond inputs and outputs, E bytes an element:
  tile      : E bytes a score, 2 E in the backward, at most `workspace_mib` (10 on CPUs, 40 on
              GPUs), or 16 rows where those take more;
  backward  : in bfloat16 + 4 M (D + V) + 6 M max(D, V) for the float32 sums of one batch item,
              unless the item is one tile;
  float16   : computed in float32, + 4 bytes for each element of the distinct operands and results.
"""

from collections.abc import Iterator

import torch

from nlkernels.ops._tiles import Buffer, ProductSum, cast, compute_dtype, scores_per_tile, tiles


def flops(batch: int, queries: int, keys: int, depth: int, value_depth: int) -> int:
    """FLOPs of the forward pass."""
    return 2 * batch * queries * keys * (depth + value_depth)


def backward_flops(batch: int, queries: int, keys: int, depth: int, value_depth: int) -> int:
    """FLOPs of the backward pass, the scores computed again included."""
    return 2 * batch * queries * keys * (3 * depth + 2 * value_depth)


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
    dtype = compute_dtype(query.dtype)
    if dtype != query.dtype:
        operands = cast(dtype, query, key, value)
        return forward(*operands, scale, workspace_mib, rectify=rectify).to(query.dtype)
    batch, rows, _ = query.shape
    keys, value_depth = value.shape[1:]
    out = value.new_empty(batch, rows, value_depth)
    if keys == 0:
        return out.zero_()
    buffer = Buffer(dtype, query.device)
    for items, part in _tiles(query, value, 1, workspace_mib):
        weights = _weights(query[items, part], key[items], scale / keys, rectify, buffer)
        torch.bmm(weights, value[items], out=out[items, part])
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
    dtype = compute_dtype(query.dtype)
    if dtype != query.dtype:
        operands = cast(dtype, grad, query, key, value)
        grads = backward(*operands, scale, workspace_mib, rectify=rectify)
        return tuple(t.to(query.dtype) for t in grads)
    d_query, d_key, d_value = (torch.empty_like(t) for t in (query, key, value))
    rows, keys, device = query.shape[1], key.shape[1], query.device
    if rows == 0 or keys == 0:
        return d_query.zero_(), d_key.zero_(), d_value.zero_()
    factor = scale / keys
    buffer, d_buffer, term = (Buffer(dtype, device) for _ in range(3))
    key_sum, value_sum = (ProductSum(dtype, device, term) for _ in range(2))
    for items, part in _tiles(query, value, 2, workspace_mib):
        q, g = query[items, part], grad[items, part]
        ends = {"first": part.start == 0, "last": part.stop == rows}
        weights = _weights(q, key[items], factor, rectify, buffer)
        d_scores = _product(g, value[items], factor, d_buffer)
        if rectify:
            torch.ops.aten.threshold_backward.grad_input(d_scores, weights, 0, grad_input=d_scores)
        torch.bmm(d_scores, key[items], out=d_query[items, part])
        key_sum.add(d_key[items], d_scores.mT, q, 1.0, **ends)
        value_sum.add(d_value[items], weights.mT, g, 1.0, **ends)
    return d_query, d_key, d_value


def _weights(
    query: torch.Tensor, key: torch.Tensor, factor: float, rectify: bool, buffer: Buffer
) -> torch.Tensor:
    scores = _product(query, key, factor, buffer)
    return scores.relu_() if rectify else scores


def _product(
    rows: torch.Tensor, columns: torch.Tensor, factor: float, buffer: Buffer
) -> torch.Tensor:
    """factor rows @ columns^T. The factor comes last: by zero, torch's own scaled product is not
    zero but what its output held."""
    shape = (*rows.shape[:2], columns.shape[1])
    return torch.bmm(rows, columns.mT, out=buffer.block(*shape)).mul_(factor)


def _tiles(
    query: torch.Tensor, value: torch.Tensor, matrices: int, workspace_mib: float | None
) -> Iterator[tuple[slice, slice]]:
    budget = scores_per_tile(query.device, matrices * query.dtype.itemsize, workspace_mib)
    return tiles(query.shape[0], query.shape[1], value.shape[1], budget)
