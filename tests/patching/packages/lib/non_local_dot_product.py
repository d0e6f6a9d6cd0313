"""Stands for Non-local_pytorch's lib/non_local_dot_product.py."""

from tests.patching.packages.lib.blocks import Mapping


class _NonLocalBlockND(Mapping):
    kind = "dot_product"


class NONLocalBlock1D(_NonLocalBlockND):
    def __init__(self, in_channels, inter_channels=None, **options):
        super().__init__(in_channels, inter_channels, 1, **options)


class NONLocalBlock2D(_NonLocalBlockND):
    def __init__(self, in_channels, inter_channels=None, **options):
        super().__init__(in_channels, inter_channels, 2, **options)


class NONLocalBlock3D(_NonLocalBlockND):
    def __init__(self, in_channels, inter_channels=None, **options):
        super().__init__(in_channels, inter_channels, 3, **options)
