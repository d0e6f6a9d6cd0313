"""Decoding in child processes that can be given up.

A decoder may hang in native code, where no exception and no Python time-out reaches it, or take the
process with it, so files are decoded in other processes. A child ends itself when a request takes
too long, and is then replaced. Plain subprocesses: scripts need no main guard, and nothing is
forked from a process that may hold a decoder.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

import nlkernels

from . import shared_pixels
from .reader import VideoReadError

# torch is imported where a tensor is made, as in `reader`.
if TYPE_CHECKING:
    from torch import Tensor


# Frames are megabytes, which glibc gives back to the system after every clip and then gets anew,
# page by page: a fifth of the decoding time.
_ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(64 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(256 * 2**20),
}


class Child:
    """One decoding process.

    Args:
        reader: The reader class, ``module:Class``, importable by a fresh Python.
        timeout_s: Longest time for one request, in seconds.

    Attributes:
        answers: Its output, to wait for.
        has_ended: No request can be sent any more.
        reader: What reads the video that it has open.
    """

    def __init__(self, reader: str, timeout_s: float) -> None:
        self.has_ended = False
        self.reader: ChildReader | None = None
        self._reader, self._timeout_s = reader, timeout_s
        self._is_ready = False
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 closed by `stop`
        self._file = shared_pixels.create()
        self._pixels = shared_pixels.SharedPixels(self._file)
        root = str(Path(nlkernels.__file__).resolve().parent.parent)
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        # -P: a stray module of the current folder must not be imported in place of a real one.
        program = f"{__package__}.child_process"
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", program, reader, str(timeout_s), str(self._file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            pass_fds=(self._file,),
            # Ctrl-C and torchrun signal whole groups: the clips of the last step are still decoded.
            process_group=0,
            env={**_ALLOCATOR, **os.environ, "PYTHONPATH": path},
        )
        self.answers = self._process.stdout

    def send(self, request: dict[str, Any]) -> None:
        """Send a request; its answer is waited for by `receive`. ``close`` is not answered."""
        # A broken pipe is left to `receive`, which finds the end of the process.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()

    def receive(self) -> tuple[dict[str, Any], np.ndarray | None]:
        """Wait for an answer: first that the child is ready, then to each request in turn.

        Returns:
            The answer, with ``error`` if the file cannot be decoded or the process has ended, and
            the pixels that belong to it, flat, uint8.

        Raises:
            ImportError: The reader cannot be loaded.
        """
        try:
            line = self.answers.readline()
        except BaseException:
            # Ctrl-C: what comes yet must not be taken for the answer to the next request.
            self.has_ended = True
            raise
        if line.endswith(b"\n"):
            answer = json.loads(line)
            self._is_ready = True
            size = answer.get("bytes")
            return answer, self._pixels.take(size) if size else None
        self.has_ended = True
        code = self._process.wait()
        if not self._is_ready:
            raise ImportError(
                f"scan: expected {self._reader} to load in a new process, got "
                f"{self._last_words()}; check that this Python can import it"
            )
        if code == -signal.SIGALRM:
            return {"error": f"no answer within {self._timeout_s:g} s, given up"}, None
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return {"error": f"the decoding process ended ({how})"}, None

    def stop(self) -> None:
        """End the process."""
        self.has_ended = True
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            with contextlib.suppress(BrokenPipeError):
                stream.close()
        os.close(self._file)

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"its end with code {self._process.returncode}"


class ChildReader:
    """A video that a child process of this process decodes; make one with `ChildReader.open`.

    One child serves all videos of a process, one after the other; opening the next video closes the
    one before. It is started when first needed, and anew after it was lost. Close a reader when its
    frames are there: until then its decoder may decode ahead, for nobody.

    Args:
        path: The video file.
        child: A child that has opened it.
        num_frames: Its length.
        fps: Its frame rate.
    """

    # By process, reader and time: a forked process must not talk to its parent's child.
    _children: dict[tuple[int, str, float], Child] = {}  # noqa: RUF012 shared on purpose

    def __init__(self, path: str, child: Child, num_frames: int, fps: float) -> None:
        self._path, self._child = path, child
        self._length, self._fps = num_frames, fps

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, reader: str, timeout_s: float = 30.0) -> Self:
        """Open a video file in the child.

        Args:
            path: The video file.
            reader: The reader class, ``module:Class``.
            timeout_s: Longest time for opening and for each decoding, in seconds.

        Raises:
            ImportError: The reader cannot be loaded.
            VideoReadError: The file cannot be opened, or the child hung or crashed.
        """
        path = os.fspath(path)
        key = os.getpid(), reader, timeout_s
        child = cls._children.get(key)
        if child is None or child.has_ended:
            if child is not None:
                child.stop()
            child = cls._children[key] = Child(reader, timeout_s)
            child.receive()
        child.send({"do": "open", "path": path})
        answer, _ = child.receive()
        if "error" in answer:
            raise VideoReadError(path, answer["error"])
        child.reader = cls(path, child, answer["num_frames"], answer["fps"])
        return child.reader

    @classmethod
    def stop_children(cls) -> None:
        """End this process's children; the next video starts a new one."""
        for key in [key for key in cls._children if key[0] == os.getpid()]:
            cls._children.pop(key).stop()

    def __len__(self) -> int:
        return self._length

    @property
    def fps(self) -> float:
        """Mean frame rate, in frames per second."""
        return self._fps

    def frames(self, indices: Sequence[int]) -> "Tensor":
        """Decode frames.

        Args:
            indices: Frame numbers, any order, repeats allowed.

        Returns:
            Frames (len(indices), H, W, 3), uint8, RGB, contiguous.

        Raises:
            VideoReadError: A frame cannot be decoded, or the child hung or crashed.
        """
        import torch

        return torch.from_numpy(self.frames_array(indices))

    def frames_array(self, indices: Sequence[int]) -> np.ndarray:
        """`frames` as a NumPy array, without importing torch."""
        # Every frame once, whatever the reader does with repeats: they go through a pipe.
        wanted, place = np.unique(np.asarray(indices, dtype=np.int64), return_inverse=True)
        self._child.send({"do": "frames", "indices": wanted.tolist()})
        answer, pixels = self._child.receive()
        if "error" in answer:
            raise VideoReadError(self._path, answer["error"])
        decoded = pixels.reshape(answer["shape"])
        if len(wanted) == len(indices) and (place[1:] > place[:-1]).all():
            return decoded
        return decoded[place]

    def close(self) -> None:
        """Let the child close the file, if it is still the one that it has open."""
        if self._child.reader is self:
            self._child.reader = None
            if not self._child.has_ended:
                self._child.send({"do": "close"})
