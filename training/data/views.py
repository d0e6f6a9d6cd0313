"""A view: what is done with the frames of a clip between decoder and network, as plain numbers.

Augmentations draw views, test crops list them, and `render` carries one out on whatever device the
frames are. So random numbers are drawn in one place, and pictures are changed in another.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .colours import Jitter, Normalisation, to_planes
from .resizing import ResizeRule, resize


@dataclass(frozen=True)
class View:
    """Scale frames, cut a window out, scale that, mirror it.

    Attributes:
        scaled: (height, width) of the whole frames before cutting; None leaves them as they are.
        top: First row of the window.
        left: First column of the window.
        height: Rows of the window.
        width: Columns of the window.
        size: (height, width) of the result; None leaves the window as it is.
        mirrored: Left and right change places.
        jitter: Changes of colour.
    """

    scaled: tuple[int, int] | None
    top: int
    left: int
    height: int
    width: int
    size: tuple[int, int] | None = None
    mirrored: bool = False
    jitter: Jitter | None = None

    def shape(self, video: Tensor) -> tuple[int, int, int, int]:
        """(C, T, h, w) of what `render` makes of frames (T, H, W, C)."""
        size = (self.height, self.width) if self.size is None else self.size
        return (video.shape[3], video.shape[0], *size)


@dataclass(frozen=True)
class Look:
    """What all views of a data set have in common.

    Attributes:
        rule: How frames are scaled.
        normalisation: How levels become network input.
        channels: ``rgb`` or ``bgr``.
        negates_flow: A mirrored flow to the right becomes one to the left (TSM; not in
            inception-I3D-NON-LOCAL).
    """

    rule: ResizeRule
    normalisation: Normalisation
    channels: str = "rgb"
    negates_flow: bool = True


def render(video: Tensor, view: View, look: Look, out: Tensor | None = None) -> Tensor:
    """Decoded frames to network input.

    Args:
        video: (T, H, W, C), uint8; C is 3 (red, green, blue) or 2 (flow to the right, and down).
        view: What to cut out.
        look: How to scale and normalise.
        out: Where to write, of the shape that `View.shape` gives; unset is new memory.

    Returns:
        (C, T, h, w), float32, on the device of `video`; contiguous in new memory.

    Raises:
        TypeError: Not uint8.
        ValueError: Not (T, H, W, 2 or 3), or the window leaves the frame.

    Example:
        >>> from nlkernels.training.data.colours import NORMALISATIONS
        >>> from nlkernels.training.data.resizing import RULES
        >>> look = Look(RULES["caffe2"], NORMALISATIONS["unit"])
        >>> clip = torch.zeros(4, 8, 10, 3, dtype=torch.uint8)
        >>> render(clip, View(None, 0, 1, 8, 8), look).shape
        torch.Size([3, 4, 8, 8])
    """
    check_video("render", video)
    if view.scaled is not None:
        video = resize(video, *view.scaled, look.rule)
    video = cut(video, view.top, view.left, view.height, view.width)
    if view.size is not None:
        video = resize(video, *view.size, look.rule)
    if view.mirrored:
        video = video.flip(2)
    if view.jitter is not None:
        video = view.jitter(video)
    planes = to_planes(video, look.channels, out)
    if view.mirrored and look.negates_flow and len(planes) == 2:
        planes[0].neg_().add_(255)
    return look.normalisation(planes)


def cut(video: Tensor, top: int, left: int, height: int, width: int) -> Tensor:
    """A window of every frame.

    Args:
        video: (T, H, W, C).
        top: First row.
        left: First column.
        height: Rows of the window.
        width: Columns of the window.

    Returns:
        (T, height, width, C), a view of `video`.

    Raises:
        ValueError: The window leaves the frame.
    """
    rows, columns = video.shape[1:3]
    if min(top, left) < 0 or top + height > rows or left + width > columns:
        raise ValueError(
            f"cut: expected a window inside {rows}x{columns}, got {height}x{width} at row {top}, "
            f"column {left}; scale the frames first"
        )
    return video[:, top : top + height, left : left + width]


def check_video(where: str, video: Tensor) -> None:
    """Raise TypeError or ValueError unless frames are as a reader decodes them."""
    if video.dtype != torch.uint8:
        raise TypeError(
            f"{where}: expected uint8 frames, got {video.dtype}; pass frames as they were decoded"
        )
    if video.ndim != 4 or video.shape[3] not in (2, 3):
        raise ValueError(
            f"{where}: expected frames (T, H, W, 3), or 2 for flow, got {tuple(video.shape)}; "
            "pass frames as they were decoded"
        )
