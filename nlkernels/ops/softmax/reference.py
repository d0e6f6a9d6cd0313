"""The definition of softmax attention: plain PyTorch, materialises the score matrix.

    out[i] = sum_j softmax_j(scale * query[i].key[j]) value[j]

Differentiable by plain autograd, which keeps two (B,N,M) matrices; usable in float64.
Sources: "Non-local Neural Networks" (Wang et al., CVPR 2018), embedded Gaussian and Gaussian;
facebookresearch/video-nonlocal-net.
"""

import torch


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    """(B,N,D), (B,M,D), (B,M,V) -> (B,N,V)."""
    return torch.softmax(query @ key.mT * scale, dim=-1) @ value
