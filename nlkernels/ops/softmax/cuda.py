"""Softmax attention in CUDA: which of its kernels runs a problem.

hopper    `cuda_hopper.py`, forward, and `cuda_hopper_backward.py`, 16-bit operands of many channels
          on compute capability 9.0; the backward not with `workspace_mib=0`
portable  nlkernels/ops/_cuda_attention.py, for every D and V, on every GPU that is served

Unverified: no GPU has run these kernels.
"""

import torch

from nlkernels.ops import _cuda_attention
from nlkernels.ops.softmax import cuda_hopper, cuda_hopper_backward


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    workspace_mib: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out (B,N,V) and stats (2,B,N)."""
    if cuda_hopper.serves(query, key, value):
        return cuda_hopper.forward(query, key, value, scale)
    return _cuda_attention.forward(_cuda_attention.SOFTMAX, query, key, value, scale)


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
    if workspace_mib != 0 and cuda_hopper_backward.serves(query, key, value):
        return cuda_hopper_backward.backward(
            grad, query, key, value, out, stats, scale, workspace_mib
        )
    return _cuda_attention.backward(
        _cuda_attention.SOFTMAX, grad, query, key, value, scale, out, stats
    )
