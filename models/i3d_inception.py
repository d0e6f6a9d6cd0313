"""Inception-I3D: Inception-v1 whose kernels are inflated in time, for RGB and optical flow.

Its ports share names and shapes of weights, and differ in padding, epsilon and head:

    hassony2      temporal padding by the number of frames, epsilon 1e-3, 2 x 7 x 7 windows
    piergiaj      all padding by the size of the input, epsilon 1e-3, 2 x 7 x 7 windows
    inception_nl  padding by kernel and stride alone, epsilon 1e-5; with two blocks 2 x 7 x 7
                  windows, without them one average of all positions

Names of modules: `conv1a`, `conv2b`, `conv2c`, `mixed{3b..5c}.{b0,b1a,b1b,b2a,b2b,b3}`, each with
`conv` and `norm`, `mixed{3c,4d}.nl` (the block behind it) and `fc`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from nlkernels._spec import check_choice
from nlkernels.models.blocks import check_block_options, check_clip, insert_blocks, scaled
from nlkernels.models.checkpointing import run
from nlkernels.models.registry import register_model

PADDINGS = ("static", "temporal", "same")
HEADS = ("window", "global")

# Channels [b0, b1a, b1b, b2a, b2b, b3] of the mixed layers.
MIXED: dict[str, tuple[int, ...]] = {
    "mixed3b": (64, 96, 128, 16, 32, 32),
    "mixed3c": (128, 128, 192, 32, 96, 64),
    "mixed4b": (192, 96, 208, 16, 48, 64),
    "mixed4c": (160, 112, 224, 24, 64, 64),
    "mixed4d": (128, 128, 256, 24, 64, 64),
    "mixed4e": (112, 144, 288, 32, 64, 64),
    "mixed4f": (256, 160, 320, 32, 128, 128),
    "mixed5b": (256, 160, 320, 32, 128, 128),
    "mixed5c": (384, 192, 384, 48, 128, 128),
}
# (kernel, stride) of the max pool in front of a layer.
POOLS = {
    "conv2b": ((1, 3, 3), (1, 2, 2)),
    "mixed3b": ((1, 3, 3), (1, 2, 2)),
    "mixed4b": ((3, 3, 3), (2, 2, 2)),
    "mixed5b": ((2, 2, 2), (2, 2, 2)),
}
# Layers that a block follows, by the number of blocks: maps of 28 x 28 and of 14 x 14 positions.
BLOCK_PLACES: dict[int, tuple[str, ...]] = {0: (), 2: ("mixed3c", "mixed4d")}


class InceptionDesign(NamedTuple):
    """What distinguishes the published Inception-I3D networks.

    Attributes:
        system: whose network it is; the key layout in which its checkpoints come.
        in_channels: 3 for RGB, 2 for optical flow.
        padding: zeros around the input of a convolution or pool: "static", by kernel and stride;
            "temporal", in time by the number of frames as well; "same", by the size of all axes,
            as TensorFlow does.
        norm_eps: epsilon of the batch norms.
        norm_momentum: their momentum.
        head: "window" classifies windows of 2 x 7 x 7 positions and averages their logits,
            "global" averages all positions first.
        preset: the blocks, a key of `nlkernels.modules.presets.PRESETS`.
    """

    system: str
    in_channels: int = 3
    padding: str = "static"
    norm_eps: float = 1e-5
    norm_momentum: float = 0.1
    head: str = "window"
    preset: str = "inception_nl"


class InceptionI3D(nn.Module):
    """Inception-I3D with optional non-local blocks.

    Weights start as torch's do. Blocks are created last, so equal seeds give equal backbones with
    and without them.

    Args:
        name: name of the model in error messages.
        design: everything that differs between the ports.
        num_classes: number of classes.
        width: multiplier of the channel counts.
        blocks: 0 or 2 (behind mixed3c and mixed4d), or names of mixed layers that blocks follow.
        block: options of `NonLocalBlock3d`, "variant" and "preset"; without a preset, the design's.
        dropout: probability in front of the classifier, in training mode.
        checkpointing: keep no activations inside layers for the backward.

    Attributes:
        design: as given.
        checkpointing: as given; may be changed at any time.

    Raises:
        TypeError: width or block of the wrong type, unknown block option.
        ValueError: width, blocks, variant, preset, dropout or the design out of range.

    Source:
        "Quo Vadis, Action Recognition?" (CVPR 2017); hassony2/kinetics_i3d_pytorch,
        piergiaj/pytorch-i3d and seominseok0429/inception-I3D-NON-LOCAL.
    """

    def __init__(
        self,
        name: str,
        design: InceptionDesign,
        *,
        num_classes: int,
        width: float = 1.0,
        blocks: int | Sequence[str] = 0,
        block: Mapping[str, Any] | None = None,
        dropout: float = 0.5,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        check_choice(name, "padding", design.padding, PADDINGS)
        check_choice(name, "head", design.head, HEADS)
        places = _chosen_places(name, blocks)
        options = check_block_options(name, block, design.preset)
        self.name, self.design, self.checkpointing = name, design, checkpointing
        stem = [scaled(channels, width) for channels in (64, 64, 192)]
        self.conv1a = Unit(design, design.in_channels, stem[0], 7, stride=2)
        self._add_pool("conv2b")
        self.conv2b = Unit(design, stem[0], stem[1], 1)
        self.conv2c = Unit(design, stem[1], stem[2], 3)
        channels = stem[2]
        for layer, counts in MIXED.items():
            if layer in POOLS:
                self._add_pool(layer)
            mixed = Mixed(design, channels, [scaled(count, width) for count in counts])
            channels = mixed.out_channels
            self.add_module(layer, mixed)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(channels, num_classes)
        layers = [self.get_submodule(layer) for layer in places]
        insert_blocks([(layer, layer.out_channels) for layer in layers], options)

    def _add_pool(self, layer: str) -> None:
        self.add_module(f"pool_{layer}", Pool(self.design, *POOLS[layer]))

    def features(self, clip: torch.Tensor) -> torch.Tensor:
        """Output of the last layer.

        Args:
            clip: (B, C, T, H, W), floating point, with C colour or flow channels, T >= 2, H and W
                >= 32.

        Returns:
            (B, 1024 * width, t, h, w): about an eighth of the frames and a 32nd of the size.
        """
        check_clip(self.name, clip, min_frames=2, min_size=32, channels=self.design.in_channels)
        x = clip
        for name, layer in self.named_children():
            if name not in ("dropout", "fc"):
                x = run(layer, x, self.checkpointing)
        return x

    def forward(self, clip: torch.Tensor) -> torch.Tensor:
        """Logits of the clip: the mean of `location_logits`.

        Args:
            clip: (B, C, T, H, W), floating point, T >= 2, H and W >= 32.

        Returns:
            (B, num_classes) logits.

        Raises:
            TypeError: clip is not a floating-point tensor.
            ValueError: clip has a wrong shape or is too small.
        """
        return self.fc(self.dropout(self._windows(self.features(clip)))).mean(dim=(1, 2, 3))

    def location_logits(self, clip: torch.Tensor) -> torch.Tensor:
        """Logits at every location of the head; dropout is not applied.

        Args:
            clip: (B, C, T, H, W), floating point.

        Returns:
            (B, t, h, w, num_classes): at 224 x 224 pixels one location a window of 2 frames of the
            last map.

        Raises:
            TypeError: clip is not a floating-point tensor.
            ValueError: clip has a wrong shape or is too small.
        """
        return self.fc(self._windows(self.features(clip)))

    def probabilities(self, clip: torch.Tensor) -> torch.Tensor:
        """Softmax of the logits, (B, num_classes); see `forward`."""
        return self(clip).softmax(-1)

    def _windows(self, features: torch.Tensor) -> torch.Tensor:
        """Averages of all windows, (B, t, h, w, C)."""
        if self.design.head == "global":
            return features.mean(dim=(2, 3, 4), keepdim=True).movedim(1, -1)
        sizes = [min(size, own) for size, own in zip(features.shape[2:], (2, 7, 7), strict=True)]
        return F.avg_pool3d(features, sizes, stride=1).movedim(1, -1)


class Unit(nn.Module):
    """Padding, convolution, batch norm and ReLU.

    Args:
        design: padding and batch norm.
        in_channels: channels of the input.
        out_channels: channels of the output.
        size: of the cubic kernel.
        stride: of all axes.
    """

    def __init__(
        self,
        design: InceptionDesign,
        in_channels: int,
        out_channels: int,
        size: int,
        stride: int = 1,
    ) -> None:
        super().__init__()
        self.padding = design.padding
        # With a stride of 1 every scheme pads both sides alike, which a convolution does itself.
        padding = size // 2 if stride == 1 else 0
        self.conv = nn.Conv3d(in_channels, out_channels, size, stride, padding, bias=False)
        self.norm = nn.BatchNorm3d(out_channels, eps=design.norm_eps, momentum=design.norm_momentum)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        conv = self.conv
        if max(conv.stride) > 1:
            x = padded(x, conv.kernel_size, conv.stride, self.padding)
        return self.relu(self.norm(conv(x)))


class Pool(nn.Module):
    """Padding with zeros, which count, and max pooling."""

    def __init__(
        self, design: InceptionDesign, kernel: tuple[int, ...], stride: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.padding = design.padding
        self.pool = nn.MaxPool3d(kernel, stride, ceil_mode=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pool(padded(x, self.pool.kernel_size, self.pool.stride, self.padding))


class Mixed(nn.Module):
    """Four branches side by side, with room for a block behind them.

    Args:
        design: padding and batch norms.
        channels: of the input.
        counts: channels [b0, b1a, b1b, b2a, b2b, b3].
    """

    def __init__(self, design: InceptionDesign, channels: int, counts: Sequence[int]) -> None:
        super().__init__()
        b0, b1a, b1b, b2a, b2b, b3 = counts
        self.out_channels = b0 + b1b + b2b + b3
        self.b0 = Unit(design, channels, b0, 1)
        self.b1a = Unit(design, channels, b1a, 1)
        self.b1b = Unit(design, b1a, b1b, 3)
        self.b2a = Unit(design, channels, b2a, 1)
        self.b2b = Unit(design, b2a, b2b, 3)
        self.pool = Pool(design, (3, 3, 3), (1, 1, 1))
        self.b3 = Unit(design, channels, b3, 1)
        self.nl: nn.Module | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branches = (self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3(self.pool(x)))
        y = torch.cat(branches, dim=1)
        return y if self.nl is None else self.nl(y)


def padded(
    x: torch.Tensor, kernel: Sequence[int], stride: Sequence[int], scheme: str
) -> torch.Tensor:
    """x with zeros around it, the odd one behind.

    Args:
        x: (B, C, T, H, W).
        kernel: size of what follows, along (T, H, W).
        stride: its stride.
        scheme: one of `PADDINGS`.
    """
    amounts = []
    for axis, (size, k, s) in enumerate(zip(x.shape[2:], kernel, stride, strict=True)):
        adapts = scheme == "same" or (scheme == "temporal" and axis == 0)
        rest = size % s if adapts else 0
        total = max(k - (rest or s), 0)
        amounts.append((total // 2, total - total // 2))
    if not any(map(any, amounts)):
        return x
    return F.pad(x, [count for pair in reversed(amounts) for count in pair])


def _chosen_places(where: str, blocks: int | Sequence[str]) -> Sequence[str]:
    """Layers that blocks follow."""
    if isinstance(blocks, list | tuple):
        for layer in blocks:
            check_choice(where, "a layer that a block follows", layer, tuple(MIXED))
        return blocks
    if isinstance(blocks, bool) or not isinstance(blocks, int) or blocks not in BLOCK_PLACES:
        raise ValueError(
            f"{where}: expected blocks to be one of {', '.join(map(str, BLOCK_PLACES))}, "
            f"got {blocks!r}; pass one of these, or names of mixed layers"
        )
    return BLOCK_PLACES[blocks]


_OPTIONS = ("blocks", "block", "dropout", "checkpointing")
_DESIGN_OPTIONS = tuple(
    name for name in InceptionDesign._fields if name not in ("system", "preset")
)


def _register(name: str, design: InceptionDesign, *, dropout: float) -> None:
    def build(*, num_classes: int, width: float, **options: Any) -> InceptionI3D:
        changed = {key: options.pop(key) for key in _DESIGN_OPTIONS if key in options}
        if design.system == "inception_nl" and "head" not in changed:
            changed["head"] = "global" if not options.get("blocks", 0) else "window"
        own, options = design._replace(**changed), {"dropout": dropout, **options}
        return InceptionI3D(name, own, num_classes=num_classes, width=width, **options)

    register_model(
        build,
        name=name,
        options=(*_OPTIONS, *_DESIGN_OPTIONS),
        family="inception",
        design=design,
    )


for _input, _channels in (("rgb", 3), ("flow", 2)):
    _register(
        f"hassony2_i3d_{_input}",
        InceptionDesign("hassony2", _channels, "temporal", norm_eps=1e-3),
        dropout=0.0,
    )
    _register(
        f"piergiaj_i3d_{_input}",
        InceptionDesign("piergiaj", _channels, "same", norm_eps=1e-3, norm_momentum=0.01),
        dropout=0.5,
    )
    _register(f"inception_nl_{_input}", InceptionDesign("inception_nl", _channels), dropout=0.5)
