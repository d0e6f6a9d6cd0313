"""Find out which videos can be decoded, in child processes that can be given up (`child`)."""

import math
import os
import selectors
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .child import Child
from .reader import choose_reader

_MIB = 2**20


@dataclass(frozen=True)
class ScannedVideo:
    """What the scan found out about a file.

    Attributes:
        path: The file.
        num_frames: Its length; 0 if it cannot be used.
        reason: Why it cannot be used, one line; empty if it can.
        pixels: The frames to keep (k, H, W, 3), uint8, if frames were to be kept.
        fps: Its frames per second.
    """

    path: str
    num_frames: int = 0
    reason: str = ""
    pixels: np.ndarray | None = None
    fps: float = 0.0


def scan_videos(
    paths: Sequence[str | os.PathLike[str]],
    *,
    timeout_s: float = 30.0,
    keep: Callable[[int], range] | None = None,
    limit_mib: float = 1024.0,
    processes: int | None = None,
    reader: str | None = None,
) -> list[ScannedVideo]:
    """Try every file.

    Three frames of it are decoded (first, middle, last), or all of them if frames are to be kept.

    Args:
        paths: Video files.
        timeout_s: Longest time for one file, in seconds; what hangs is given up and reported.
        keep: Which frames to keep, given the length of a video; unset keeps none.
        limit_mib: Most memory for the frames to keep, and for any one video, in MiB.
        processes: Child processes; unset is one per usable CPU, at most 8.
        reader: The reader class, ``module:Class``, importable by a fresh Python; unset takes
            decord, or PyAV where decord is missing.

    Returns:
        One result per path, in order.

    Raises:
        ValueError: The frames to keep need more than ``limit_mib``, or no time is allowed.
        ImportError: The reader cannot be loaded.
    """
    if reader is None:
        reader = choose_reader()
    if not timeout_s > 0:
        raise ValueError(
            f"scan: expected a time-out above 0 s, got {timeout_s}; a file needs some time"
        )
    if processes is None:
        processes = min(os.cpu_count() or 1, 8)
    files = [os.fspath(path) for path in paths]
    results: dict[int, ScannedVideo] = {}
    waiting = deque(range(len(files)))
    max_bytes = None if keep is None else math.floor(limit_mib * _MIB)
    kept_bytes = 0
    at_work: dict[Child, int | None] = {}
    selector = selectors.DefaultSelector()

    def hire() -> None:
        child = Child(reader, timeout_s)
        at_work[child] = None
        selector.register(child.answers, selectors.EVENT_READ, child)

    def dismiss(child: Child) -> None:
        selector.unregister(child.answers)
        del at_work[child]
        child.stop()

    try:
        for _ in range(min(processes, len(files))):
            hire()
        while len(results) < len(files):
            for key, _ in selector.select():
                child = key.data
                answer, pixels = child.receive()
                number = at_work[child]
                if number is not None:
                    if keep is not None:
                        check_kept(files[number], answer.get("needed", 0), limit_mib)
                    results[number] = _result(files[number], answer, pixels, keep)
                    kept_bytes += 0 if pixels is None else results[number].pixels.nbytes
                    if keep is not None:
                        check_kept(f"the first {len(results)} videos", kept_bytes, limit_mib)
                if child.has_ended or not waiting:
                    dismiss(child)
                    if waiting:
                        hire()
                else:
                    at_work[child] = number = waiting.popleft()
                    child.send({"do": "try", "path": files[number], "max_bytes": max_bytes})
    finally:
        for child in at_work:
            child.stop()
        selector.close()
    return [results[number] for number in range(len(files))]


def _result(
    path: str,
    answer: dict[str, Any],
    pixels: np.ndarray | None,
    keep: Callable[[int], range] | None,
) -> ScannedVideo:
    if "error" in answer:
        return ScannedVideo(path, reason=answer["error"])
    length = answer["num_frames"]
    if keep is None:
        return ScannedVideo(path, length, fps=answer["fps"])
    kept = keep(length)
    frames = pixels.reshape(length, *answer["shape"])
    # A part is copied, so that the rest can be forgotten.
    part = frames if len(kept) == length else frames[kept.start : kept.stop].copy()
    return ScannedVideo(path, length, pixels=part, fps=answer["fps"])


def check_kept(what: str, needed: int, limit_mib: float) -> None:
    """Raise ValueError where frames to keep need more bytes than the limit of them."""
    if needed > math.floor(limit_mib * _MIB):
        raise ValueError(
            f"scan: expected decoded videos of at most {limit_mib:g} MiB to keep in memory, got "
            f"{needed / _MIB:.1f} MiB for {what}; read them from disk (preload off) or raise the "
            "limit"
        )
