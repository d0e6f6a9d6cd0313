"""The definition of the concatenation affinity: plain PyTorch, materialises the scores.

    out[i] = sum_j relu(query_score[i] + key_score[j]) value[j] / M

M is the number of keys, zero keys give zeros. A weight vector over the concatenation of a query and
a key splits into two, one for either: so the scores are sums of one number for each. The derivative
of relu at 0 is 0. Differentiable by plain autograd; usable in float64.
Sources: "Non-local Neural Networks" (Wang et al., CVPR 2018), concatenation, without their bias;
open-mmlab/mmcv, AlexHex7/Non-local_pytorch.
"""

import torch


def attend(query_score: torch.Tensor, key_score: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """(B,N), (B,M), (B,M,V) -> (B,N,V)."""
    weights = torch.relu(query_score.unsqueeze(2) + key_score.unsqueeze(1))
    return weights @ value / max(key_score.shape[1], 1)
