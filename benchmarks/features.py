"""Operations on features x (B,C,T,H,W) with a weight for each channel: what region and gate share.

Their results are `NAMES`; x and the gradient of the output lie in one of two memory formats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

import nlkernels

from .checks import AGREEMENT, FACTORS, WrongResult, rounding
from .measure import Call, Judging, compare, derive
from .peak import forced_isa, on_isa, state_shares

NAMES = ("out", "grad_x", "grad_weight")
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last_3d}

OURS = {
    "chunked": ("chunked", ""),
    "cpp": ("cpp", ""),
    "cpp_avx2": ("cpp", "avx2"),
    "triton": ("triton", ""),
    "cuda": ("cuda", ""),
    "auto": ("auto", ""),
}
"""Our providers: the backend, and the instruction set that it is held to."""

Operands = tuple[Tensor, Tensor, Tensor]
"""x (B,C,T,H,W), weight (C,...) and the gradient of the output, shaped as x."""

Function = Callable[[Tensor, Tensor], Tensor]


class FeatureCase(Protocol):
    """One problem: x (batch, channels, *positions), and sizes by letter as rows hold them."""

    name: str
    kind: str
    batch: int
    channels: int
    positions: tuple[int, int, int]
    format: str
    shape: dict[str, int]

    def make_weight(self, generator: torch.Generator) -> Tensor:
        """Draws the weight, in float32 on the CPU."""

    def flop(self, passes: str) -> int:
        """Operations, which are also the fewest."""

    def traffic(self, passes: str, itemsize: int) -> int:
        """Fewest bytes to read and write."""


@dataclass(frozen=True)
class Operation:
    """One operation, its implementations and its judge.

    Attributes:
        name: As `nlkernels.explain` knows it.
        functions: Provider -> function of x and weight.
        judge: (operands, passes) -> the judge of a problem.
        peer_slack: Multiplies the error that providers of others are allowed.
    """

    name: str
    functions: Mapping[str, Function]
    judge: Callable[[Operands, str], Judging]
    peer_slack: float = 1.0


def make_operands(
    case: FeatureCase, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Operands:
    """x, weight and gradient of the output; x and its gradient in the case's memory format."""
    generator = torch.Generator().manual_seed(seed)
    shape = (case.batch, case.channels, *case.positions)
    x, grad = (
        torch.randn(shape, generator=generator)
        .to(device, dtype)
        .contiguous(memory_format=FORMATS[case.format])
        for _ in range(2)
    )
    return x, case.make_weight(generator).to(device, dtype), grad


def step(function: Function, operands: Operands, passes: str) -> Callable[[], dict[str, Tensor]]:
    """The call that is timed and judged: forward without a graph, or with both gradients."""
    x, weight, grad = operands

    def forward() -> dict[str, Tensor]:
        with torch.no_grad():
            return {"out": function(x, weight)}

    def forward_backward() -> dict[str, Tensor]:
        leaves = x.detach().requires_grad_(), weight.detach().requires_grad_()
        out = function(*leaves)
        grads = torch.autograd.grad(out, leaves, grad)
        return dict(zip(NAMES, (out.detach(), *grads), strict=True))

    return forward if passes == "forward" else forward_backward


