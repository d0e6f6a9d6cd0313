"""Pixels that go from one process to another through memory that both see."""

import mmap
import os
import tempfile

import numpy as np

# A whole video is decoded once: its memory is given back. What clips need is used again.
_KEPT_BYTES = 64 * 2**20


def create() -> int:
    """Descriptor of an empty file in memory, on disk where the system has none; the caller's."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("nlkernels-frames")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


class SharedPixels:
    """One array at a time in a file of `create`, seen by all processes that have its descriptor.

    Who writes and who reads take turns, by messages of their own.

    Args:
        descriptor: Stays the caller's, who closes it.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._memory: mmap.mmap | None = None

    def put(self, pixels: np.ndarray) -> None:
        """Replace the array.

        Args:
            pixels: Not empty, uint8.
        """
        if os.fstat(self._descriptor).st_size < pixels.nbytes:
            os.ftruncate(self._descriptor, pixels.nbytes)
        self._view(pixels.nbytes)[:] = pixels.reshape(-1)

    def take(self, count: int) -> np.ndarray:
        """A copy of the array that was put last, flat, uint8.

        Args:
            count: Its bytes.
        """
        pixels = self._view(count).copy()
        if count > _KEPT_BYTES:
            self._memory = None
            os.ftruncate(self._descriptor, 0)
        return pixels

    def _view(self, count: int) -> np.ndarray:
        if self._memory is None or len(self._memory) < count:
            self._memory = mmap.mmap(self._descriptor, count)
        return np.frombuffer(self._memory, np.uint8, count)
