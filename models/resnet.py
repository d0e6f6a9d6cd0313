"""One 3-D ResNet for the C2D, I3D, SlowOnly and TSM models of every system.

The models differ in what `nlkernels.models.design.ResNetDesign` names. For the original's 8 x 8
setting and frames of 224 x 224 pixels:

    stem    kt x 7 x 7 convolution, stride (1, 2, 2), batch norm, ReLU    8 x 112 x 112
            max pool 1 x 3 x 3, stride (1, 2, 2), without padding         8 x 55 x 55
    layer1  3 bottlenecks, 256 channels (res2)                            8 x 55 x 55
            max pool 2 x 1 x 1, stride (2, 1, 1) (pool2)                  4 x 55 x 55
    layer2  4 bottlenecks, 512 channels (res3)                            4 x 28 x 28
    layer3  6 bottlenecks, 1024 channels (res4)                           4 x 14 x 14
    layer4  3 bottlenecks, 2048 channels (res5)                           4 x 7 x 7
    head    average pool, dropout, linear classifier

Names of modules: `conv1`, `bn1`, `layer{1..4}.{i}.conv{1,2,3}`, `.bn{1,2,3}`, `.downsample.{0,1}`,
`.gate` and `.nl` (the gate and the block behind bottleneck i) and `fc`. `nlkernels.models.systems`
maps them onto the names of every published checkpoint.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from nlkernels.models.blocks import (
    Bottleneck,
    check_block_options,
    check_clip,
    for_layer,
    insert_blocks,
    scaled,
)
from nlkernels.models.checkpointing import run
from nlkernels.models.design import (
    CAFFE2_EPS,
    Place,
    ResNetDesign,
    check_design,
    chosen_places,
)
from nlkernels.models.places import RESNET50_PLACES
from nlkernels.modules import ChannelGate

# The epsilon and the places of the original, under the names they are imported by.
NORM_EPS = CAFFE2_EPS
BLOCK_PLACES = RESNET50_PLACES


class VideoResNet(nn.Module):
    """Video ResNet-50 or -101 with optional non-local blocks.

    Initialisation follows the original: He normal over the fan-out for convolutions, a normal for
    the classifier, and zero for the last batch norm of each bottleneck where the design says so.
    Blocks are created last, so equal seeds give equal backbones with and without them. Affine norms
    start at 1 and are not trained: such a network is meant to start from converted weights.

    Args:
        name: name of the model in error messages.
        design: everything that differs between published networks.
        num_classes: number of classes.
        width: multiplier of the channel counts.
        blocks: number of non-local blocks, one that `design.places` has (0, 1, 5 or 10 in the
            original), or (layer, index) pairs of the bottlenecks that blocks follow.
        block: options of `NonLocalBlock3d`, "variant" ("nonlocal" or "local") and "preset" (a
            published system's options). Without a preset, the design's holds, and its kind.
        dropout: probability in front of the classifier, in training mode.
        checkpointing: keep no activations inside bottlenecks for the backward, which computes them
            again.

    Attributes:
        design: as given.
        checkpointing: as given; may be changed at any time.

    Raises:
        TypeError: width, block or layer_block of the wrong type, unknown block option.
        ValueError: width, blocks, variant, preset, dropout or the design out of range.
    """

    def __init__(
        self,
        name: str,
        design: ResNetDesign,
        *,
        num_classes: int,
        width: float = 1.0,
        blocks: int | Sequence[Place] = 0,
        block: Mapping[str, Any] | None = None,
        dropout: float = 0.5,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        check_design(name, design)
        places = chosen_places(name, design, blocks)
        options = check_block_options(name, block, design.preset, design.kind)
        self.name, self.design, self.checkpointing = name, design, checkpointing
        channels = scaled(64, width)
        self.conv1 = nn.Conv3d(
            design.in_channels,
            channels,
            (design.stem_kernel_t, 7, 7),
            stride=(design.stem_stride_t, 2, 2),
            padding=(design.stem_kernel_t // 2, 3, 3),
            bias=False,
        )
        self.bn1 = design.make_norm(channels)
        self.relu = nn.ReLU(inplace=True)
        padding = design.pool1_padding
        self.pool1 = nn.MaxPool3d(
            (design.pool1_kernel_t, 3, 3), (design.pool1_stride_t, 2, 2), (0, padding, padding)
        )
        self.pool2: nn.Module | None = None
        if design.pool2:
            self.pool2 = nn.MaxPool3d((design.pool2, 1, 1), (2, 1, 1), (design.pool2 // 3, 0, 0))
        for index in range(4):
            inner = scaled(64 * 2**index, width)
            layer = _bottlenecks(design, index, channels, inner)
            channels = 4 * inner
            self.add_module(f"layer{index + 1}", layer)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(channels, num_classes)
        self._initialise()
        for layer, index in places:
            own = for_layer(options, block, design.layer_block.get(layer, {}))
            unit = self.bottleneck(layer, index)
            insert_blocks([(unit, unit.conv3.out_channels)], own)
        for layer, index in design.gates if places else ():
            unit = self.bottleneck(layer, index)
            unit.gate = ChannelGate(unit.conv3.out_channels)

    def bottleneck(self, layer: int, index: int) -> Bottleneck:
        """The bottleneck at an index of layer1 to layer4."""
        return self.get_submodule(f"layer{layer}.{index}")

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, Bottleneck) and self.design.zero_init:
                nn.init.zeros_(module.bn3.weight)
        nn.init.normal_(self.fc.weight, std=self.design.fc_std)
        nn.init.zeros_(self.fc.bias)

    @property
    def min_frames(self) -> int:
        """Fewest frames of a clip."""
        design = self.design
        behind_pool1 = 2 if design.pool2 == 2 else 1
        behind_stem = design.pool1_kernel_t + design.pool1_stride_t * (behind_pool1 - 1)
        return 1 + design.stem_stride_t * (behind_stem - 1)

    def features(self, clip: torch.Tensor) -> torch.Tensor:
        """Output of the last stage.

        Args:
            clip: (B, 3, T, H, W), floating point, T >= `min_frames`, H and W >= 32.

        Returns:
            (B, 2048 * width, t, h, w): t is T by the temporal strides, h and w about H / 32 and
            W / 32 (7 for 224).
        """
        check_clip(
            self.name,
            clip,
            min_frames=self.min_frames,
            min_size=32,
            channels=self.design.in_channels,
        )
        x = self.pool1(self.relu(self.bn1(self.conv1(clip))))
        for index, layer in enumerate((self.layer1, self.layer2, self.layer3, self.layer4)):
            x = run(layer, x, self.checkpointing)
            if index == 0 and self.pool2 is not None:
                x = self.pool2(x)
        return x

    def forward(self, clip: torch.Tensor) -> torch.Tensor:
        """Logits of the clip, by the design's head.

        With the head "global", that of the original: at 224 x 224 pixels it is the original network
        in training and testing; at other sizes the original averages probabilities over locations
        instead, see `probabilities`.

        Args:
            clip: (B, 3, T, H, W), floating point, T >= `min_frames`, H and W >= 32.

        Returns:
            (B, num_classes) logits.

        Raises:
            TypeError: clip is not a floating-point tensor.
            ValueError: clip has a wrong shape or is too small.
        """
        features = self.features(clip)
        if self.design.head == "window":
            windows = self.dropout(self._windows(features))
            return self.fc(windows).mean(dim=(1, 2, 3))
        if self.design.head == "frames":
            frames = features.mean(dim=(3, 4)).transpose(1, 2)
            return self.fc(self.dropout(frames)).mean(dim=1)
        return self.fc(self.dropout(features.mean(dim=(2, 3, 4))))

    def location_logits(self, clip: torch.Tensor) -> torch.Tensor:
        """Logits at every location of the head's window: the fully convolutional test.

        Dropout is not applied.

        Args:
            clip: (B, 3, T, H, W), floating point. The original needs H and W >= 197; below that
                the window is as large as the feature map.

        Returns:
            (B, t, h, w, num_classes) logits for maps that hold t x h x w windows: one location at
            224, 2 x 2 at 256. A window of the original spans all frames: t = 1.

        Raises:
            TypeError: clip is not a floating-point tensor.
            ValueError: clip has a wrong shape or is too small.
        """
        return self.fc(self._windows(self.features(clip)))

    def probabilities(self, clip: torch.Tensor) -> torch.Tensor:
        """Probabilities of the clip as its system's test takes them.

        The Caffe2 original and PySlowFast take the softmax at every location and average it; the
        others take that of `forward`, with its dropout. At locations there is none.

        Args:
            clip: (B, 3, T, H, W), floating point.

        Returns:
            (B, num_classes), rows of which sum to 1.

        Raises:
            TypeError: clip is not a floating-point tensor.
            ValueError: clip has a wrong shape or is too small.
        """
        if self.design.system in ("caffe2", "slowfast"):
            return self.location_logits(clip).softmax(-1).mean(dim=(1, 2, 3))
        return self(clip).softmax(-1)

    def _windows(self, features: torch.Tensor) -> torch.Tensor:
        """Averages of all windows, (B, t, h, w, C)."""
        sizes = [
            size if window is None else min(size, window)
            for size, window in zip(features.shape[2:], self.design.window, strict=True)
        ]
        return F.avg_pool3d(features, sizes, stride=1).movedim(1, -1)


def _bottlenecks(design: ResNetDesign, layer: int, channels: int, inner: int) -> nn.Sequential:
    """A layer: bottlenecks of which the first one changes channels and spatial size."""
    bottlenecks = nn.Sequential()
    for index, kernel_t in enumerate(design.kernels_t()[layer]):
        inputs = channels if index == 0 else 4 * inner
        bottlenecks.append(
            Bottleneck(
                inputs,
                inner,
                4 * inner,
                kernel_t=kernel_t,
                stride=2 if index == 0 and layer > 0 else 1,
                norm=design.make_norm,
                shift=inputs // design.shift_div if design.shifts(index) else 0,
                shift_shortcut=design.shift == "block",
            )
        )
    return bottlenecks
