"""The training loop: one for ``nlk train`` and ``nlk compare``.

A step is batch, learning rate, update (``updates.py``), record. Between two steps the loop looks
whether it was asked to stop; what is saved and tested then is up to its caller.
"""

import resource
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from nlkernels._memory import MIB

from .distributed import ALONE, Processes
from .freezing import train_mode
from .schedules import Schedule
from .stopping import StopSignals
from .updates import Stopwatch, Updater


@dataclass(frozen=True)
class StepRecord:
    """What one training step did; times of this process in milliseconds."""

    step: int
    """Number of the step, from 1."""
    loss: float
    """Mean cross-entropy of the batch."""
    accuracy: float
    """Share of the batch that was classified correctly before the update."""
    lr: float
    """Learning rate of the update, before the factors of parameter groups."""
    grad_norm: float | None
    """Euclidean norm of all gradients before clipping; None if the update was left out."""
    data_ms: float
    """Waiting for the batch and moving it to the device."""
    forward_ms: float
    """Forward pass and loss."""
    backward_ms: float
    """Backward pass."""
    optimiser_ms: float
    """Update of the parameters."""
    clips_per_s: float = 0.0
    """Clips of the step, of all processes, by the sum of the four times."""
    peak_mib: float = 0.0
    """Peak so far of the GPU allocator, on CPU of the resident set."""
    skips: int = 0
    """Updates left out so far because gradients overflowed float16."""


def train(
    updater: Updater,
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    schedule: Schedule,
    *,
    steps: int,
    start: int = 0,
    on_step: Callable[[StepRecord, bool], None],
    stop: StopSignals | None = None,
    processes: Processes = ALONE,
) -> None:
    """Train a model in place.

    Args:
        updater: Holds model, optimiser and device.
        batches: Clips (B, C, T, H, W), labels (B,) and clip numbers (B,) of step ``start`` onwards,
            of this process.
        schedule: Learning rate of every step.
        steps: Length of the whole training.
        start: Steps that were already taken.
        on_step: Called after every step with its record, and whether any process was asked to stop;
            it ends the loop by an exception. It may leave the model in evaluation mode.
        stop: Signals to look at; without it nothing stops the loop.
        processes: Those that train together, as the updater knows them.

    Raises:
        NonFiniteError: The loss or a gradient is not finite; parameters are those of the step
            before.
    """
    stop = StopSignals() if stop is None else stop
    watch = Stopwatch(updater.device)
    iterator = iter(batches)
    for step in range(start, steps):
        train_mode(updater.model, updater.optim)
        # Tests and checkpoints behind the last step are no waiting for data.
        watch.lap_ms()
        # With several processes all of them stop behind the same step.
        with stop.waiting(at_once=processes.count == 1):
            clips, labels, numbers = next(iterator)
        waited_ms = watch.lap_ms()
        lr = schedule.rate(step)
        for group in updater.optimiser.param_groups:
            group["lr"] = lr * group["lr_mult"]
        result = updater.step(clips, labels, watch, where=f"step {step + 1}", numbers=numbers)
        result["data_ms"] += waited_ms
        step_s = 1e-3 * sum(value for key, value in result.items() if key.endswith("_ms"))
        (asked,) = processes.means(stop.asked)
        record = StepRecord(
            step=step + 1,
            lr=lr,
            clips_per_s=processes.count * len(clips) / step_s,
            peak_mib=_peak_mib(updater.device),
            skips=updater.skips,
            **result,
        )
        on_step(record, asked > 0)


def _peak_mib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    # In KiB on Linux.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB
