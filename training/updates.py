"""One update of the parameters: parts of a batch, precision, clipping, and what stops it.

An update is forward, loss, finite check and backward of every part, then a finite check of the
gradients, clipping, and the optimiser's step. Nothing is updated from a loss or a gradient that is
not finite. With float16 the loss is scaled; a gradient that overflows then leaves the step out and
lowers the scale, which may happen a bounded number of times in a row.
"""

import math
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .config_optim import OptimConfig
from .distributed import ALONE, Processes


class NonFiniteError(RuntimeError):
    """The loss or a gradient became infinite or NaN; the step was not applied."""


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


class Updater:
    """Updates the parameters of a network, one step at a time.

    Args:
        network: Takes clips (B, C, T, H, W), gives logits (B, classes); on ``device``. It may be a
            DistributedDataParallel: gradients are then exchanged once a step.
        optimiser: Holds the network's parameters.
        optim: ``accumulate``, ``precision``, ``clip_norm``, ``max_skips``.
        device: Where the network is.
        processes: Those that train together: none updates its parameters where one cannot.

    Attributes:
        model: The network itself, without DistributedDataParallel.
        skips: Updates that were left out so far (float16 only).
    """

    def __init__(
        self,
        network: nn.Module,
        optimiser: torch.optim.Optimizer,
        optim: OptimConfig,
        device: torch.device,
        processes: Processes = ALONE,
    ) -> None:
        self._processes = processes
        self.network, self.optimiser, self.optim, self.device = network, optimiser, optim, device
        parallel = isinstance(network, DistributedDataParallel)
        self.model: nn.Module = network.module if parallel else network
        self.skips = 0
        self._skips_in_a_row = 0
        self._dtype = getattr(torch, optim.precision)
        scaled = self._dtype == torch.float16
        self._scaler = torch.amp.GradScaler(device.type, enabled=scaled)

    def step(
        self,
        clips: Tensor,
        labels: Tensor,
        watch: Stopwatch,
        *,
        where: str,
        numbers: Tensor | None = None,
    ) -> dict[str, Any]:
        """One update of the parameters, timed in four laps.

        The loss is the mean of those of ``accumulate`` equal parts, so that gradients are those of
        the whole batch wherever no layer looks at other clips.

        Args:
            clips: (B, C, T, H, W), on any device, with B a multiple of ``accumulate``.
            labels: (B,) class numbers.
            watch: Its last lap ended when the batch was there.
            where: Name of the step, for the error message.
            numbers: (B,) numbers of the clips in the data set, for the error message.

        Returns:
            loss, accuracy (means over all processes), grad_norm (None if the update was left out),
            data_ms (moving the batch), forward_ms, backward_ms, optimiser_ms.

        Raises:
            NonFiniteError: The loss or a gradient is not finite, here or in another process; no
                parameter was changed in any of them.
        """
        self.optimiser.zero_grad(set_to_none=True)
        laps_ms = dict.fromkeys(("data_ms", "forward_ms", "backward_ms"), 0.0)
        losses, correct = [], 0.0
        parts = self.optim.accumulate
        pairs = zip(clips.chunk(parts), labels.chunk(parts), strict=True)
        for part, (own, truth) in enumerate(pairs):
            own, truth = own.to(self.device), truth.to(self.device)
            laps_ms["data_ms"] += watch.lap_ms()
            with self._exchange(last=part == parts - 1):
                with self._autocast():
                    logits = self.network(own)
                # In float32 whatever the layers compute in.
                logits = logits if self._dtype == torch.float32 else logits.float()
                loss = nn.functional.cross_entropy(logits, truth)
                losses.append(loss.item())
                correct += (logits.argmax(1) == truth).float().mean().item()
                if part == parts - 1:
                    # Before gradients are exchanged: a process that ended here would leave the
                    # others waiting for its own.
                    mean_loss, accuracy = self._agreed(
                        sum(losses) / parts, correct / parts, where, numbers
                    )
                laps_ms["forward_ms"] += watch.lap_ms()
                self._scaler.scale(loss / parts).backward()
            laps_ms["backward_ms"] += watch.lap_ms()
        grad_norm = self._gradients(where, numbers)
        laps_ms["backward_ms"] += watch.lap_ms()
        if grad_norm is not None:
            self._scaler.step(self.optimiser)
        self._scaler.update()
        return {
            "loss": mean_loss,
            "accuracy": accuracy,
            "grad_norm": grad_norm,
            **laps_ms,
            "optimiser_ms": watch.lap_ms(),
        }

    def state_dict(self) -> dict[str, Any]:
        """State of the scale of losses, and how many updates were left out."""
        return {
            "scaler": self._scaler.state_dict(),
            "skips": self.skips,
            "skips_in_a_row": self._skips_in_a_row,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the state of another updater; one without a scale keeps its own."""
        if state["scaler"] and self._scaler.is_enabled():
            self._scaler.load_state_dict(state["scaler"])
        self.skips, self._skips_in_a_row = state["skips"], state["skips_in_a_row"]

    def _agreed(
        self, loss: float, accuracy: float, where: str, numbers: Tensor | None
    ) -> tuple[float, float]:
        """Loss and accuracy of all processes; an error in each of them where one has none."""
        mean_loss, accuracy = self._processes.means(loss, accuracy)
        _check_finite("loss", loss, where, numbers)
        # Whose clips they are is in that process's message.
        _check_finite("loss of every process", mean_loss, where, None)
        return mean_loss, accuracy

    def _gradients(self, where: str, numbers: Tensor | None) -> float | None:
        """Check and shorten the gradients; their norm, or None where they overflowed float16."""
        self._scaler.unscale_(self.optimiser)
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        total = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        grad_norm = total.item()
        if not math.isfinite(grad_norm) and self._scaler.is_enabled():
            self._skip(grad_norm, where)
            return None
        _check_finite("gradient", grad_norm, where, numbers)
        self._skips_in_a_row = 0
        if self.optim.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.optim.clip_norm, total)
        return grad_norm

    def _skip(self, grad_norm: float, where: str) -> None:
        if self._skips_in_a_row >= self.optim.max_skips:
            raise NonFiniteError(
                f"train: expected a finite gradient, got {grad_norm} at {where} after "
                f"{self._skips_in_a_row} steps in a row that were left out, with losses scaled by "
                f"{self._scaler.get_scale():g}; set optim.precision=bfloat16 or lower optim.lr"
            )
        self.skips += 1
        self._skips_in_a_row += 1

    def _autocast(self) -> AbstractContextManager:
        if self._dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self._dtype)

    def _exchange(self, *, last: bool) -> AbstractContextManager:
        """Gradients of the processes are averaged in the backward of the last part only."""
        if last or self.network is self.model:
            return nullcontext()
        return self.network.no_sync()


def _check_finite(what: str, value: float, where: str, numbers: Tensor | None) -> None:
    if math.isfinite(value):
        return
    clips = "" if numbers is None else f" (clips {', '.join(map(str, numbers.tolist()))})"
    raise NonFiniteError(
        f"train: expected a finite {what}, got {value} at {where}{clips}; parameters are unchanged "
        "since the step before, lower optim.lr or lengthen optim.warmup"
    )
