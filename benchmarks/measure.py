"""Measures implementations of one problem against each other: judged, weighed, timed in turns.

Attention problems are measured by `measure`; `compare` does the same for any operation whose calls
and judge are given to it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from nlkernels._memory import PeakMemory

from .checks import Judge, WrongResult
from .graphs import NotCaptured, capture
from .providers import Provider, chosen_backend
from .registry import Case
from .timing import ForeignLoad, Timer, interleave, quantiles

PASSES = ("forward", "forward_backward")

BASELINES = {
    "naive": ("naive",),
    "two_bmm": ("two_bmm",),
    "sdpa": ("sdpa_flash", "sdpa_efficient", "sdpa_cudnn", "sdpa_math"),
}
"""What speed-ups are stated over: the fastest of each group within the same run."""

PEER_SLACK = 4.0
"""Errors that peers may make on a GPU and in blocks, in those of the rule: refusing a fast peer
would flatter."""

Step = Callable[[], dict[str, Tensor]]


class DeviceLost(RuntimeError):
    """The GPU no longer answers this process: whatever runs in it from now on fails."""


class Judging(Protocol):
    """Decides whether the results of a provider are right."""

    def check(
        self, name: str, results: dict[str, Tensor], slack: float = 1.0
    ) -> dict[str, dict[str, float]]:
        """Errors per result; raises WrongResult beyond `slack` times what is allowed."""


@dataclass(frozen=True)
class Call:
    """One implementation's call, or why there is none.

    Attributes:
        step: Computes the results; not called where `reason` is given.
        reason: Why the implementation does not serve the problem; "" if it does.
        optional: What it raises is a refusal to serve, not a failure.
        status: Of the row where `reason` is given.
        slack: Multiplies the error that is allowed.
    """

    step: Step
    reason: str = ""
    optional: bool = False
    status: str = "unserved"
    slack: float = 1.0


def make_operands(
    case: Case, dtype: torch.dtype, device: torch.device, seed: int
) -> tuple[Tensor, ...]:
    """query, key, value and gradient of the output: standard normal, drawn on the CPU.

    Query and key of relu are rounded to quarters, of whose products float32 sums are exact: every
    implementation then agrees on which scores are positive, where relu's derivative jumps.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = ((case.n, case.d), (case.m, case.d), (case.m, case.v), (case.n, case.v))
    query, key, *others = (
        torch.randn(case.batch, rows, width, generator=generator) for rows, width in sizes
    )
    if case.kind == "relu":
        query, key = ((4 * t).round() / 4 for t in (query, key))
    return tuple(t.to(device, dtype) for t in (query, key, *others))


def measure(
    case: Case,
    providers: list[Provider],
    dtype_name: str,
    passes: str,
    device: torch.device,
    *,
    rounds: int,
    seed: int = 0,
    gemm: float | None = None,
    graphs: bool = False,
    begin: Callable[[str], None] | None = None,
    lost: Mapping[str, str] | None = None,
    peer_slack: float = 1.0,
) -> list[dict[str, Any]]:
    """Judges and times providers on one problem.

    Args:
        case: The problem.
        providers: What is compared; rows come back in this order.
        dtype_name: "float32", "bfloat16" or "float16".
        passes: "forward" or "forward_backward".
        device: Where to run.
        rounds: Interleaved rounds, one sample per provider each.
        seed: Seed of operands and of the judged sample.
        gemm: Measured matrix-product rate in TFLOP/s that rates are stated against; None leaves
            the share out.
        graphs: Also time a replayed CUDA graph of every provider.
        begin: Told the name of every provider before its first call.
        lost: Providers that are not called, with the reason: they failed before.
        peer_slack: Multiplies the error that providers of others are allowed.

    Returns:
        One row per provider (see README.md of this folder). A provider whose result is wrong has
        status "refused" and no times.

    Raises:
        DeviceLost: A provider broke the GPU's context.
    """
    dtype = getattr(torch, dtype_name)
    operands = make_operands(case, dtype, device, seed)
    calls = {}
    for provider in providers:
        call = provider.step(case, operands, passes)
        if lost is not None and provider.name in lost:
            calls[provider.name] = Call(call, lost[provider.name], status="failed")
            continue
        reason = provider.reason(case, dtype, device)
        if not reason and passes not in provider.passes:
            reason = f"not measured in the pass {passes}"
        slack = 1.0 if provider.ours else peer_slack
        calls[provider.name] = Call(call, reason, provider.optional, slack=slack)
    head = {
        "case": case.name,
        "kind": case.kind,
        "dtype": dtype_name,
        "pass": passes,
        "shape": {"B": case.batch, "N": case.n, "M": case.m, "D": case.d, "V": case.v},
    }
    rows = compare(
        head,
        calls,
        Judge(case, operands, passes, seed),
        device,
        rounds=rounds,
        graphs=graphs,
        begin=begin,
    )
    # These do fewer operations than the nominal count, being linear: a share would mislead.
    linear = case.kind in ("dot_product", "concat")
    least = {
        "least_flop": case.least_flop(passes),
        "least_bytes": case.traffic(passes, dtype.itemsize),
    }
    derive(rows, case.flop(passes), None if linear else gemm, least)
    for row in rows:
        if row["provider"] == "auto" and row["status"] == "ok":
            row["backend"] = chosen_backend(case, dtype, device)
    return rows


