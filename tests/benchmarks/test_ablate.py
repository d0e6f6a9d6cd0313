"""The stage `ablate`: rows of the plans survive a process that breaks off, hangs or runs late."""

import sys
from pathlib import Path

import pytest

from benchmarks import ablate
from benchmarks.stage import DEADLINE, read_rows

ROW = '{"head": [256, 256], "plan": "p", "time_ms": {"p50": 1.0}, "tflops": 5.0}'
FAULT = '{"head": [256, 256], "plan": "q", "fault": "results differ between runs"}'


def run(monkeypatch, tmp_path: Path, script: str, *options: str) -> tuple[int, list[dict]]:
    """The stage, as on a Hopper GPU whose processes run a script."""
    monkeypatch.setattr(ablate, "architecture", lambda device: 90)
    monkeypatch.setattr(ablate, "command", lambda *_: [sys.executable, "-Sc", script])
    monkeypatch.setattr(ablate, "RowFile", lambda *given: _File(tmp_path / "rows"))
    code = ablate.main(["--out", str(tmp_path), "--heads", "256x256", "512x512", *options])
    return code, read_rows(tmp_path / "rows")


class _File(ablate.RowFile):
    """Without the description of a GPU that is not there."""

    def __init__(self, path: Path) -> None:
        self.begun, self._file = 0, path.open("a")


@pytest.mark.parametrize(
    ("script", "code", "found"),
    [
        (f"print('noise'); print('{ROW}')", 0, [{"plan", "tflops"}]),
        (f"print('{ROW}'); print('{FAULT}'); exit(1)", 1, [{"plan", "tflops"}, {"plan", "fault"}]),
        (f"print('{ROW}', flush=True); import os; os.abort()", 1, [{"plan", "tflops"}, {"fault"}]),
    ],
    ids=["right", "wrong plan", "crash"],
)
def test_rows_of_every_head(monkeypatch, tmp_path: Path, script, code, found) -> None:
    ended, rows = run(monkeypatch, tmp_path, script)
    assert ended == code
    plans = [row for row in rows if row["event"] == "plan"]
    assert [{"plan", "tflops", "fault"} & set(row) for row in plans] == found * 2
    assert {tuple(row["head"]) for row in plans} >= {(256, 256)}
    assert rows[-1]["missing"] == [] and rows[-1]["faults"] == (2 if code else 0)


def test_a_head_that_hangs_and_those_without_time_are_missing(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ablate, "LEAST_S", 0.5)
    script = f"print('{ROW}', flush=True); import time; time.sleep(60)"
    code, rows = run(monkeypatch, tmp_path, script, "--budget", "1")
    assert code == DEADLINE and rows[-1]["missing"] == ["256x256", "512x512"]
    assert rows[0]["tflops"] == 5.0 and "killed after 1 s" in rows[1]["late"]


def test_other_gpus_have_no_such_kernels(monkeypatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setattr(ablate, "RowFile", lambda *given: _File(tmp_path / "rows"))
    monkeypatch.setattr(ablate, "architecture", lambda device: 80)
    assert ablate.main(["--out", str(tmp_path)]) == 2
    assert "expected a Hopper GPU (sm_90), got sm_80" in capsys.readouterr().out


def test_each_head_is_a_command_of_hopper_plans() -> None:
    words = " ".join(ablate.command("512x256", 3)[1:])
    assert words == "-m benchmarks.hopper_plans 512x256 --rounds 3"
    assert ablate.command("512x256", 3, backward=True)[-1] == "--backward"
    for head in ablate.hopper_plans.HEADS:
        for backward in (False, True):
            plans = [row["plan"] for row in ablate.planned(head, backward)]
            assert len(plans) == len(set(plans)) > 1
