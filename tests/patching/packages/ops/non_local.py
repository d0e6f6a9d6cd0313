"""Stands for temporal-shift-module's ops/non_local.py."""

from torch import nn

from tests.patching.packages.lib.blocks import Block


class _Block(Block):
    kind = "embedded_gaussian"

    def forward(self, x):
        return self.run(x)[0]


class NONLocalBlock1D(_Block):
    def __init__(self, *args, **options):
        super().__init__(1, *args, **options)


class NONLocalBlock2D(_Block):
    def __init__(self, *args, **options):
        super().__init__(2, *args, **options)


class NONLocalBlock3D(_Block):
    def __init__(self, *args, **options):
        super().__init__(3, *args, **options)


class NL3DWrapper(nn.Module):
    def __init__(self, block, n_segment):
        super().__init__()
        self.block, self.n_segment = block, n_segment
        self.nl = NONLocalBlock3D(block.bn3.num_features)

    def forward(self, x):
        frames = self.block(x)
        clips = frames.unflatten(0, (-1, self.n_segment)).transpose(1, 2)
        return self.nl(clips).transpose(1, 2).flatten(0, 1)
