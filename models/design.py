"""What distinguishes the published video ResNets: every choice that changes numbers, by name.

`VideoResNet` is built from a `ResNetDesign`. Systems agree on names and shapes of weights where
they disagree on one of these choices, so none of them is left to a default of the code.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from nlkernels._spec import nearest
from nlkernels.modules.layers import Affine
from nlkernels.modules.options import BlockOptions

# Bottlenecks of res2 to res5.
DEPTHS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}

# The epsilon of the Caffe2 original, for the backbone and for its non-local blocks.
CAFFE2_EPS = 1.0000001e-5

Place = tuple[int, int]
Places = tuple[Place, ...]
# By depth, then by the number of blocks.
Placement = Mapping[int, Mapping[int, Places]]


@dataclass(frozen=True)
class ResNetDesign:
    """One published video ResNet, apart from its width, its blocks and its number of classes.

    Attributes:
        system: whose network it is; the key layout in which its checkpoints come.
        depth: 50 or 101.
        in_channels: channels of a frame, 3 for RGB.
        inflated: temporal kernel 3 (else 1) of the first convolution of every bottleneck, by layer;
            a layer's pattern is repeated up to its depth.
        stem_kernel_t: temporal kernel of the stem, odd.
        stem_stride_t: temporal stride of the stem.
        pool1_kernel_t: temporal kernel of the first max pool.
        pool1_stride_t: temporal stride of the first max pool.
        pool1_padding: spatial padding of the first max pool: 0 in the original, 1 in most ports.
        pool2: frames that the second max pool, behind the first layer, looks at: 2, or 3 with a
            padding of 1, both with a stride of 2; 0 for none.
        norm: "batch", or "affine" for frozen factors per channel.
        norm_eps: epsilon of the batch norms.
        zero_init: the last batch norm of each bottleneck starts at 0, so that new ones do nothing.
        fc_std: standard deviation with which the classifier starts.
        head: "global" averages all positions in front of the classifier; "frames" classifies the
            average of each frame and averages the logits; "window" classifies windows of the last
            map and averages their logits.
        window: (frames, height, width) of the windows of `location_logits`; None is all there are.
        shift: which input the temporal shift changes: that of the first convolution ("blockres") or
            of the whole bottleneck ("block"); None shifts nothing.
        shift_div: a channel in so many comes from the next frame, and one from the frame before.
        preset: the system's block, a key of `nlkernels.modules.presets.PRESETS`.
        kind: kind of the published network's blocks; None for the preset's.
        layer_block: options of the blocks behind one layer, 1 to 4, only. JSON makes texts of these
            numbers: "2" is read as 2.
        gates: bottlenecks that a channel gate follows when there are blocks.
        placement: bottlenecks that a block follows, by depth and by the number of blocks.
    """

    system: str
    depth: int = 50
    in_channels: int = 3
    inflated: Sequence[Sequence[int]] = ((0,), (0,), (0,), (0,))
    stem_kernel_t: int = 1
    stem_stride_t: int = 1
    pool1_kernel_t: int = 1
    pool1_stride_t: int = 1
    pool1_padding: int = 1
    pool2: int = 2
    norm: str = "batch"
    norm_eps: float = 1e-5
    zero_init: bool = False
    fc_std: float = 0.01
    head: str = "global"
    window: tuple[int | None, int | None, int | None] = (None, 7, 7)
    shift: str | None = None
    shift_div: int = 8
    preset: str = "caffe2"
    kind: str | None = None
    layer_block: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    gates: Places = ()
    placement: Placement = field(default_factory=lambda: {depth: {0: ()} for depth in DEPTHS})

    def __post_init__(self) -> None:
        if isinstance(self.layer_block, Mapping):
            numbered = {_numbered(layer): own for layer, own in self.layer_block.items()}
            if len(numbered) == len(self.layer_block):  # else a text stays, and is refused
                object.__setattr__(self, "layer_block", numbered)

    @property
    def places(self) -> Mapping[int, Places]:
        """Bottlenecks that a block follows at this depth, by the number of blocks."""
        return self.placement[self.depth]

    def kernels_t(self) -> list[list[int]]:
        """Temporal kernel of `conv1` of every bottleneck, by layer."""
        return [
            [3 if pattern[index % len(pattern)] else 1 for index in range(depth)]
            for pattern, depth in zip(self.inflated, DEPTHS[self.depth], strict=True)
        ]

    def shifts(self, index: int) -> bool:
        """Whether the bottleneck at this index of any layer is shifted."""
        # Both code bases spare every other bottleneck of a deep network.
        every = 2 if self.shift == "blockres" and DEPTHS[self.depth][2] >= 23 else 1
        return self.shift is not None and index % every == 0

    def make_norm(self, channels: int) -> nn.Module:
        """The norm of a number of channels; the factors of an affine one are not trained."""
        if self.norm == "affine":
            return Affine(channels).requires_grad_(False)
        return nn.BatchNorm3d(channels, eps=self.norm_eps)


def _numbered(layer: object) -> object:
    """A layer's number, of which JSON makes a text."""
    return int(layer) if isinstance(layer, str) and layer.isdecimal() else layer


