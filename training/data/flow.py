"""Optical flow between frames, as the published data sets store it: TV-L1 in grey images."""

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

# Pixels per frame at which a grey level of 0 or 255 is reached: that of the published extractions.
BOUND = 20.0


class FlowMethod(Protocol):
    """What OpenCV's methods have in common."""

    def calc(self, before: np.ndarray, after: np.ndarray, flow: None) -> np.ndarray:
        """Motion (H, W, 2), float32, from one grey picture (H, W), uint8, to the next."""


def tv_l1() -> FlowMethod:
    """OpenCV's Dual TV-L1.

    Raises:
        ImportError: OpenCV is missing, or is one without the contributed modules.
    """
    try:
        import cv2

        return cv2.optflow.DualTVL1OpticalFlow_create()
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"flow: expected OpenCV with its contributed modules (cv2.optflow), got {error}; "
            "install it with: pip install 'nlkernels[flow]'"
        ) from error


def grey(frames: np.ndarray) -> np.ndarray:
    """Frames (T, H, W, 3), uint8, RGB, to grey ones (T, H, W), uint8."""
    levels = frames.astype(np.float32) @ np.float32([0.299, 0.587, 0.114])
    return levels.round().astype(np.uint8)


def to_levels(flow: np.ndarray, bound: float = BOUND) -> np.ndarray:
    """Motion in pixels to grey levels.

    Args:
        flow: Any shape, in pixels per frame.
        bound: Motion of level 0 (negative) and 255; what is faster is cut off.

    Returns:
        uint8 of the same shape; 128 is rest.

    Example:
        >>> to_levels(np.float32([-50, -20, 0, 10, 20])).tolist()
        [0, 0, 128, 191, 255]
    """
    share = (np.clip(flow, -bound, bound) + bound) / (2 * bound)
    # Rest is 127.5: up, as published.
    return np.floor(share * 255 + 0.5).astype(np.uint8)


def flow_images(pictures: Iterator[np.ndarray], method: FlowMethod) -> Iterator[np.ndarray]:
    """Flow of a video, frame by frame.

    Args:
        pictures: Grey frames (H, W), uint8, in order.
        method: From `tv_l1`.

    Yields:
        (2, H, W), uint8, of every pair of frames: to the right, and down; one less than frames.
    """
    before: Any = None
    for picture in pictures:
        if before is not None:
            yield to_levels(method.calc(before, picture, None)).transpose(2, 0, 1)
        before = picture
