"""A pytest plugin for machines that may vanish: one JSON line per test, as it finishes.

Loaded with `-p benchmarks.pytest_rows`. `--rows FILE` names the file; `--rows-device NAME` keeps
only tests whose `device` parameter is that device, so that a run on a GPU is a run of the GPU's
tests. A run without a single passed test fails.
"""

from __future__ import annotations

import json
import platform
from collections import Counter
from pathlib import Path
from typing import TextIO

import numpy as np
import pytest
import torch

MESSAGE_CHARACTERS = 2000


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("rows")
    group.addoption("--rows", type=Path, help="file that gets one JSON line per finished test")
    group.addoption("--rows-device", default="cuda", help="run only tests of this device")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--rows")
    if path is None:
        raise pytest.UsageError("benchmarks.pytest_rows needs --rows FILE")
    path.parent.mkdir(parents=True, exist_ok=True)
    config.pluginmanager.register(Rows(path, config.getoption("--rows-device")), "nlkernels-rows")


class Rows:
    """Selects the tests of one device and writes what becomes of them."""

    def __init__(self, path: Path, device: str) -> None:
        self.device = device
        self.counts: Counter[str] = Counter()
        self._file: TextIO = path.open("w")
        self._write({"event": "start", **_machine(device)})

    def _write(self, row: dict[str, object]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        kept, dropped = [], []
        for item in items:
            parameters = item.callspec.params if hasattr(item, "callspec") else {}
            device = str(parameters.get("device", "")).partition(":")[0]
            (kept if device == self.device else dropped).append(item)
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept
        self._write({"event": "collected", "tests": len(kept), "of_other_devices": len(dropped)})

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._finish(report.nodeid, "collection error", 0.0, report.longreprtext)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.failed or report.skipped:
            outcome = "error" if report.failed and report.when != "call" else report.outcome
            self._finish(report.nodeid, outcome, report.duration, report.longreprtext)

    def _finish(self, test: str, outcome: str, seconds: float, message: str) -> None:
        self.counts[outcome] += 1
        row = {"event": "test", "test": test, "outcome": outcome, "time_s": round(seconds, 4)}
        if outcome != "passed":
            row["message"] = message[-MESSAGE_CHARACTERS:]
        self._write(row)

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if exitstatus == pytest.ExitCode.OK and not self.counts["passed"]:
            session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED
        self._write({"event": "end", "exit": int(session.exitstatus), **self.counts})
        self._file.close()


def _machine(device: str) -> dict[str, object]:
    gpu = device == "cuda" and torch.cuda.is_available()
    return {
        "device": device,
        "device_name": torch.cuda.get_device_name() if gpu else platform.machine(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())) if gpu else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
