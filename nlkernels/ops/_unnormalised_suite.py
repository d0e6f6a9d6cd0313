"""Small problems that show whether kernels without a softmax are right; see `nlkernels._trust`.

The operands are those of the softmax suite. A kind's own module adds `problem`, `definition`,
`call`.
"""

from typing import Any

import torch

from nlkernels.ops.softmax.suite import (
    DTYPES,
    GRADIENTS,
    HEADS,
    Trial,
    large,
    like,
    operands,
    trials,
)

__all__ = [
    "DTYPES",
    "GRADIENTS",
    "HEADS",
    "Trial",
    "backward",
    "forward",
    "large",
    "like",
    "operands",
    "trials",
]


def forward(module: Any, trial: Trial, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Output of a backend, of a kind whose backward wants nothing back."""
    return (module.forward(*tensors, trial.scale, trial.workspace_mib),)


def backward(
    module: Any,
    trial: Trial,
    grad: torch.Tensor,
    tensors: tuple[torch.Tensor, ...],
    kept: tuple[torch.Tensor, ...],
) -> tuple[torch.Tensor, ...]:
    """Gradients of a backend; `kept` is what its forward returned."""
    _, *state = kept
    return module.backward(grad, *tensors, *state, trial.scale, trial.workspace_mib)
