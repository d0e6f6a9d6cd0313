"""Dot-product attention in Triton in the quadratic order, bitwise repeatable.

For problems whose linear order costs more FLOPs, which are short ones: none of them has a state.
Which kernels run, and the memory they take, stands in nlkernels/ops/_triton_quadratic.py.

Unverified: no GPU has run these kernels.
"""

import torch

from nlkernels.ops import _triton_quadratic
from nlkernels.ops.dot_product import order

KERNELS = _triton_quadratic.CANDIDATES


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    workspace_mib: float | None = None,
    keep: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out (B,N,V) and the empty state, whatever `keep` says."""
    out = _triton_quadratic.forward(query, key, value, scale, workspace_mib, rectify=False)
    return out, order.new_state(query, key, value, keep=False)


def backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    state: torch.Tensor,
    scale: float,
    workspace_mib: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query, key and value, in their dtypes; reads no state."""
    return _triton_quadratic.backward(grad, query, key, value, scale, workspace_mib, rectify=False)
