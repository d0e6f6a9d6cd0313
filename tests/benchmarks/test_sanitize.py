"""The sanitizer's words are read correctly, and its program launches every kernel there is."""

import ast
import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import results, sanitize, sanitize_driver
from benchmarks.sanitize import Ended, verdict

CLEAN = """========= COMPUTE-SANITIZER
ran softmax-bfloat16-rows
KERNELS attend=3
DONE
========= ERROR SUMMARY: 0 errors
"""
RACES = CLEAN.replace(
    "ERROR SUMMARY: 0 errors", "RACECHECK SUMMARY: 3 hazards displayed (2 errors, 1 warning)"
)
NO_RACES = CLEAN.replace(
    "ERROR SUMMARY: 0 errors", "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
)
OUT_OF_BOUNDS = CLEAN.replace(
    "DONE\n========= ERROR SUMMARY: 0",
    "DONE\n========= Invalid __global__ write of size 2 bytes\n========= ERROR SUMMARY: 7",
)
REFUSED = """========= COMPUTE-SANITIZER
========= Error: Device not supported. Please refer to the release notes.
torch.AcceleratorError: CUDA error: unknown error
========= ERROR SUMMARY: 1 error
"""
CRASHED = "ran softmax-bfloat16-rows\nTraceback\nArithmeticError: not finite\n"


@pytest.mark.parametrize(
    ("code", "output", "status", "word"),
    [
        (0, CLEAN, "clean", ""),
        (0, NO_RACES, "clean", ""),
        (0, RACES, "findings", "2 errors"),
        (0, OUT_OF_BOUNDS, "findings", "Invalid __global__ write"),
        (1, REFUSED, "unavailable", "Device not supported"),
        (1, CRASHED, "failed", "ArithmeticError"),
        (1, CRASHED + "========= ERROR SUMMARY: 0 errors\n", "failed", "ArithmeticError"),
        (None, "ran softmax-bfloat16-rows\n", "failed", "killed after 12 s"),
        (1, "", "unavailable", "no output"),
    ],
    ids=["clean", "no race", "race", "bounds", "refused", "crash", "raised", "late", "mute"],
)
def test_verdict(code: int | None, output: str, status: str, word: str) -> None:
    found, reason = verdict(Ended(code, output, 12.0))
    assert (found, word in reason) == (status, True)


def test_late_processes_are_killed_and_their_words_kept() -> None:
    command = [sys.executable, "-S", "-u", "-c", "import time; print('here'); time.sleep(60)"]
    quick = [sys.executable, "-S", "-c", "print('done')"]
    ended = sanitize.run_together({"late": command, "quick": quick}, 1.5, {})
    assert ended["late"].code is None
    assert ended["late"].output == "here\n"
    assert ended["quick"][:2] == (0, "done\n")


def launched(source: str) -> set[str]:
    """Names of the kernels that a module hands to `_launch.launch`."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return {
        call.args[0].id
        for call in calls
        if ast.unparse(call.func) == "_launch.launch" and isinstance(call.args[0], ast.Name)
    }


@pytest.mark.gate
def test_every_kernel_is_launched() -> None:
    pytest.importorskip("triton")
    # float16 alone has units.
    parts = (*(p for p in sanitize_driver.PARTS if "float32" in p), "dot_product-float16-rows")
    recorder = sanitize_driver.run(parts, torch.device("cpu"))
    folder = results.ROOT / "nlkernels" / "ops"
    kernels = set().union(*(launched(path.read_text()) for path in folder.rglob("*.py")))
    assert len(kernels) > 4
    assert kernels <= set(recorder.launches)


@pytest.mark.parametrize("present", [False, True])
def test_missing_or_refused_tools_are_recorded(
    present: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\nprintf '%s' '{REFUSED}'\nexit 1\n")
    tool.chmod(0o755)
    monkeypatch.setattr(sanitize, "_sanitizer", lambda: str(tool) if present else None)
    rows = sanitize._watched(["true"], sanitize_driver.PARTS, "cuda", 20.0)
    assert [row["tool"] for row in rows] == ["memcheck", "racecheck", "initcheck"]
    assert {row["status"] for row in rows} == {"unavailable"}
    said = "Device not supported" if present else "not installed"
    assert all(said in row["reason"] for row in rows)
    assert json.dumps(rows)
