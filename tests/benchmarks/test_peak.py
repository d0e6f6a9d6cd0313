"""The machine's peak, shares of it, and the instruction set that providers are held to."""

import itertools
import os
from types import SimpleNamespace

import pytest
import torch

from benchmarks import features, gate, peak, region
from benchmarks.providers import DEFAULT, PROVIDERS
from benchmarks.registry import Case
from nlkernels import _ext

CPU = torch.device("cpu")
CEILINGS = {"peak_gflops": {"avx2": {"float32": 1.0}}, "copy_gb_s": 1.0}


def test_instruction_set_is_forced_within_the_call_only(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = peak.on_isa("avx2", lambda: os.environ["NLKERNELS_CPU_ISA"])
    monkeypatch.delenv("NLKERNELS_CPU_ISA", raising=False)
    assert seen() == "avx2"
    assert "NLKERNELS_CPU_ISA" not in os.environ
    monkeypatch.setenv("NLKERNELS_CPU_ISA", "portable")
    assert seen() == "avx2"
    assert os.environ["NLKERNELS_CPU_ISA"] == "portable"
    assert peak.on_isa("", lambda: os.environ["NLKERNELS_CPU_ISA"])() == "portable"


def test_instruction_set_holds_in_the_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NLKERNELS_CPU_ISA", raising=False)
    seen = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            seen.append(os.environ.get("NLKERNELS_CPU_ISA"))
            return value.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append(os.environ.get("NLKERNELS_CPU_ISA"))
            return grad

    provider = PROVIDERS["cpp_avx2"]
    watched = type(provider)(
        "watched",
        lambda kind: lambda q, k, v, scale: Watched.apply(v) + 0 * (q + k),
        provider.reason,
        isa=provider.isa,
    )
    case = Case("tiny", "softmax", 1, 3, 3, 2, 2)
    operands = tuple(torch.randn(1, 3, 2) for _ in range(4))
    watched.step(case, operands, "forward_backward")()
    assert seen == ["avx2", "avx2"]


def test_only_named_providers_need_another_compilation() -> None:
    assert "cpp" in DEFAULT
    assert "cpp_avx2" not in DEFAULT


def test_set_that_cannot_be_had_has_no_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ext, "missing", lambda: "no compiler")
    assert peak.peak_gflops(["", "avx2"]) == {}


def test_peak_is_that_of_the_fastest_long_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    now = 0.0
    # Threads start in the first call; then a round takes 1 us, in every third call twice that.
    calls = []

    def run(isa: int, dtype: int, tasks: int, rounds: int, threads: int) -> int:
        nonlocal now
        calls.append(rounds)
        disturbed = 2 if next(clock) % 3 == 0 else 1
        now += rounds * 1e-6 * disturbed + (0.5 if len(calls) == 1 else 0.0)
        return rounds * 1000

    monkeypatch.setattr(peak.time, "perf_counter", lambda: now)
    assert peak.sustained(SimpleNamespace(_peak_run=run), 2, 1) == pytest.approx(1.0)
    assert calls[-1] * 1e-6 >= peak.SAMPLE_S


def test_native_peak_is_plausible(monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := _ext.missing():
        pytest.skip(reason)
    monkeypatch.setattr(peak, "SAMPLE_S", 0.002)
    ((name, rates),) = peak.peak_gflops().items()
    assert name in _ext.load().isas
    assert rates.keys() == {"float64", "float32", "bfloat16"}
    assert all(0.01 < rate < 1e6 for rate in rates.values())


def test_larger_of_two_measurements() -> None:
    before = {"gemm": {"float32": 1.0}, "peak": {"avx2": {"float32": 2.0}}, "copy": 3.0}
    after = {
        "gemm": {},
        "peak": {"avx2": {"float32": 1.0}, "avx512": {"float32": 5.0}},
        "copy": 4.0,
    }
    assert peak.larger(before, after) == {
        "gemm": {"float32": 1.0},
        "peak": {"avx2": {"float32": 2.0}, "avx512": {"float32": 5.0}},
        "copy": 4.0,
    }


def test_share_is_of_the_fastest_instruction_set() -> None:
    peaks = {
        "avx2": {"float32": 4.0, "bfloat16": 4.0},
        "avx512_bf16": {"float32": 3.0, "bfloat16": 8.0},
    }
    assert peak.machine_peak(peaks, "float32") == peak.machine_peak(peaks, "float16") == 4.0
    assert peak.machine_peak(peaks, "bfloat16") == 8.0
    assert peak.machine_peak({}, "float32") is None
    rows = [
        {"time_ms": {"p50": 500.0}, "dtype": "float32", "least_flop": 1e9, "least_bytes": 2e9},
        {"status": "refused"},
    ]
    peak.state_shares(rows, {"peak_gflops": peaks, "copy_gb_s": 8.0})
    assert (rows[0]["share_of_peak"], rows[0]["share_of_copy"]) == (0.5, 0.5)
    peak.state_shares(rows, {"copy_gb_s": 16.0})
    assert (rows[0]["share_of_peak"], rows[0]["share_of_copy"]) == (None, 0.25)


@pytest.mark.parametrize("passes", ["forward", "forward_backward"])
@pytest.mark.parametrize("kind", ["region", "gate"])
def test_native_features_are_judged(kind: str, passes: str) -> None:
    if kind == "region":
        operation = region.OPERATION
        case = region.RegionCase("tiny", 1, 24, (3, 5, 4), (3, 3, 3), "contiguous")
    else:
        operation, case = gate.OPERATION, gate.GateCase("tiny", 1, 24, (3, 5, 4), "contiguous")
    names = [name for name in operation.functions if name not in ("cpp_avx2", "triton")]
    rows = features.measure(
        operation, case, "float32", passes, CPU, rounds=1, ceilings=CEILINGS, names=names
    )
    assert [row["provider"] for row in rows] == names
    for row in rows:
        assert row["status"] in ("ok", "unserved"), row
        if row["status"] == "ok":
            seconds = row["time_ms"]["p50"] / 1e3
            assert row["share_of_peak"] == pytest.approx(case.flop(passes) / seconds / 1e9)
    served = {row["provider"] for row in rows if row["status"] == "ok"}
    assert {"chunked", "auto"} < served
