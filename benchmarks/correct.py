"""The stage `correct`: the tests of operations and modules on a GPU.

`python -m benchmarks.correct --device cuda --out DIR` runs `nlk verify` and the tests, these twice:
with torch's float32 products at their highest precision, then those of float32 once more with its
switch for TF32 on. A test that hangs or breaks the GPU's context is lost, and the others go on in
a new process. Rows: DIR/correct.jsonl, the new kernels' tests first.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from nlkernels._operations import VERIFIED

from . import results
from .sanitize import Ended, run_together
from .sanitize_driver import OPERATIONS
from .stage import DEADLINE, RowFile, clean, read_rows, supervise_all

BUDGET_S = 470.0
FOLDERS = ("tests/ops", "tests/modules", "tests")
KERNEL_TESTS = ("test_cuda*.py", "test_triton*.py", "test_region*.py", "test_verify.py")
OTHER_TESTS = (
    "test_launch.py",
    "test_tune.py",
    "test_block*.py",
    "test_segments.py",
    "test_concat*.py",
    "test_gate*.py",
    "test_attention.py",
    "test_contract.py",
    "test_shared_operands.py",
    "test_dispatch.py",
    "test_fuzz.py",
)
HARDWARE_FREE = ("test_launch", "test_tune", "test_verify")
"""Modules whose tests take no device: what they say of a machine they say on any."""

SHARES = 8
"""Processes on a GPU: most of a test's time there is the compilation of its kernels."""

EVERY = 25
"""A dry run takes every so manieth test."""


def files() -> list[str]:
    """The test files, the kernels' own first."""
    found = []
    for pattern in (*KERNEL_TESTS, *OTHER_TESTS):
        for folder in FOLDERS:
            found += sorted((results.ROOT / folder).glob(pattern))
    return list(dict.fromkeys(str(path.relative_to(results.ROOT)) for path in found))


def verify_commands(device: str) -> dict[str, list[str]]:
    """`nlk verify`, a backend, an operation and a dtype in each process, which compile kernels side
    by side; of those that want the module of CUDA, one compiles it and the others wait."""
    command = [sys.executable, "-m", "nlkernels.cli", "verify", "--device", device, "--json"]
    if device == "cpu":
        # The interpreter takes a quarter of a minute for one verdict on the kernels.
        only = ["--backend", "chunked", "--op", "softmax", "--depth", "16"]
        return {"softmax": [*command, *only]}
    return {
        f"{op} {dtype} {backend}": [*command, "--backend", backend, "--op", op, "--dtype", dtype]
        for backend in VERIFIED
        for op in OPERATIONS
        if (results.ROOT / "nlkernels" / "ops" / op / f"{backend}.py").is_file()
        for dtype in ("bfloat16", "float16", "float32")
    }


def verdicts(name: str, end: Ended) -> list[dict[str, Any]]:
    """What one process of `nlk verify` found."""
    if end.code is None:
        said = f"no answer within {end.seconds:.0f} s"
        return [{"op": name, "verdict": "not finished", "detail": said}]
    try:
        # Warnings, of a kernel that was switched off for example, stand around the report.
        report = end.output[end.output.index("{\n") : end.output.rindex("\n}") + 2]
        return json.loads(report)["checks"]
    except ValueError:
        return [{"op": name, "verdict": "failed", "detail": end.output[-2000:]}]


def run_tests(command: list[str], shares: int, deadline: float) -> int:
    """Runs pytest in processes that share the tests; returns the worst of their exit codes."""
    with tempfile.TemporaryDirectory() as state:
        commands = {}
        for share in range(shares):
            folder = Path(state) / str(share)
            folder.mkdir()
            own = ["--rows-state", str(folder), "--rows-share", f"{share}/{shares}"]
            commands[folder] = [*command, *own]
        codes = supervise_all(commands, deadline)
    return worst(codes)


def worst(codes: list[int]) -> int:
    """One exit code for several; a share without tests is no failure where others had some."""
    bad = [code for code in codes if code not in (0, 5)]
    if DEADLINE in bad:
        return DEADLINE
    return bad[0] if bad else min(codes)


def main(arguments: list[str] | None = None) -> int:
    """Returns 0 if everything passed, 1 if not, 5 if nothing did, DEADLINE if time ran out."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.correct")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=BUDGET_S)
    parser.add_argument("--commit", default=None, help="commit to record where git cannot tell")
    parser.add_argument("--every", type=int, default=None, help="only every so manieth test")
    parser.add_argument("--shares", type=int, default=None, help="processes that share the tests")
    parser.add_argument("--files", nargs="+", default=None, help="test files, instead of all")
    options = parser.parse_args(arguments)
    deadline = time.time() + options.budget
    clean(options.out, "correct")
    rows = options.out / "correct.jsonl"
    every = options.every or (EVERY if options.device == "cpu" else 1)
    command = [sys.executable, "-m", "pytest", *(options.files or files())]
    command += ["-p", "benchmarks.pytest_rows", "-p", "no:cacheprovider", "-q", "--durations=5"]
    command += ["--rows", str(rows), "--rows-device", options.device, "--device", options.device]
    command += ["--rows-every", str(every), "--rows-hardware-free", ",".join(HARDWARE_FREE)]
    if options.commit is not None:
        command += ["--rows-commit", options.commit]
    file = RowFile(rows, "correct", torch.device(options.device), options.commit)
    pool = ThreadPoolExecutor(1)
    commands = verify_commands(options.device)
    verified = pool.submit(run_together, commands, options.budget - 10, {})
    shares = options.shares or (SHARES if options.device == "cuda" else 1)
    code = run_tests(command, shares, deadline)
    if code in (0, 1):
        # Whatever failed with exact products: the other setting is another question.
        second = run_tests([*command, "--rows-tf32"], shares, deadline)
        code = second if second not in (0, 5) else code
    checks = [check for name, end in verified.result().items() for check in verdicts(name, end)]
    for check in checks:
        file.add(event="verify", **check)
        if check["verdict"] != "ok":
            print(f"nlk verify: {check}", flush=True)
    if code == 0 and any(check["verdict"] == "failed" for check in checks):
        code = 1
    file.add(event="finished", code=code)
    print(f"nlk verify: {dict(Counter(check['verdict'] for check in checks))}")
    counts = Counter(row["outcome"] for row in read_rows(rows) if row["event"] == "test")
    said = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    print(f"correct: {said or 'no test ran'}")
    if code == DEADLINE:
        print("correct: time ran out before the last test", file=sys.stderr)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
