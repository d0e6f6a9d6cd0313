"""Small problems that show whether gate kernels are right; see `nlkernels._trust`.

Odd channels and positions leave tails in every tile; one item of many positions takes several
tiles in each split, many items take one. Clips of frames (B T, C, H, W) lie in three layouts.
"""

from typing import Any, NamedTuple

import torch

from nlkernels.ops.gate import problem as gate
from nlkernels.ops.gate import reference

# Channels that `nlk verify` checks when none are named: those of the published blocks.
HEADS = ((256,), (512,), (1024,), (2048,))
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
GRADIENTS = ("d_x", "d_weight")
LAYOUTS = ("ncdhw", "channels_last", "frames")


class Trial(NamedTuple):
    """One problem: sizes and layout of x."""

    shape: tuple[int, ...]
    layout: str = "ncdhw"

    def __str__(self) -> str:
        batch, channels, *positions = self.shape
        where = "x".join(map(str, positions))
        return f"B={batch} C={channels} positions={where} {self.layout}"


def large(head: tuple[int]) -> tuple[Trial, ...]:
    """Problems of up to that many channels, for every configuration of a kernel."""
    (channels,) = head
    return (
        *(Trial((2, channels - 3, 8, 29, 15), layout) for layout in LAYOUTS),
        Trial((130, channels, 3, 5, 5)),
        Trial((1, channels, 32, 56, 56), "channels_last"),
    )


def trials(head: tuple[int]) -> tuple[Trial, ...]:
    """Problems that are small enough for Triton's interpreter."""
    (channels,) = head
    return tuple(Trial((2, channels - 1, 3, 7, 9), layout) for layout in LAYOUTS)


def problem(head: tuple[int], dtype: torch.dtype, device: torch.device) -> gate.GateProblem:
    """A problem of so many channels, to ask who serves it."""
    return gate.GateProblem(2, head[0], 189, dtype, device.type, device.index)


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same numbers, contiguous in another order of dimensions."""
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    return x.transpose(1, 2).contiguous().transpose(1, 2) if layout == "frames" else x


def operands(trial: Trial, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Random x, weight, and a gradient of the output; logits of deviation 1."""
    generator = torch.Generator().manual_seed(0)
    batch, channels, *_ = trial.shape
    x, weight, grad = (
        torch.randn(size, generator=generator, device="cpu")
        for size in (trial.shape, (channels,), (batch, channels))
    )
    x, weight, grad = (t.to(dtype).to(device) for t in (x, weight * channels**-0.5, grad))
    return laid_out(x, trial.layout), weight, grad


def definition(trial: Trial, *tensors: torch.Tensor) -> torch.Tensor:
    """The output in plain PyTorch, differentiable."""
    return reference.pool(*tensors)


def forward(module: Any, trial: Trial, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Output of a backend, which is also what its backward wants back."""
    return (module.forward(*tensors),)


def backward(
    module: Any,
    trial: Trial,
    grad: torch.Tensor,
    tensors: tuple[torch.Tensor, ...],
    kept: tuple[torch.Tensor, ...],
) -> tuple[torch.Tensor, ...]:
    """Gradients of a backend, from what a forward returned."""
    return module.backward(grad, *tensors, *kept)


def like(tensors: tuple[torch.Tensor, ...]) -> Trial:
    """The trial that describes operands which a model brought."""
    x = tensors[0]
    return Trial(tuple(x.shape), "channels_last" if gate.is_channels_last(x) else "ncdhw")


def call(backend: str, *tensors: torch.Tensor) -> torch.Tensor:
    """The public operation's pooling in one backend, differentiable."""
    from nlkernels.ops.gate import op

    return op.pool(*tensors, backend=backend)
