"""One 3-D ResNet-50 for the C2D and I3D models of the Caffe2 original, 8 x 8 setting.

The models differ in temporal kernel sizes only. For 8 frames of 224 x 224 pixels:

    stem    kt x 7 x 7 convolution, stride (1, 2, 2), batch norm, ReLU    8 x 112 x 112
            max pool 1 x 3 x 3, stride (1, 2, 2), without padding         8 x 55 x 55
    layer1  3 bottlenecks, 256 channels (res2)                            8 x 55 x 55
            max pool 2 x 1 x 1, stride (2, 1, 1) (pool2)                  4 x 55 x 55
    layer2  4 bottlenecks, 512 channels (res3)                            4 x 28 x 28
    layer3  6 bottlenecks, 1024 channels (res4)                           4 x 14 x 14
    layer4  3 bottlenecks, 2048 channels (res5)                           4 x 7 x 7
    head    average pool, dropout, linear classifier

Names of modules: `conv1`, `bn1`, `layer{1..4}.{i}.conv{1,2,3}`, `.bn{1,2,3}`, `.downsample.{0,1}`,
`.nl` (the block behind bottleneck i, with `theta`, `phi`, `g`, `out`, `norm`) and `fc`. Blob names
of the original map onto them one to one: `res{n+1}_{i}_branch2{a,b,c}` is
`layer{n}.{i}.conv{1,2,3}`, `res{n+1}_{i}_branch1` is `layer{n}.{i}.downsample`,
`nonlocal_conv{n+1}_{i}` is `layer{n}.{i}.nl` and `pred` is `fc`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from nlkernels.models.blocks import (
    Bottleneck,
    check_block_count,
    check_block_options,
    check_clip,
    insert_blocks,
    scaled,
)

# The epsilon of the Caffe2 original, for the backbone and for its non-local blocks.
NORM_EPS = 1.0000001e-5

# (layer, bottleneck) that a block follows, by the number of blocks. The original places 5 behind
# every second bottleneck of layer2 and layer3 (its LAYER_MOD is 2), and 10 behind every one (1).
BLOCK_PLACES: dict[int, tuple[tuple[int, int], ...]] = {
    0: (),
    1: ((3, 4),),
    5: ((2, 1), (2, 3), (3, 1), (3, 3), (3, 5)),
    10: (*((2, index) for index in range(4)), *((3, index) for index in range(6))),
}


class VideoResNet(nn.Module):
    """Video ResNet-50 with optional non-local blocks.

    Initialisation follows the original: He normal over the fan-out for convolutions, zero for the
    last batch norm of each bottleneck, N(0, 0.01^2) for the classifier. Blocks are created last, so
    equal seeds give equal backbones with and without them.

    Args:
        name: name of the model in error messages.
        stem_kernel_t: temporal kernel of the first convolution, odd.
        kernels_t: temporal kernel of `conv1` of every bottleneck, one sequence per layer; their
            lengths are the depths of the layers.
        num_classes: number of classes.
        width: multiplier of the channel counts.
        blocks: number of non-local blocks: 0, 1 (behind the fifth bottleneck of layer3), 5 (behind
            every second bottleneck of layer2 and layer3) or 10 (behind each of them).
        block: options of `NonLocalBlock3d`, "variant" ("nonlocal" or "local") and "preset" (a
            published system's options). Without a preset, `norm_eps` is that of the original.
        dropout: probability in front of the classifier, in training mode.

    Raises:
        TypeError: width or block of the wrong type, unknown block option.
        ValueError: width, blocks, variant, preset or dropout out of range.
    """

    def __init__(
        self,
        name: str,
        *,
        stem_kernel_t: int,
        kernels_t: Sequence[Sequence[int]],
        num_classes: int,
        width: float,
        blocks: int,
        block: Mapping[str, Any] | None,
        dropout: float,
    ) -> None:
        super().__init__()
        check_block_count(name, blocks, BLOCK_PLACES)
        options = check_block_options(name, block, {"norm_eps": NORM_EPS})
        self.name = name
        channels = scaled(64, width)
        self.conv1 = nn.Conv3d(
            3,
            channels,
            (stem_kernel_t, 7, 7),
            stride=(1, 2, 2),
            padding=(stem_kernel_t // 2, 3, 3),
            bias=False,
        )
        self.bn1 = nn.BatchNorm3d(channels, eps=NORM_EPS)
        self.relu = nn.ReLU(inplace=True)
        self.pool1 = nn.MaxPool3d((1, 3, 3), stride=(1, 2, 2))
        self.pool2 = nn.MaxPool3d((2, 1, 1), stride=(2, 1, 1))
        out_channels = []
        for index, layer_kernels_t in enumerate(kernels_t):
            inner = scaled(64 * 2**index, width)
            layer = _bottlenecks(channels, inner, layer_kernels_t, stride=1 if index == 0 else 2)
            channels = 4 * inner
            out_channels.append(channels)
            self.add_module(f"layer{index + 1}", layer)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(channels, num_classes)
        self._initialise()
        insert_blocks(
            (
                (self.get_submodule(f"layer{layer}.{index}"), out_channels[layer - 1])
                for layer, index in BLOCK_PLACES[blocks]
            ),
            options,
        )

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def features(self, clip: torch.Tensor) -> torch.Tensor:
        """Output of the last stage.

        Args:
            clip: (B, 3, T, H, W), floating point, T >= 2, H and W >= 32.

        Returns:
            (B, 2048 * width, T // 2, h, w), h and w about H / 32 and W / 32 (7 for 224).
        """
        check_clip(self.name, clip, min_frames=2, min_size=32)
        x = self.pool1(self.relu(self.bn1(self.conv1(clip))))
        x = self.pool2(self.layer1(x))
        return self.layer4(self.layer3(self.layer2(x)))

    def forward(self, clip: torch.Tensor) -> torch.Tensor:
        """Logits of the globally averaged features.

        At 224 x 224 pixels this is the original network in training and testing. At other sizes the
        original averages probabilities over locations instead: see `location_logits`.

        Args:
            clip: (B, 3, T, H, W), floating point, T >= 2, H and W >= 32.

        Returns:
            (B, num_classes) logits.

        Raises:
            TypeError: clip is not a floating-point tensor.
            ValueError: clip has a wrong shape or is too small.
        """
        pooled = self.features(clip).mean(dim=(2, 3, 4))
        return self.fc(self.dropout(pooled))

    def location_logits(self, clip: torch.Tensor) -> torch.Tensor:
        """Logits at every location of a 7 x 7 window: the fully convolutional test of the original.

        The published protocol takes the softmax per location first and then averages:
        `model.location_logits(clip).softmax(-1).mean(dim=(1, 2, 3))`. Dropout is not applied.

        Args:
            clip: (B, 3, T, H, W), floating point, T >= 2. The original needs H and W >= 197; below
                that the window is as large as the feature map.

        Returns:
            (B, 1, h - 6, w - 6, num_classes) logits for feature maps of h x w: one location at 224,
            2 x 2 at 256. The window spans all frames.

        Raises:
            TypeError: clip is not a floating-point tensor.
            ValueError: clip has a wrong shape or is too small.
        """
        features = self.features(clip)
        frames, height, width = features.shape[2:]
        pooled = F.avg_pool3d(features, (frames, min(height, 7), min(width, 7)), stride=1)
        return self.fc(pooled.movedim(1, -1))


def _bottlenecks(
    channels: int, inner: int, kernels_t: Sequence[int], *, stride: int
) -> nn.Sequential:
    """A layer: bottlenecks of which the first one changes channels and spatial size."""
    layer = nn.Sequential()
    for index, kernel_t in enumerate(kernels_t):
        layer.append(
            Bottleneck(
                channels if index == 0 else 4 * inner,
                inner,
                4 * inner,
                kernel_t=kernel_t,
                stride=stride if index == 0 else 1,
                norm_eps=NORM_EPS,
            )
        )
    return layer
