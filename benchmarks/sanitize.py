"""The stage `sanitize`: compute-sanitizer's tools over every kernel on small problems.

`python -m benchmarks.sanitize --device cuda --out DIR` first runs the driver natively, its parts
side by side: that compiles the kernels into Triton's cache, and a kernel that crashes without a
sanitizer is a finding too. Then memcheck, racecheck and initcheck watch it, one process each. A
machine whose sanitizer is missing or refused is recorded as "unavailable" with the tool's words.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import results
from .sanitize_driver import CUDA_PARTS, PARTS, parts_of
from .stage import RowFile, clean

BUDGET_S = 470.0
TOOLS = ("memcheck", "racecheck", "initcheck")
NATIVE_SHARE = 0.6
"""Of the budget, for the native runs and their compilation."""

_SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)")
_REFUSED = re.compile(
    r"not supported|Unable to|Failed to initialize|Could not|cannot (?:open|attach)"
    r"|permission|LibraryNotLoaded|Internal error",
    re.IGNORECASE,
)
_WORDS = 1500


class Ended(NamedTuple):
    """A finished process: exit code (None: killed for time), output, seconds."""

    code: int | None
    output: str
    seconds: float


def run_together(
    commands: dict[str, list[str]], limit_s: float, environment: dict[str, str]
) -> dict[str, Ended]:
    """Runs processes side by side; each is killed after limit_s."""
    begun = time.time()
    children = {
        name: subprocess.Popen(
            command,
            cwd=results.ROOT,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name, command in commands.items()
    }
    ended = {}
    for name, child in children.items():
        try:
            output, _ = child.communicate(timeout=max(0.1, begun + limit_s - time.time()))
            ended[name] = Ended(child.returncode, output, time.time() - begun)
        except subprocess.TimeoutExpired:
            child.kill()
            output, _ = child.communicate()
            ended[name] = Ended(None, output, time.time() - begun)
    return ended


def verdict(end: Ended) -> tuple[str, str]:
    """Status and reason of a tool's run: "clean", "findings", "unavailable" or "failed"."""
    lines = end.output.strip().splitlines()
    said = [line for line in lines if line.startswith("=========")]
    words = "\n".join(said or lines[-12:])[:_WORDS]
    if end.code is None:
        return "failed", f"killed after {end.seconds:.0f} s; it said: {words}"
    summary = _SUMMARY.search(end.output)
    done = "DONE" in lines
    # Before anything of ours ran: the machine does not let the tool work.
    if not done and "ran " not in end.output and _REFUSED.search(words):
        return "unavailable", words
    if summary is None:
        return ("unavailable" if not done and not lines else "failed"), words or "no output"
    if int(summary[1]) > 0:
        return "findings", words
    if not done or end.code != 0:
        return "failed", "\n".join(lines[-15:])[:_WORDS]
    return "clean", ""


def main(arguments: list[str] | None = None) -> int:
    """Returns 0 if nothing was found, 1 otherwise; a tool that is unavailable is no finding."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sanitize")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=BUDGET_S)
    parser.add_argument("--commit", default=None, help="commit to record where git cannot tell")
    parser.add_argument(
        "--part", choices=(*PARTS, *CUDA_PARTS), action="append", help="only these parts"
    )
    options = parser.parse_args(arguments)
    clean(options.out, "sanitize")
    begun = time.time()
    device = torch.device(options.device)
    file = RowFile(options.out / "sanitize.jsonl", "sanitize", device, options.commit)
    parts = tuple(options.part or parts_of(options.device))
    driver = [sys.executable, "-m", "benchmarks.sanitize_driver", "--device", options.device]

    bad = 0
    for row in _native(driver, parts, options.device, options.budget * NATIVE_SHARE):
        bad += row["status"] != "clean"
        file.add(event="native", **row)
        print(f"native {row['part']}: {row['status']} {row['reason']}", flush=True)
    limit = begun + options.budget - time.time()
    for row in _watched(driver, parts, options.device, limit):
        bad += row["status"] in ("findings", "failed")
        file.add(event="tool", **row)
        print(f"{row['tool']}: {row['status']} {row['reason']}", flush=True)
    file.add(event="end", bad=bad)
    return int(bad > 0)


def _native(
    driver: list[str], parts: tuple[str, ...], device: str, limit_s: float
) -> list[dict[str, Any]]:
    # Side by side where there are cores; the interpreter of a dry run would only get in its way.
    runs = {part: (part,) for part in parts} if device == "cuda" else {"all": parts}
    commands = {
        name: driver + [word for part in run for word in ("--part", part)]
        for name, run in runs.items()
    }
    rows = []
    for name, end in run_together(commands, limit_s, {}).items():
        good = end.code == 0
        said = "" if good else end.output.strip()[-_WORDS:] or "killed for time"
        kernels = re.search(r"^KERNELS (.*)$", end.output, re.MULTILINE)
        rows.append(
            {
                "part": name,
                "status": "clean" if good else "failed",
                "reason": said,
                "kernels": kernels[1].split() if kernels else [],
                "seconds": round(end.seconds, 1),
            }
        )
    return rows


def _watched(
    driver: list[str], parts: tuple[str, ...], device: str, limit_s: float
) -> list[dict[str, Any]]:
    path = _sanitizer()
    if device == "cpu" or path is None:
        reason = "a dry run has no GPU" if device == "cpu" else "compute-sanitizer is not installed"
        rows = [{"tool": tool, "status": "unavailable", "reason": reason} for tool in TOOLS]
        return rows
    words = [word for part in parts for word in ("--part", part)]
    # PyTorch asks for things that a machine may not have, and goes on without them: no finding.
    options = {"memcheck": ["--report-api-errors", "no"]}
    commands = {
        tool: [path, "--tool", tool, *options.get(tool, []), "--print-limit", "20", *driver, *words]
        for tool in TOOLS
    }
    # One allocation for each tensor: in a shared block, reading past a tensor is no error.
    ends = run_together(commands, limit_s, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    rows = []
    for tool, end in ends.items():
        status, reason = verdict(end)
        rows.append(
            {"tool": tool, "status": status, "reason": reason, "seconds": round(end.seconds, 1)}
        )
    return rows


def _sanitizer() -> str | None:
    usual = "/usr/local/cuda/bin/compute-sanitizer"
    return shutil.which("compute-sanitizer") or (usual if os.path.exists(usual) else None)


if __name__ == "__main__":
    raise SystemExit(main())
