"""A pytest plugin for machines that may vanish: one JSON line per test, as it finishes.

Loaded with `-p benchmarks.pytest_rows`. `--rows FILE` names the file, to which lines are appended;
tests that it names already, or that an earlier process was lost in, are not run again.
`--rows-device NAME` keeps only tests whose `device` parameter is that device, so that a run on a
GPU is a run of the GPU's tests. A run without a single passed test fails.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from .measure import DeviceLost, check_device
from .stage import AGAIN, RowFile, Watch, lost_items, read_rows

MESSAGE_CHARACTERS = 2000
TEST_S = 90.0
"""Longest time of one test, the compilation of its kernels included."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("rows")
    group.addoption("--rows", type=Path, help="file that gets one JSON line per finished test")
    group.addoption("--rows-device", default="cuda", help="run only tests of this device")
    group.addoption("--rows-commit", help="commit to record where git cannot tell")
    group.addoption("--rows-every", type=int, default=1, help="run only every so manieth test")
    group.addoption("--rows-state", type=Path, help="folder of what is under way and was lost")
    group.addoption(
        "--rows-share", default="0/1", help="run only this share of the tests, 0/4 to 3/4"
    )
    group.addoption(
        "--rows-tf32",
        action="store_true",
        help="run only the tests of float32, with torch's switch for TF32 products on",
    )
    group.addoption(
        "--rows-hardware-free",
        default="",
        help="modules, separated by commas, whose tests without a device are run too",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--rows") is None:
        raise pytest.UsageError("benchmarks.pytest_rows needs --rows FILE")
    config.pluginmanager.register(Rows(config), "nlkernels-rows")


class Rows:
    """Selects the tests of one device and writes what becomes of them."""

    def __init__(self, config: pytest.Config) -> None:
        path = config.getoption("--rows")
        self.device = config.getoption("--rows-device")
        self.every = config.getoption("--rows-every")
        self.tf32 = config.getoption("--rows-tf32")
        self.hardware_free = config.getoption("--rows-hardware-free").split(",")
        self.lost_device = False
        torch_device = torch.device(self.device if torch.cuda.is_available() else "cpu")
        self._torch_device = torch_device
        self._file = RowFile(path, "correct", torch_device, config.getoption("--rows-commit"))
        state = config.getoption("--rows-state") or path.parent
        self._lost = lost_items(state)
        self._watch = Watch(state)
        self.share, self.shares = map(int, config.getoption("--rows-share").split("/"))
        rows = [row for row in read_rows(path) if row["event"] == "test"]
        self._done = {row["test"] for row in rows}
        self.counts = Counter(row["outcome"] for row in rows if row["tf32"] == self.tf32)

    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        mine = [item for item in items if self._wanted(item)]
        sampled = mine[:: self.every][self.share :: self.shares]
        kept = [item for item in sampled if self._name(item.nodeid) not in self._done]
        for item in kept:
            name = self._name(item.nodeid)
            if name in self._lost:
                self._finish(name, "lost", 0.0, self._lost[name])
        kept = [item for item in kept if self._name(item.nodeid) not in self._lost]
        chosen = set(kept)
        others = len(items) - len(mine)
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = kept
        self._file.add(
            event="collected",
            tests=len(kept),
            of_others=others,
            not_sampled=len(mine) - len(sampled),
            tf32=self.tf32,
        )

    def _wanted(self, item: pytest.Item) -> bool:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if self.tf32 and not any(value is torch.float32 for value in parameters.values()):
            return False
        if "device" not in parameters:
            return not self.tf32 and Path(item.path).stem in self.hardware_free
        return str(parameters["device"]).partition(":")[0] == self.device

    def _name(self, nodeid: str) -> str:
        return f"{nodeid} with tf32" if self.tf32 else nodeid

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._finish(report.nodeid, "collection error", 0.0, report.longreprtext)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item):
        self._watch.begin(self._name(item.nodeid), TEST_S)
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if self.tf32 else before)
        try:
            return (yield)
        finally:
            torch.set_float32_matmul_precision(before)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.failed or report.skipped:
            outcome = "error" if report.failed and report.when != "call" else report.outcome
            name = self._name(report.nodeid)
            self._finish(name, outcome, report.duration, report.longreprtext)

    def _finish(self, test: str, outcome: str, seconds: float, message: str) -> None:
        self.counts[outcome] += 1
        row = {"event": "test", "test": test, "outcome": outcome, "time_s": round(seconds, 4)}
        if outcome != "passed":
            row["message"] = message[-MESSAGE_CHARACTERS:]
        self._file.add(**row, tf32=self.tf32)

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        if not (self.counts["failed"] or self.counts["error"]) or self._torch_device.type == "cpu":
            return
        try:
            check_device(self._torch_device)
        except DeviceLost as error:
            # Every test behind it would fail for this one's sake: another process takes over.
            print(f"{nodeid} broke the GPU's context: {error}", file=sys.stderr, flush=True)
            self.lost_device = True
            raise pytest.exit.Exception("the GPU's context is broken", AGAIN) from error

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if self.lost_device:
            return
        bad = sum(
            self.counts[outcome] for outcome in ("failed", "error", "collection error", "lost")
        )
        if exitstatus == pytest.ExitCode.OK and bad:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        elif exitstatus == pytest.ExitCode.OK and not self.counts["passed"]:
            session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED
        self._file.add(event="end", exit=int(session.exitstatus), tf32=self.tf32, **self.counts)
