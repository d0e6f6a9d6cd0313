"""Small problems that show whether dot-product kernels are right; see `nlkernels._trust`."""

from typing import Any

import torch

from nlkernels._spec import Problem
from nlkernels.ops._unnormalised_suite import *  # noqa: F403
from nlkernels.ops._unnormalised_suite import Trial
from nlkernels.ops.dot_product import reference


def problem(head: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Problem:
    """A problem of that head size, to ask who serves it: short, as the kernels' problems are."""
    return Problem(1, 16, 16, *head, dtype, device.type, device.index)


def forward(module: Any, trial: Trial, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Output of a backend, and the state that its backward is given."""
    return module.forward(*tensors, trial.scale, trial.workspace_mib, keep=True)


def definition(trial: Trial, *tensors: torch.Tensor) -> torch.Tensor:
    """The output in plain PyTorch, differentiable."""
    return reference.attention(*tensors, trial.scale)


def call(backend: str, *tensors: torch.Tensor) -> torch.Tensor:
    """The public operation in one backend, differentiable."""
    from nlkernels.ops.dot_product import op

    return op.attention(*tensors, 1.0, backend)
