"""What suites share whose kernels return the output alone, and read operands in the backward."""

from typing import Any

import torch


def forward(module: Any, trial: Any, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Output of a backend, and nothing that its backward wants back."""
    return (module.forward(*tensors),)


def backward(
    module: Any,
    trial: Any,
    grad: torch.Tensor,
    tensors: tuple[torch.Tensor, ...],
    kept: tuple[torch.Tensor, ...],
) -> tuple[torch.Tensor, ...]:
    """Gradients of a backend, from the operands."""
    return module.backward(grad, *tensors)
