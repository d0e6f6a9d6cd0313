"""The training loop: one for ``nlk train`` and ``nlk compare``, one step for it and the profiler.

A step is forward, loss, finite check, backward, finite check, learning rate, update. Nothing is
updated from a loss or a gradient that is not finite: the run stops and names the step instead.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .config import OptimConfig


class NonFiniteError(RuntimeError):
    """The loss or a gradient became infinite or NaN; the step was not applied."""


@dataclass(frozen=True)
class StepRecord:
    """What one training step did; times in milliseconds."""

    step: int
    """Number of the step, from 1."""
    loss: float
    """Mean cross-entropy of the batch."""
    accuracy: float
    """Share of the batch that was classified correctly before the update."""
    lr: float
    """Learning rate of the update."""
    grad_norm: float
    """Euclidean norm of all gradients."""
    data_ms: float
    """Waiting for the batch and moving it to the device."""
    forward_ms: float
    """Forward pass and loss."""
    backward_ms: float
    """Backward pass."""
    optimiser_ms: float
    """Update of the parameters."""


class Stopwatch:
    """Wall-clock laps that wait for the device, so that each lap holds the work it started."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last = 0.0
        self.lap_ms()

    def lap_ms(self) -> float:
        """Milliseconds since the previous lap."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        elapsed_ms = 1e3 * (now - self._last)
        self._last = now
        return elapsed_ms


def learning_rate(step: int, steps: int, optim: OptimConfig) -> float:
    """Learning rate of a step.

    Args:
        step: Number of the step, from 0.
        steps: Length of the training.
        optim: Warm-up, schedule and peak rate.

    Returns:
        Linear warm-up from ``lr / warmup`` to ``lr``, then the schedule; the cosine ends near zero
        at the last step.

    Example:
        >>> learning_rate(0, 10, OptimConfig(lr=0.4, warmup=4, steps=10))
        0.1
    """
    if step < optim.warmup:
        return optim.lr * (step + 1) / optim.warmup
    if optim.schedule == "step":
        return optim.lr * optim.gamma ** sum(step >= milestone for milestone in optim.milestones)
    if optim.schedule == "constant":
        return optim.lr
    progress = (step - optim.warmup) / max(1, steps - optim.warmup)
    return optim.lr * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimiser(model: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """The configured optimiser; weight decay spares biases and normalisation parameters."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    spared = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]
    if optim.name == "adamw":
        return torch.optim.AdamW(groups, lr=optim.lr, weight_decay=optim.weight_decay)
    return torch.optim.SGD(
        groups,
        lr=optim.lr,
        momentum=optim.momentum,
        nesterov=optim.nesterov,
        weight_decay=optim.weight_decay,
    )


def train(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    optimiser: torch.optim.Optimizer,
    optim: OptimConfig,
    *,
    steps: int,
    start: int = 0,
    device: torch.device,
    on_step: Callable[[StepRecord], None],
) -> None:
    """Train a model in place.

    Args:
        model: Takes clips (B, 3, T, H, W), gives logits (B, classes).
        batches: Clips (B, 3, T, H, W), labels (B,) and clip numbers (B,) of step ``start`` onwards.
        optimiser: Holds the model's parameters.
        optim: Learning rate and schedule.
        steps: Length of the whole training.
        start: Steps that were already taken.
        device: Where the model is.
        on_step: Called after every step.

    Raises:
        NonFiniteError: The loss or a gradient is not finite; parameters are those of the step
            before.
    """
    model.train()
    watch = Stopwatch(device)
    iterator = iter(batches)
    for step in range(start, steps):
        clips, labels, numbers = next(iterator)
        clips, labels = clips.to(device), labels.to(device)
        data_ms = watch.lap_ms()
        lr = learning_rate(step, steps, optim)
        for group in optimiser.param_groups:
            group["lr"] = lr
        result = train_step(
            model, clips, labels, optimiser, watch, where=f"step {step + 1}", numbers=numbers
        )
        on_step(StepRecord(step=step + 1, lr=lr, data_ms=data_ms, **result))


def train_step(
    model: nn.Module,
    clips: Tensor,
    labels: Tensor,
    optimiser: torch.optim.Optimizer,
    watch: Stopwatch,
    *,
    where: str,
    numbers: Tensor | None = None,
) -> dict[str, float]:
    """One update of the parameters, timed in three parts.

    Args:
        model: In training mode.
        clips: (B, 3, T, H, W) on the model's device.
        labels: (B,) class numbers.
        optimiser: Holds the model's parameters.
        watch: Its last lap ended when the batch was ready.
        where: Name of the step, for the error message.
        numbers: (B,) numbers of the clips in the data set, for the error message.

    Returns:
        loss, accuracy, grad_norm, forward_ms, backward_ms, optimiser_ms.

    Raises:
        NonFiniteError: The loss or a gradient is not finite; no parameter was changed.
    """
    optimiser.zero_grad(set_to_none=True)
    logits = model(clips)
    loss = nn.functional.cross_entropy(logits, labels)
    loss_value = loss.item()
    _check_finite("loss", loss_value, where, numbers)
    forward_ms = watch.lap_ms()

    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    grad_norm = torch.nn.utils.get_total_norm(gradients).item()
    _check_finite("gradient", grad_norm, where, numbers)
    backward_ms = watch.lap_ms()

    optimiser.step()
    optimiser_ms = watch.lap_ms()
    return {
        "loss": loss_value,
        "accuracy": (logits.argmax(1) == labels).float().mean().item(),
        "grad_norm": grad_norm,
        "forward_ms": forward_ms,
        "backward_ms": backward_ms,
        "optimiser_ms": optimiser_ms,
    }


def _check_finite(what: str, value: float, where: str, numbers: Tensor | None) -> None:
    if math.isfinite(value):
        return
    clips = "" if numbers is None else f" (clips {', '.join(map(str, numbers.tolist()))})"
    raise NonFiniteError(
        f"train: expected a finite {what}, got {value} at {where}{clips}; parameters are unchanged "
        "since the step before, lower optim.lr or lengthen optim.warmup"
    )
