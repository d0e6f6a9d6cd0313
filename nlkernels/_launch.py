"""Launching Triton kernels: where they can run, what a tile may be, and the launch itself.

Nothing here imports Triton before it is asked for, so the package works without it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

# Shared memory that one program may use, in bytes, by compute capability.
SHARED_MEMORY = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
# The interpreter runs kernels as this architecture would get them, descriptors included.
_INTERPRETED = 90


class Config(NamedTuple):
    """How one kernel is tiled and compiled.

    Attributes:
        rows: query rows, or positions, of a tile.
        columns: keys, or channels, of a tile.
        depth: channels of query and key that one step of a product takes; 0 takes all at once.
        warps: warps of a program.
        stages: tiles in flight between global and shared memory.
        descriptors: operands are read through tensor descriptors (TMA), not pointers.
        specialised: one warp group loads while the others compute (Hopper).
    """

    rows: int
    columns: int
    depth: int = 0
    warps: int = 4
    stages: int = 2
    descriptors: bool = False
    specialised: bool = False


class _Pretence(NamedTuple):
    architecture: int | None = None
    wide: bool | None = None
    launcher: Callable[..., None] | None = None


_pretence = _Pretence()


@contextlib.contextmanager
def pretend(
    architecture: int | None = None,
    wide: bool | None = None,
    launcher: Callable[..., None] | None = None,
) -> Iterator[None]:
    """Plan and launch as on another machine: for tests and for compilation ahead of time.

    Args:
        architecture: compute capability, 80 for sm_80.
        wide: force 64-bit (True) or 32-bit (False) offsets.
        launcher: called as launcher(kernel, grid, arguments, options) in place of a launch.
    """
    global _pretence
    before, _pretence = _pretence, _Pretence(architecture, wide, launcher)
    try:
        yield
    finally:
        _pretence = before


@functools.cache
def installed() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1), on CPU tensors."""
    if not installed():
        return False
    try:
        from triton import knobs
    except ImportError:
        # Older than any release that these kernels are for.
        return False
    return bool(knobs.runtime.interpret)


def unavailable(device_type: str, index: int | None = None) -> list[str]:
    """Why no Triton kernel can run on a device (None: the current one); empty when one can."""
    if not installed():
        return ["the package triton is not installed"]
    if device_type == "cuda":
        if torch.version.hip is not None:
            return ["its kernels are written for NVIDIA GPUs"]
        if _pretence.architecture is None and not torch.cuda.is_available():
            return ["there is no usable GPU"]
        major, minor = divmod(architecture(torch.device("cuda", index)), 10)
        if major < 8:
            return [f"its kernels need compute capability 8.0, this GPU has {major}.{minor}"]
        return []
    if device_type == "cpu" and (interpreting() or _pretence.launcher is not None):
        return []
    return [f"its kernels run on GPUs, not on {device_type}"]


def unserved(problem: Any) -> list[str]:
    """Why no kernel can run a problem: its device or its dtype; empty when one can."""
    reasons = list(unavailable(problem.device, problem.index))
    if problem.dtype == torch.float64:
        reasons.append("its kernels take float16, bfloat16 and float32, not float64")
    return reasons


def architecture(device: torch.device) -> int:
    """Compute capability of a device as one number: 90 for sm_90."""
    if _pretence.architecture is not None:
        return _pretence.architecture
    if device.type != "cuda":
        return _INTERPRETED
    return _capability(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def has_descriptors(device: torch.device) -> bool:
    """Whether the device has a copy engine for tensor descriptors (TMA): Hopper and later."""
    return architecture(device) >= 90


def capturing(device: torch.device) -> bool:
    """Whether work is being recorded rather than run: nothing may be timed, verified or awaited."""
    if torch.compiler.is_compiling():
        return True
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def wide(*tensors: torch.Tensor) -> bool:
    """Whether an element of a tensor lies beyond what a 32-bit offset reaches."""
    if _pretence.wide is not None:
        return _pretence.wide
    return any(_extent(tensor) >= 2**31 for tensor in tensors)


def _extent(tensor: torch.Tensor) -> int:
    """Distance in elements from the first to past the last one."""
    steps = ((n - 1) * abs(s) for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return 1 + sum(steps) if tensor.numel() else 0


def precision(dtype: torch.dtype) -> str:
    """How tensor cores multiply a dtype: torch's own switch decides about TF32 for float32."""
    if dtype != torch.float32:
        return "ieee"
    # Follows torch.set_float32_matmul_precision too, whose own getter raises where this was set.
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def undescribable(tensor: torch.Tensor, dim: int = -1) -> str:
    """Why a tensor descriptor cannot read `tensor` with `dim` innermost; "" when it can.

    The copy engine wants the innermost stride to be 1, every other a positive multiple of 16 bytes
    below 2**40, a base address divisible by 16, and sizes of 1 to 2**32.
    """
    size = tensor.element_size()
    strides = list(tensor.stride())
    if strides.pop(dim) != 1:
        return f"dimension {dim} has stride {tensor.stride(dim)}, not 1"
    for stride in strides:
        if stride <= 0 or stride * size % 16 or stride * size >= 2**40:
            return f"a stride of {stride * size} bytes is no multiple of 16 below 2**40"
    if tensor.data_ptr() % 16:
        return "its address is no multiple of 16"
    return "" if all(0 < n <= 2**32 for n in tensor.shape) else f"sizes {tuple(tensor.shape)}"


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    config: Config,
    scratch: bool = False,
    **constants: Any,
) -> None:
    """Run `kernel` over `grid`, on the device and current stream of its first tensor.

    Args:
        kernel: a function decorated with triton.jit.
        grid: numbers of programs; nothing runs when one is 0.
        *arguments: the kernel's arguments, tensors first.
        config: its warps and stages.
        scratch: the kernel makes descriptors itself, in memory that torch allocates (128 bytes
            for each descriptor of each program).
        **constants: its tl.constexpr arguments.
    """
    options = {**constants, "num_warps": config.warps, "num_stages": config.stages}
    if _pretence.launcher is not None:
        _pretence.launcher(kernel, grid, arguments, options)
        return
    if 0 in grid:
        return
    device = next(a.device for a in arguments if isinstance(a, torch.Tensor))
    if device.type != "cuda":
        kernel[grid](*arguments, **options)
        return
    with torch.cuda.device(device):
        if scratch:
            # Per context, and autograd's threads have contexts of their own: set at every launch.
            _set_allocator()
        kernel[grid](*arguments, **options)


def _set_allocator() -> None:
    import triton

    triton.set_allocator(
        lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device="cuda")
    )
