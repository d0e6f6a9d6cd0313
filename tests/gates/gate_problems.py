"""Problems for which the kernels of context pooling are compiled, and how they are called."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch

from nlkernels.ops.gate.problem import GateProblem
from nlkernels.ops.gate.suite import laid_out


class Gate(NamedTuple):
    """One problem of context pooling; `passes`: both, or only the backward."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    layout: str
    passes: tuple[str, ...] = ("forward", "backward")
    wide: bool | None = None
    tf32: bool = False

    def operands(self) -> dict[str, torch.Tensor]:
        """x, weight and the gradient of the output; tensors without memory."""
        x = torch.empty(self.shape, dtype=self.dtype, device="meta")
        return {
            "x": laid_out(x, self.layout),
            "weight": x.new_empty(self.shape[1]),
            "grad": x.new_empty(self.shape[:2]),
        }

    def is_common(self) -> bool:
        """Whether the widest instructions have room, and operands can be read as they are meant."""
        return self.shape[1] >= 64


def described(case: Gate) -> GateProblem:
    tensors = case.operands()
    return GateProblem.of(tensors["x"], tensors["weight"])


def run(module: ModuleType, case: Gate) -> object:
    tensors = case.operands()
    x, weight, grad = tensors["x"], tensors["weight"], tensors["grad"]
    if "forward" in case.passes:
        module.forward(x, weight)
    return module.backward(grad, x, weight, torch.empty_like(grad))


# The widest takes the most registers, in float32 and backward; layouts differ in what is 1.
FIRST = [
    Gate(torch.bfloat16, (2, 512, 8, 28, 28), "ncdhw"),
    Gate(torch.float32, (2, 2048, 8, 7, 7), "channels_last", passes=("backward",)),
]
