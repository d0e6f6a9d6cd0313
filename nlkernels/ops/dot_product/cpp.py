"""Dot-product attention in C++ on CPUs, in the order of products that costs fewer FLOPs.

Both orders, and the memory they take beside a state that is kept (an output of the forward, where
nlkernels/ops/dot_product/order.py says so): see nlkernels/ops/_cpp.py. With the state of a forward
in C++ the gradients are to the last bit those of a backward that sums it again.
"""

import torch

from nlkernels.ops import _cpp
from nlkernels.ops.dot_product import order


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    workspace_mib: float | None = None,
    keep: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out (B,N,V), zeros without keys, and the state, `order.new_state`."""
    state = order.new_state(query, key, value, keep)
    if key.shape[1] == 0:
        return value.new_zeros(*query.shape[:2], value.shape[2]), state
    linear, quadratic = order.flops(*query.shape[:2], *key.shape[1:], value.shape[2])
    affinity = _cpp.LINEAR if linear <= quadratic else _cpp.SCORES
    out, _ = _cpp.forward(affinity, query, key, value, scale, workspace_mib, state)
    return out, state


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
    sizes = (*query.shape[:2], *key.shape[1:], value.shape[2])
    linear, quadratic = order.backward_flops(*sizes, kept=state.numel() > 0)
    affinity = _cpp.LINEAR if linear <= quadratic else _cpp.SCORES
    return _cpp.backward(affinity, grad, query, key, value, scale, workspace_mib, state)
