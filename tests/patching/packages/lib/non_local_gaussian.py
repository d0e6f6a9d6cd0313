"""Stands for Non-local_pytorch's lib/non_local_gaussian.py."""

from tests.patching.packages.lib.blocks import Mapping


class _Block(Mapping):
    kind = "gaussian"


class NONLocalBlock1D(_Block):
    def __init__(self, *args, **options):
        super().__init__(1, *args, **options)


class NONLocalBlock2D(_Block):
    def __init__(self, *args, **options):
        super().__init__(2, *args, **options)


class NONLocalBlock3D(_Block):
    def __init__(self, *args, **options):
        super().__init__(3, *args, **options)
