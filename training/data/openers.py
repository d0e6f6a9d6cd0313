"""How the videos of a data set are opened: files, folders of images, frames kept in memory."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .child import ChildReader
from .dataset import Video
from .frame_folders import FrameFolder, Naming
from .reader import VideoReader, load_reader
from .scan import ScannedVideo


@dataclass(frozen=True)
class FileOpener:
    """Opens video files.

    Args:
        reader: The reader class, ``module:Class``.
        child_timeout_s: Decode in a child process that may take so many seconds; None decodes in
            the process that asks, where a decoder that hangs or crashes cannot be stopped.
    """

    reader: str
    child_timeout_s: float | None = None

    def __call__(self, number: int, video: Video) -> VideoReader:
        """Open video ``number``."""
        if self.child_timeout_s is None:
            return load_reader(self.reader).open(video.path)
        return ChildReader.open(video.path, reader=self.reader, timeout_s=self.child_timeout_s)


@dataclass(frozen=True)
class ImageOpener:
    """Opens folders of images.

    Args:
        root: Folder of all videos.
        naming: Names of the images.
    """

    root: str
    naming: Naming

    def __call__(self, number: int, video: Video) -> VideoReader:
        """Open video ``number``."""
        length = None if video.frames is None else video.frames.stop
        name = os.path.relpath(video.path, self.root)
        return FrameFolder.open(self.root, name, self.naming, num_frames=length)


class MemoryOpener:
    """All frames of all videos in one flat uint8 tensor.

    One tensor, because every one that goes to a loader process by another way than forking costs a
    file descriptor.

    Args:
        videos: Scanned videos with their pixels.
    """

    def __init__(self, videos: Sequence[ScannedVideo]) -> None:
        self._shapes = [video.pixels.shape for video in videos]
        ends = np.cumsum([video.pixels.size for video in videos])
        self._starts = [0, *ends.tolist()]
        self._pixels = torch.empty(self._starts[-1], dtype=torch.uint8)
        for number, video in enumerate(videos):
            self._video(number).copy_(torch.from_numpy(video.pixels))

    def __call__(self, number: int, video: Video) -> VideoReader:
        """Open video ``number``."""
        return _InMemory(self._video(number), video.frames, video.fps)

    def _video(self, number: int) -> Tensor:
        start, end = self._starts[number : number + 2]
        return self._pixels[start:end].view(self._shapes[number])


class _InMemory:
    """Frames of one video; numbers count from the beginning of the file, as elsewhere."""

    def __init__(self, pixels: Tensor, frames: range, fps: float) -> None:
        self._pixels, self._frames, self.fps = pixels, frames, fps

    def __len__(self) -> int:
        return self._frames.stop

    def frames(self, indices: Sequence[int]) -> Tensor:
        return self._pixels[torch.tensor(indices) - self._frames.start]

    def close(self) -> None:
        pass
