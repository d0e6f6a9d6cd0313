"""Max pooling in plain PyTorch, on any device.

Memory beyond inputs and outputs, P pooled numbers: 8 P bytes for torch's indices, and some 24 P
while winners are packed or unpacked.
"""

import torch
from torch.nn import functional as F

from nlkernels.ops.pool import problem
from nlkernels.ops.region.problem import is_channels_last


def forward(x: torch.Tensor, window: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(B,C,T,H,W) -> pooled (B,C,T',H',W') and winners."""
    out = problem.like(x, window)
    if out.numel() == 0:
        return out, problem.winners_like(x, window).zero_()
    found, places = F.max_pool3d(x, window, return_indices=True)
    width, area = x.shape[4], x.shape[3] * x.shape[4]
    axes = (places // area, places // width % x.shape[3], places % width)
    numbers = torch.zeros_like(places)
    for place, size in zip(axes, window, strict=True):
        numbers = numbers * size + place % size
    return out.copy_(found), problem.packed(numbers, is_channels_last(x), window)


def backward(
    grad: torch.Tensor, winners: torch.Tensor, d_x: torch.Tensor, window: list[int]
) -> torch.Tensor:
    """d_x (B,C,T,H,W), with the gradients of the pooled numbers added to their winners."""
    if grad.numel() == 0:
        return d_x
    last = is_channels_last(d_x)
    count = grad.shape[1] if last else grad.shape[4]
    numbers = problem.unpacked(winners, count, last, window)
    whole = [n * k for n, k in zip(grad.shape[2:], window, strict=True)]
    region = d_x[:, :, : whole[0], : whole[1], : whole[2]]
    for tap in range(problem.taps(window)):
        h, w = tap // window[2] % window[1], tap % window[2]
        t = tap // (window[1] * window[2])
        part = region[:, :, t :: window[0], h :: window[1], w :: window[2]]
        part.add_(torch.where(numbers == tap, grad, 0))
    return d_x
