"""Verification of a kernel in a process of its own: one that hangs or crashes takes no program.

What `_operations.ISOLATED` names is tried by a child, `python -m nlkernels._isolated`, which reads
one case a line and answers in one line each. A kernel that does not come back in time, or ends the
child, is wrong like one whose numbers are: it is refused. After that, and at the end of `kept`, the
child is ended, as its context may be broken and holds memory of the GPU.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

import torch

from nlkernels import _cuda, _launch, _operations, _trust
from nlkernels._ext import ExtensionError
from nlkernels._trust import CannotJudge

COMMAND = (sys.executable, "-m", "nlkernels._isolated")
# Imports, on a file system that is slow; then one suite, which takes a second or two on a GPU.
START_S = 180.0
LIMIT_S = 60.0
# A child whose parent was killed ends by itself, so much later.
_GRACE_S = 30.0
# For a process to end.
_PATIENCE_S = 10.0
_WORDS = 300

_lock = threading.RLock()
_child: _Child | None = None
_keeping = False


def judge(
    op: str,
    backend: str,
    head: tuple[int, ...],
    dtype: torch.dtype,
    direction: str,
    device: torch.device,
    keeps: bool = True,
) -> str:
    """As `_trust.judge`, in a child.

    Raises:
        CannotJudge: as there; or the kernels could not be compiled, or no child could start.
    """
    global _child
    if backend == "cuda" and device.type == "cuda":
        # Here, as it takes minutes, and what goes wrong says nothing about a kernel.
        try:
            _cuda.CUDA.load(str(_launch.architecture(device)))
        except ExtensionError as error:
            raise CannotJudge(_trust.one_line(error)) from error
    suite = _operations.OPERATIONS[op].suite
    case = {
        "op": op,
        "backend": backend,
        "head": list(head),
        "dtype": str(dtype).removeprefix("torch."),
        "precision": _launch.precision(torch.float32),
        "direction": direction,
        "device": str(device),
        "keeps": keeps,
        "suite": suite if isinstance(suite, str) else "",
    }
    with _lock:
        reason = None
        try:
            _child = _child or _Child()
            reason = _child.answer(case)
            return reason
        finally:
            if reason != "" or not _keeping:
                _end()


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Within the context, one child serves all cases up to the first that is refused."""
    global _keeping
    before, _keeping = _keeping, True
    try:
        yield
    finally:
        _keeping = before
        if not before:
            _end()


def _end() -> None:
    global _child
    with _lock:
        if _child is not None:
            _child.end()
        _child = None


def _environment() -> dict[str, str]:
    """The program's, and its places to import from, without what lies in this folder besides."""
    places = os.pathsep.join(place or os.getcwd() for place in sys.path)
    return {**os.environ, "PYTHONPATH": places, "PYTHONSAFEPATH": "1"}


class _Child:
    """A process that verifies; it is ready when it is made."""

    def __init__(self) -> None:
        self._words = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                COMMAND,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._words,
                text=True,
                env=_environment(),
                # Ctrl-C ends the program, which ends the child: that is no word about a kernel.
                start_new_session=True,
            )
        except OSError as error:
            self._words.close()
            raise CannotJudge(f"no process could be started ({error})") from error
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()
        if not self._next(START_S):
            reason = f"the process that verifies did not start: {self._ending()}"
            self.end()
            raise CannotJudge(reason)

    def answer(self, case: dict[str, Any]) -> str:
        """What is wrong in a case, "" when all is right.

        Raises:
            CannotJudge: as `_trust.judge`.
        """
        again = f"nlk verify --op {case['op']} --backend {case['backend']} tries it again"
        with contextlib.suppress(OSError):
            print(json.dumps(case), file=self._process.stdin, flush=True)
        line = self._next(LIMIT_S)
        if line is None:
            return f"it did not come back within {LIMIT_S:g} s; {again}"
        if not line:
            return f"it ended the process that tried it, {self._ending()}; {again}"
        found = json.loads(line)
        if not found["judged"]:
            raise CannotJudge(found["reason"])
        return found["reason"]

    def end(self) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            # The driver may hold it for as long as its kernel runs.
            self._process.wait(_PATIENCE_S)
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._words.close()

    def _ending(self) -> str:
        """How the process ended by itself, and what it said last."""
        try:
            code = self._process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            return "which goes on without an answer"
        how = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
        file = self._words.fileno()
        size = os.fstat(file).st_size
        last = os.pread(file, _WORDS, max(0, size - _WORDS)).decode(errors="replace")
        return f"{how}: {' '.join(last.split())}" if last.strip() else how

    def _read(self) -> None:
        with self._process.stdout as lines:
            for line in lines:
                self._answers.put(line)
        self._answers.put("")

    def _next(self, limit_s: float) -> str | None:
        """The next line; "" when the process has ended, None when the time has."""
        try:
            return self._answers.get(timeout=limit_s)
        except queue.Empty:
            return None


def _answer(case: dict[str, Any]) -> dict[str, Any]:
    """The child's answer to a case."""
    op = case["op"]
    if op not in _operations.OPERATIONS and case["suite"]:
        # The suite of an operation that is not of this package registers it.
        _operations.loaded(case["suite"])
    if op not in _operations.OPERATIONS:
        return {
            "judged": False,
            "reason": f"a new process does not know {op}: register it where its suite is imported, "
            "and give Operation the suite's name",
        }
    torch.backends.cuda.matmul.fp32_precision = "tf32" if case["precision"] == "tf32" else "ieee"
    head, dtype = tuple(case["head"]), getattr(torch, case["dtype"])
    rest = case["direction"], torch.device(case["device"]), case["keeps"]
    try:
        reason = _trust.judge(op, case["backend"], head, dtype, *rest)
    except CannotJudge as error:
        return {"judged": False, "reason": str(error)}
    return {"judged": True, "reason": reason}


def main() -> None:
    """The child: answers cases until its parent has no more."""
    # What kernels and libraries print goes to the other stream.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # Registers every operation.
    import nlkernels.verify  # noqa: F401

    print("ready", file=answers, flush=True)
    with _trust.held():
        for line in sys.stdin:
            # Its parent may have been killed: then nobody else ends a kernel that hangs.
            faulthandler.dump_traceback_later(LIMIT_S + _GRACE_S, exit=True)
            answer = _answer(json.loads(line))
            faulthandler.cancel_dump_traceback_later()
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
