"""Videos through PyAV, for machines without decord; the same frames."""

import bisect
import os
from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from .reader import ArrayReader, VideoReadError, check_file, one_line, wanted_frames

# Frames that are rather decoded than jumped over.
_SEEK_BEYOND = 12


class AvReader(ArrayReader):
    """Decodes with PyAV; make one with `AvReader.open`.

    A frame's number is its place in the order of display. Nothing decoded is kept: ask for all
    frames of a clip in one call.

    Args:
        path: The video file.
        container: An open `av` container with a video stream.
        starts: Time stamps of all frames, ascending, in units of the stream.
        keys: Numbers of the frames at which decoding can begin, ascending, from 0; None for a file
            without time stamps to rely on (AVI), which is decoded from its beginning.
    """

    def __init__(
        self, path: str, container: Any, starts: list[int], keys: list[int] | None
    ) -> None:
        self._path, self._container = path, container
        self._starts, self._keys = starts, keys

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Open a video file and read where its frames are.

        Args:
            path: Any file that PyAV's FFmpeg can read.

        Raises:
            ImportError: PyAV is not installed.
            VideoReadError: The file is missing, empty, not a video, or has no frames.
        """
        try:
            import av
        except ImportError as error:
            raise ImportError(
                f"video reader: expected the package av (PyAV), got {error}; "
                "install it with: pip install 'nlkernels[video]'"
            ) from error
        path = os.fspath(path)
        check_file(path)
        try:
            container = av.open(path)
        except Exception as error:  # InvalidDataError or another of FFmpeg's, by the damage
            raise VideoReadError(path, f"cannot be opened: {one_line(error)}") from error
        try:
            starts, keys = _index(path, container)
        except BaseException:
            container.close()
            raise
        return cls(path, container, starts, keys)

    def __len__(self) -> int:
        self._open_stream()
        return len(self._starts)

    @property
    def fps(self) -> float:
        """Mean frame rate, in frames per second."""
        return float(self._open_stream().average_rate or 30)

    def frames_array(self, indices: Sequence[int]) -> np.ndarray:
        """`frames` as a NumPy array, without importing torch."""
        stream = self._open_stream()
        wanted = wanted_frames(self._path, len(self._starts), indices)
        try:
            found = self._decode(stream, wanted)
        except Exception as error:  # FFmpeg's errors have many classes
            raise VideoReadError(
                self._path,
                f"decoding of frames {wanted[0]} to {wanted[-1]} failed: {one_line(error)}",
            ) from error
        missing = [number for number in wanted if number not in found]
        if missing:
            raise VideoReadError(self._path, f"frame {missing[0]} could not be decoded")
        shapes = {picture.shape for picture in found.values()}
        if len(shapes) > 1:
            raise VideoReadError(self._path, f"frames of several sizes: {sorted(shapes)}")
        return np.stack([found[number] for number in indices])

    def close(self) -> None:
        """Give the decoder's memory and threads back; closing twice is fine."""
        if self._container is not None:
            self._container.close()
            self._container = None

    def _decode(self, stream: Any, wanted: list[int]) -> dict[int, np.ndarray]:
        """Pictures by frame number."""
        if self._keys is None:
            return self._pass(stream, 0, wanted)
        found: dict[int, np.ndarray] = {}
        current: list[int] = []
        key = 0
        for number in wanted:
            nearest = self._keys[bisect.bisect_right(self._keys, number) - 1]
            # A seek costs about as much as the decoding of some frames.
            if current and nearest > current[-1] + _SEEK_BEYOND:
                found |= self._pass(stream, key, current)
                current = []
            if not current:
                key = nearest
            current.append(number)
        return found | self._pass(stream, key, current)

    def _pass(self, stream: Any, key: int, wanted: list[int]) -> dict[int, np.ndarray]:
        """Decode from a key frame to the last of the wanted frames."""
        found: dict[int, np.ndarray] = {}
        self._container.seek(0 if key == 0 else self._starts[key], stream=stream, backward=True)
        for place, frame in enumerate(self._container.decode(stream)):
            if self._keys is None:
                number = place
            elif frame.pts is not None:
                number = bisect.bisect_left(self._starts, frame.pts)
            else:
                continue
            if number in wanted and number not in found:
                # As decord scales colour planes.
                picture = frame.reformat(format="rgb24", interpolation="BICUBIC")
                found[number] = picture.to_ndarray()
            if number >= wanted[-1]:
                break
        return found

    def _open_stream(self) -> Any:
        if self._container is None:
            raise ValueError(
                f"video reader: expected an open reader, got a closed one of {self._path}; "
                "open the file again"
            )
        return self._container.streams.video[0]


def _index(path: str, container: Any) -> tuple[list[int], list[int] | None]:
    """Time stamps of all frames in the order of display, and the numbers of the key frames."""
    if not container.streams.video:
        raise VideoReadError(path, "no video in it")
    stream = container.streams.video[0]
    stream.thread_count = 1
    stamps: list[tuple[int | None, bool]] = []
    try:
        for packet in container.demux(stream):
            # The end is an empty packet. One to be thrown away shows nothing (edit lists of MP4).
            if packet.size > 0 and not packet.is_discard:
                stamps.append((packet.pts, packet.is_keyframe))
    except Exception as error:  # FFmpeg's errors have many classes
        raise VideoReadError(path, f"cannot be read: {one_line(error)}") from error
    if not stamps:
        raise VideoReadError(path, "no frames in it")
    # Time stamps of AVI are not those of its frames where these are stored out of order.
    if container.format.name == "avi" or any(stamp is None for stamp, _ in stamps):
        return list(range(len(stamps))), None
    stamps.sort()
    keys = [number for number, (_, is_key) in enumerate(stamps) if is_key]
    return [stamp for stamp, _ in stamps], keys if keys and keys[0] == 0 else [0, *keys]
