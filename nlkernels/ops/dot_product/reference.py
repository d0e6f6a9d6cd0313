"""The definition of dot-product attention: plain PyTorch, materialises the score matrix.

    out[i] = sum_j scale * query[i].key[j] / M * value[j]

M is the number of keys, zero keys give zeros. Differentiable by plain autograd; usable in float64.
Sources: "Non-local Neural Networks" (Wang et al., CVPR 2018), dot product;
facebookresearch/video-nonlocal-net.
"""

import torch


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    """(B,N,D), (B,M,D), (B,M,V) -> (B,N,V)."""
    return query @ key.mT * (scale / max(key.shape[1], 1)) @ value
