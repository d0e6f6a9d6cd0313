"""Find out which videos can be decoded, in child processes that can be given up.

A decoder may hang in native code, where no exception and no Python time-out reaches it, so files
are tried in other processes. Each of these decodes one file after another, ends itself when a file
takes too long, and is then replaced. Plain subprocesses: scripts need no main guard, and nothing is
forked from a process that may hold a decoder.
"""

import contextlib
import importlib.util
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import nlkernels

_READER = "nlkernels.training.data.reader:DecordReader"
_MIB = 2**20


@dataclass(frozen=True)
class ScannedVideo:
    """What the scan found out about a file.

    Attributes:
        path: The file.
        num_frames: Its length; 0 if it cannot be used.
        reason: Why it cannot be used, one line; empty if it can.
        pixels: The frames to keep (k, H, W, 3), uint8, if frames were to be kept.
    """

    path: str
    num_frames: int = 0
    reason: str = ""
    pixels: np.ndarray | None = None


def scan_videos(
    paths: Sequence[str | os.PathLike[str]],
    *,
    timeout_s: float = 30.0,
    keep: Callable[[int], range] | None = None,
    limit_mib: float = 1024.0,
    processes: int | None = None,
    reader: str = _READER,
) -> list[ScannedVideo]:
    """Try every file.

    Three frames of it are decoded (first, middle, last), or all of them if frames are to be kept.

    Args:
        paths: Video files.
        timeout_s: Longest time for one file, in seconds; what hangs is given up and reported.
        keep: Which frames to keep, given the length of a video; unset keeps none.
        limit_mib: Most memory for the frames to keep, and for any one video, in MiB.
        processes: Child processes; unset is one per usable CPU, at most 8.
        reader: The reader class, ``module:Class``, importable by a fresh Python.

    Returns:
        One result per path, in order.

    Raises:
        ValueError: The frames to keep need more than ``limit_mib``, or no time is allowed.
        ImportError: The reader cannot be loaded.
    """
    if reader == _READER and importlib.util.find_spec("decord") is None:
        raise ImportError(
            "scan: expected the package decord, got none; "
            "install it with: pip install 'nlkernels[video]'"
        )
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
    children: set[_Child] = set()
    selector = selectors.DefaultSelector()

    def hire() -> None:
        child = _Child(reader, timeout_s)
        children.add(child)
        selector.register(child.answers, selectors.EVENT_READ, child)

    def dismiss(child: _Child) -> None:
        selector.unregister(child.answers)
        children.remove(child)
        child.stop()

    try:
        for _ in range(min(processes, len(files))):
            hire()
        while len(results) < len(files):
            for key, _ in selector.select():
                child = key.data
                answer, pixels = child.receive()
                number = child.file
                if number is not None:
                    if keep is not None and answer.get("needed", 0) > max_bytes:
                        raise _too_large(files[number], answer["needed"], limit_mib)
                    results[number] = _result(files[number], answer, pixels, keep)
                    kept_bytes += 0 if pixels is None else results[number].pixels.nbytes
                    if max_bytes is not None and kept_bytes > max_bytes:
                        raise _too_large(f"the first {len(results)} videos", kept_bytes, limit_mib)
                if child.has_ended or not waiting:
                    dismiss(child)
                    if waiting:
                        hire()
                else:
                    child.send(waiting.popleft(), files, max_bytes)
    finally:
        for child in children:
            child.stop()
        selector.close()
    return [results[number] for number in range(len(files))]


class _Child:
    """One decoding process and the file that it works on."""

    def __init__(self, reader: str, timeout_s: float) -> None:
        self.file: int | None = None
        self.has_ended = False
        self._reader, self._timeout_s = reader, timeout_s
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 closed by `stop`
        root = str(Path(nlkernels.__file__).resolve().parent.parent)
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        # -P: a stray module of the current folder must not be imported in place of a real one.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", f"{__package__}.scan_child", reader, str(timeout_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, "PYTHONPATH": path},
        )
        self.answers = self._process.stdout

    def send(self, number: int, files: list[str], max_bytes: int | None) -> None:
        self.file = number
        request = {"path": files[number], "max_bytes": max_bytes}
        # A broken pipe is left to `receive`, which finds the end of the process.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()

    def receive(self) -> tuple[dict[str, Any], bytearray | None]:
        """Wait for the answer to the last request; the end of the process is one, too."""
        line = self.answers.readline()
        if line.endswith(b"\n"):
            answer = json.loads(line)
            if not answer.get("bytes"):
                return answer, None
            pixels = bytearray(answer["bytes"])
            if self.answers.readinto(pixels) == len(pixels):
                return answer, pixels
        self.has_ended = True
        code = self._process.wait()
        if self.file is None:
            raise ImportError(
                f"scan: expected {self._reader} to load in a new process, got "
                f"{self._last_words()}; check that this Python can import it"
            )
        if code == -signal.SIGALRM:
            return {"error": f"no answer within {self._timeout_s:g} s, given up"}, None
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return {"error": f"the decoding process ended ({how})"}, None

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            with contextlib.suppress(BrokenPipeError):
                stream.close()

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"its end with code {self._process.returncode}"


def _result(
    path: str,
    answer: dict[str, Any],
    pixels: bytearray | None,
    keep: Callable[[int], range] | None,
) -> ScannedVideo:
    if "error" in answer:
        return ScannedVideo(path, reason=answer["error"])
    length = answer["num_frames"]
    if keep is None:
        return ScannedVideo(path, length)
    kept = keep(length)
    frames = np.frombuffer(pixels, np.uint8).reshape(length, *answer["shape"])
    # A part is copied, so that the rest can be forgotten.
    part = frames if len(kept) == length else frames[kept.start : kept.stop].copy()
    return ScannedVideo(path, length, pixels=part)


def _too_large(what: str, needed: int, limit_mib: float) -> ValueError:
    return ValueError(
        f"scan: expected decoded videos of at most {limit_mib:g} MiB to keep in memory, got "
        f"{needed / _MIB:.1f} MiB for {what}; read them from disk (preload off) or raise the limit"
    )
