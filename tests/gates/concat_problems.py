"""Problems for which the kernels of the concatenation are compiled, and how they are called."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch

from nlkernels._spec import Problem
from nlkernels.ops.concat.problem import problem


class Concat(NamedTuple):
    """One problem of the concatenation; `passes` counts them: forward only, or backward too."""

    dtype: torch.dtype
    passes: int
    size: tuple[int, int] = (3136, 784)
    value_depth: int = 256
    batch: int = 2
    wide: bool | None = None
    tf32: bool = False

    def operands(self) -> dict[str, torch.Tensor]:
        """Both scores, value and the gradient of the output; tensors without memory."""
        queries, keys = self.size
        shapes = {
            "query_score": (queries,),
            "key_score": (keys,),
            "value": (keys, self.value_depth),
            "grad": (queries, self.value_depth),
        }
        return {
            name: torch.empty(self.batch, *shape, dtype=self.dtype, device="meta")
            for name, shape in shapes.items()
        }

    def is_common(self) -> bool:
        """Whether the widest instructions have room, and operands can be read as they are meant."""
        return self.value_depth >= 64


def described(case: Concat) -> Problem:
    tensors = case.operands()
    return problem(tensors["query_score"], tensors["key_score"], tensors["value"])


def run(module: ModuleType, case: Concat) -> object:
    tensors = case.operands()
    grad = tensors.pop("grad")
    out = module.forward(**tensors)
    return out if case.passes == 1 else module.backward(grad, **tensors)


# Dot products are summed in float64 where an operand is float32.
FIRST = [Concat(torch.bfloat16, passes=2), Concat(torch.float32, passes=2)]
