"""What is asked of a device: which one it is, and how long work takes on it."""

from __future__ import annotations

import functools
import platform
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch

from nlkernels import _launch

# Kinds of devices whose kernels are chosen by what was verified and measured on the machine.
MEASURED = ("cuda",)
_DRIVER = Path("/proc/driver/nvidia/version")
_LONGEST_MS = 40.0


def present(kind: str, index: int | None) -> torch.device | None:
    """The device of a problem, None where this machine has no such one (a traced or fake one)."""
    if kind == "cpu":
        return torch.device("cpu")
    if kind != "cuda" or not (torch.cuda.is_initialized() or torch.cuda.is_available()):
        return None
    index = torch.cuda.current_device() if index is None else index
    return torch.device(kind, index) if index < torch.cuda.device_count() else None


def name(device: torch.device) -> str:
    """What a device calls itself: "NVIDIA H200"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {device.type}"


def identity(device: torch.device) -> str:
    """Device, driver, Triton and torch: what was seen with others of these says nothing here."""
    return _identity(device.type, device.index)


@functools.cache
def _identity(kind: str, index: int | None) -> str:
    device = torch.device(kind, index) if index is not None else torch.device(kind)
    return ", ".join(
        (
            name(device),
            f"driver {driver() if kind == 'cuda' else 'none'}",
            f"triton {triton_version()}",
            f"torch {torch.__version__}",
        )
    )


def triton_version() -> str:
    """Installed version of Triton, "none" without it."""
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "none"


def driver() -> str:
    """Version of the NVIDIA driver, else of the CUDA runtime."""
    try:
        line = _DRIVER.read_text().splitlines()[0]
    except (OSError, IndexError):
        return f"of CUDA {torch.version.cuda}"
    return next((word for word in line.split() if word[:1].isdigit() and "." in word), line)


def label(dtype: torch.dtype) -> str:
    """A dtype, and for float32 how it is multiplied: torch's switch decides about TF32."""
    precision = _launch.precision(dtype)
    name = str(dtype).removeprefix("torch.")
    return name if precision == "ieee" else f"{name} {precision}"


def synchronize(device: torch.device) -> None:
    """Wait for the work of a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_ms(run: Callable[[], object], device: torch.device, repeats: int = 15) -> float:
    """Median time of `run` in milliseconds, after one call that is not timed.

    Fewer repeats where they would take longer than 40 ms together, but at least 3.
    """
    run()
    first = _once_ms(run, device)
    count = max(3, min(repeats, int(_LONGEST_MS / max(first, 1e-3))))
    return statistics.median([_once_ms(run, device) for _ in range(count)])


def _once_ms(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    with torch.cuda.device(device):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
    return start.elapsed_time(stop)
