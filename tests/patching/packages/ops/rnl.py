"""Stands for region-based-non-local-network's ops/rnl.py."""

import torch
from torch import nn
from torch.nn import functional as F


class Depthwise(nn.Module):
    """A grouped convolution whose mask leaves each channel to itself."""

    def __init__(self, channels, kernel):
        super().__init__()
        self.groups = max(channels // 32, 1)
        width = channels // self.groups
        own = torch.arange(width) == torch.arange(channels)[:, None] % width
        mask = own.view(channels, width, 1, 1, 1).float().expand(-1, -1, *kernel).contiguous()
        self.mask = nn.Parameter(mask, requires_grad=False)
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(mask.shape)) * mask)
        self.padding = tuple(size // 2 for size in kernel)

    def forward(self, x):
        weight = self.weight * self.mask
        return F.conv3d(x, weight, padding=self.padding, groups=self.groups)


class RegionNonLocal(nn.Module):
    def __init__(
        self,
        in_channels,
        ratio=2,
        ks=(3, 7, 7),
        sub_sample=False,
        bn_layer=True,
        activation="softmax",
        use_norm=False,
    ):
        super().__init__()
        self.sub_sample, self.activation, self.use_norm = sub_sample, activation, use_norm
        inner = in_channels // ratio
        self.theta = nn.Conv3d(in_channels, inner, 1)
        if max(ks) > 1:
            self.penta = Depthwise(inner, ks)
        if sub_sample:
            self.max_pool = nn.MaxPool3d(kernel_size=(1, 2, 2))
        self.W = nn.Conv3d(inner, in_channels, 1)
        last = self.W
        if bn_layer:
            last = nn.BatchNorm3d(in_channels)
            self.W = nn.Sequential(self.W, last)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.attention_maps = self.feature_maps = None

    def forward(self, x):
        value = self.theta(x)
        query = self.penta(value) if hasattr(self, "penta") else value
        if self.use_norm:
            query = F.normalize(query, dim=1)
        key = self.max_pool(query) if self.sub_sample else query
        pooled = self.max_pool(value) if self.sub_sample else value
        scores = key.flatten(2).mT @ query.flatten(2)
        if self.activation == "softmax":
            weights = scores.softmax(1)
        else:
            weights = F.relu(scores) / scores.shape[1]
        self.attention_maps, self.feature_maps = weights, value
        out = (pooled.flatten(2) @ weights).view_as(value)
        return self.W(out) + x


class NL3DWrapper(nn.Module):
    def __init__(self, block, n_segment, **options):
        super().__init__()
        self.block, self.n_segment = block, n_segment
        self.nl = RegionNonLocal(block.bn3.num_features, **options)

    def forward(self, x):
        clips = self.block(x).unflatten(0, (-1, self.n_segment)).transpose(1, 2)
        return self.nl(clips).transpose(1, 2).flatten(0, 1)