_CHOICES = {
    "depth": tuple(DEPTHS),
    "pool2": (0, 2, 3),
    "norm": ("batch", "affine"),
    "head": ("global", "frames", "window"),
    "shift": (None, "blockres", "block"),
}
_POSITIVE = (
    "in_channels",
    "stem_kernel_t",
    "stem_stride_t",
    "pool1_kernel_t",
    "pool1_stride_t",
    "shift_div",
)


def check_design(where: str, design: ResNetDesign) -> None:
    """Raise ValueError, or TypeError for `layer_block`, unless a network can have this design."""
    for name, choices in _CHOICES.items():
        value = getattr(design, name)
        if value not in choices:
            hint = nearest(value, choices) if isinstance(value, str) else "; pass one of these"
            raise ValueError(
                f"{where}: expected {name} to be one of {', '.join(map(repr, choices))}, "
                f"got {value!r}{hint}"
            )
    for name in _POSITIVE:
        value = getattr(design, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(
                f"{where}: expected {name} to be a positive int, got {value!r}; pass a number"
            )
    if design.stem_kernel_t % 2 == 0:
        raise ValueError(
            f"{where}: expected an odd stem_kernel_t, got {design.stem_kernel_t}; "
            "a frame needs as many neighbours on both sides"
        )
    if design.pool1_padding not in (0, 1):
        raise ValueError(
            f"{where}: expected pool1_padding 0 or 1, got {design.pool1_padding!r}; "
            "the pool is 3 pixels wide"
        )
    if not design.norm_eps > 0:
        raise ValueError(
            f"{where}: expected norm_eps > 0, got {design.norm_eps!r}; most systems have 1e-5"
        )
    if len(design.inflated) != 4 or not all(len(pattern) for pattern in design.inflated):
        raise ValueError(
            f"{where}: expected inflated to be four patterns of 0 and 1, got {design.inflated!r}; "
            "pass one for each of layer1 to layer4"
        )
    _check_layer_block(where, design.layer_block)


def _check_layer_block(where: str, layer_block: object) -> None:
    if not isinstance(layer_block, Mapping) or not all(
        isinstance(own, Mapping) for own in layer_block.values()
    ):
        raise TypeError(
            f"{where}: expected layer_block to be options by layer, got {layer_block!r}; "
            "pass for example {2: {'temporal_group': 4}}"
        )
    for layer, own in layer_block.items():
        if isinstance(layer, bool) or layer not in (1, 2, 3, 4):
            raise ValueError(
                f"{where}: expected the layers of layer_block to be 1 to 4, got {layer!r}; "
                "the original's res3 is layer 2"
            )
        for option in own:
            if option not in BlockOptions._fields:
                raise TypeError(
                    f"{where}: expected block options in layer_block[{layer}], got {option!r}"
                    f"{nearest(option, BlockOptions._fields)}"
                )


def chosen_places(where: str, design: ResNetDesign, blocks: int | Sequence[Place]) -> Places:
    """The bottlenecks that blocks follow.

    Args:
        where: name for the error messages.
        design: the network.
        blocks: a number that the design has places for, or (layer, index) pairs.

    Raises:
        ValueError: another number, or a bottleneck that does not exist.
    """
    if not isinstance(blocks, list | tuple):
        if isinstance(blocks, bool) or not isinstance(blocks, int) or blocks not in design.places:
            raise ValueError(
                f"{where}: expected blocks to be one of {', '.join(map(str, design.places))}, "
                f"got {blocks!r}; pass one of these, or a list of (layer, index) pairs"
            )
        return design.places[blocks]
    depths = DEPTHS[design.depth]
    places = tuple(tuple(place) for place in blocks)
    for place in places:
        ok = len(place) == 2 and place[0] in (1, 2, 3, 4) and 0 <= place[1] < depths[place[0] - 1]
        if not ok or places.count(place) > 1:
            raise ValueError(
                f"{where}: expected blocks at different bottlenecks (layer, index) with layers of "
                f"{', '.join(map(str, depths))} bottlenecks, got {place}; count them from 0"
            )
    return places
