"""The definition of context pooling: plain PyTorch, a softmax over all positions of an item.

    context[b] = sum_p softmax_p(weight . x[b,:,p] + bias) x[b,:,p]

The bias shifts all logits alike, so it changes nothing and its gradient is zero but for rounding.
Differentiable by plain autograd; usable in float64. Memory beyond inputs and outputs: a few numbers
a position, and what torch's products copy.
Sources: "GCNet: Non-local Networks Meet Squeeze-Excitation Networks and Beyond" (Cao et al., 2019);
guoxih/region-based-non-local-network, ChannelGate.
"""

import torch


def pool(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """(B,C,*positions), (C,), (1,) -> (B,C)."""
    rows = x.flatten(2)
    logits = torch.matmul(weight, rows)
    if bias is not None:
        logits = logits + bias
    return torch.matmul(rows, torch.softmax(logits, dim=-1).unsqueeze(-1)).squeeze(-1)
