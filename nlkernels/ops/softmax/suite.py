"""Small problems that show whether softmax kernels are right; see `nlkernels._trust`.

Odd sizes leave tails in every tile, 256 keys leave none, 1031 take several tiles (and are split
where the queries are few), a workspace of 0 MiB takes many chunks, odd channels and sizes forbid
descriptors, a negative scale turns the softmax round.
"""

from typing import Any, NamedTuple

import torch

from nlkernels._spec import Problem
from nlkernels.ops.softmax import reference

# D and V that `nlk verify` checks when none is named: those of the published blocks.
HEADS = ((64, 64), (128, 128), (256, 256), (512, 512), (512, 256), (1024, 512))
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
GRADIENTS = ("d_query", "d_key", "d_value")


class Trial(NamedTuple):
    """One problem: sizes, layout of the operands, and workspace."""

    batch: int
    queries: int
    keys: int
    depth: int
    value_depth: int
    channel_first: bool = False
    workspace_mib: float | None = None
    sign: int = 1

    @property
    def scale(self) -> float:
        return self.sign * self.depth**-0.5

    def __str__(self) -> str:
        sizes = f"B={self.batch} N={self.queries} M={self.keys} D={self.depth} V={self.value_depth}"
        layout = "channel-first" if self.channel_first else "row-major"
        workspace = " workspace_mib=0" if self.workspace_mib == 0 else ""
        return f"{sizes} {layout}{workspace}" + (" scale<0" if self.sign < 0 else "")


def large(head: tuple[int, int]) -> tuple[Trial, ...]:
    """Problems of one head size (D, V), multiples of 16, for every configuration of a kernel.

    The last has more tiles than a Hopper GPU has multiprocessors: blocks that stay take several.
    """
    return (
        Trial(2, 296, 264, *head, channel_first=True),
        Trial(2, 300, 264, *head),
        Trial(140, 33, 130, *head),
    )


def trials(head: tuple[int, int]) -> tuple[Trial, ...]:
    """More problems of that head size, small enough for Triton's interpreter."""
    depth, value_depth = head
    return (
        Trial(1, 33, 1031, depth, value_depth, channel_first=True),
        Trial(2, 129, 97, depth - 3, value_depth - 5, sign=-1),
        Trial(1, 128, 256, depth, value_depth, sign=-1),
        Trial(1, 70, 136, depth, value_depth, channel_first=True, workspace_mib=0),
    )


def problem(head: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Problem:
    """A problem of that head size, to ask who serves it."""
    sizes = trials(head)[0][:3]
    return Problem(*sizes, *head, dtype, device.type, device.index)


def operands(trial: Trial, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Random query, key, value, and a gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    sizes = (
        (trial.queries, trial.depth),
        (trial.keys, trial.depth),
        (trial.keys, trial.value_depth),
        (trial.queries, trial.value_depth),
    )
    drawn = (torch.randn(trial.batch, *size, generator=generator, device="cpu") for size in sizes)
    moved = (t.to(dtype).to(device) for t in drawn)
    return tuple(t.mT.contiguous().mT if trial.channel_first else t for t in moved)


def definition(trial: Trial, *tensors: torch.Tensor) -> torch.Tensor:
    """The output in plain PyTorch, differentiable."""
    return reference.attention(*tensors, trial.scale)


def forward(module: Any, trial: Trial, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Output of a backend, and what its backward wants back."""
    return module.forward(*tensors, trial.scale, trial.workspace_mib)


def backward(
    module: Any,
    trial: Trial,
    grad: torch.Tensor,
    tensors: tuple[torch.Tensor, ...],
    kept: tuple[torch.Tensor, ...],
) -> tuple[torch.Tensor, ...]:
    """Gradients of a backend, from what a forward returned."""
    return module.backward(grad, *tensors, *kept, trial.scale, trial.workspace_mib)


def like(tensors: tuple[torch.Tensor, ...]) -> Trial:
    """The trial that describes operands which a model brought."""
    (batch, queries, depth), (_, keys, value_depth) = tensors[0].shape, tensors[2].shape
    return Trial(batch, queries, keys, depth, value_depth)


def call(backend: str, *tensors: torch.Tensor) -> torch.Tensor:
    """The public operation in one backend, differentiable."""
    from nlkernels.ops.softmax import op

    return op.attention(*tensors, tensors[0].shape[2] ** -0.5, backend)
