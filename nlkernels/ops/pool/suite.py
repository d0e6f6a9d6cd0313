"""Small problems that show whether pooling kernels are right; see `nlkernels._trust`.

Sizes that are no multiples of the window, of a byte's winners or of a tile; numbers of few digits,
many of which are equal within a window.
"""

from typing import Any, NamedTuple

import torch

from nlkernels.ops.pool import problem as pooling
from nlkernels.ops.pool import reference
from nlkernels.ops.region.problem import is_channels_last
from nlkernels.ops.region.problem import like as region_like

# Windows, and whether x is channels_last_3d, that `nlk verify` checks when none is named.
HEADS = ((1, 2, 2, 0), (1, 2, 2, 1), (2, 2, 2, 0), (2, 2, 2, 1))
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
GRADIENTS = ("d_x",)


class Trial(NamedTuple):
    """One problem: sizes and layout of x, and the window."""

    shape: tuple[int, int, int, int, int]
    window: tuple[int, int, int]
    channels_last: bool = False

    def __str__(self) -> str:
        sizes = " ".join(f"{n}={size}" for n, size in zip("BCTHW", self.shape, strict=True))
        layout = " channels_last_3d" if self.channels_last else ""
        return f"{sizes} window {'x'.join(map(str, self.window))}{layout}"


def large(head: tuple[int, ...]) -> tuple[Trial, ...]:
    """Problems of one window and layout, for every configuration of a kernel."""
    return _of(head, ((2, 520), (2, 14, 14), 0), ((3, 67), (3, 7, 9), 1), ((1, 3), (1, 2, 131), 0))


def trials(head: tuple[int, ...]) -> tuple[Trial, ...]:
    """A problem of that kind that is small enough for Triton's interpreter."""
    return _of(head, ((2, 5), (2, 3, 5), 1), ((1, 9), (1, 2, 8), 0))


def _of(head: tuple[int, ...], *sizes: tuple) -> tuple[Trial, ...]:
    """Trials of (B, C), windows along T, H and W, and numbers that are left over behind them."""
    *window, last = head
    found = []
    for items, windows, rest in sizes:
        positions = (n * k + rest * (k > 1) for n, k in zip(windows, window, strict=True))
        found.append(Trial((*items, *positions), tuple(window), bool(last)))
    return tuple(found)


def problem(head: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> pooling.PoolProblem:
    """A problem of that window and layout, to ask who serves it."""
    shape, window, last = trials(head)[0]
    return pooling.PoolProblem(*shape, window, dtype, device.type, device.index, last)


def operands(trial: Trial, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Random x, and a gradient of the output."""
    generator = torch.Generator(device).manual_seed(0)
    pooled = (n // k for n, k in zip(trial.shape[2:], trial.window, strict=True))
    sizes = (trial.shape, (*trial.shape[:2], *pooled))
    x, grad = (torch.randn(size, generator=generator, device=device) for size in sizes)
    x, grad = (x * 2).round().to(dtype), grad.to(dtype)
    if trial.channels_last:
        x, grad = (t.contiguous(memory_format=torch.channels_last_3d) for t in (x, grad))
    return x, grad


def definition(trial: Trial, x: torch.Tensor) -> torch.Tensor:
    """The output in plain PyTorch, differentiable."""
    return reference.pool(x, list(trial.window))


def forward(module: Any, trial: Trial, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Output of a backend, and the winners, which every backend's backward reads."""
    return module.forward(x, list(trial.window))


def backward(
    module: Any,
    trial: Trial,
    grad: torch.Tensor,
    tensors: tuple[torch.Tensor, ...],
    kept: tuple[torch.Tensor, ...],
) -> tuple[torch.Tensor, ...]:
    """Gradient of a backend, from winners that a forward returned."""
    d_x = region_like(tensors[0]).zero_()
    return (module.backward(grad, kept[1], d_x, list(trial.window)),)


def like(seen: tuple[Any, ...]) -> Trial:
    """The trial that describes x and the window which a model brought."""
    x, window = seen
    return Trial(tuple(x.shape), tuple(window), is_channels_last(x))