def compare(
    head: Mapping[str, Any],
    calls: Mapping[str, Call],
    judge: Judging,
    device: torch.device,
    *,
    rounds: int,
    graphs: bool = False,
    begin: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Judges, weighs and times calls of the same operation on the same operands.

    Args:
        head: Fields that all rows share: case, kind, dtype, pass, shape.
        calls: Provider name -> its call; rows come back in this order.
        judge: Holds the truth.
        device: Where the calls run.
        rounds: Interleaved rounds, one sample per provider each.
        graphs: Also time a replayed CUDA graph of every call, in rounds of their own.
        begin: Told the name of every provider before its first call.

    Raises:
        DeviceLost: A call broke the GPU's context.
    """
    rows: dict[str, dict[str, Any]] = {}
    steps: dict[str, Step] = {}
    replays: dict[str, Step] = {}
    for name, call in calls.items():
        row: dict[str, Any] = {**head, "provider": name, "backend": None, "status": "ok"}
        row["reason"] = call.reason
        rows[name] = row
        if call.reason:
            row["status"] = call.status
            continue
        if begin is not None:
            begin(name)
        _judge_and_weigh(row, call, judge, device)
        if row["status"] != "ok":
            continue
        steps[name] = call.step
        if graphs:
            row["graph"] = {"time_ms": None, "reason": ""}
            try:
                replays[name] = _captured(name, call, judge, device)
            except NotCaptured as error:
                check_device(device)
                row["graph"]["reason"] = str(error)
    if begin is not None:
        begin("timing")
    with ForeignLoad() as foreign:
        samples = interleave(steps, Timer(device), rounds)
    for name, taken in samples.items():
        rows[name] |= {"time_ms": quantiles(taken), "samples_ms": taken}
        rows[name]["foreign_cores"] = foreign.cores
    for name, taken in interleave(replays, Timer(device), rounds).items():
        rows[name]["graph"]["time_ms"] = quantiles(taken)
    return list(rows.values())


def _captured(name: str, call: Call, judge: Judging, device: torch.device) -> Step:
    """A replay of the call whose results were judged too."""
    replay = capture(call.step, device)
    try:
        judge.check(f"{name} (graph)", replay(), call.slack)
    except WrongResult as error:
        raise NotCaptured(f"its replay is wrong: {error}") from error
    return replay


def _judge_and_weigh(row: dict[str, Any], call: Call, judge: Judging, device: torch.device) -> None:
    try:
        row["error"] = judge.check(row["provider"], call.step(), call.slack)
        gc.collect()
        with PeakMemory(device) as peak:
            outputs = call.step()
    except WrongResult as error:
        row |= {"status": "refused", "reason": str(error)}
        return
    except Exception as error:
        # Compilers and packages of others raise what they like; it is a result like any other.
        check_device(device)
        said = f"{type(error).__name__}: {error}"[:400]
        row |= {"status": "unserved" if call.optional else "failed", "reason": said}
        return
    row["peak_mib"] = peak.live_mib
    row["device_peak_mib"] = peak.device_mib
    row["output_mib"] = sum(t.numel() * t.element_size() for t in outputs.values()) / 2**20


def check_device(device: torch.device) -> None:
    """Raise DeviceLost if an error has broken the GPU's context for this process."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        raise DeviceLost(str(error).strip().splitlines()[0]) from error


def derive(
    rows: list[dict[str, Any]],
    flop: int,
    gemm: float | None,
    least: Mapping[str, int] | None = None,
) -> None:
    """Adds rates and ratios to the rows of one problem that were timed.

    Args:
        rows: Of one problem.
        flop: Nominal operations.
        gemm: Rate in TFLOP/s that the share is of; None leaves the share out.
        least: `least_flop` and `least_bytes`, what any implementation needs at least.
    """
    medians = {row["provider"]: row["time_ms"]["p50"] for row in rows if "time_ms" in row}
    for row in rows:
        if row["provider"] not in medians:
            continue
        row |= least or {}
        own = medians[row["provider"]]
        row["speedup_over"] = {}
        for baseline, names in BASELINES.items():
            times = [medians[name] for name in names if name in medians]
            row["speedup_over"][baseline] = min(times) / own if times else None
        row["auto_speedup"] = own / medians["auto"] if "auto" in medians else None
        row["nominal_tflops"] = flop / own / 1e9
        row["share_of_gemm"] = row["nominal_tflops"] / gemm if gemm is not None else None
