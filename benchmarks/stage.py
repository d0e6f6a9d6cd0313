"""What the stages of on_gpu.sh share: rows that survive, a budget, and a supervisor.

Kernels that no GPU has run may hang, or break the GPU's context for the whole process. So each
stage works in a child process that names what it is about to do; the supervisor ends a child that
does not come back in time, notes what was lost, and starts another one that goes on behind it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

import torch

from nlkernels import _launch

from . import results
from .measure import DeviceLost

AGAIN = 75
"""Exit code of a child that has to be replaced: its GPU context is broken."""

BROKEN = 70
"""Exit code of a child that raised what it did not expect."""

DEADLINE = 124
"""Exit code when the budget ended before the work."""

FINISHED = (0, 1, 2, 5)
"""Exit codes of a child that came to its own end; 5 is pytest's for no tests."""

MOST_LOST = 12


class RowFile:
    """A file of JSON lines, each on disk before the next measurement starts.

    The first line says what was run and where. Every line holds `at_s`, seconds since then.

    Args:
        path: The file; lines are appended to one that exists.
        stage: Name of the stage, for a new file.
        device: Where it runs.
        commit: Commit to record where git cannot tell.
    """

    def __init__(
        self, path: Path, stage: str, device: torch.device, commit: str | None = None
    ) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        old = read_rows(path)
        self.begun = old[0]["begun"] if old else int(time.time())
        self._file = path.open("a")
        if not old:
            self.add(
                event="start",
                stage=stage,
                begun=self.begun,
                command=f"benchmarks/on_gpu.sh {stage} --device {device.type}",
                environment=results.environment(device, commit),
            )

    def add(self, **row: Any) -> None:
        """Writes one line."""
        row["at_s"] = round(time.time() - self.begun, 2)
        self._file.write(json.dumps(results.rounded(row), default=str) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a row file; a last one that was cut off is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


class Watch:
    """Tells the supervisor what is under way, and until when it may take.

    Args:
        folder: Of the stage's files; None tells nobody.
    """

    def __init__(self, folder: Path | None) -> None:
        self._path = None if folder is None else folder / "under_way.json"

    def begin(self, item: str, limit_s: float) -> None:
        """From here to the next call, the child works on `item`."""
        if self._path is not None:
            partial = self._path.with_suffix(".partial")
            partial.write_text(json.dumps({"item": item, "until": time.time() + limit_s}))
            os.replace(partial, self._path)

    def current(self) -> dict[str, Any] | None:
        """What the child named last."""
        try:
            return json.loads(self._path.read_text())
        except (OSError, ValueError):
            return None

    def clear(self) -> None:
        """Forget the last item."""
        self._path.unlink(missing_ok=True)


def lost_items(folder: Path) -> dict[str, str]:
    """What killed a child of this stage before, with the reason."""
    return {row["item"]: row["reason"] for row in read_rows(folder / "lost.jsonl")}


def clean(folder: Path, name: str) -> None:
    """Makes the folder of a stage, without what an earlier run left in it."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in (f"{name}.jsonl", "under_way.json", "lost.jsonl"):
        (folder / file).unlink(missing_ok=True)


def supervise(command: list[str], folder: Path, deadline: float) -> int:
    """Runs a command until it comes to its own end.

    Args:
        command: Resumes by itself: it skips what its row file and `lost_items` name.
        folder: Where the child's `Watch` and `lost.jsonl` are.
        deadline: By `time.time()`; what still runs is killed.

    Returns:
        The command's exit code, or DEADLINE.
    """
    return supervise_all({folder: command}, deadline)[0]


def supervise_all(commands: Mapping[Path, list[str]], deadline: float) -> list[int]:
    """`supervise` for several commands side by side, each with a folder of its own."""
    # Whoever ends the supervisor ends its children: they would go on alone, with the GPU.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    runs = {
        folder: _until_finished(command, folder, deadline) for folder, command in commands.items()
    }
    codes: dict[Path, int] = {}
    try:
        while len(codes) < len(runs):
            for folder, run in runs.items():
                if folder not in codes:
                    try:
                        next(run)
                    except StopIteration as end:
                        codes[folder] = end.value
            time.sleep(0.05)
    finally:
        for folder, run in runs.items():
            run.close()
            Watch(folder).clear()
        signal.signal(signal.SIGTERM, before)
    return [codes[folder] for folder in runs]


def _until_finished(
    command: list[str], folder: Path, deadline: float
) -> Generator[None, None, int]:
    """Yields while a child works; returns the last one's exit code."""
    watch = Watch(folder)
    for _ in range(MOST_LOST + 1):
        watch.clear()
        child = subprocess.Popen(command, start_new_session=True, cwd=results.ROOT)
        reason = yield from _wait(child, watch, deadline)
        code = child.returncode
        if reason == "" and code in FINISHED:
            return code
        if time.time() >= deadline:
            return DEADLINE
        current = watch.current()
        if current is None:
            return code
        if not reason:
            end = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            reason = "broke the GPU's context" if code == AGAIN else f"ended the process: {end}"
        with (folder / "lost.jsonl").open("a") as file:
            file.write(json.dumps({"item": current["item"], "reason": reason}) + "\n")
        print(f"lost: {current['item']}: {reason}; going on behind it", flush=True)
    print(f"gave up after {MOST_LOST} losses", flush=True)
    return 1


def _wait(
    child: subprocess.Popen[bytes], watch: Watch, deadline: float
) -> Generator[None, None, str]:
    """Yields until the end; returns why the child was killed, "" if it was not."""
    try:
        while child.poll() is None:
            yield
            now = time.time()
            current = watch.current()
            late = current is not None and now > current["until"]
            if late or now > deadline:
                return "did not come back in time" if late else "the stage's time is over"
        return ""
    finally:
        if child.poll() is None:
            _kill(child)


def _kill(child: subprocess.Popen[bytes]) -> None:
    # The whole group: compilers run in processes of their own.
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def run_child(work: Callable[[], int]) -> int:
    """Runs a child's work; what breaks it becomes an exit code that asks for another child."""
    try:
        return work()
    except Exception as error:
        if not isinstance(error, DeviceLost):
            traceback.print_exc()
            return BROKEN
        print(f"the GPU's context is broken: {error}", file=sys.stderr, flush=True)
        # Without the clean-up that would wait for the GPU.
        sys.stdout.flush()
        os._exit(AGAIN)


def describe(value: Mapping[str, Any]) -> str:
    """Numbers of a row for a line of the log."""
    parts = []
    for name, item in value.items():
        parts.append(f"{name} {item:.4g}" if isinstance(item, float) else f"{name} {item}")
    return "  ".join(parts)


def interpret() -> None:
    """Run Triton's kernels in its interpreter from here on, as the tests do without a GPU."""
    os.environ["TRITON_INTERPRET"] = "1"
    if not _launch.installed():
        return
    from triton.runtime.interpreter import InterpreterBuilder

    from tests import interpreter

    if InterpreterBuilder.create_dot.__module__ != interpreter.__name__:
        interpreter.mend()
