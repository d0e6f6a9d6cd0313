"""Blocks for clips inside networks for frames."""

import torch
from torch import nn

from nlkernels._spec import describe

# Attribute of the non-local block, which is part of its keys: in TSM and RNL, in mmaction2.
NL_NAMES = ("nl", "non_local_block")


class SegmentBlock(nn.Module):
    """A layer for frames, followed by a gate and a non-local block for the clips they belong to.

    y = block(x) of N clips' T frames each, seen as clips (N, C, T, H, W); then gate, then nl, and
    back to frames. The submodules are called `block`, `cg` and `nl` (or as `nl_name` says), as in
    published checkpoints.

    Args:
        block: (N T, C', H', W') -> (N T, C, H, W), a residual block for example.
        nl: (N, C, T, H, W) -> the same, a NonLocalBlock3d; None with a gate alone.
        segments: T, frames of a clip.
        gate: (N, C, T, H, W) -> the same, a ChannelGate; None for none.
        nl_name: "nl" as in TSM and RNL, or "non_local_block" as in mmaction2.

    Shape:
        (N T, C', H', W') -> (N T, C, H, W).

    Memory:
        That of its parts. The clip is a view of the frames: in channels_last frames it is a
        channels_last_3d clip. Going back is a view as well where gate and nl return their input's
        order of dimensions, as a sum that begins with it does; else it is a copy.

    Raises:
        ValueError: segments below 1, neither gate nor nl, unknown `nl_name`; frames that are no
            multiple of segments.
        TypeError: a part is no module; input or output of block is no tensor.

    Example:
        >>> import torch, nlkernels
        >>> nl, conv = nlkernels.NonLocalBlock3d(16), torch.nn.Conv2d(8, 16, 1)
        >>> block = nlkernels.SegmentBlock(conv, nl, 4, gate=nlkernels.ChannelGate(16))
        >>> block(torch.randn(2 * 4, 8, 6, 6)).shape
        torch.Size([8, 16, 6, 6])

    Source:
        mit-han-lab/temporal-shift-module, guoxih/region-based-non-local-network and
        open-mmlab/mmaction2, NL3DWrapper.
    """

    def __init__(
        self,
        block: nn.Module,
        nl: nn.Module | None,
        segments: int,
        gate: nn.Module | None = None,
        *,
        nl_name: str = "nl",
    ) -> None:
        super().__init__()
        for name, module in (("block", block), ("nl", nl), ("gate", gate)):
            optional = module is None and name != "block"
            if not optional and not isinstance(module, nn.Module):
                raise TypeError(
                    f"SegmentBlock: expected {name} to be a module, got {type(module).__name__}; "
                    "the order is block, nl, segments, gate"
                )
        if nl is None and gate is None:
            raise ValueError(
                "SegmentBlock: expected nl or gate, got None for both; use the block itself"
            )
        if not isinstance(segments, int) or isinstance(segments, bool) or segments < 1:
            raise ValueError(
                f"SegmentBlock: expected segments of 1 or more, got {segments!r}; pass the frames "
                "of a clip"
            )
        if nl_name not in NL_NAMES:
            raise ValueError(
                f"SegmentBlock: expected nl_name to be one of {', '.join(NL_NAMES)}, got "
                f"{nl_name!r}; it is part of the keys of published checkpoints"
            )
        self.segments, self.nl_name = segments, nl_name
        self.block = block
        if gate is not None:
            self.cg = gate
        if nl is not None:
            self.add_module(nl_name, nl)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N T, C', H', W') -> (N T, C, H, W)."""
        self._check("a batch of frames (N T, C, H, W)", x)
        frames = self.block(x)
        self._check("the block to return frames (N T, C, H, W)", frames)
        clip = frames.unflatten(0, (-1, self.segments)).transpose(1, 2)
        for name in ("cg", self.nl_name):
            layer = self._modules.get(name)
            clip = clip if layer is None else layer(clip)
        return clip.transpose(1, 2).flatten(0, 1)

    def extra_repr(self) -> str:
        return f"segments={self.segments}"

    def _check(self, what: str, frames: torch.Tensor) -> None:
        if not isinstance(frames, torch.Tensor):
            raise TypeError(
                f"SegmentBlock: expected {what}, got {type(frames).__name__}; pass one tensor"
            )
        if frames.dim() != 4 or frames.shape[0] % self.segments:
            raise ValueError(
                f"SegmentBlock: expected {what} with N T a multiple of segments={self.segments}, "
                f"got {describe(frames)}; every clip has so many frames, one after the other"
            )
