"""Measures the low-level operations against other implementations of the same mathematics.

Two entries: `python -m benchmarks.bench_ops` writes a result file with interleaved, judged
measurements; `pytest benchmarks/bench_ops.py` gives a quick look at small shapes through
pytest-benchmark.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import features, gate, region, results
from benchmarks.checks import Judge
from benchmarks.measure import PASSES, make_operands, measure
from benchmarks.peak import larger, peak_gflops, state_shares
from benchmarks.providers import DEFAULT, PROVIDERS, Provider
from benchmarks.registry import CASES, DTYPES, GROUPS, KINDS, Case, select_cases
from benchmarks.timing import copy_gb_s, gemm_tflops, keep_freed_memory, synchronised_clock

OPERATIONS = {"region": region.OPERATION, "gate": gate.OPERATION}
ALL_CASES = (*CASES, *region.CASES, *gate.CASES)
ALL_PROVIDERS = dict.fromkeys([*PROVIDERS, *region.FUNCTIONS, *gate.FUNCTIONS])

BUSY_CORES = 0.1
"""Average foreign load above which a measurement is called disturbed."""


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line of `python -m benchmarks.bench_ops`."""

    def words(text: str) -> list[str]:
        return [word for word in text.split(",") if word]

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
        names = _provider_names(options.providers)
        _check_choice("dtype", options.dtype, DTYPES)
        _check_choice("pass", options.passes, PASSES)
        device = _device(options.device, options.dtype)
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
        "command": shlex.join(["python", "-m", "benchmarks.bench_ops", *given]),
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
                rows = rows_of(case, names, dtype_name, passes, device, options, ceilings)
                if rows:
                    file.add(rows)
                    _print(rows)
    # GEMM's rate has been divided by already, the others are stated again.
    again = measured_ceilings(device, [], isas)
    ceilings = larger(ceilings, again)
    file.report["settings"] |= ceilings
    state_shares(file.report["rows"], ceilings)
    file.close()
    print(f"written: {out}")
    return exit_code("bench_ops", file.report["rows"])


def exit_code(program: str, rows: list[dict[str, Any]]) -> int:
    """1 if a provider was refused or failed; says which, and whether the machine was busy."""
    busy = max((row.get("foreign_cores") or 0.0 for row in rows), default=0.0)
    if busy > BUSY_CORES:
        print(f"{program}: other processes took {busy:.2f} cores; repeat this", file=sys.stderr)
    bad = [row for row in rows if row["status"] in ("refused", "failed")]
    for row in bad:
        print(f"{row['status']}: {row['reason']}", file=sys.stderr)
    return 1 if bad else 0


def rows_of(
    case: Any,
    names: list[str],
    dtype_name: str,
    passes: str,
    device: torch.device,
    options: argparse.Namespace,
    ceilings: dict[str, Any],
) -> list[dict[str, Any]]:
    """Rows of one problem, of those providers that its operation has."""
    common = {"rounds": options.rounds, "seed": options.seed}
    if case.kind in OPERATIONS:
        operation = OPERATIONS[case.kind]
        own = [name for name in operation.functions if name in names]
        return features.measure(
            operation, case, dtype_name, passes, device, names=own, ceilings=ceilings, **common
        )
    providers = [PROVIDERS[name] for name in names if name in PROVIDERS]
    gemm = ceilings["gemm_tflops"][dtype_name]
    rows = measure(case, providers, dtype_name, passes, device, gemm=gemm, **common)
    state_shares(rows, ceilings)
    return rows


def measured_ceilings(
    device: torch.device, dtypes: list[str], isas: list[str]
) -> dict[str, dict[str, Any] | float]:
    """What this machine gives at best: matrix products, multiply-adds in registers, a copy."""
    return {
        "gemm_tflops": {name: gemm_tflops(device, getattr(torch, name)) for name in dtypes},
        "peak_gflops": peak_gflops(isas) if device.type == "cpu" else {},
        "copy_gb_s": copy_gb_s(device),
    }


def _provider_names(given: list[str]) -> list[str]:
    default = [name for name in ALL_PROVIDERS if name in DEFAULT or name not in PROVIDERS]
    names = [name for word in given for name in (default if word == "default" else [word])]
    _check_choice("providers", names, tuple(ALL_PROVIDERS))
    return list(dict.fromkeys(names))


def _has_isa(name: str) -> bool:
    return name in PROVIDERS and bool(PROVIDERS[name].isa)


def _check_choice(what: str, given: list[str], allowed: tuple[str, ...]) -> None:
    unknown = sorted(set(given) - set(allowed))
    if unknown or not given:
        raise ValueError(f"{what}: expected some of {', '.join(allowed)}, got {', '.join(unknown)}")


def _device(name: str, dtypes: list[str]) -> torch.device:
    if name not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu or cuda, got {name}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected one that exists, got cuda, but torch sees no GPU")
    if name == "cpu" and "float16" in dtypes:
        raise ValueError(
            "dtype: expected float32 or bfloat16 on a CPU, got float16; PyTorch's own float16 "
            "products there are too slow to compare with"
        )
    return torch.device(name)


def _print(rows: list[dict[str, Any]]) -> None:
    first = rows[0]
    shape = " ".join(f"{letter}={size}" for letter, size in first["shape"].items())
    print(f"\n{first['case']}  {first['kind']}  {first['dtype']}  {first['pass']}  {shape}")
    for row in rows:
        label = row["provider"] + (f" ({row['backend']})" if row["backend"] else "")
        if row["status"] != "ok":
            print(f"  {label:20} {row['status']}: {row['reason'][:90]}", flush=True)
            continue
        times = row["time_ms"]
        over = "  ".join(
            f"{ratio:.2f}x {name}"
            for name, ratio in row["speedup_over"].items()
            if ratio is not None
        )
        share = row["share_of_peak"]
        of_peak = "" if share is None else f"{share:6.1%} of peak  "
        print(
            f"  {label:20} {times['p50']:9.2f} ms ({times['p20']:.2f} .. {times['p80']:.2f})"
            f"  {row['peak_mib']:8.1f} MiB  {of_peak}{over}",
            flush=True,
        )


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
