"""Decoded frames to network input: resize, crop, flip, normalise, and the two usual sequences."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

# Of all three channels, in levels of 0 to 255: the normalisation of the original Caffe2 models.
MEAN = 114.75
STD = 57.375


def resize_short_side(video: Tensor, short_side: int) -> Tensor:
    """Resize so that the shorter side has the given length; the other one is rounded down.

    Bilinear without smoothing, as in the original: shrinking by more than two leaves aliasing.

    Args:
        video: (T, H, W, 3), uint8.
        short_side: New length of the shorter side, in pixels.

    Returns:
        (T, h, w, 3), uint8; `video` itself if it has that size already.

    Raises:
        TypeError: Not uint8.
        ValueError: Not (T, H, W, 3), or `short_side` below 1.
    """
    _check_video("resize_short_side", video)
    if short_side < 1:
        raise ValueError(
            f"resize_short_side: expected at least 1 pixel, got {short_side}; use the crop size"
        )
    height, width = video.shape[1:3]
    if min(height, width) == short_side:
        return video
    if height < width:
        size = short_side, width * short_side // height
    else:
        size = height * short_side // width, short_side
    planes = interpolate(video.permute(0, 3, 1, 2), size=size, mode="bilinear", align_corners=False)
    return planes.permute(0, 2, 3, 1)


def crop(video: Tensor, top: int, left: int, height: int, width: int) -> Tensor:
    """Cut a window out of every frame.

    Args:
        video: (T, H, W, 3), uint8.
        top: First row.
        left: First column.
        height: Rows of the window.
        width: Columns of the window.

    Returns:
        (T, height, width, 3), uint8, a view.

    Raises:
        TypeError: Not uint8.
        ValueError: Not (T, H, W, 3), or the window leaves the frame.
    """
    _check_video("crop", video)
    rows, columns = video.shape[1:3]
    if min(top, left) < 0 or top + height > rows or left + width > columns:
        raise ValueError(
            f"crop: expected a window inside {rows}x{columns}, got {height}x{width} at row {top}, "
            f"column {left}; resize the video first"
        )
    return video[:, top : top + height, left : left + width]


def flip(video: Tensor) -> Tensor:
    """Mirror every frame left to right.

    Args:
        video: (T, H, W, 3), uint8.

    Returns:
        (T, H, W, 3), uint8.

    Raises:
        TypeError: Not uint8.
        ValueError: Not (T, H, W, 3).
    """
    _check_video("flip", video)
    return video.flip(2)


def normalise(video: Tensor) -> Tensor:
    """Network input: ``(level - 114.75) / 57.375``, channels first.

    Args:
        video: (T, H, W, 3), uint8.

    Returns:
        (3, T, H, W), float32, contiguous.

    Raises:
        TypeError: Not uint8.
        ValueError: Not (T, H, W, 3).
    """
    _check_video("normalise", video)
    planes = video.permute(3, 0, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return planes.sub_(MEAN).div_(STD)


@dataclass(frozen=True)
class TrainTransform:
    """Random scale, random window, random mirror image, normalised; the same for a whole clip.

    Args:
        short_side: Smallest and largest length of the shorter side, in pixels, both included.
        size: Height and width of the window, in pixels, at most the smallest short side.
        flip: Mirror half of the clips; switch it off where left and right are what is learned.

    Raises:
        ValueError: An empty range, or a window larger than a frame can be.
    """

    short_side: tuple[int, int]
    size: int
    flip: bool = True

    def __post_init__(self) -> None:
        low, high = self.short_side
        if not 1 <= self.size <= low <= high:
            raise ValueError(
                "TrainTransform: expected 1 <= size <= short_side[0] <= short_side[1], got size "
                f"{self.size} and short_side {self.short_side}; make short_side larger"
            )

    def __call__(self, video: Tensor, generator: torch.Generator) -> Tensor:
        """(T, H, W, 3) uint8 to (3, T, size, size) float32."""
        low, high = self.short_side
        scaled = resize_short_side(video, low + _draw(high - low, generator))
        top = _draw(scaled.shape[1] - self.size, generator)
        left = _draw(scaled.shape[2] - self.size, generator)
        window = crop(scaled, top, left, self.size, self.size)
        mirror = _draw(1, generator) == 1
        return normalise(flip(window) if self.flip and mirror else window)


@dataclass(frozen=True)
class TestTransform:
    """Fixed scale and centre window, normalised.

    Args:
        short_side: Length of the shorter side, in pixels.
        size: Height and width of the window, in pixels, at most the short side.

    Raises:
        ValueError: A window larger than the short side.
    """

    __test__ = False  # not a test, whatever its name makes pytest believe

    short_side: int
    size: int

    def __post_init__(self) -> None:
        if not 1 <= self.size <= self.short_side:
            raise ValueError(
                f"TestTransform: expected 1 <= size <= short_side, got size {self.size} and "
                f"short_side {self.short_side}; make short_side larger"
            )

    def __call__(self, video: Tensor, generator: torch.Generator) -> Tensor:
        """(T, H, W, 3) uint8 to (3, T, size, size) float32; nothing is drawn from `generator`."""
        scaled = resize_short_side(video, self.short_side)
        top, left = (scaled.shape[1] - self.size) // 2, (scaled.shape[2] - self.size) // 2
        return normalise(crop(scaled, top, left, self.size, self.size))


def _draw(largest: int, generator: torch.Generator) -> int:
    return int(torch.randint(largest + 1, (1,), generator=generator))


def _check_video(where: str, video: Tensor) -> None:
    if video.dtype != torch.uint8:
        raise TypeError(
            f"{where}: expected uint8 frames, got {video.dtype}; pass frames as they were decoded"
        )
    if video.ndim != 4 or video.shape[3] != 3:
        raise ValueError(
            f"{where}: expected frames (T, H, W, 3), got {tuple(video.shape)}; "
            "pass frames as they were decoded"
        )
