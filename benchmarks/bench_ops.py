"""Measures the low-level operations against other implementations of the same mathematics.

Two entries: `python -m benchmarks.bench_ops` writes a result file with interleaved, judged
measurements; `pytest benchmarks/bench_ops.py` gives a quick look at small shapes through
pytest-benchmark.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from . import results
from .checks import Judge
from .measure import PASSES, make_operands
from .op_rows import (
    ALL_CASES,
    OPERATIONS,
    check_choice,
    device_of,
    exit_code,
    measured_ceilings,
    print_rows,
    provider_names,
    rows_of,
)
from .peak import larger, state_shares
from .providers import DEFAULT, PROVIDERS, Provider
from .registry import DTYPES, GROUPS, KINDS, Case, select_cases
from .text import words
from .timing import keep_freed_memory, synchronised_clock


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line of `python -m benchmarks.bench_ops`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_ops", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--cases",
        type=words,
        default=["quick"],
        help=f"groups ({', '.join(GROUPS)}), names or patterns",
    )
    parser.add_argument(
        "--kinds", type=words, default=list(KINDS), help=f"also {', '.join(OPERATIONS)}"
    )
    parser.add_argument(
        "--providers",
        type=words,
        default=["default"],
        help='names; "default" stands for all but cpp_avx2',
    )
    parser.add_argument("--dtype", type=words, default=["float32", "bfloat16"])
    parser.add_argument("--pass", dest="passes", type=words, default=list(PASSES))
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=None, help="replaces the batch of every case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--threads", type=int, default=None, help="CPU threads; torch's default if absent"
    )
    parser.add_argument(
        "--out", type=Path, default=None, help="default: results/<device>/<date>.json"
    )
    parser.add_argument("--commit", default=None, help="commit to record where git cannot tell")
    parser.add_argument(
        "--tests", type=words, default=[], help="test paths that must pass first, e.g. tests/ops"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Returns 0, or 1 if a provider was refused or failed, or 2 if nothing could be run."""
    given = sys.argv[1:] if arguments is None else arguments
    options = parse_arguments(given)
    try:
        cases = select_cases(options.cases, options.kinds, options.batch, ALL_CASES)
        names = provider_names(options.providers)
        check_choice("dtype", options.dtype, DTYPES)
        check_choice("pass", options.passes, PASSES)
        device = device_of(options.device, options.dtype)
    except ValueError as error:
        print(f"bench_ops: {error}", file=sys.stderr)
        return 2
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    keeps_freed_memory = keep_freed_memory()
    tests = results.run_tests(options.tests)
    if tests["outcome"] == "failed":
        print(
            f"bench_ops: the tests fail, nothing is measured: {tests['summary']}", file=sys.stderr
        )
        return 2

    isas = ["", *dict.fromkeys(PROVIDERS[name].isa for name in names if _has_isa(name))]
    ceilings = measured_ceilings(device, options.dtype, isas)
    environment = results.environment(device, options.commit)
    out = results.default_path(environment["slug"]) if options.out is None else options.out
    header = {
        "command": results.command_line("benchmarks.bench_ops", given),
        "environment": environment,
        "tests": tests,
        "settings": {
            "rounds": options.rounds,
            "seed": options.seed,
            "keeps_freed_memory": keeps_freed_memory,
            **ceilings,
        },
    }
    file = results.ResultFile(out, header)
    for case in cases:
        for dtype_name in options.dtype:
            for passes in options.passes:
                rows = rows_of(
                    case,
                    names,
                    dtype_name,
                    passes,
                    device,
                    ceilings,
                    rounds=options.rounds,
                    seed=options.seed,
                )
                if rows:
                    file.add(rows)
                    print_rows(rows)
    # GEMM's rate has been divided by already, the others are stated again.
    again = measured_ceilings(device, [], isas)
    ceilings = larger(ceilings, again)
    file.report["settings"] |= ceilings
    state_shares(file.report["rows"], ceilings)
    file.close()
    print(f"written: {out}")
    return exit_code("bench_ops", file.report["rows"])


def _has_isa(name: str) -> bool:
    return name in PROVIDERS and bool(PROVIDERS[name].isa)


def _served() -> list[Any]:
    cpu = torch.device("cpu")
    return [
        pytest.param(case, provider, passes, id=f"{case.kind}-{passes}-{provider.name}")
        for case in select_cases(["quick"], batch=2)
        for provider in map(PROVIDERS.get, DEFAULT)
        for passes in PASSES
        if not provider.reason(case, torch.float32, cpu)
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrises when the tests are collected, not when this module is imported."""
    metafunc.parametrize(("case", "provider", "passes"), _served())


@pytest.mark.benchmark(timer=synchronised_clock, min_rounds=5, max_time=0.3, warmup=True)
def test_op(benchmark: Any, case: Case, provider: Provider, passes: str) -> None:
    """One provider on a small shape; the result of the timed call is judged."""
    operands = make_operands(case, torch.float32, torch.device("cpu"), seed=0)
    benchmark.group = f"{case.name} {case.kind} {passes}"
    outputs = benchmark(provider.step(case, operands, passes))
    Judge(case, operands, passes).check(provider.name, outputs)


if __name__ == "__main__":
    raise SystemExit(main())
