"""How frames are scaled: sizes by the integer rule of each system, and the interpolation itself."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate


@dataclass(frozen=True)
class ResizeRule:
    """How a system scales frames to a short side.

    Attributes:
        rounding: How the longer side becomes a whole number: ``float32`` cuts off a product in
            single precision, ``float64`` one in double precision, ``floor`` the exact one, ``near``
            rounds halves up.
        mode: Interpolation.
        antialias: Smooth while shrinking, as Pillow does and OpenCV does not.
        exact: Interpolate floating-point levels (PySlowFast and pytorchvideo scale tensors), else
            levels are whole numbers before and after.
    """

    rounding: Literal["float32", "float64", "floor", "near"] = "float32"
    mode: Literal["bilinear", "bicubic"] = "bilinear"
    antialias: bool = False
    exact: bool = False

    def size(self, height: int, width: int, short_side: int) -> tuple[int, int]:
        """New (height, width) of frames whose shorter side gets a given length.

        Args:
            height: Rows of a frame.
            width: Columns of a frame.
            short_side: New length of the shorter side, in pixels.

        Example:
            >>> RULES["caffe2"].size(720, 1280, 256)
            (256, 455)
        """
        short, long = sorted((height, width))
        if self.rounding == "float32":
            ratio = np.float32(short_side) / np.float32(short)
            longer = int(np.float32(long) * ratio)
        elif self.rounding == "float64":
            longer = int((long / short) * short_side)
        elif self.rounding == "floor":
            longer = long * short_side // short
        else:
            longer = int(long * (short_side / short) + 0.5)
        # Rounded products may fall just below the short side itself.
        longer = max(longer, short_side)
        return (short_side, longer) if height <= width else (longer, short_side)


# By the names of `data.crop_rule` and of the augmentations.
RULES = {
    "caffe2": ResizeRule(),
    "mmaction": ResizeRule("near"),
    "slowfast": ResizeRule("float64", exact=True),
    "tsm": ResizeRule("floor", antialias=True),
    "inception": ResizeRule("floor", antialias=True),
    "mindspore": ResizeRule("near", "bicubic"),
}


def resize(video: Tensor, height: int, width: int, rule: ResizeRule) -> Tensor:
    """Scale frames to a size.

    Args:
        video: (T, H, W, C), uint8, or float32 levels.
        height: New rows.
        width: New columns.
        rule: Interpolation.

    Returns:
        (T, height, width, C): uint8, or float32 if the rule is exact or the input was; `video`
        itself if it has that size already and nothing is to be converted.

    Example:
        >>> resize(torch.zeros(2, 4, 6, 3, dtype=torch.uint8), 8, 12, RULES["caffe2"]).shape
        torch.Size([2, 8, 12, 3])
    """
    if rule.exact:
        video = video.float()
    if video.shape[1:3] == (height, width):
        return video
    planes = video.permute(0, 3, 1, 2)
    # PyTorch interpolates uint8 on CPUs only; elsewhere the result is rounded here.
    rounded = planes.dtype == torch.uint8 and planes.device.type != "cpu"
    planes = interpolate(
        planes.float() if rounded else planes,
        size=(height, width),
        mode=rule.mode,
        align_corners=False,
        antialias=rule.antialias,
    )
    if rounded:
        planes = planes.round().clamp(0, 255).to(torch.uint8)
    return planes.permute(0, 2, 3, 1)
