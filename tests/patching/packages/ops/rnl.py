"""Stands for region-based-non-local-network's ops/rnl.py."""

import numpy as np
from torch import nn
from torch.nn import functional as F

from tests.patching.packages.ops.depthwise_conv import DepthwiseConv3d


class ChannelGate(nn.Module):
    def __init__(self, gate_channels, reduction_ratio=16):
        super().__init__()
        inner = gate_channels // reduction_ratio
        self.W_k = nn.Conv3d(gate_channels, 1, 1)
        self.W_v1 = nn.Linear(gate_channels, inner)
        self.bn1 = nn.BatchNorm1d(inner, momentum=0.01)
        self.relu = nn.ReLU(inplace=True)
        self.W_v2 = nn.Linear(inner, gate_channels)
        nn.init.zeros_(self.W_v2.weight)
        nn.init.zeros_(self.W_v2.bias)

    def forward(self, x):
        weights = self.W_k(x).flatten(1).softmax(1)
        context = (x.flatten(2) @ weights[:, :, None]).squeeze(2)
        hidden = self.bn1(self.W_v1(context)[:, :, None]).squeeze(2)
        return x + self.W_v2(self.relu(hidden))[:, :, None, None, None]


class _NonLocalBlockND(nn.Module):
    def __init__(
        self,
        in_channels,
        ratio,
        ks,
        sub_sample,
        bn_layer=True,
        activation="softmax",
        use_norm=False,
    ):
        super().__init__()
        self.in_channels, self.ratio, self.ks = in_channels, ratio, np.array(ks)
        self.sub_sample, self.activation, self.use_norm = sub_sample, activation, use_norm
        inner = in_channels // ratio
        if activation == "relu":
            self.relu = nn.ReLU(inplace=True)
        self.theta = nn.Conv3d(in_channels, inner, 1)
        if (self.ks > 1).any():
            self.penta = DepthwiseConv3d(inner, ks)
        self.W = nn.Conv3d(inner, in_channels, 1)
        last = self.W
        if bn_layer:
            last = nn.BatchNorm3d(in_channels)
            self.W = nn.Sequential(self.W, last)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        if sub_sample:
            self.pooling = nn.MaxPool3d(kernel_size=(1, 2, 2))

    def forward(self, x):
        self.feature_maps, self.attention_size = x, x.shape
        value = self.theta(x)
        query = self.penta(value) if (self.ks > 1).any() else value
        if self.use_norm:
            query = F.normalize(query, dim=1)
        key = self.pooling(query) if self.sub_sample else query
        pooled = self.pooling(value) if self.sub_sample else value
        scores = key.flatten(2).mT @ query.flatten(2)
        if self.activation == "softmax":
            weights = scores.softmax(1)
        else:
            weights = self.relu(scores) / scores.shape[1]
        self.attention_maps = weights
        out = (pooled.flatten(2) @ weights).view_as(value)
        return self.W(out) + x


class NONLocalBlock3D(_NonLocalBlockND):
    def __init__(self, in_channels, ratio, ks, sub_sample):
        super().__init__(in_channels, ratio, ks, sub_sample)


class NL3DWrapper(nn.Module):
    def __init__(self, block, n_segment, attr, ratio=2, ks=(3, 7, 7), sub_sample=False):
        super().__init__()
        self.block, self.attr, self.n_segment = block, attr, n_segment
        channels = block.bn3.num_features
        if "cg" in attr:
            self.cg = ChannelGate(channels, reduction_ratio=2)
        if "nl" in attr:
            self.nl = NONLocalBlock3D(channels, ratio, ks, sub_sample)

    def forward(self, x):
        frames = self.block(x)
        clips = frames.unflatten(0, (-1, self.n_segment)).transpose(1, 2)
        for name in ("cg", "nl"):
            clips = getattr(self, name)(clips) if name in self.attr else clips
        return clips.transpose(1, 2).contiguous().view(frames.shape)
