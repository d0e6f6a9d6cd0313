"""Non-local blocks as modules."""

from nlkernels.modules.block import (
    NonLocalBlock1d,
    NonLocalBlock2d,
    NonLocalBlock3d,
    set_nonlocal_backend,
)
from nlkernels.modules.gate import ChannelGate
from nlkernels.modules.segments import SegmentBlock

__all__ = [
    "ChannelGate",
    "NonLocalBlock1d",
    "NonLocalBlock2d",
    "NonLocalBlock3d",
    "SegmentBlock",
    "set_nonlocal_backend",
]
