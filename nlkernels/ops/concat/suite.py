"""Small problems that show whether concatenation kernels are right; see `nlkernels._trust`.

Sums of the scores lie on both sides of zero, and some are exactly zero: scores are multiples of
1/8, so that many are equal. Odd sizes leave tails in every tile, 256 keys leave none, 1031 take
several; scores far from zero show sums that cancel.
"""

from typing import NamedTuple

import torch

from nlkernels._spec import Problem
from nlkernels.ops._operand_suite import backward as backward
from nlkernels.ops._operand_suite import forward as forward
from nlkernels.ops.concat import reference

# V that `nlk verify` checks when none is named: that of the published blocks.
HEADS = ((64,), (128,), (256,), (512,))
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
GRADIENTS = ("d_query_score", "d_key_score", "d_value")


class Trial(NamedTuple):
    """One problem: sizes, layout of the values, and how far the scores lie from zero."""

    batch: int
    queries: int
    keys: int
    value_depth: int
    channel_first: bool = False
    shift: float = 0.0

    def __str__(self) -> str:
        sizes = f"B={self.batch} N={self.queries} M={self.keys} V={self.value_depth}"
        layout = "channel-first" if self.channel_first else "row-major"
        return f"{sizes} {layout}" + (f" scores shifted by {self.shift:g}" if self.shift else "")


def large(head: tuple[int, ...]) -> tuple[Trial, ...]:
    """Problems of one width of values, a multiple of 16, for every configuration of a kernel."""
    return Trial(2, 3100, 1031, *head, channel_first=True), Trial(3, 700, 2500, *head)


def trials(head: tuple[int, ...]) -> tuple[Trial, ...]:
    """More problems of that width, small enough for Triton's interpreter."""
    (depth,) = head
    return (
        Trial(2, 129, 97, depth - 5),
        Trial(1, 33, 1031, depth, channel_first=True),
        Trial(1, 128, 256, depth, shift=100.0),
        Trial(8, 70, 2, depth),
    )


def problem(head: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Problem:
    """A problem of that width, to ask who serves it."""
    sizes = trials(head)[0][:3]
    return Problem(*sizes, 1, *head, dtype, device.type, device.index)


def operands(trial: Trial, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Random query_score, key_score, value, and a gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    batch, queries, keys, depth = trial[:4]
    sizes = ((queries,), (keys,), (keys, depth), (queries, depth))
    drawn = [torch.randn(batch, *size, generator=generator, device="cpu") for size in sizes]
    drawn[0] = (8 * drawn[0]).round() / 8 + trial.shift
    drawn[1] = (8 * drawn[1]).round() / 8 - trial.shift
    moved = [t.to(dtype).to(device) for t in drawn]
    if trial.channel_first:
        moved[2:] = (t.mT.contiguous().mT for t in moved[2:])
    return tuple(moved)


def definition(trial: Trial, *tensors: torch.Tensor) -> torch.Tensor:
    """The output in plain PyTorch, differentiable."""
    return reference.attend(*tensors)


def like(tensors: tuple[torch.Tensor, ...]) -> Trial:
    """The trial that describes operands which a model brought."""
    (batch, queries), (_, keys, depth) = tensors[0].shape, tensors[2].shape
    return Trial(batch, queries, keys, depth)


def call(backend: str, *tensors: torch.Tensor) -> torch.Tensor:
    """The public operation in one backend, differentiable."""
    from nlkernels.ops.concat import op

    return op.attend(*tensors, backend)
