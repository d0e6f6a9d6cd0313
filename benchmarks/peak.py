"""What the machine gives at best, and each row's share of it.

The peak is that of multiply-adds in registers (csrc/cpu/peak.cpp), by instruction set and dtype, on
torch's number of threads; the copy rate is `benchmarks.timing.copy_gb_s`. A machine slows down and
recovers while a benchmark runs: both are measured before and after, and the larger counts.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from nlkernels import _ext
from nlkernels._ext import DTYPES

SAMPLE_S = 0.05
"""Least seconds of a sample."""
SAMPLES = 5
_TASKS_PER_THREAD = 16
"""A thread that was held up leaves some of its tasks to the others."""

Peaks = dict[str, dict[str, float]]
"""Instruction set -> dtype -> GFLOP/s."""


@contextmanager
def forced_isa(isa: str) -> Iterator[None]:
    """Makes the C++ kernels use an instruction set; "" leaves the choice as it is."""
    before = os.environ.get("NLKERNELS_CPU_ISA")
    if isa:
        os.environ["NLKERNELS_CPU_ISA"] = isa
    try:
        yield
    finally:
        if before is not None:
            os.environ["NLKERNELS_CPU_ISA"] = before
        elif isa:
            del os.environ["NLKERNELS_CPU_ISA"]


def on_isa(isa: str, step: Callable[[], Any]) -> Callable[[], Any]:
    """The call, backward included, with the C++ kernels of an instruction set."""
    if not isa:
        return step

    def run() -> Any:
        with forced_isa(isa):
            return step()

    return run


def peak_gflops(isas: Iterable[str] = ("",)) -> Peaks:
    """Measured rates of multiply-adds in registers, two operations each.

    Args:
        isas: Instruction sets to measure; "" is the one that kernels use.

    Returns:
        float32 and float64, and bfloat16: twice the former where the CPU multiplies pairs of it as
        fast, and equal to it where kernels convert. Sets that cannot be had here are left out.
    """
    peaks = {}
    for isa in isas:
        with forced_isa(isa):
            if _ext.missing() or _ext.prepare():
                continue
            module, level = _ext.load(), _ext.isa()
        name = next(name for name, other in module.isas.items() if other == level)
        peaks[name] = {
            str(dtype).removeprefix("torch."): sustained(module, level, number)
            for dtype, number in DTYPES.items()
            if dtype != torch.float16
        }
    return peaks


def sustained(module: Any, level: int, dtype: int) -> float:
    """GFLOP/s of the native module's multiply-adds: the fastest of several samples."""
    threads = torch.get_num_threads()
    tasks, rounds = _TASKS_PER_THREAD * threads, 100
    while True:
        samples = []
        for _ in range(SAMPLES):
            start = time.perf_counter()
            operations = module._peak_run(level, dtype, tasks, rounds, threads)
            samples.append(time.perf_counter() - start)
        if min(samples) >= SAMPLE_S:
            return operations / min(samples) / 1e9
        # A few more than would do: the clock rises under load. At most ten times as many, as the
        # first samples are those of threads that have yet to start.
        rounds = math.ceil(rounds * min(10.0, 1.2 * SAMPLE_S / min(samples)))


def larger(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """The larger of two measurements of everything that either has."""
    both = {}
    for name in [*before, *(name for name in after if name not in before)]:
        values = [found[name] for found in (before, after) if name in found]
        nested = isinstance(values[0], Mapping)
        both[name] = larger(values[0], values[-1]) if nested else max(values)
    return both


def machine_peak(peaks: Mapping[str, Mapping[str, float]], dtype: str) -> float | None:
    """GFLOP/s of the fastest instruction set for a dtype; None where nothing was measured."""
    counted = "float32" if dtype == "float16" else dtype
    return max((rates[counted] for rates in peaks.values() if counted in rates), default=None)


def state_shares(rows: Iterable[dict[str, Any]], ceilings: Mapping[str, Any]) -> None:
    """Adds to timed rows, or states again, which shares of the ceilings they reached.

    Both shares count what a problem needs at least, whatever a provider does (`least_flop` and
    `least_bytes` of the rows), so that time / share is a bound for any implementation.

    Args:
        rows: Of any problems.
        ceilings: "peak_gflops" as `peak_gflops` returns it, and "copy_gb_s".
    """
    for row in rows:
        if "time_ms" not in row:
            continue
        seconds = row["time_ms"]["p50"] / 1e3
        peak = machine_peak(ceilings.get("peak_gflops", {}), row["dtype"])
        row["share_of_peak"] = row["least_flop"] / seconds / 1e9 / peak if peak else None
        row["share_of_copy"] = row["least_bytes"] / seconds / 1e9 / ceilings["copy_gb_s"]
