"""The stage `bench`: the plan of gpu_plan.py, judged and timed, within a budget.

`python -m benchmarks.gpu_bench --device cuda --out DIR` supervises a child that does the work and
is replaced when it hangs or breaks the GPU's context. Rows are appended to DIR/bench.jsonl. The
end lists what time did not allow and, for every problem, how `auto` stands to the best peer.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nlkernels import _cuda, _launch

from . import features, gate, region
from .gpu_plan import Job, plan, reduced
from .gpu_summary import PEERS, floors, print_summary
from .kernel_rows import configuration_rows, kernel_rows
from .measure import PEER_SLACK, measure
from .peers import GPU_PROVIDERS, forget_compiled
from .stage import (
    DEADLINE,
    RowFile,
    Watch,
    clean,
    describe,
    interpret,
    lost_items,
    read_rows,
    run_child,
    supervise,
)
from .timing import copy_gb_s, gemm_tflops

BUDGET_S = 460.0
ROUNDS = 7
SEPARATOR = " :: "
MOST_LOSSES = 3
"""A provider that was lost in so many problems is not called again: each costs half a minute."""


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line of `python -m benchmarks.gpu_bench`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_bench")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds, the start counted")
    parser.add_argument("--jobs", default="", help="only jobs whose name contains this")
    parser.add_argument("--most", type=int, default=None, help="only so many jobs")
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--commit", default=None, help="commit to record where git cannot tell")
    parser.add_argument("--child", type=float, default=None, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def jobs_of(options: argparse.Namespace) -> list[Job]:
    """The jobs that were asked for, in order."""
    jobs = plan() if options.device == "cuda" else reduced()
    return [job for job in jobs if options.jobs in job.name][: options.most]


def main(arguments: list[str] | None = None) -> int:
    """Returns 0, or 1 if one of ours was refused, failed or lost, or nothing was measured."""
    given = sys.argv[1:] if arguments is None else arguments
    options = parse_arguments(given)
    if options.child is not None:
        return run_child(lambda: work(options))
    begun = time.time()
    clean(options.out, "bench")
    command = [sys.executable, "-m", "benchmarks.gpu_bench", *given, "--child", str(begun)]
    # The child stops by itself between two jobs; what it is in then gets a little longer.
    code = supervise(command, options.out, begun + options.budget + 15)
    if code not in (0, DEADLINE):
        print(f"gpu_bench: {shlex.join(command)} ended with {code}", file=sys.stderr)
    return max(finish(options, code == DEADLINE), int(code not in (0, DEADLINE)))


def work(options: argparse.Namespace) -> int:
    """The child: measures what no child before it measured."""
    device = torch.device(options.device)
    if device.type == "cpu":
        interpret()
    deadline = options.child + options.budget
    watch = Watch(options.out)
    watch.begin("start", 120)
    lost = lost_items(options.out)
    file = RowFile(options.out / "bench.jsonl", "bench", device, options.commit)
    before = read_rows(options.out / "bench.jsonl")
    done = {row["job"] for row in before if row["event"] == "job"}
    if device.type == "cuda":
        # Compiled here, if it has to be: no provider's first call has minutes.
        watch.begin("module of CUDA kernels", 240)
        _cuda.CUDA.prepare()
        watch.begin("start", 120)
    ceilings = next((row for row in before if row["event"] == "ceilings"), None)
    if ceilings is None:
        ceilings = measured_ceilings(device)
        file.add(event="ceilings", **ceilings)
    for job in jobs_of(options):
        if job.name in done:
            continue
        if time.time() > deadline:
            break
        own = lost_of(job, lost)
        print(f"[{time.time() - options.child:4.0f} s] {job.name}", flush=True)
        begun = time.time()
        for row in run(job, device, options, ceilings, watch, own):
            file.add(event="row", section=job.kind, job=job.name, **row)
            print(f"    {line_of(row)}", flush=True)
        file.add(event="job", job=job.name, seconds=round(time.time() - begun, 2))
    return 0


def lost_of(job: Job, lost: Mapping[str, str]) -> dict[str, str]:
    """Providers that are not called in a job: lost in it, or in too many others."""
    found, counts = {}, Counter()
    for item, reason in lost.items():
        name, _, provider = item.partition(SEPARATOR)
        counts[provider] += 1
        if name == job.name:
            found[provider] = reason
    often = [name for name in job.providers if counts[name] >= MOST_LOSSES]
    return dict.fromkeys(often, f"lost in {MOST_LOSSES} problems, not called again") | found


def measured_ceilings(device: torch.device) -> dict[str, Any]:
    """What this machine gives at best: matrix products by dtype, and a copy."""
    names = ("bfloat16", "float16", "float32") if device.type == "cuda" else ("bfloat16",)
    return {
        "gemm_tflops": {name: gemm_tflops(device, getattr(torch, name)) for name in names},
        "copy_gb_s": copy_gb_s(device),
    }


def run(
    job: Job,
    device: torch.device,
    options: argparse.Namespace,
    ceilings: dict[str, Any],
    watch: Watch,
    lost: dict[str, str],
) -> list[dict[str, Any]]:
    """The rows of one job."""
    if "" in lost or len(lost) > 3:
        reason = "; ".join(lost.values())
        return [{"kind": job.kind, "case": job.case.name, "status": "failed", "reason": reason}]

    def begin(name: str) -> None:
        watch.begin(f"{job.name}{SEPARATOR}{name}", job.limit_s)

    # Truth and operands are not a provider's: what is lost here loses the job.
    watch.begin(job.name, 60)
    rounds = options.rounds or ROUNDS
    gemm = ceilings["gemm_tflops"].get(job.dtype)
    if job.kind in ("region", "gate"):
        return features.measure(
            region.OPERATION if job.kind == "region" else gate.OPERATION,
            job.case,
            job.dtype,
            job.passes,
            device,
            rounds=rounds,
            ceilings=ceilings,
            names=job.providers,
            graphs=True,
            begin=begin,
            lost=lost,
        )
    if job.kind in ("kernels", "configurations"):
        if reasons := _launch.unavailable(device.type):
            return [{"case": job.case.name, "status": "unserved", "reason": "; ".join(reasons)}]
        arguments = {"rounds": rounds, "gemm": gemm, "begin": begin}
        if job.kind == "kernels":
            if lost:
                reason = "; ".join(lost.values())
                return [{"case": job.case.name, "status": "failed", "reason": reason}]
            return kernel_rows(job.case, job.dtype, device, **arguments)
        return configuration_rows(job.case, job.dtype, device, lost=lost, **arguments)
    forget_compiled()
    return measure(
        job.case,
        [GPU_PROVIDERS[name] for name in job.providers],
        job.dtype,
        job.passes,
        device,
        rounds=rounds,
        gemm=gemm,
        graphs=True,
        begin=begin,
        lost=lost,
        peer_slack=PEER_SLACK,
    )


def line_of(row: dict[str, Any]) -> str:
    """A row for the log."""
    name = row.get("provider") or f"{row.get('pass', '')} {row.get('kernel', '')}".strip()
    if "time_ms" not in row:
        return f"{name:12} {row['status']}: {row['reason'][:110]}"
    said = {"ms": row["time_ms"]["p50"]}
    if (row.get("graph") or {}).get("time_ms"):
        said["graph_ms"] = row["graph"]["time_ms"]["p50"]
    for field, label in (
        ("nominal_tflops", "TFLOP/s"),
        ("tflops", "TFLOP/s"),
        ("share_of_gemm", "of GEMM"),
        ("share_of_copy", "of copy"),
        ("peak_mib", "MiB"),
        ("backend", "by"),
    ):
        if row.get(field) is not None:
            said[label] = row[field]
    return f"{name:12} {describe(said)}"


def finish(options: argparse.Namespace, cut: bool) -> int:
    """Writes what is missing and how every problem ended; returns the exit code."""
    path = options.out / "bench.jsonl"
    rows = read_rows(path)
    done = {row["job"] for row in rows if row["event"] == "job"}
    missing = [job.name for job in jobs_of(options) if job.name not in done]
    measured = [row for row in rows if row["event"] == "row"]
    bad = [
        row
        for row in measured
        if row.get("status") in ("refused", "failed") and row.get("provider") not in PEERS
    ]
    summary = floors(measured)
    file = RowFile(path, "bench", torch.device(options.device), options.commit)
    for floor in summary:
        file.add(event="floor", **floor)
    file.add(
        event="end",
        jobs=len(done),
        missing=missing,
        cut=cut,
        lost=lost_items(options.out),
        failed=len(bad),
    )
    print_summary(summary, measured, missing)
    for row in bad:
        name = row.get("provider", row.get("case"))
        print(f"{row['status']}: {name} in {row['job']}: {row['reason']}", file=sys.stderr)
    return 1 if bad or not any("time_ms" in row for row in measured) else 0


if __name__ == "__main__":
    raise SystemExit(main())
