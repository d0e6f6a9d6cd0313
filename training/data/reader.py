"""One video behind four methods: open, length and frame rate, frames by index, close."""

import importlib
import importlib.util
import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np

# torch is imported where a tensor is made: the scan's child processes decode without it and so
# start in a tenth of the time.
if TYPE_CHECKING:
    from torch import Tensor


class VideoReadError(Exception):
    """A video that cannot be opened or decoded.

    Attributes:
        path: The video file.
        reason: What is wrong with it, one line.
    """

    def __init__(self, path: str | os.PathLike[str], reason: str = "") -> None:
        # One argument must do: a DataLoader re-raises a worker's exception from its text alone.
        super().__init__(os.fspath(path), reason)
        self.path = os.fspath(path)
        self.reason = reason

    def __str__(self) -> str:
        if not self.reason:
            return self.path
        return (
            f"video reader: expected a video that can be decoded, got {self.path} ({self.reason}); "
            "repair the file or take it out of the folder"
        )


class VideoReader(Protocol):
    """What the data set needs of a decoder; any class with these methods serves."""

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Open a video file; `VideoReadError` if that is impossible."""

    def __len__(self) -> int:
        """Number of frames that the container claims."""

    @property
    def fps(self) -> float:
        """Mean frame rate, in frames per second."""

    def frames(self, indices: Sequence[int]) -> "Tensor":
        """Frames (len(indices), H, W, 3), uint8 RGB; `VideoReadError` if one cannot be decoded."""

    def close(self) -> None:
        """Give the decoder's memory and threads back."""


class ArrayReader:
    """`frames` of the readers that give NumPy arrays."""

    def frames(self, indices: Sequence[int]) -> "Tensor":
        """Read frames.

        Args:
            indices: Frame numbers from 0, any order, repeats allowed; every frame is read once.

        Returns:
            (len(indices), H, W, 3), uint8, RGB, contiguous; of flow two channels.

        Raises:
            ValueError: No index at all, or the reader is closed.
            VideoReadError: A frame does not exist or cannot be decoded.
        """
        import torch

        return torch.from_numpy(self.frames_array(indices))

    def frames_array(self, indices: Sequence[int]) -> np.ndarray:
        """`frames` as a NumPy array, without importing torch."""
        raise NotImplementedError


class DecordReader(ArrayReader):
    """Decodes with decord; make one with `DecordReader.open`.

    A reader belongs to the process that opened it: close it before the process forks.

    Args:
        path: The video file, for messages.
        video: An open `decord.VideoReader`.
    """

    def __init__(self, path: str, video: Any) -> None:
        self._path = path
        self._video = video

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, num_threads: int = 1) -> Self:
        """Open a video file.

        Args:
            path: Any file that decord's FFmpeg can read.
            num_threads: Decoding threads; 1 suits loader processes.

        Raises:
            ImportError: decord is not installed.
            VideoReadError: The file is missing, empty, not a video, or has no frames.
        """
        try:
            import decord
        except ImportError as error:
            raise ImportError(
                f"video reader: expected the package decord, got {error}; "
                "install it with: pip install 'nlkernels[video]'"
            ) from error
        path = os.fspath(path)
        check_file(path)
        try:
            return cls(path, decord.VideoReader(path, num_threads=num_threads))
        except Exception as error:  # RuntimeError, AssertionError or DECORDError, by the damage
            raise VideoReadError(path, f"cannot be opened: {one_line(error)}") from error

    def __len__(self) -> int:
        return len(self._open_video())

    @property
    def fps(self) -> float:
        """Mean frame rate, in frames per second."""
        return float(self._open_video().get_avg_fps())

    def frames_array(self, indices: Sequence[int]) -> np.ndarray:
        """`frames` as a NumPy array, without importing torch."""
        video = self._open_video()
        # Ascending order: decord then never seeks back.
        wanted = wanted_frames(self._path, len(video), indices)
        try:
            decoded = _decode(video, wanted)
        except Exception as error:  # DECORDError is not derived from any narrower class
            raise VideoReadError(
                self._path,
                f"decoding of frames {wanted[0]} to {wanted[-1]} failed: {one_line(error)}",
            ) from error
        if wanted == list(indices):
            return decoded
        return decoded[np.searchsorted(wanted, indices)]

    def close(self) -> None:
        """Give the decoder's memory and threads back; closing twice is fine."""
        self._video = None

    def _open_video(self) -> Any:
        if self._video is None:
            raise ValueError(
                f"video reader: expected an open reader, got a closed one of {self._path}; "
                "open the file again"
            )
        return self._video


