"""Stands for timm's NonLocalAttn."""

from torch import nn


class NonLocalAttn(nn.Module):
    def __init__(self, in_channels, use_scale=True, rd_channels=None):
        super().__init__()
        rd_channels = rd_channels or max(in_channels // 8, 8)
        self.scale = in_channels**-0.5 if use_scale else 1.0
        self.t, self.p, self.g = (nn.Conv2d(in_channels, rd_channels, 1) for _ in range(3))
        self.z = nn.Conv2d(rd_channels, in_channels, 1)
        self.norm = nn.BatchNorm2d(in_channels)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x):
        t, p, g = self.t(x).flatten(2), self.p(x).flatten(2), self.g(x).flatten(2)
        weights = (t.mT @ p * self.scale).softmax(2)
        out = (g @ weights.mT).view(x.shape[0], -1, *x.shape[2:])
        return self.norm(self.z(out)) + x
