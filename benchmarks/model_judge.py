"""Are a network's results right? They are held against those of blocks that are known to be right.

A float64 truth of a whole network would take longer than its measurement. In bfloat16 the truth is
the same network in float32, and a result may lie from it a few times as far as plain PyTorch's does
in bfloat16. In float32 the truth is plain PyTorch's own result, and the measure is how far rounding
carries: what changes when the input changes in last bits.

In float32 that is sharp. In bfloat16 rounding alone changes a network's gradients by much of their
magnitude, so that end to end only gross errors show; therefore each block is judged alone as well,
on the input and the gradient that it gets in the network: through one block little is carried.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from .checks import WrongResult

Results = dict[str, Tensor]
Errors = dict[str, dict[str, float]]
Run = Callable[[Tensor], Results]

SLACK = 3.0
"""How many times as far as by rounding a block's result may lie from the right one."""

SLACK_OF_NETWORKS = 10.0
"""The same end to end, where how far rounding carries is a matter of luck."""

FLOOR = 1e-4
"""What is allowed at least: what sums in another order may differ."""

NUDGES = 2
"""How many nudged inputs are tried; the one that carries furthest counts."""


class Judge:
    """Results that are right, and how far from them others may lie.

    Results are judged in groups: the error of a group is that of all its values together, relative
    to their magnitude.

    Args:
        right: Results by name.
        rounded: Results that differ from the right ones by rounding alone.
        group: Name of a result -> its group.
        slack: How many times as far others may lie from them.
    """

    def __init__(
        self,
        right: Results,
        rounded: Sequence[Results],
        group: Callable[[str], str],
        slack: float = SLACK,
    ) -> None:
        self._right, self._group = right, group
        carried = [self.errors(results) for results in rounded]
        self.allowed = {
            group: max(slack * max(one[group] for one in carried), FLOOR) for group in carried[0]
        }

    @classmethod
    def of(
        cls,
        run: Run,
        x: Tensor,
        group: Callable[[str], str],
        *,
        wide: Run | None = None,
        slack: float = SLACK,
    ) -> Judge:
        """The judge of one input.

        Args:
            run: Input -> results, of plain PyTorch in the dtype under test.
            x: The input.
            group: Name of a result -> its group.
            wide: The same in float32 where `run` is not; None where it is.
            slack: How many times as far as by rounding results may lie from the right ones.
        """
        if wide is not None:
            return cls(wide(x), [run(x)], group, slack)
        rounded = [run(nudged(x, seed=1 + number)) for number in range(NUDGES)]
        return cls(run(x), rounded, group, slack)

    def check(self, name: str, results: Results, slack: float = 1.0) -> Errors:
        """Errors of one form.

        Args:
            name: What it is called in messages.
            results: By the names of the right ones, or some of them: another package names its
                weights as it likes.
            slack: Multiplies what is allowed.

        Returns:
            group -> {"relative", "allowed"}.

        Raises:
            WrongResult: A result is unknown, not finite, or too far from the right one.
        """
        check_finite(name, results)
        unknown = sorted(results.keys() - self._right.keys())
        if unknown or not results:
            raise WrongResult(f"{name}: expected results that naive has, got {unknown or 'none'}")
        errors = {
            group: {"relative": error, "allowed": slack * self.allowed[group]}
            for group, error in self.errors(results).items()
        }
        for group, error in errors.items():
            if not error["relative"] <= error["allowed"]:
                raise WrongResult(
                    f"{name}: {group} are off by {error['relative']:.3g} of their magnitude, more "
                    f"than the allowed {error['allowed']:.3g}"
                )
        return errors

    def errors(self, results: Results) -> dict[str, float]:
        """Group -> error relative to the right results' magnitude."""
        sums: dict[str, list[float]] = {}
        for name, result in results.items():
            right = self._right[name].double()
            totals = sums.setdefault(self._group(name), [0.0, 0.0])
            totals[0] += (result.double() - right).square().sum().item()
            totals[1] += right.square().sum().item()
        return {group: (error / size) ** 0.5 for group, (error, size) in sums.items()}