# Import paths of the readers of video files, in the order in which ``auto`` prefers them.
READERS = {
    "decord": ("decord", "nlkernels.training.data.reader:DecordReader"),
    "av": ("av", "nlkernels.training.data.reader_av:AvReader"),
}


def choose_reader(name: str = "auto") -> str:
    """Import path, ``module:Class``, of a reader of video files.

    Args:
        name: ``decord``, ``av`` (PyAV), or ``auto``: the first of them that is installed.

    Raises:
        ImportError: It is not installed.
        ValueError: No such reader.

    Example:
        >>> choose_reader("nothing")
        Traceback (most recent call last):
        ...
        ValueError: video reader: expected one of auto, decord, av, got 'nothing'; choose one
    """
    if name != "auto" and name not in READERS:
        raise ValueError(
            f"video reader: expected one of auto, {', '.join(READERS)}, got {name!r}; choose one"
        )
    wanted = list(READERS) if name == "auto" else [name]
    for one in wanted:
        package, path = READERS[one]
        if importlib.util.find_spec(package) is not None:
            return path
    raise ImportError(
        f"video reader: expected the package {' or '.join(READERS[one][0] for one in wanted)}, "
        "got none; install it with: pip install 'nlkernels[video]'"
    )


def load_reader(path: str) -> type[VideoReader]:
    """The class of ``module:Class``."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def open_video(path: str | os.PathLike[str], reader: str = "auto") -> VideoReader:
    """Open a video file with decord, or with PyAV where decord is missing.

    Args:
        path: The video file.
        reader: ``auto``, ``decord`` or ``av``.

    Raises:
        ImportError: No decoder is installed.
        ValueError: No such reader.
        VideoReadError: The file is missing, empty, not a video, or has no frames.

    Example:
        >>> from contextlib import closing
        >>> def first_frames(path):
        ...     with closing(open_video(path)) as video:
        ...         return video.frames(range(8))
    """
    return load_reader(choose_reader(reader)).open(path)


def wanted_frames(path: str, length: int, indices: Sequence[int]) -> list[int]:
    """The frames that are asked for, ascending and each once.

    Args:
        path: The video, for messages.
        length: Its frames.
        indices: Frame numbers, any order, repeats allowed.

    Raises:
        ValueError: No index at all.
        VideoReadError: There is no such frame.
    """
    if len(indices) == 0:
        raise ValueError("frames: expected at least one index, got none; ask for a frame")
    wanted = sorted(set(map(int, indices)))
    if wanted[0] < 0 or wanted[-1] >= length:
        raise VideoReadError(
            path, f"has {length} frames, frames {wanted[0]} to {wanted[-1]} were asked for"
        )
    return wanted


def check_file(path: str) -> None:
    """Raise VideoReadError unless there is a file with something in it.

    Decoders have one error for all of these, and it looks like damage.
    """
    if not os.path.exists(path):
        raise VideoReadError(path, "no such file")
    if not os.path.isfile(path):
        raise VideoReadError(path, "not a file")
    if os.path.getsize(path) == 0:
        raise VideoReadError(path, "the file is empty")


def _decode(video: Any, wanted: list[int]) -> np.ndarray:
    first = _array(video[wanted[0]])
    if first.shape[2] == 3:
        if len(wanted) == 1:
            return first[None]
        return np.concatenate([first[None], _array(video.get_batch(wanted[1:]))])
    # Widths such as 48 or 72: decord 0.6.0 takes FFmpeg's row padding for more channels
    # (dmlc/decord#336) and its batch call fails. The pixels are there, at the front of each row.
    frames = [first] + [_array(video[index]) for index in wanted[1:]]
    height, width, channels = first.shape
    rows = np.stack(frames).reshape(len(frames), height, width * channels)
    return np.ascontiguousarray(rows[:, :, : width * 3]).reshape(len(frames), height, width, 3)


def _array(frames: Any) -> np.ndarray:
    """NumPy array of decord's output, whichever of its bridges the program has chosen."""
    return frames.asnumpy() if hasattr(frames, "asnumpy") else np.asarray(frames)


def one_line(error: Exception) -> str:
    """What a decoder says, without times, source lines and the text of its failed check."""
    lines = str(error).splitlines()
    said = re.sub(r"\[\d\d:\d\d:\d\d\] \S+:\d+: ", "", lines[0] if lines else "").strip()
    without_check = re.sub(r"Check failed: .*\(\S+ vs\. \S+\)\s*", "", said).strip()
    return (without_check or said or type(error).__name__).rstrip(".")
