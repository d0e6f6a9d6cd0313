"""Problems for which the kernels of max pooling are compiled, and how they are called."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch

from nlkernels.ops.pool.problem import PoolProblem


class Pool(NamedTuple):
    """One problem of max pooling."""

    dtype: torch.dtype
    window: tuple[int, int, int]
    channels_last: bool = False
    wide: bool | None = None
    tf32: bool = False

    def operands(self) -> dict[str, torch.Tensor]:
        """x; a tensor without memory."""
        x = torch.empty(8, 512, 4, 28, 28, dtype=self.dtype, device="meta")
        return {"x": x.to(memory_format=torch.channels_last_3d) if self.channels_last else x}

    def is_common(self) -> bool:
        """Whether operands can be read as they are meant."""
        return True


def described(case: Pool) -> PoolProblem:
    return PoolProblem.of(case.operands()["x"], case.window)


def run(module: ModuleType, case: Pool) -> object:
    x, window = case.operands()["x"], list(case.window)
    out, winners = module.forward(x, window)
    return module.backward(out, winners, x, window)


# Winners of 2, 4 and 8 bits; layouts differ in what is 1.
FIRST = [
    Pool(torch.bfloat16, (1, 2, 2)),
    Pool(torch.bfloat16, (1, 2, 2), channels_last=True),
    Pool(torch.float32, (2, 2, 2), channels_last=True),
    Pool(torch.float32, (1, 2, 2), wide=True),
    Pool(torch.float16, (3, 3, 3)),
]
