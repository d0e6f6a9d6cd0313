"""A network and its steps: with data, to be timed, and without, to be reckoned beforehand."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from nlkernels._memory import MIB, PeakMemory
from nlkernels.training.config import OptimConfig
from nlkernels.training.measure import count_flops, count_parameters, needed_mib
from nlkernels.training.memory import state_mib
from nlkernels.training.optimisers import make_optimiser

from .model_cases import ModelCase, build, named_blocks
from .model_judge import Results
from .reckoned import ReckonedMemory

PASSES = ("training", "forward")
"""training: forward, backward and update, batch statistics. forward: no graph, running ones."""


class Attention(NamedTuple):
    """The attention of a block: query and key positions of one, and which backend takes it."""

    queries: int
    keys: int
    backend: str


class Network(NamedTuple):
    """A network and what moves its weights: by nothing, as the rate is 0, at the full cost."""

    model: nn.Module
    optimiser: torch.optim.Optimizer

    @classmethod
    def make(cls, case: ModelCase, variant: str, dtype: str, passes: str, seed: int = 0) -> Network:
        """A variant of a case on the CPU, in the mode that a pass needs."""
        return cls.of(build(case, variant, dtype, seed), passes)

    @classmethod
    def of(cls, model: nn.Module, passes: str) -> Network:
        """A model in the mode that a pass needs."""
        optimiser = make_optimiser(model.train(passes == "training"), OptimConfig(steps=1))
        for group in optimiser.param_groups:
            group["lr"] = 0.0
        return cls(model, optimiser)

    @property
    def state_mib(self) -> float:
        """Weights, buffers and, once a step was taken, momentum."""
        return state_mib(self.model, self.optimiser)

    def step(self, call: Callable[[Tensor], Tensor], clips: Tensor, labels: Tensor) -> Results:
        """A training step, or a forward pass where the model is in evaluation mode.

        Args:
            call: The model, or compiled code of it.
            clips: (B, 3, T, H, W).
            labels: (B,) class numbers.

        Returns:
            Logits, and after a training step the gradient of every trained parameter by its name.
        """
        if not self.model.training:
            with torch.no_grad():
                return {"logits": call(clips)}
        logits = call(clips)
        nn.functional.cross_entropy(logits, labels).backward()
        self.optimiser.step()
        named = self.model.named_parameters()
        gradients = {name: p.grad for name, p in named if p.grad is not None}
        self.optimiser.zero_grad(set_to_none=True)
        return {"logits": logits.detach()} | gradients

    def peak_mib(self, clips: Tensor, labels: Tensor) -> float:
        """Peak of a step that runs, its clips included, above what is held before."""
        with PeakMemory(clips.device) as peak:
            self.step(self.model, clips, labels)
        return needed_mib(peak) + clips.numel() * clips.element_size() / MIB


class Reckoned:
    """A network without data, asked what its steps take: nothing runs, no memory is needed.

    Args:
        case: The network; of any size.
        variant: A key of `model_cases.VARIANTS` that is no compiled code.
        dtype: "float32", or "bfloat16" for autocast.
        passes: "training" or "forward".

    Attributes:
        parameters: Trainable values.
        state_mib: Weights, buffers and, when training, momentum.
    """

    def __init__(self, case: ModelCase, variant: str, dtype: str, passes: str) -> None:
        self.case, self._dtype = case, dtype
        self._mode = FakeTensorMode()
        self._answers: dict[int, tuple[float, float, int]] = {}
        with self._mode:
            self._network = Network.make(case, variant, dtype, passes)
            if passes == "training":  # in whose first step momentum appears
                self._step(case.batch)
        self.parameters = count_parameters(self._network.model)
        self.state_mib = self._network.state_mib

    def _step(self, batch: int) -> float:
        """Takes a step; returns the size of its clips in MiB."""
        clips = torch.empty(self.case.clip_shape(batch))
        labels = torch.zeros(batch, dtype=torch.int64)
        self._network.step(self._network.model, clips, labels)
        return clips.numel() * clips.element_size() / MIB

    def _asked(self, batch: int) -> tuple[float, float, int]:
        """Peak of a step with its clips, size of the clips, both in MiB; its operations."""
        if batch not in self._answers:
            counter = FlopCounterMode(display=False)
            with self._mode, counter, ReckonedMemory() as peak:
                size = self._step(batch)
            self._answers[batch] = peak.live_mib, size, counter.get_total_flops()
        return self._answers[batch]

    def peak_mib(self, batch: int, *, clips: bool = False) -> float:
        """Peak of live tensor bytes of a step above what is held before.

        Args:
            batch: Clips of the step.
            clips: Count them, too.
        """
        peak, size, _ = self._asked(batch)
        return peak if clips else peak - size

    def flop(self, batch: int) -> int:
        """Floating-point operations of a step; a multiply-add counts as two."""
        return self._asked(batch)[2]

    def multiply_adds(self) -> int:
        """Those of the forward pass of one clip."""
        with self._mode:
            return count_flops(self._network.model, torch.empty(self.case.clip_shape(1))) // 2

    def attention(self, device: torch.device) -> list[Attention]:
        """What every block attends to, in the order of the forward pass.

        Args:
            device: Whose backends are asked about.
        """
        model, found = self._network.model, []

        def record(block: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            size = block.footprint(
                tuple(inputs[0].shape),
                torch.bfloat16 if self._dtype == "bfloat16" else torch.float32,
                device,
                model.training,
            )
            found.append(Attention(size.queries, size.keys, size.backend))

        # Gates have one query: no attention to speak of.
        blocks = [one for one in named_blocks(model).values() if hasattr(one, "footprint")]
        handles = [block.register_forward_pre_hook(record) for block in blocks]
        try:
            with self._mode, torch.no_grad():
                model(torch.empty(self.case.clip_shape()))
        finally:
            for handle in handles:
                handle.remove()
        return found
