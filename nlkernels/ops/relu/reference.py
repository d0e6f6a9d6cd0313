"""The definition of attention by rectified scores: plain PyTorch, materialises the score matrix.

    out[i] = sum_j relu(scale * query[i].key[j]) / M * value[j]

M is the number of keys, zero keys give zeros; the derivative of relu at 0 is 0. Differentiable by
plain autograd; usable in float64.
Sources: G. Huang, A. G. Bors, "Region-based Non-local Operation for Video Classification", ICPR
2020; guoxih/region-based-non-local-network.
"""

import torch


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    """(B,N,D), (B,M,D), (B,M,V) -> (B,N,V)."""
    return torch.relu(query @ key.mT * (scale / max(key.shape[1], 1))) @ value
