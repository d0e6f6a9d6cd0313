"""Small problems that show whether region kernels are right; see `nlkernels._trust`.

Frames of odd sizes and below the kernel's leave tails in every tile; many channels and positions
take several tiles in each split of the weight's gradient.
"""

from typing import NamedTuple

import torch

from nlkernels.ops._operand_suite import backward as backward
from nlkernels.ops._operand_suite import forward as forward
from nlkernels.ops.region import problem as region
from nlkernels.ops.region import reference

# Kernel sizes, and whether x is channels_last_3d, that `nlk verify` checks when none is named.
HEADS = ((3, 7, 7, 0), (3, 7, 7, 1), (3, 3, 3, 0), (3, 3, 3, 1))
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
GRADIENTS = ("d_x", "d_weight")


class Trial(NamedTuple):
    """One problem: sizes of x and of the kernel, layout of x."""

    shape: tuple[int, int, int, int, int]
    kernel: tuple[int, int, int]
    channels_last: bool = False

    def __str__(self) -> str:
        sizes = " ".join(f"{n}={size}" for n, size in zip("BCTHW", self.shape, strict=True))
        layout = " channels_last_3d" if self.channels_last else ""
        return f"{sizes} kernel {'x'.join(map(str, self.kernel))}{layout}"


def large(head: tuple[int, ...]) -> tuple[Trial, ...]:
    """Problems of one kernel size and layout, for every configuration of a kernel."""
    return _of(head, (3, 80, 5, 29, 15), (2, 96, 2, 14, 14), (2, 33, 2, 3, 5))


def trials(head: tuple[int, ...]) -> tuple[Trial, ...]:
    """A problem of that kind that is small enough for Triton's interpreter."""
    return _of(head, (1, 5, 3, 9, 5))


def _of(head: tuple[int, ...], *shapes: tuple[int, int, int, int, int]) -> tuple[Trial, ...]:
    *kernel, last = head
    return tuple(Trial(shape, tuple(kernel), bool(last)) for shape in shapes)


def problem(
    head: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> region.RegionProblem:
    """A problem of that kernel size, to ask who serves it."""
    trial = trials(head)[0]
    return region.RegionProblem(
        *trial.shape, trial.kernel, dtype, device.type, device.index, trial.channels_last
    )


def operands(trial: Trial, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Random x, weight, and a gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    sizes = (trial.shape, (trial.shape[1], *trial.kernel), trial.shape)
    x, weight, grad = (
        torch.randn(size, generator=generator, device="cpu").to(dtype).to(device) for size in sizes
    )
    if trial.channels_last:
        x, grad = (t.contiguous(memory_format=torch.channels_last_3d) for t in (x, grad))
    return x, weight, grad


def definition(trial: Trial, *tensors: torch.Tensor) -> torch.Tensor:
    """The output in plain PyTorch, differentiable."""
    return reference.aggregate(*tensors)


def like(tensors: tuple[torch.Tensor, ...]) -> Trial:
    """The trial that describes operands which a model brought."""
    x, weight = tensors[:2]
    return Trial(tuple(x.shape), tuple(weight.shape[1:]), region.is_channels_last(x))


def call(backend: str, *tensors: torch.Tensor) -> torch.Tensor:
    """The public operation in one backend, differentiable."""
    from nlkernels.ops.region import op

    return op.aggregate(*tensors, backend)
