"""I3D: ResNets in which every other bottleneck sees three frames."""

from collections.abc import Mapping
from typing import Any

from nlkernels.models.registry import register_model
from nlkernels.models.resnet import VideoResNet

# Temporal kernel of the first convolution of each bottleneck of res2 to res5.
I3D_R50_KERNELS_T = ((3, 3, 3), (3, 1, 3, 1), (3, 1, 3, 1, 3, 1), (1, 3, 1))


@register_model
def i3d_r50_8x8(
    *,
    num_classes: int,
    width: float = 1.0,
    blocks: int = 0,
    block: Mapping[str, Any] | None = None,
    dropout: float = 0.5,
) -> VideoResNet:
    """I3D ResNet-50, 8 frames with a stride of 8: 28.0 M parameters, 35.4 M with 5 blocks.

    The stem has a 5 x 7 x 7 kernel; nine bottlenecks start with a 3 x 1 x 1 convolution. Arguments
    as in `VideoResNet`; the dropout is that of the published recipe.
    """
    return VideoResNet(
        "i3d_r50_8x8",
        stem_kernel_t=5,
        kernels_t=I3D_R50_KERNELS_T,
        num_classes=num_classes,
        width=width,
        blocks=blocks,
        block=block,
        dropout=dropout,
    )
