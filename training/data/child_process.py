"""The process that decodes for `child.Child`; it must not import torch.

Its arguments are the reader class as ``module:Class``, the seconds that one request may take, and
the descriptor of the memory for pixels (`shared_pixels`). Requests come as JSON lines on standard
input, answers go to standard output as JSON lines; as many pixels as one announces (``bytes``) are
in the memory until the next request. The process ends when its input does.

Requests: ``try`` decodes three frames of a file, or all of them if a limit is given; ``open`` opens
one and answers its length; ``frames`` decodes frames of the open one; ``close`` closes it, without
an answer.
"""

import importlib
import json
import os
import signal
import sys
from contextlib import closing
from typing import Any, BinaryIO

import numpy as np

from .reader import VideoReadError
from .shared_pixels import SharedPixels

# Starting up: importing a decoder from a slow disk.
_START_S = 60.0


def main() -> None:
    """Answer requests until there are no more."""
    reader_name, timeout_s, descriptor = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
    memory = SharedPixels(descriptor)
    # Decoders print; what they print must not get between the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    # The system itself ends a process whose time is up, even one that spins inside a decoder with
    # the interpreter's lock held, and even if the program that started it is gone.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    signal.setitimer(signal.ITIMER_REAL, _START_S)
    module, _, name = reader_name.partition(":")
    decoder = _Decoder(getattr(importlib.import_module(module), name))
    _answer(answers, {"ready": True})
    for line in sys.stdin.buffer:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, timeout_s)
        if request["do"] == "close":
            decoder.close()
            signal.setitimer(signal.ITIMER_REAL, 0)
            continue
        answer, pixels = decoder.serve(request)
        signal.setitimer(signal.ITIMER_REAL, 0)
        if pixels is not None:
            memory.put(pixels)
            # Not kept until the next request: they are megabytes.
            del pixels
        _answer(answers, answer)


class _Decoder:
    """Serves requests with a reader class; keeps one video open between them."""

    def __init__(self, reader: Any) -> None:
        self._reader = reader
        self._video: Any = None

    def serve(self, request: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray | None]:
        """Answer, and the pixels that belong to it."""
        try:
            if request["do"] == "try":
                return self._try(request["path"], request["max_bytes"])
            if request["do"] == "open":
                self.close()
                self._video = self._reader.open(request["path"])
                return {"num_frames": len(self._video), "fps": float(self._video.fps)}, None
            pixels = np.ascontiguousarray(_frames(self._video, request["indices"]))
            return {"shape": list(pixels.shape), "bytes": pixels.nbytes}, pixels
        except VideoReadError as error:
            return {"error": error.reason}, None
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}, None

    def close(self) -> None:
        """Close the open video, if there is one."""
        if self._video is not None:
            self._video.close()
            self._video = None

    def _try(self, path: str, max_bytes: int | None) -> tuple[dict[str, Any], np.ndarray | None]:
        with closing(self._reader.open(path)) as video:
            length = len(video)
            if max_bytes is None:
                # From first to last in one call: where a wrong length in the container shows.
                _frames(video, sorted({0, length // 2, length - 1}))
                return {"num_frames": length, "fps": float(video.fps)}, None
            first = _frames(video, [0])
            needed = length * first.nbytes
            answer = {"num_frames": length, "fps": float(video.fps)}
            answer |= {"shape": list(first.shape[1:]), "needed": needed}
            if needed > max_bytes:
                return answer, None
            pixels = np.ascontiguousarray(_frames(video, range(length)))
            return answer | {"bytes": pixels.nbytes}, pixels


def _frames(video: Any, indices: Any) -> np.ndarray:
    """Frames as an array, without torch where the reader can."""
    return np.asarray(getattr(video, "frames_array", video.frames)(indices))


def _answer(answers: BinaryIO, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer).encode() + b"\n")
    answers.flush()


if __name__ == "__main__":
    main()
