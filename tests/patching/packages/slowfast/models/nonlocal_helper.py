"""Stands for PySlowFast's block."""

import torch
from torch import nn


class Nonlocal(nn.Module):
    def __init__(self, dim, dim_inner, pool_size=None, instantiation="softmax", norm="bn"):
        super().__init__()
        self.dim_inner, self.instantiation = dim_inner, instantiation
        self.use_pool = pool_size is not None and any(size > 1 for size in pool_size)
        for name in ("conv_theta", "conv_phi", "conv_g"):
            self.add_module(name, nn.Conv3d(dim, dim_inner, kernel_size=1, stride=1, padding=0))
        self.conv_out = nn.Conv3d(dim_inner, dim, kernel_size=1, stride=1, padding=0)
        if norm == "bn":
            self.bn = nn.BatchNorm3d(dim)
        elif norm == "layer":  # what other releases call "layernorm"
            self.norm = nn.GroupNorm(1, dim, affine=False)
        if self.use_pool:
            self.pool = nn.MaxPool3d(kernel_size=pool_size, stride=pool_size, padding=[0, 0, 0])

    def forward(self, x):
        theta = self.conv_theta(x).flatten(2)
        source = self.pool(x) if self.use_pool else x
        phi, g = self.conv_phi(source).flatten(2), self.conv_g(source).flatten(2)
        scores = torch.einsum("bdn,bdm->bnm", theta, phi)
        if self.instantiation == "softmax":
            weights = (scores * self.dim_inner**-0.5).softmax(2)
        else:
            weights = scores / scores.shape[2]
        out = torch.einsum("bnm,bdm->bdn", weights, g).view(x.shape[0], -1, *x.shape[2:])
        out = self.conv_out(out)
        norm = getattr(self, "bn", getattr(self, "norm", None))
        return x + (out if norm is None else norm(out))
