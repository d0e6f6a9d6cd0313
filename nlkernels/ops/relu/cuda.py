"""Attention by rectified scores in CUDA: see nlkernels/ops/_cuda_attention.py.

Unverified: no GPU has run these kernels.
"""

import torch

from nlkernels.ops import _cuda_attention


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    workspace_mib: float | None = None,
) -> torch.Tensor:
    """Return out (B,N,V); zeros without keys."""
    return _cuda_attention.forward(_cuda_attention.RELU, query, key, value, scale)[0]


def backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    workspace_mib: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query, key and value, in their dtypes."""
    return _cuda_attention.backward(_cuda_attention.RELU, grad, query, key, value, scale)
