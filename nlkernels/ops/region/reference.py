"""The definition of region aggregation: plain PyTorch, a depthwise 3-D correlation.

    out[b,c,t,h,w] = sum_ijk weight[c,i,j,k] x[b,c,t+i-(kt-1)/2,h+j-(kh-1)/2,w+k-(kw-1)/2]

with zeros outside of x: stride 1, no bias, odd sizes. Differentiable by plain autograd; usable in
float64. Memory beyond inputs and outputs: what torch's convolution takes.
Sources: "Region-based Non-local Operation for Video Classification" (Huang and Bors, ICPR 2020);
guoxih/region-based-non-local-network, which multiplies a dense grouped kernel by a mask.
"""

import torch


def aggregate(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(B,C,T,H,W), (C,kt,kh,kw) -> (B,C,T,H,W)."""
    if x.numel() == 0:
        return (
            x * weight.sum()
        )  # empty, which torch's convolution refuses, and still differentiable
    padding = [size // 2 for size in weight.shape[1:]]
    return torch.conv3d(x, weight.unsqueeze(1), padding=padding, groups=x.shape[1])
