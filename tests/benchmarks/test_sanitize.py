"""The sanitizer's words are read correctly, and its program launches every kernel there is."""

import ast
import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import results, sanitize, sanitize_driver
from benchmarks.sanitize import Ended, verdict
from nlkernels._spec import Problem
from nlkernels.ops.softmax import cuda_hopper_plan

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


def test_every_form_of_the_hopper_kernels_is_watched() -> None:
    forms = set()
    for batch, n, m, d, v, _ in sanitize_driver.HOPPER:
        problem = Problem(batch, n, m, d, v, torch.float16, "cuda")
        assert not cuda_hopper_plan.unserved(problem)
        assert n % 8 == m % 8 == 0, "else tensor copies read rows only"
        plans = [cuda_hopper_plan.plan(problem, channels) for channels in (False, True)]
        forms |= {(plan.split, plan.streamed, plan.channel_first) for plan in plans}
        assert m > plans[0].tile_keys and m % plans[0].tile_keys
    halves = ((False, False), (True, False), (True, True))
    assert forms == {(*half, channels) for half in halves for channels in (False, True)}


def test_problems_for_hopper_are_those_of_softmax_in_cuda(monkeypatch) -> None:
    ran = []

    def attend(query, key, value, *, backend, **options):
        ran.append((backend, query.shape[2]))
        return query[..., :1] * 0 + value.sum(1, keepdim=True) + key.sum()

    monkeypatch.setattr(sanitize_driver.nlkernels, "nonlocal_attention", attend)
    cases = (("softmax", "cuda"), ("softmax", "triton"), ("relu", "cuda"))
    for kind, backend in cases:
        given = torch.float32, "rows", torch.device("cpu"), backend
        list(sanitize_driver.run_attention(*given, kind=kind))
    assert [depth for backend, depth in ran if backend == "cuda" and depth > 264] == [512, 1024]
    assert all(depth <= 264 for backend, depth in ran if backend == "triton")


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
