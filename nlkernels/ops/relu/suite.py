"""Small problems that show whether relu kernels are right; see `nlkernels._trust`."""

import torch

from nlkernels.ops._unnormalised_suite import *  # noqa: F403
from nlkernels.ops._unnormalised_suite import Trial
from nlkernels.ops.relu import reference
from nlkernels.ops.softmax.suite import problem as problem


def definition(trial: Trial, *tensors: torch.Tensor) -> torch.Tensor:
    """The output in plain PyTorch, differentiable."""
    return reference.attention(*tensors, trial.scale)


def call(backend: str, *tensors: torch.Tensor) -> torch.Tensor:
    """The public operation in one backend, differentiable."""
    from nlkernels.ops.relu import op

    return op.attention(*tensors, 1.0, backend)
