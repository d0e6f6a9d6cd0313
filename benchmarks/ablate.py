"""The stage `ablate`: which plan of the Hopper kernels is the fastest, of those that are right.

`python -m benchmarks.ablate --device cuda --out DIR [--backward]` runs `hopper_plans.py`, a head in
each process, until the time is over: clusters, widths of tiles and slots of the rings. That checks
every plan before it times it. Rows: DIR/ablate.jsonl. A dry run lists the plans that would be
compared.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from nlkernels._launch import architecture
from nlkernels._spec import Problem
from nlkernels.ops.softmax import cuda_hopper_backward_plan, cuda_hopper_plan

from . import hopper_plans, results
from .stage import DEADLINE, RowFile, clean, describe

BUDGET_S = 280.0
"""With `correct` and `sanitize` in calls of their own, what is left of a quarter of an hour."""

LEAST_S = 30.0
"""No head begins with less time left: its first plan would not be done."""


def command(head: str, rounds: int, backward: bool = False) -> list[str]:
    """The process that compares the plans of a head."""
    words = [sys.executable, "-m", "benchmarks.hopper_plans", head, "--rounds", str(rounds)]
    return words + ["--backward"] * backward


def rows_of(process: list[str], limit_s: float) -> Iterator[dict[str, Any]]:
    """The rows that a process prints, and one more where it was killed or broke off."""
    child = subprocess.Popen(
        process, cwd=results.ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    killed = threading.Event()

    def kill() -> None:
        # The whole group: what measures is a process of that process.
        killed.set()
        os.killpg(child.pid, signal.SIGKILL)

    late = threading.Timer(limit_s, kill)
    late.start()
    try:
        for line in child.stdout:
            try:
                yield json.loads(line)
            except ValueError:
                print(line, end="", flush=True)
        code = child.wait()
    finally:
        late.cancel()
        child.kill()
        child.wait()
    if killed.is_set():
        yield {"late": f"killed after {limit_s:.0f} s"}
    elif code not in (0, 1):
        yield {"fault": f"ended with {code}"}


def planned(head: str, backward: bool = False) -> Iterator[dict[str, Any]]:
    """The plans of a head that a GPU would compare."""
    depth, value_depth = map(int, head.split("x"))
    reason = "a dry run has no GPU"
    problem = Problem(1, 3136, 784, depth, value_depth, torch.bfloat16, "cuda")
    plans = cuda_hopper_plan.alternatives(problem)
    if backward:
        chunk = cuda_hopper_backward_plan.Chunk(problem.batch, problem.queries)
        plans = cuda_hopper_backward_plan.alternatives(problem, chunk)
    for plan in plans:
        yield {"head": [depth, value_depth], "plan": str(plan), "unserved": reason}


def main(arguments: list[str] | None = None) -> int:
    """Returns 0 if every plan was right, 1 if not, DEADLINE if a head was left out for time."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablate")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=BUDGET_S)
    parser.add_argument("--commit", default=None, help="commit to record where git cannot tell")
    parser.add_argument("--heads", nargs="+", default=hopper_plans.HEADS, metavar="HEAD")
    parser.add_argument("--backward", action="store_true", help="the plans of the backward")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(arguments)
    deadline = time.time() + options.budget
    clean(options.out, "ablate")
    device = torch.device(options.device)
    file = RowFile(options.out / "ablate.jsonl", "ablate", device, options.commit)
    if device.type == "cuda" and architecture(device) != 90:
        print(f"ablate: expected a Hopper GPU (sm_90), got sm_{architecture(device)}")
        file.add(event="end", missing=list(options.heads), faults=0)
        return 2
    missing, faults = [], 0
    for head in options.heads:
        left = deadline - time.time()
        if left < LEAST_S:
            missing.append(head)
            continue
        if device.type == "cuda":
            rows = rows_of(command(head, options.rounds, options.backward), left)
        else:
            rows = planned(head, options.backward)
        for row in rows:
            row = {"head": list(map(int, head.split("x"))), **row}
            faults += "fault" in row
            missing += [head] * ("late" in row)
            file.add(event="plan", **row)
            print(line_of(row), flush=True)
    file.add(event="end", missing=missing, faults=faults)
    print(f"ablate: {faults} faults; left out for want of time: {', '.join(missing) or 'nothing'}")
    if faults:
        return 1
    return DEADLINE if missing else 0


def line_of(row: dict[str, Any]) -> str:
    """A row for the log."""
    said = {name: row[name] for name in ("head", "sizes", "dtype", "plan", "pass") if name in row}
    said |= {"ms": row["time_ms"]["p50"], "TFLOP/s": row["tflops"]} if "time_ms" in row else {}
    said |= {name: row[name] for name in ("fault", "late", "unserved") if name in row}
    return describe(said)


if __name__ == "__main__":
    raise SystemExit(main())
