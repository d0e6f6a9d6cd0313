"""Problems for which the kernels of pointwise products are compiled, and how they are called."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch

from nlkernels.ops.pointwise.problem import PointwiseProblem


class Pointwise(NamedTuple):
    """What a block asks for in one of its steps.

    Attributes:
        dtype: of the operands.
        step: "project" x, "merge" rows with x, or the "gradient" of x from those of three
            projections.
        layout: of x, its gradient and the block's result: "maps" or "rows".
        positions: 3136 leaves tails that descriptors can read, 3137 is read by pointers.
        channels: of the projections; x has 512.
    """

    dtype: torch.dtype
    step: str
    layout: str = "maps"
    positions: int = 3136
    channels: int = 256
    wide: bool | None = None
    tf32: bool = False

    def operands(self) -> dict[str, torch.Tensor]:
        """x, rows of a projection, its weight and shift; tensors without memory."""
        x = torch.empty(8, self.positions, 512, dtype=self.dtype, device="meta")
        return {
            "x": x.mT.contiguous().mT if self.layout == "maps" else x,
            "rows": x.new_empty(8, self.positions, self.channels),
            "weight": x.new_empty(self.channels, 512),
            "shift": x.new_empty(self.channels, dtype=torch.float32),
        }

    def is_common(self) -> bool:
        """Whether the widest instructions have room, and operands can be read as they are meant."""
        return self.channels >= 64 and self.positions % 8 == 0


def described(case: Pointwise) -> PointwiseProblem:
    tensors = case.operands()
    if case.step == "project":
        return PointwiseProblem.of(tensors["x"], 512, case.channels)
    sources = 3 if case.step == "gradient" else 1
    return PointwiseProblem.of(tensors["rows"], sources * case.channels, 512)


def run(module: ModuleType, case: Pointwise) -> object:
    x, rows, weight, shift = case.operands().values()
    maps = case.layout == "maps"
    if case.step == "project":
        module.product([(x, weight)], shift, None, False)
        return module.outer(rows, x)
    if case.step == "merge":
        module.product([(rows, weight.mT.contiguous())], shift.new_empty(512), x, maps)
        return module.outer(x, rows)
    return module.product([(rows, weight.mT)] * 3, None, x, maps)


HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
# Other configurations: a projection's, and those of the widest result.
OTHERS = [
    *(Pointwise(dtype, "project", channels=64) for dtype in (BRAIN, SINGLE)),
    *(Pointwise(dtype, "merge") for dtype in (BRAIN, SINGLE)),
]
FIRST = [
    *OTHERS,
    *(Pointwise(dtype, "project") for dtype in (BRAIN, SINGLE)),
    *(Pointwise(dtype, "gradient") for dtype in (BRAIN, SINGLE)),
    Pointwise(BRAIN, "merge", "rows"),
    Pointwise(HALF, "project", "rows"),
    *(Pointwise(dtype, "merge", positions=3137) for dtype in (BRAIN, SINGLE)),
    Pointwise(HALF, "project", wide=True),
    Pointwise(SINGLE, "project", "rows", tf32=True),
]
