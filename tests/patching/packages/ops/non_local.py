"""Stands for temporal-shift-module's ops/non_local.py."""

from torch import nn

from tests.patching.packages.lib.blocks import Block


class _NonLocalBlockND(Block):
    kind = "embedded_gaussian"

    def forward(self, x):
        return self.run(x)[0]


class NONLocalBlock1D(_NonLocalBlockND):
    def __init__(self, in_channels, inter_channels=None, **options):
        super().__init__(in_channels, inter_channels, 1, **options)


class NONLocalBlock2D(_NonLocalBlockND):
    def __init__(self, in_channels, inter_channels=None, **options):
        super().__init__(in_channels, inter_channels, 2, **options)


class NONLocalBlock3D(_NonLocalBlockND):
    def __init__(self, in_channels, inter_channels=None, **options):
        super().__init__(in_channels, inter_channels, 3, **options)


class NL3DWrapper(nn.Module):
    def __init__(self, block, n_segment):
        super().__init__()
        self.block, self.n_segment = block, n_segment
        self.nl = NONLocalBlock3D(block.bn3.num_features)

    def forward(self, x):
        frames = self.block(x)
        clips = frames.unflatten(0, (-1, self.n_segment)).transpose(1, 2)
        return self.nl(clips).transpose(1, 2).contiguous().view(frames.shape)
