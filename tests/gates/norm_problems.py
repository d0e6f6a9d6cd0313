"""Problems for which the kernels of batch norms are compiled, and how they are called."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch

from nlkernels.ops.norm.problem import NormProblem


class Norm(NamedTuple):
    """The end of a block: 256 channels of attention are projected to 512.

    `base`: a residual is added, as to maps or rows; 3137 positions are read by pointers.
    """

    dtype: torch.dtype
    maps: bool = True
    base: bool = True
    positions: int = 3136
    wide: bool | None = None
    tf32: bool = False

    def operands(self) -> dict[str, torch.Tensor]:
        """Rows, weight, shift, parameters and moments; tensors without memory."""
        rows = torch.empty(8, self.positions, 256, dtype=self.dtype, device="meta")
        return {
            "rows": rows,
            "weight": rows.new_empty(512, 256),
            "shift": rows.new_empty(512, dtype=torch.float32),
            "gamma": rows.new_empty(512),
            "moments": rows.new_empty(2, 512, dtype=torch.float32),
        }

    def is_common(self) -> bool:
        """Whether operands can be read as they are meant."""
        return self.positions % 8 == 0


def described(case: Norm) -> NormProblem:
    return NormProblem.of(case.operands()["rows"], 512, case.maps)


def run(module: ModuleType, case: Norm) -> object:
    rows, weight, shift, gamma, moments = case.operands().values()
    z, _ = module.product(rows, weight, shift, case.maps)
    base = z if case.base else None
    grad = module.forward(z, moments, gamma, gamma, base, 1e-5)
    module.backward(grad, z, gamma, moments, 1e-5)
    return module.gradient(grad, z, gamma, moments, moments, 1e-5)


HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
FIRST = [
    *(Norm(BRAIN, maps) for maps in (True, False)),
    Norm(SINGLE),
    Norm(BRAIN, base=False, positions=3137),
    Norm(HALF, wide=True),
]
