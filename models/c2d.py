"""C2D: networks that convolve each frame alone, so that only pooling and blocks relate frames."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from nlkernels.models.blocks import (
    check_block_count,
    check_block_options,
    check_clip,
    insert_blocks,
    scaled,
)
from nlkernels.models.checkpointing import run
from nlkernels.models.recipes import (
    CAFFE2_SETTINGS,
    MMACTION,
    PYTORCHVIDEO,
    SLOWFAST,
    register_resnet,
)
from nlkernels.models.registry import register_model

# Channels and spatial stride of the layers of C2DTiny.
TINY_LAYERS = ((16, 2), (32, 2), (32, 1), (64, 2), (64, 1), (128, 1))

# Layers of C2DTiny that a block follows, by the number of blocks: maps of an eighth of the clip's
# size. On maps of a quarter the blocks learn as well, in steps that take several times as long.
TINY_BLOCK_PLACES: dict[int, tuple[int, ...]] = {0: (), 1: (4,), 2: (3, 4)}


# The original's, and PySlowFast's and pytorchvideo's with a padded stem, of 8 frames.
for _depth in (50, 101):
    for _setting, _design in CAFFE2_SETTINGS:
        register_resnet(f"c2d_r{_depth}_{_setting}", "c2d", depth=_depth, **_design)
for _depth in (50, 101):
    register_resnet(
        f"slowfast_c2d_r{_depth}_8x8", "c2d", depth=_depth, window=(4, 7, 7), **SLOWFAST
    )
register_resnet("slowfast_c2d_nopool_r50_8x8", "c2d", window=(8, 7, 7), pool2=0, **SLOWFAST)
register_resnet("pytorchvideo_c2d_r50_8x8", "c2d", window=(4, 7, 7), **PYTORCHVIDEO)

# mmaction2's: frames through a 2-D ResNet, with the temporal pool of the original or without any.
register_resnet("mmaction_c2d_r50_8x8", "c2d", pool1_padding=0, **MMACTION)
register_resnet("mmaction_c2d_r50_16x4", "c2d", pool1_padding=0, **MMACTION)
for _depth in (50, 101):
    register_resnet(
        f"mmaction_c2d_nopool_r{_depth}_8x8",
        "c2d",
        depth=_depth,
        dropout=0.4,
        pool2=0,
        **MMACTION,
    )


@register_model
def c2d_tiny(
    *,
    num_classes: int,
    width: float = 1.0,
    blocks: int = 0,
    block: Mapping[str, Any] | None = None,
    dropout: float = 0.0,
    checkpointing: bool = False,
) -> "C2DTiny":
    """Six-layer C2D for clips of about 8 x 48 x 48. Arguments as in `C2DTiny`."""
    return C2DTiny(
        num_classes=num_classes,
        width=width,
        blocks=blocks,
        block=block,
        dropout=dropout,
        checkpointing=checkpointing,
    )


class C2DTiny(nn.Module):
    """Six layers of 1 x 3 x 3 convolution, batch norm and ReLU, small enough to train on a CPU.

    For clips of 8 x 48 x 48, blocks see 8 x 6 x 6 positions of 64 channels. Without blocks no
    layer relates one frame to another: the head averages over all positions.

    Names of modules: `layers.{0..5}.conv`, `.bn`, `.nl` (the block behind the layer) and `fc`.
    Blocks are created last, so equal seeds give equal backbones with and without them.

    Args:
        num_classes: number of classes.
        width: multiplier of the channel counts 16, 32, 32, 64, 64, 128.
        blocks: 0, 1 (behind the fifth layer) or 2 (behind the fourth and the fifth).
        block: options of `NonLocalBlock3d`, "variant" ("nonlocal" or "local") and "preset" (a
            published system's options).
        dropout: probability in front of the classifier, in training mode.
        checkpointing: keep no activations inside layers for the backward.

    Raises:
        TypeError: width or block of the wrong type, unknown block option.
        ValueError: width, blocks, variant, preset or dropout out of range.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        width: float,
        blocks: int,
        block: Mapping[str, Any] | None,
        dropout: float,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        check_block_count("c2d_tiny", blocks, TINY_BLOCK_PLACES)
        options = check_block_options("c2d_tiny", block)
        self.checkpointing = checkpointing
        outputs = [scaled(channels, width) for channels, _ in TINY_LAYERS]
        inputs = [3, *outputs[:-1]]
        strides = [stride for _, stride in TINY_LAYERS]
        self.layers = nn.Sequential(
            *(_Layer(*sizes) for sizes in zip(inputs, outputs, strides, strict=True))
        )
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(outputs[-1], num_classes)
        insert_blocks(
            ((self.layers[index], outputs[index]) for index in TINY_BLOCK_PLACES[blocks]), options
        )

    def forward(self, clip: torch.Tensor) -> torch.Tensor:
        """Logits of the globally averaged features.

        Args:
            clip: (B, 3, T, H, W), floating point, H and W >= 16.

        Returns:
            (B, num_classes) logits.

        Raises:
            TypeError: clip is not a floating-point tensor.
            ValueError: clip has a wrong shape or is too small.
        """
        check_clip("c2d_tiny", clip, min_frames=1, min_size=16)
        pooled = run(self.layers, clip, self.checkpointing).mean(dim=(2, 3, 4))
        return self.fc(self.dropout(pooled))


class _Layer(nn.Module):
    """Convolution of single frames, batch norm, ReLU, and the block behind them where present."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(
            in_channels,
            out_channels,
            (1, 3, 3),
            stride=(1, stride, stride),
            padding=(0, 1, 1),
            bias=False,
        )
        self.bn = nn.BatchNorm3d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.nl: nn.Module | None = None
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.bn(self.conv(x)))
        return x if self.nl is None else self.nl(x)
