"""The run's logs: every event as a JSON line in a file, now and then one readable line.

Whoever asks for them gets the same numbers in TensorBoard and Weights & Biases (``log_extras.py``).
"""

import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from .engine import StepRecord
from .log_extras import Extra

# Longest time between two readable lines, in seconds.
_SILENCE_S = 30.0

_TIMES = ("data_ms", "forward_ms", "backward_ms", "optimiser_ms")


class RunLog:
    """Log of one training.

    Every step becomes a JSON line with the fields of ``StepRecord`` and ``"event": "step"``; other
    events are written by ``event``. The readable line is rewritten in place on a terminal and
    printed anew elsewhere.

    Args:
        path: The JSONL file. An old one is replaced; of a resumed training, what lies behind the
            step that it continues from is.
        steps: Length of the training, for the remaining time.
        name: Starts every readable line.
        every: Steps between two readable lines; long steps are shown after half a minute.
        start: Steps that were already taken.
        stream: Where readable lines go; standard output if unset.
        extras: Other places that get the numbers.
    """

    def __init__(
        self,
        path: Path,
        *,
        steps: int,
        name: str,
        every: int,
        start: int = 0,
        stream: TextIO | None = None,
        extras: Sequence[Extra] = (),
    ) -> None:
        kept = _lines_until(path, start) if start > 0 else []
        self._file = path.open("w", encoding="utf-8")
        self._file.writelines(kept)
        self._stream = sys.stdout if stream is None else stream
        self._steps, self._start, self._name, self._every = steps, start, name, every
        self._extras = extras
        self._begun = self._shown = time.perf_counter()
        self._window: list[StepRecord] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            self.event("stopped", reason=str(error))
            if self._stream.isatty():
                print(file=self._stream)
        self._file.close()
        for extra in self._extras:
            extra.close()

    def step(self, record: StepRecord) -> None:
        """Log a training step."""
        self.event("step", **dataclasses.asdict(record))
        self._window.append(record)
        due = record.step % self._every == 0 or record.step == self._steps
        if due or time.perf_counter() - self._shown > _SILENCE_S:
            self._progress(record)
            self._window.clear()
            self._shown = time.perf_counter()

    def event(self, event: str, **values: Any) -> None:
        """Log anything else; ``values`` must be plain and finite.

        Numbers of an event with a ``step`` go to the extras as well.
        """
        line = json.dumps({"event": event, **values}, allow_nan=False)
        self._file.write(line + "\n")
        # A killed run leaves complete lines.
        self._file.flush()
        if "step" in values:
            numbers = {
                f"{event}/{key}": value
                for key, value in values.items()
                if key != "step" and isinstance(value, int | float)
            }
            for extra in self._extras:
                extra.write(values["step"], numbers)

    def say(self, line: str) -> None:
        """Print a line of its own."""
        start = "\r\x1b[K" if self._stream.isatty() else ""
        print(f"{start}{line}", file=self._stream, flush=True)

    def _progress(self, record: StepRecord) -> None:
        count = len(self._window)
        loss = sum(one.loss for one in self._window) / count
        accuracy = sum(one.accuracy for one in self._window) / count
        rate = (record.step - self._start) / (time.perf_counter() - self._begun)
        remaining_s = (self._steps - record.step) / rate
        width = len(str(self._steps))
        line = (
            f"{self._name:<12} step {record.step:>{width}}/{self._steps}  {duration(remaining_s)} "
            f"left  loss {loss:.4f}  accuracy {accuracy:6.1%}  lr {record.lr:.3g}  {_rate(rate)}  "
            f"{self._split()}  {record.peak_mib:.0f} MiB"
        )
        last = record.step == self._steps
        if self._stream.isatty():
            # Carriage return, then "erase to the end of the line"; a wrapped one cannot be erased.
            width = shutil.get_terminal_size().columns - 1
            print(
                f"\r{line[:width]}\x1b[K", end="\n" if last else "", file=self._stream, flush=True
            )
        else:
            print(line, file=self._stream, flush=True)

    def _split(self) -> str:
        """Clips per second, and where the time of the last steps went."""
        times = {name: sum(getattr(one, name) for one in self._window) for name in _TIMES}
        whole_ms = sum(times.values())
        # Clips of a step by its time, so the mean weighs each step by its time.
        clips = sum(
            one.clips_per_s * sum(getattr(one, name) for name in _TIMES) for one in self._window
        )
        shares = "/".join(f"{100 * value / whole_ms:.0f}" for value in times.values())
        return f"{clips / whole_ms:.1f} clips/s  data/fwd/bwd/opt {shares}%"


def _rate(steps_per_s: float) -> str:
    """Steps per second; of slow ones as many digits as tell something."""
    return f"{steps_per_s:5.1f} steps/s" if steps_per_s >= 1 else f"{steps_per_s:.3g} steps/s"


def _lines_until(path: Path, step: int) -> list[str]:
    """Lines of an earlier part of the same training, without those of steps that are redone."""
    if not path.is_file():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            event = json.loads(line)
        except ValueError:
            # The last line of a killed run.
            continue
        # A test behind the step itself is repeated.
        redone = event.get("step", 0) - (event["event"] == "step")
        if redone < step:
            kept.append(line)
    return kept


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
