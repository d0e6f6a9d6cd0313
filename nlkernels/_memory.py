"""Peak memory of a piece of code, from the allocator's own events.

Tensor bytes are counted exactly, inside opaque operators too: every allocation and release that
torch's allocator reports to its profiler is replayed in order. Scratch that a math library
allocates for itself does not pass there; the resident set is the cross-check for it.
"""

import gc
import os

import torch

MIB = 2**20


class PeakMemory:
    """Context manager that measures the peak of live tensor bytes above the level at its start.

    Attributes:
        live_mib: peak of live tensor bytes on the device above the start, in MiB, exactly.
        kept_mib: live tensor bytes at the end above the start, in MiB: what is kept alive.
        device_mib: on CUDA, `torch.cuda.max_memory_allocated` above the start, in MiB; None on CPU.

    Example:
        >>> import torch
        >>> from nlkernels._memory import PeakMemory
        >>> with PeakMemory("cpu") as peak:
        ...     x = torch.ones(256, 1024)
        >>> peak.live_mib
        1.0
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.live_mib = self.kept_mib = float("nan")
        self.device_mib: float | None = None

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        # torch's profiler announces every start and stop on stderr below this level of its own.
        self._level = os.environ.get("KINETO_LOG_LEVEL")
        os.environ["KINETO_LOG_LEVEL"] = "6" if self._level is None else self._level
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._start_bytes = torch.cuda.memory_allocated(self.device)
        self._profile = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        )
        self._profile.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            peak_bytes = torch.cuda.max_memory_allocated(self.device) - self._start_bytes
            self.device_mib = peak_bytes / MIB
        self._profile.__exit__(*exception)
        if self._level is None:
            del os.environ["KINETO_LOG_LEVEL"]
        peak, live = self._peak_and_kept_bytes()
        self.live_mib, self.kept_mib = peak / MIB, live / MIB

    def _peak_and_kept_bytes(self) -> tuple[int, int]:
        live = peak = 0
        for event in self._profile.profiler.kineto_results.events():
            if event.name() == "[memory]" and self._here(event):
                live += event.nbytes()
                peak = max(peak, live)
        return peak, live

    def _here(self, event) -> bool:
        kind = "CUDA" if self.device.type == "cuda" else "CPU"
        return event.device_type().name == kind
