"""Networks of the zoo by their names, with their own clips and blocks, for `nlk bench model`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch._subclasses import FakeTensorMode

from nlkernels.models import create_model
from nlkernels.models.zoo import describe
from nlkernels.modules import ChannelGate
from nlkernels.modules.base import NonLocalBlock

from .model_cases import CLASSES


@dataclass(frozen=True)
class ZooCase:
    """One network of the zoo; what `ModelCase` has, but for the published settings.

    Attributes:
        model: One of `nlkernels.models.list_models()`.
        shape: Of its clips, (B, C, T, H, W).
        blocks: Number of non-local blocks.
        kind: Their affinity.
        width: Multiplier of the channels.
        options: Of `create_model`.
    """

    model: str
    shape: tuple[int, ...]
    blocks: int
    kind: str
    width: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The network's name."""
        return self.model

    @property
    def batch(self) -> int:
        """Clips of a step."""
        return self.shape[0]

    def clip_shape(self, batch: int | None = None) -> tuple[int, ...]:
        """(B, C, T, H, W)."""
        return (self.batch if batch is None else batch, *self.shape[1:])

    def make(self, blocks: bool) -> nn.Module:
        """The network with its blocks, or without."""
        options = dict(self.options)
        if not blocks:
            options.pop("block", None)
        count = self.blocks if blocks else 0
        return create_model(
            self.model, num_classes=CLASSES, width=self.width, blocks=count, dropout=0.0, **options
        )


def zoo_case(
    name: str,
    *,
    shape: tuple[int, ...] | None,
    blocks: int,
    kind: str | None,
    width: float,
) -> ZooCase:
    """The case of a network; nothing is allocated.

    Args:
        name: One of `nlkernels.models.list_models()`.
        shape: (B, C, T, H, W); None is one clip as the network is published, two
            where a gate needs them.
        blocks: Number of blocks.
        kind: Their affinity; None is that of the network's system.
        width: Multiplier of the channels.

    Raises:
        ValueError: An unknown network, kind or number of blocks, or clips of other channels.
        TypeError: A network without blocks of this kind.
    """
    clip = describe(name).input
    options = {} if kind is None else {"block": {"kind": kind}}
    with FakeTensorMode():
        found = ZooCase(name, (), blocks, kind or "", width, options).make(blocks=True)
    own = [module for module in found.modules() if isinstance(module, NonLocalBlock)]
    if not own:
        raise ValueError(
            f"model: expected a network with non-local blocks, got {name} with --blocks {blocks}; "
            "ask for at least one"
        )
    channels = getattr(getattr(found, "design", None), "in_channels", 3)
    if shape is None:
        # A gate's batch norm trains on the clips' means: one clip has no variance.
        batch = 2 if any(isinstance(module, ChannelGate) for module in found.modules()) else 1
        shape = (batch, channels, clip.frames, clip.size, clip.size)
    if len(shape) != 5 or shape[1] != channels:
        raise ValueError(
            f"shape: expected B,{channels},T,H,W for {name}, got {','.join(map(str, shape))}"
        )
    return ZooCase(name, shape, blocks, own[0].kind, width, options)
