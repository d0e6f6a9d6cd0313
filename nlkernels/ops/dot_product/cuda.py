"""Dot-product attention in CUDA in the quadratic order: see nlkernels/ops/_cuda_attention.py.

For problems whose linear order costs more FLOPs, which are short ones: none of them has a state.

Unverified: no GPU has run these kernels.
"""

import torch

from nlkernels.ops import _cuda_attention
from nlkernels.ops.dot_product import order


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    workspace_mib: float | None = None,
    keep: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out (B,N,V) and the empty state, whatever `keep` says."""
    out = _cuda_attention.forward(_cuda_attention.SCORES, query, key, value, scale)[0]
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
    return _cuda_attention.backward(_cuda_attention.SCORES, grad, query, key, value, scale)
