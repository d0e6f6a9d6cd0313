"""Stands for region-based-non-local-network's ops/depthwise_conv.py."""

import torch
from torch import nn
from torch.nn import functional as F


class DiagonalwiseRefactorization(nn.Module):
    """A grouped convolution whose mask leaves each channel to itself."""

    def __init__(self, in_channels, ks, stride=1, groups=1):
        super().__init__()
        self.in_channels, self.groups, self.stride = in_channels, groups, stride
        self.p = [size // 2 for size in ks]
        width = in_channels // groups
        own = torch.arange(width) == torch.arange(in_channels)[:, None] % width
        mask = own.view(in_channels, width, 1, 1, 1).float().expand(-1, -1, *ks).contiguous()
        self.mask = nn.Parameter(mask, requires_grad=False)
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(mask.shape)) * mask)
        self.conv = F.conv3d

    def forward(self, x):
        weight = self.weight * self.mask
        return self.conv(x, weight, stride=self.stride, padding=self.p, groups=self.groups)


def DepthwiseConv3d(in_channels, ks, stride=1):
    return DiagonalwiseRefactorization(in_channels, ks, stride, max(in_channels // 32, 1))
