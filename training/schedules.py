"""Learning rates: warm-up, then one of five shapes, by steps or by passes over the clips.

Time is counted in ``optim.unit``. Passes follow each other without a gap, so step s is at epoch
s * batch / clips, a fraction as in the published trainers that count by iteration. A milestone m
acts from the first step at or behind m, which is both ``epoch >= m`` of epochs counted from 0
(TSM, mmaction2) and ``epoch > m`` of epochs counted from 1 (region-based non-local networks).
"""

import math
from typing import Any

from .config_optim import OptimConfig


class Schedule:
    """The learning rate of every step.

    Args:
        optim: Shape, warm-up, units.
        steps: Length of the training, in steps.
        clips: Training clips of a pass; needed where ``optim.unit`` or ``cosine_every`` is epoch.

    Attributes:
        base: Rate that all factors multiply: ``lr``, scaled with the batch if ``lr_batch`` is set.

    Raises:
        ValueError: Epochs are asked for, and the clips are not given.

    Example:
        >>> schedule = Schedule(OptimConfig(lr=0.4, warmup=4, steps=10), steps=10)
        >>> [round(schedule.rate(step), 3) for step in range(6)]
        [0.1, 0.2, 0.3, 0.4, 0.4, 0.373]
    """

    def __init__(self, optim: OptimConfig, *, steps: int, clips: int | None = None) -> None:
        if clips is None and "epoch" in (optim.unit, optim.cosine_every):
            raise ValueError(
                "Schedule: expected the number of clips for a schedule by epochs, got none; "
                "pass clips"
            )
        self._optim, self._clips = optim, clips
        self._end = self._time(steps)
        self._plateau = Plateau(optim.patience)
        self.base = optim.lr
        if optim.lr_batch is not None:
            self.base *= optim.batch / optim.lr_batch

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        optim, time = self._optim, self._time(step)
        if time >= optim.warmup:
            return self.base * self._factor(time)
        low, high = self.base * optim.warmup_start, self.base
        if optim.warmup_to == "schedule":
            high *= self._factor(optim.warmup)
        done, length = self._warmed(step, time)
        return low + (high - low) * done / length

    def tested(self, loss: float) -> None:
        """Tell the result of a test; only ``plateau`` listens.

        Args:
            loss: Test loss; lower is better.
        """
        self._plateau.tested(loss)

    def state_dict(self) -> dict[str, Any]:
        """What the rate depends on besides the step."""
        plateau = self._plateau
        return {"best": plateau.best, "bad": plateau.bad, "reductions": plateau.reductions}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the state of another schedule."""
        vars(self._plateau).update(state)

    def _time(self, step: int) -> float:
        if self._optim.unit == "step":
            return step
        return step * self._optim.batch / self._clips

    def _warmed(self, step: int, time: float) -> tuple[float, float]:
        """What a step of the warm-up has behind it, and the whole of it."""
        optim = self._optim
        if optim.warmup_every == "epoch":
            epoch, length = _whole(time), optim.warmup
            if optim.warmup_form == "both":
                length -= 1
            return epoch + (optim.warmup_form == "last"), length
        if optim.warmup_form == "first":
            return time, optim.warmup
        if optim.warmup_form == "last":
            return min(self._time(step + 1), optim.warmup), optim.warmup
        # In epochs a warm-up may end between two steps.
        last = optim.warmup - 1
        if optim.unit == "epoch":
            last = math.ceil(optim.warmup * self._clips / optim.batch) - 1
        return (step, last) if last > 0 else (1, 1)

    def _factor(self, time: float) -> float:
        optim = self._optim
        if optim.schedule == "constant":
            return 1.0
        if optim.schedule == "step":
            return optim.gamma ** sum(time >= milestone for milestone in optim.milestones)
        if optim.schedule == "multistep":
            end = 0
            for length, factor in zip(optim.lengths, optim.rates, strict=True):
                end += length
                if time < end:
                    return factor
            return optim.rates[-1]
        if optim.schedule == "plateau":
            return optim.gamma**self._plateau.reductions
        return self._cosine(time)

    def _cosine(self, time: float) -> float:
        optim = self._optim
        start = optim.warmup if optim.cosine_from == "warmup" else 0
        end = self._end if optim.cosine_period is None else start + optim.cosine_period
        if optim.cosine_every == "epoch":
            epoch = self._clips / optim.batch if optim.unit == "step" else 1
            time = _whole(time / epoch) * epoch
        # A training may be shorter than its warm-up.
        progress = (time - start) / (end - start) if end > start else 0.0
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _whole(epochs: float) -> int:
    """Whole epochs; a rounded quotient may just miss the boundary that it lies on."""
    return math.floor(epochs + 1e-9)


class Plateau:
    """Counts how often the rate is reduced because tests stopped improving.

    Counts as torch's ``ReduceLROnPlateau`` does: better is lower by more than 1 in 10000.

    Args:
        patience: Tests in a row without improvement that do not reduce the rate yet.
    """

    _BETTER = 1 - 1e-4

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.best = math.inf
        self.bad = 0
        self.reductions = 0

    def tested(self, loss: float) -> None:
        """Take in a test loss."""
        if loss < self.best * self._BETTER:
            self.best, self.bad = loss, 0
            return
        self.bad += 1
        if self.bad > self.patience:
            self.bad = 0
            self.reductions += 1
