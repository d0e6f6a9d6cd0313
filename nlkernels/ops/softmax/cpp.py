"""Softmax attention in C++ on CPUs: see nlkernels/ops/_cpp.py."""

import torch

from nlkernels.ops import _cpp


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    workspace_mib: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out (B,N,V) and stats (2,B,N): each row's extreme product, and its sum."""
    return _cpp.forward(_cpp.SOFTMAX, query, key, value, scale, workspace_mib)


def backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    stats: torch.Tensor,
    scale: float,
    workspace_mib: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query, key and value, in their dtypes."""
    return _cpp.backward(_cpp.SOFTMAX, grad, query, key, value, scale, workspace_mib)