class FeatureJudge:
    """Compares results with the truth, or with parts of it, and then with the first that passed.

    Args:
        truth: Result -> its truth, in float64.
        same: Result -> what the definition gives in the operands' own dtype.
        dtype: The operands' dtype.
        take: (name, whole result) -> what is compared with the truth; None: all of it.
    """

    def __init__(
        self,
        truth: Mapping[str, Tensor],
        same: Mapping[str, Tensor],
        dtype: torch.dtype,
        take: Callable[[str, Tensor], Tensor] | None = None,
    ) -> None:
        self._take = take
        self._truth = truth
        self._limits = {}
        for name, exact in truth.items():
            factor, error = FACTORS.get(name, 3.0), same[name].double() - exact
            scale = exact.square().mean().sqrt().item()
            most = factor * error.abs().max().item() + rounding(exact, dtype)
            rms = factor * error.square().mean().sqrt().item() / scale
            self._limits[name] = (most, rms, scale)
        self._first: dict[str, Tensor] | None = None

    def check(
        self, name: str, results: dict[str, Tensor], slack: float = 1.0
    ) -> dict[str, dict[str, float]]:
        """Errors per result, as `benchmarks.checks.Judge.check` gives them."""
        errors = {key: self._errors(name, key, results[key], slack) for key in self._truth}
        if self._take is not None:
            self._agree(name, results, slack)
        return errors

    def _errors(self, name: str, key: str, result: Tensor, slack: float) -> dict[str, float]:
        exact, (most, limit, scale) = self._truth[key], self._limits[key]
        compared = result if self._take is None else self._take(key, result)
        if compared.shape != exact.shape or not torch.isfinite(result).all():
            raise WrongResult(f"{name}: {key} has {tuple(result.shape)} or is not finite")
        error = compared.double() - exact
        found = {
            "max": error.abs().max().item(),
            "max_limit": most,
            "rms": error.square().mean().sqrt().item() / scale,
            "rms_limit": limit,
        }
        for measure in ("max", "rms"):
            if not found[measure] <= slack * found[f"{measure}_limit"]:
                raise WrongResult(
                    f"{name}: {measure} error of {key} is {found[measure]:.3g}, more than "
                    f"the allowed {found[f'{measure}_limit']:.3g}"
                )
        return found

    def _agree(self, name: str, results: dict[str, Tensor], slack: float) -> None:
        """What was left out of the truth has to be as in the first result."""
        if self._first is None:
            self._first = {key: results[key].detach().clone() for key in self._truth}
            return
        for key, (_, limit, scale) in self._limits.items():
            other = self._first[key].float()
            gap = (results[key].float() - other).square().mean().sqrt().item() / scale
            if not gap <= slack * AGREEMENT * limit:
                raise WrongResult(f"{name}: {key} differs from the first result by {gap:.3g}")


def measure(
    operation: Operation,
    case: FeatureCase,
    dtype_name: str,
    passes: str,
    device: torch.device,
    *,
    rounds: int,
    ceilings: Mapping[str, Any],
    names: Sequence[str] | None = None,
    seed: int = 0,
    graphs: bool = False,
    begin: Callable[[str], None] | None = None,
    lost: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Rows of `names`, by default of all; other arguments as in `benchmarks.measure.measure`."""
    dtype = getattr(torch, dtype_name)
    operands = make_operands(case, dtype, device, seed)
    calls = {}
    for name in operation.functions if names is None else names:
        reason, status = (lost or {}).get(name, ""), "failed"
        isa = ""
        if name in OURS:
            backend, isa = OURS[name]
            if not reason:
                reason, status = _refusal(operation, backend, isa, operands), "unserved"
        call = on_isa(isa, step(operation.functions[name], operands, passes))
        slack = 1.0 if name in OURS else operation.peer_slack
        calls[name] = Call(call, reason, status=status, slack=slack)
    head = {
        "case": case.name,
        "kind": case.kind,
        "dtype": dtype_name,
        "pass": passes,
        "shape": case.shape,
    }
    judge = operation.judge(operands, passes)
    rows = compare(head, calls, judge, device, rounds=rounds, graphs=graphs, begin=begin)
    least = {"least_flop": case.flop(passes), "least_bytes": case.traffic(passes, dtype.itemsize)}
    derive(rows, case.flop(passes), None, least)
    state_shares(rows, ceilings)
    for row in rows:
        if row["provider"] == "auto" and row["status"] == "ok":
            row["backend"] = nlkernels.explain(operation.name, *operands[:2]).backend
    return rows


def _refusal(operation: Operation, backend: str, isa: str, operands: Operands) -> str:
    try:
        with forced_isa(isa):
            nlkernels.explain(operation.name, *operands[:2], backend=backend)
    except NotImplementedError as error:
        return str(error)
    return ""
