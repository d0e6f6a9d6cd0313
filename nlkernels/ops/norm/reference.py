"""The definitions: a product's statistics, the norm by them with the residual, and its gradients.

product    z = features weight^T + shift;  moments = mean and biased variance of its channels
forward    out = base + gamma standard + beta, standard = (z - mean) / sqrt(variance + eps)
sums       sum_b,n grad standard;  sum_b,n grad
gradient   gamma / sqrt(variance + eps) (grad - mean of grad - standard * mean of grad standard)

as published by Ioffe and Szegedy, "Batch normalization", 2015, and computed by torch's batch norms.
"""

import torch


def norm(z: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor, eps: float) -> torch.Tensor:
    """z (B,N,C) by its own statistics, differentiable by autograd."""
    mean, variance = z.mean((0, 1)), z.var((0, 1), correction=0)
    return (z - mean) * torch.rsqrt(variance + eps) * gamma + beta
