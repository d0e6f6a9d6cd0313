"""The timer measures calls, and all functions under the same conditions."""

import os
import platform
import subprocess
import sys
import time

import pytest
import torch

from benchmarks.timing import ForeignLoad, Timer, interleave, quantiles, synchronised_clock

CPU = torch.device("cpu")


def test_empty_call_takes_less_than_10_us() -> None:
    timer = Timer(CPU, min_sample_ms=1.0, max_repeats=1000)
    samples = interleave({"empty": lambda: None}, timer, rounds=5)["empty"]
    assert quantiles(samples)["p50"] < 0.010


def test_sleep_is_measured_in_ms() -> None:
    assert 20.0 <= Timer(CPU).call_ms(lambda: time.sleep(0.02)) < 1000.0


def test_sample_repeats_short_calls_only() -> None:
    calls = []
    Timer(CPU, min_sample_ms=5.0).sample_ms(lambda: calls.append(time.sleep(0.006)))
    assert len(calls) == 1
    Timer(CPU, min_sample_ms=5.0, max_repeats=9).sample_ms(lambda: calls.append(None))
    assert len(calls) == 1 + 9


def test_rounds_are_interleaved_and_rotated() -> None:
    log: list[str] = []
    functions = {name: lambda name=name: log.append(name) for name in "ABC"}
    timer = Timer(CPU, max_repeats=1)
    samples = interleave(functions, timer, rounds=4, warmup=1)
    assert "".join(log) == "ABC" + "ABC" + "ACB" + "CAB" + "CBA"
    assert {name: len(taken) for name, taken in samples.items()} == {"A": 4, "B": 4, "C": 4}


def test_nothing_to_time() -> None:
    assert interleave({}, Timer(CPU), rounds=2) == {}


def test_wrong_rounds() -> None:
    with pytest.raises(ValueError, match="rounds"):
        interleave({"a": lambda: None}, Timer(CPU), rounds=0)


def test_quantiles() -> None:
    assert quantiles([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == {"p20": 2.0, "p50": 3.5, "p80": 5.0}


def test_foreign_load_leaves_out_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    busy_s, own_s = iter([10.0, 13.0]), iter([1.0, 2.0])
    monkeypatch.setattr(ForeignLoad, "_busy_s", staticmethod(lambda: next(busy_s)))
    monkeypatch.setattr(ForeignLoad, "_own_s", staticmethod(lambda: next(own_s)))
    with ForeignLoad() as foreign:
        time.sleep(0.5)
    # Two of three busy seconds were foreign; a late wake-up only makes the quotient smaller.
    assert 1.0 < foreign.cores <= (3.0 - 1.0) / 0.5


def test_foreign_load_is_read_from_this_system() -> None:
    with ForeignLoad() as foreign:
        time.sleep(0.05)
    assert 0.0 <= foreign.cores <= os.cpu_count() + 1


def test_clock_runs_in_seconds() -> None:
    start = synchronised_clock()
    time.sleep(0.01)
    assert 0.01 <= synchronised_clock() - start < 5.0


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another library allocates")
@pytest.mark.parametrize("keeps", [False, True])
def test_freed_memory_is_kept(keeps):
    program = """
import ctypes, resource, sys
import torch
from benchmarks.timing import _M_TRIM_THRESHOLD, keep_freed_memory

assert ctypes.CDLL(None).mallopt(_M_TRIM_THRESHOLD, 128 << 10) == 1
assert sys.argv[1] != "True" or keep_freed_memory()
for _ in range(5):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.zeros(20 << 20, dtype=torch.uint8) for _ in range(4)]
    del blocks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    command = [sys.executable, "-c", program, str(keeps)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    # Four blocks are 20,480 pages of 4 KiB.
    assert (int(done.stdout) < 100) == keeps
