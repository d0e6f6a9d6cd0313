"""mmaction2, releases 0.x and 1.x alike: ResNet3d, SlowOnly, C2D, and TSM with and without blocks.

Networks of frames, which are those without a kernel over time, have convolutions of two dimensions;
SlowOnly's have three throughout.

Source: open-mmlab/mmaction2: mmaction/models/backbones/resnet3d.py, c2d.py, resnet_tsm.py.
"""

import dataclasses

from torch import nn

from nlkernels.models.systems.layout import Layout, Pair
from nlkernels.models.systems.paths import Unit, unit

NAME = "mmaction"

_OUTSIDE = {"conv1": "conv1.conv", "bn1": "conv1.bn"}


def _module(model: nn.Module, path: str) -> str | None:
    part = unit(path)
    if part is None:
        return "cls_head.fc_cls" if path == "fc" else _prefixed(_OUTSIDE.get(path))
    kind = "bn" if part.is_norm else "conv"
    if part.is_shortcut:
        name = f"downsample.{kind}"
    else:
        name = f"conv{'abc'.index(part.letter) + 1}.{kind}"
    owner = place(model, part)
    bottleneck = model.bottleneck(part.layer, part.index)
    if model.design.head == "frames" and bottleneck.nl is not None:  # TSM wraps, shifted or not
        owner += ".block"
    if bottleneck.shift and model.design.shift == "block":
        owner += ".net"
    elif bottleneck.shift and part.inner == "conv1":
        name += ".net"
    return _prefixed(f"{owner}.{name}")


def place(model: nn.Module, part: Unit) -> str:
    """Where a bottleneck is: the pool of frames wraps the layer that it stands in front of."""
    pooled = model.design.pool2 == 3 and part.layer == 2
    return f"layer{part.layer}.net.{part.index}" if pooled else f"layer{part.layer}.{part.index}"


def _prefixed(name: str | None) -> str | None:
    return None if name is None else f"backbone.{name}"


def _block(model: nn.Module, path: str) -> str | None:
    part = unit(path)
    return None if part is None else f"backbone.{place(model, part)}.non_local_block."


class _Layout(Layout):
    """Two dimensions where the network looks at single frames."""

    def pairs(self, model: nn.Module, *, partial: bool = False) -> list[Pair]:
        flat = not any(map(any, model.design.inflated)) and model.design.stem_kernel_t == 1
        own = dataclasses.replace(self, flat=flat)
        return Layout.pairs(own, model, partial=partial)


LAYOUT = _Layout(
    name=NAME,
    module=_module,
    block_prefix=_block,
    preset="mmaction_i3d",
    anchors=("backbone.conv1.conv.weight", "backbone.conv1.bn.weight"),
)
detect, to_ours, from_ours = LAYOUT.detect, LAYOUT.to_ours, LAYOUT.from_ours
