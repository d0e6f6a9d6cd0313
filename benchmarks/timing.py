"""Timing of implementations against each other: synchronised, interleaved, in quantiles."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

L2_FLUSH_MIB = 256
"""Bytes written before each GPU call: several times the L2 of any current GPU (60 MB on an
H200)."""


# malloc.h of glibc.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> bool:
    """Let glibc keep up to 1 GiB of freed memory; False where another library allocates.

    By default its heap gives memory back when its end becomes free, which depends on the order in
    which all providers' buffers came and went: one provider then pays for pages in every call (up
    to a third of its time was seen), another never. Blocks of over 32 MiB are mapped anew by every
    call, as they are by default.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    settings = ((_M_MMAP_THRESHOLD, 32 << 20), (_M_TRIM_THRESHOLD, 1 << 30))
    return mallopt is not None and all(mallopt(*setting) == 1 for setting in settings)


def synchronised_clock() -> float:
    """Seconds, read after all queued GPU work is done: a `timer` for pytest-benchmark."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


class Timer:
    """Times one call at a time, in milliseconds.

    On a GPU a call is bracketed by CUDA events after the L2 cache has been overwritten, so every
    call finds cold caches and host-side launch latency counts only where it leaves the device idle.
    On a CPU it is bracketed by `time.perf_counter`.

    Args:
        device: Where the calls run.
        min_sample_ms: A sample repeats a call until this much time has passed, and is the median
            of the repeats.
        max_repeats: Upper limit of those repeats.
    """

    def __init__(
        self, device: torch.device, min_sample_ms: float = 10.0, max_repeats: int = 25
    ) -> None:
        self.device = device
        self.min_sample_ms = min_sample_ms
        self.max_repeats = max_repeats
        self._flush = None
        if device.type == "cuda":
            self._flush = torch.empty(L2_FLUSH_MIB << 20, dtype=torch.uint8, device=device)

    def call_ms(self, function: Callable[[], object]) -> float:
        """Duration of one call in ms."""
        if self._flush is None:
            start = time.perf_counter()
            function()
            return (time.perf_counter() - start) * 1e3
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        with torch.cuda.device(self.device):
            self._flush.zero_()
            begin.record()
            function()
            end.record()
            end.synchronize()
        return begin.elapsed_time(end)

    def sample_ms(self, function: Callable[[], object]) -> float:
        """Median duration in ms of as many calls as `min_sample_ms` asks for."""
        calls = []
        while len(calls) < self.max_repeats and sum(calls) < self.min_sample_ms:
            calls.append(self.call_ms(function))
        return float(np.median(calls))


def interleave(
    functions: Mapping[str, Callable[[], object]],
    timer: Timer,
    rounds: int = 7,
    warmup: int = 1,
) -> dict[str, list[float]]:
    """Samples every function once per round, so that drift of the machine falls on all alike.

    Each round starts one function later, and every second round runs backwards, so that no function
    is always first or always finds the caches as the same neighbour left them.

    Args:
        functions: Name -> call without arguments.
        timer: Takes the samples.
        rounds: Samples per function.
        warmup: Untimed calls of each function beforehand.

    Returns:
        Name -> samples in ms, one per round.

    Raises:
        ValueError: rounds < 1 or warmup < 0.
    """
    if rounds < 1 or warmup < 0:
        raise ValueError(
            f"interleave: expected rounds >= 1 and warmup >= 0, got {rounds} and {warmup}"
        )
    names = list(functions)
    for name in names:
        for _ in range(warmup):
            functions[name]()
    samples: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names) if names else 0
        order = names[first:] + names[:first]
        for name in order if turn % 2 == 0 else reversed(order):
            samples[name].append(timer.sample_ms(functions[name]))
    return samples


class ForeignLoad:
    """Average number of CPU cores that other processes used during a `with` block.

    Attributes:
        cores: The number, known after the block; None where the system has no /proc/stat.
    """

    def __enter__(self) -> ForeignLoad:
        self.cores: float | None = None
        self._start = time.perf_counter(), self._busy_s(), self._own_s()
        return self

    def __exit__(self, *exception: object) -> None:
        wall, busy, own = self._start
        now = self._busy_s()
        if busy is None or now is None:
            return
        foreign = now - busy - (self._own_s() - own)
        # Ticks of 10 ms round to slightly below zero on an idle machine.
        self.cores = max(0.0, foreign / max(time.perf_counter() - wall, 0.01))

    @staticmethod
    def _busy_s() -> float | None:
        try:
            user, nice, system, _, _, irq, softirq, steal = (
                int(ticks) for ticks in Path("/proc/stat").read_text().split()[1:9]
            )
        except (OSError, ValueError):
            return None
        return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")

    @staticmethod
    def _own_s() -> float:
        times = os.times()
        return times.user + times.system


def quantiles(samples: list[float]) -> dict[str, float]:
    """p20, p50 (median) and p80 of samples."""
    p20, p50, p80 = np.quantile(samples, (0.2, 0.5, 0.8))
    return {"p20": float(p20), "p50": float(p50), "p80": float(p80)}


def gemm_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """Rate in TFLOP/s of a large square matrix product here: the ceiling of other rates."""
    size = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    timer = Timer(device)
    samples = interleave({"gemm": lambda: a @ b}, timer, rounds=9, warmup=2)["gemm"]
    return 2 * size**3 / (quantiles(samples)["p50"] * 1e9)


def copy_gb_s(device: torch.device) -> float:
    """Rate in GB/s, bytes read and written, of a large copy here: the ceiling of memory traffic."""
    size = 2**30 if device.type == "cuda" else 2**24
    source = torch.randn(size, device=device)
    target = torch.empty_like(source)
    timer = Timer(device)
    samples = interleave({"copy": lambda: target.copy_(source)}, timer, rounds=9, warmup=2)["copy"]
    return 2 * source.numel() * source.element_size() / (quantiles(samples)["p50"] * 1e6)
