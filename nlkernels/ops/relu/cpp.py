"""Rectified attention in C++ on CPUs: see nlkernels/ops/_cpp.py."""

import torch

from nlkernels.ops import _cpp


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
    return _cpp.forward(_cpp.RELU, query, key, value, scale, workspace_mib)[0]


def backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    workspace_mib: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query, key and value, in their dtypes."""
    return _cpp.backward(_cpp.RELU, grad, query, key, value, scale, workspace_mib)
