"""The course of a training, read from its log: every step and test, before and after breaks."""

import json
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

COLUMNS = (
    *("step", "loss", "accuracy", "lr", "data_ms", "forward_ms", "backward_ms", "optimiser_ms"),
    *("clips_per_s", "peak_mib"),
)
PARTS = ("data_ms", "forward_ms", "backward_ms", "optimiser_ms")


@dataclass(frozen=True)
class History:
    """A training from its first step in the log to its last."""

    columns: dict[str, np.ndarray]
    """Name of ``COLUMNS`` -> values (steps,), float64."""
    tests: list[dict[str, float]]
    """``step``, ``accuracy`` and ``loss`` of every test, in order."""
    breaks: list[int]
    """Steps behind which the training was interrupted and resumed."""

    def __len__(self) -> int:
        return len(self.columns["step"])

    def step_ms(self) -> np.ndarray:
        """Time of every step, (steps,)."""
        return sum(self.columns[part] for part in PARTS)


def read_history(path: str | Path) -> History:
    """Read a ``.jsonl`` log; a last line that a killed run has left unfinished is none.

    Args:
        path: Written by ``log.RunLog``.
    """
    columns = {name: array("d") for name in COLUMNS}
    tests: list[dict[str, float]] = []
    breaks: list[int] = []
    with Path(path).open(encoding="utf-8") as lines:
        for line in lines:
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if event["event"] == "step":
                for name, values in columns.items():
                    values.append(event[name])
            elif event["event"] == "test":
                tests.append({name: event[name] for name in ("step", "accuracy", "loss")})
            elif event["event"] == "start" and event["start"] > 0:
                breaks.append(event["start"])
    return History({name: np.array(v) for name, v in columns.items()}, tests, breaks)


def section(history: History) -> Mapping[str, Any]:
    """What ``report.json`` says about the course of a training; times are medians."""
    columns = history.columns
    medians = {part: round(float(np.median(columns[part])), 3) for part in PARTS}
    total_ms = float(history.step_ms().sum())
    shares = {part: round(float(columns[part].sum()) / total_ms, 4) for part in PARTS}
    return {
        "tests": history.tests,
        "breaks": [{"step": step} for step in history.breaks],
        "step_ms": round(float(np.median(history.step_ms())), 3),
        **medians,
        "share": shares,
        "clips_per_s": round(float(np.median(columns["clips_per_s"])), 3),
        "peak_mib": round(float(columns["peak_mib"].max()), 1),
    }