def nudged(x: Tensor, seed: int) -> Tensor:
    """An input in which every value is about a last bit larger or smaller, at random."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, x.shape, generator=generator, dtype=torch.int8).to(x.device)
    return x * (1 + torch.finfo(x.dtype).eps * (2 * signs - 1))


def check_finite(name: str, results: Results) -> None:
    """Raise WrongResult unless all results are finite."""
    for key, tensor in results.items():
        if not torch.isfinite(tensor).all():
            raise WrongResult(f"{name}: {key} is not finite everywhere")


class ModelJudge:
    """Judges forms of a network end to end, and each block on its own.

    Args:
        step: Clips -> logits and, after a training step, gradients by parameter, of the network
            with blocks that are right.
        wide: The same in float32 where `step` is in bfloat16; None where it is not.
        blocks: Those blocks by name.
        clips: (B, 3, T, H, W).
        forms: Variant -> its blocks by name; empty where they do not run one by one.
        unjudged: Variants that compute something else: only finite results are asked.
    """

    def __init__(
        self,
        step: Run,
        wide: Run | None,
        blocks: Mapping[str, nn.Module],
        clips: Tensor,
        forms: Mapping[str, Mapping[str, nn.Module]],
        unjudged: Sequence[str] = (),
    ) -> None:
        self.forms, self.unjudged = forms, unjudged
        self._autocast = wide is not None
        self._seen = Seen(blocks)
        with self._seen:
            step(clips)
        self._network = Judge.of(step, clips, _group_of_network, wide=wide, slack=SLACK_OF_NETWORKS)
        self._blocks = {name: self._judge(name, block) for name, block in blocks.items()}

    def check(self, name: str, results: Results, slack: float = 1.0) -> Errors:
        """Errors of one variant, see `Judge.check`; of the blocks the worst one's."""
        if name in self.unjudged:
            check_finite(name, results)
            return {}
        errors = self._network.check(name, results, slack)
        for place, block in self.forms.get(name, {}).items():
            found = self._results(place, block, self._seen.inputs[place])
            for group, error in self._blocks[place].check(f"{name}, {place}", found, slack).items():
                worst = errors.setdefault(group, error)
                if error["relative"] / error["allowed"] > worst["relative"] / worst["allowed"]:
                    errors[group] = error
        return errors

    def _judge(self, name: str, block: nn.Module) -> Judge:
        def run(x: Tensor) -> Results:
            return self._results(name, block, x)

        def wide(x: Tensor) -> Results:
            grad = self._seen.grads[name]
            return block_results(block, x.float(), None if grad is None else grad.float())

        x = self._seen.inputs[name]
        return Judge.of(run, x, group_of_block, wide=wide if self._autocast else None)

    def _results(self, name: str, block: nn.Module, x: Tensor) -> Results:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self._autocast):
            return block_results(block, x, self._seen.grads[name])


class Seen:
    """Context manager that keeps what blocks of a network get: inputs, and gradients of outputs."""

    def __init__(self, blocks: Mapping[str, nn.Module]) -> None:
        self._blocks = blocks
        self.inputs: dict[str, Tensor] = {}
        self.grads: dict[str, Tensor | None] = dict.fromkeys(blocks)

    def __enter__(self) -> Seen:
        self._handles = [
            block.register_forward_hook(
                lambda _, inputs, out, name=name: self._keep(name, inputs, out)
            )
            for name, block in self._blocks.items()
        ]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _keep(self, name: str, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        self.inputs[name] = inputs[0].detach().clone()
        if out.requires_grad:
            out.register_hook(lambda grad: self.grads.update({name: grad.detach().clone()}))


def block_results(
    block: nn.Module,
    x: Tensor,
    grad: Tensor | None,
    call: Callable[[Tensor], Tensor] | None = None,
) -> Results:
    """Output of a block and, with the gradient of it, gradients of input and weights by name.

    Args:
        block: Holds the weights.
        x: (B, C, T, H, W).
        grad: Gradient of the output; None for no backward.
        call: What is called instead of the block, as compiled code of it.
    """
    call = block if call is None else call
    if grad is None:
        with torch.no_grad():
            return {"out": call(x)}
    x = x.detach().requires_grad_()
    names, parameters = zip(*block.named_parameters(), strict=True)
    out = call(x)
    grads = torch.autograd.grad(out, (x, *parameters), grad.to(out.dtype))
    return {"out": out.detach()} | dict(zip(("x", *names), grads, strict=True))


def _group_of_network(name: str) -> str:
    if name == "logits":
        return "logits"
    return "gradients in blocks" if ".nl." in name else "other gradients"


def group_of_block(name: str) -> str:
    """Which results of a block are judged together, by the name of one."""
    known = {"out": "outputs of blocks", "x": "gradients of blocks' inputs"}
    return known.get(name, "gradients of blocks' weights")
