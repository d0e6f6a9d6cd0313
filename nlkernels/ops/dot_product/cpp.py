"""Dot-product attention in C++ on CPUs, in the order of products that costs fewer FLOPs.

Both orders: see nlkernels/ops/_cpp.py.
"""

import torch

from nlkernels.ops import _cpp
from nlkernels.ops.dot_product import chunked


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    workspace_mib: float | None = None,
) -> torch.Tensor:
    """Return out (B,N,V); zeros without keys."""
    if key.shape[1] == 0:
        return value.new_zeros(*query.shape[:2], value.shape[2])
    linear, quadratic = chunked.flops(*query.shape[:2], *key.shape[1:], value.shape[2])
    order = _cpp.LINEAR if linear <= quadratic else _cpp.SCORES
    return _cpp.forward(order, query, key, value, scale, workspace_mib)[0]


def backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    workspace_mib: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query, key and value, in their dtypes."""
    linear, quadratic = chunked.backward_flops(*query.shape[:2], *key.shape[1:], value.shape[2])
    order = _cpp.LINEAR if linear <= quadratic else _cpp.SCORES
    return _cpp.backward(order, grad, query, key, value, scale, workspace_mib)
