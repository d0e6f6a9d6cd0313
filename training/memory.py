"""What memory holds beside a step, and how many clips fit into it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from nlkernels._memory import MIB


@dataclass(frozen=True)
class BatchFit:
    """The largest batch whose step a memory holds, on the line through measured peaks."""

    gib: float
    """Size of the memory in GiB."""
    batch: int | None
    """Clips that fit, 0 if not even one does; None where the peaks do not grow with the batch."""
    fixed_mib: float
    """What no clip adds to: weights, buffers, optimiser state, gradients of the weights."""
    clip_mib: float
    """What each clip adds."""
    peaks_mib: dict[int, float]
    """Batch -> peak of a step, its clips included, above what is held before: the points."""
    deviation: float | None
    """How far a third peak lies above the line through the first two, as a share of it."""

    def __str__(self) -> str:
        points = ", ".join(map(str, self.peaks_mib))
        largest = "any batch" if self.batch is None else f"batch {self.batch}"
        text = f"{largest} fits {self.gib:g} GiB, reckoned from peaks at B={points}"
        if self.deviation is not None:
            text += f" ({self.deviation:+.1%} off the line of the first two)"
        return text


def largest_batch(peaks_mib: Mapping[int, float], *, state_mib: float, gib: float) -> BatchFit:
    """Extend the line through the peaks of small batches to the size of a memory.

    Args:
        peaks_mib: Batch -> peak of a step, its clips included, above what is held before, of two
            or three batches. The line goes through the two largest; the smallest of three says how
            straight it is.
        state_mib: What is held before the step, see ``state_mib``.
        gib: Size of the memory in GiB.

    Returns:
        The batch and the line. What fragments and other programs take is not in it.

    Raises:
        ValueError: Fewer than two or more than three batches; a size that is not positive.

    Example:
        >>> str(largest_batch({1: 400.0, 2: 700.0}, state_mib=300.0, gib=2.0))
        'batch 5 fits 2 GiB, reckoned from peaks at B=1, 2'
    """
    if not 2 <= len(peaks_mib) <= 3:
        raise ValueError(
            f"largest_batch: expected the peaks of two or three batches, got {len(peaks_mib)}; "
            "measure batch 1 and 2"
        )
    check_gib("largest_batch", gib)
    points = sorted(peaks_mib.items())
    deviation = None
    if len(points) == 3:
        expected = _through(points[0], points[1], points[2][0])
        deviation = points[2][1] / expected - 1
    clip_mib = (points[-1][1] - points[-2][1]) / (points[-1][0] - points[-2][0])
    fixed_mib = state_mib + _through(points[-2], points[-1], 0)
    batch = None
    if clip_mib > 0:
        batch = max(0, math.floor((gib * 1024 - fixed_mib) / clip_mib))
    return BatchFit(gib, batch, fixed_mib, clip_mib, dict(points), deviation)


def check_gib(where: str, gib: float) -> None:
    """Raise ValueError unless a memory can have this size."""
    if not 0 < gib < math.inf:
        raise ValueError(
            f"{where}: expected a memory of more than 0 GiB, got {gib}; give its size in GiB"
        )


def state_mib(model: nn.Module, optimiser: torch.optim.Optimizer | None = None) -> float:
    """MiB of a model's parameters and buffers, and of the optimiser's state."""
    tensors = [*model.parameters(), *model.buffers()]
    if optimiser is not None:
        for state in optimiser.state.values():
            tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / MIB


def _through(one: tuple[int, float], other: tuple[int, float], batch: int) -> float:
    """The line through two points (batch, MiB), at another batch."""
    slope = (other[1] - one[1]) / (other[0] - one[0])
    return one[1] + slope * (batch - one[0])
