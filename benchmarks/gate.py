"""Context pooling, the channel gate's attention with one query, against the published form.

`naive` is the definition: logits by a product, softmax, a product. Ours are `chunked`, `triton` and
`auto`. The transform is the identity: out = x + context. Truth is computed in float64, whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import nlkernels
from benchmarks.checks import FACTORS, WrongResult, rounding
from benchmarks.measure import Call, compare, derive
from benchmarks.region import FORMATS, OURS, region_step

NAMES = ("out", "grad_x", "grad_weight")


@dataclass(frozen=True)
class GateCase:
    """One pooling: x (batch, channels, *positions), a weight for each channel."""

    name: str
    batch: int
    channels: int
    positions: tuple[int, int, int]
    format: str
    kind: str = "gate"

    @property
    def shape(self) -> dict[str, int]:
        """Sizes by letter, as rows hold them."""
        sizes = (self.batch, self.channels, *self.positions)
        return dict(zip(("B", "C", "T", "H", "W"), sizes, strict=True))

    def flop(self, passes: str) -> int:
        """Two products with x forward; two and the outer products of x's gradient backward."""
        forward = 4 * self.batch * self.channels * math.prod(self.positions)
        return forward if passes == "forward" else 3 * forward

    def traffic(self, passes: str, itemsize: int) -> int:
        """Fewest bytes: x twice and out; then x and both gradients."""
        tensor = self.batch * self.channels * math.prod(self.positions) * itemsize
        return (3 if passes == "forward" else 6) * tensor


LAYERS = tuple(
    GateCase(f"rnl_r50_8seg/{stage}@224/{form}", 8, channels, (8, size, size), form)
    for stage, channels, size in (("layer2", 512, 28), ("layer3", 1024, 14))
    for form in FORMATS
)


def make_operands(
    case: GateCase, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and gradient of the output; x and its gradient in the case's memory format."""
    generator = torch.Generator().manual_seed(seed)
    shape = (case.batch, case.channels, *case.positions)
    x, grad = (
        torch.randn(shape, generator=generator)
        .to(device, dtype)
        .contiguous(memory_format=FORMATS[case.format])
        for _ in range(2)
    )
    weight = torch.randn(case.channels, generator=generator) / case.channels**0.5
    return x, weight.to(device, dtype), grad


def naive(x: Tensor, weight: Tensor) -> Tensor:
    """The published form: a 1x1 convolution's logits, softmax, product."""
    rows = x.flatten(2)
    shares = torch.softmax(weight @ rows, dim=-1)
    context = (rows @ shares.unsqueeze(-1)).squeeze(-1)
    return x + context[:, :, None, None, None]


def _ours(backend: str) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, weight: nlkernels.channel_gate(
        x, weight, transform=lambda context: context, backend=backend
    )


FUNCTIONS = {"naive": naive, **{backend: _ours(backend) for backend in OURS}}


class GateJudge:
    """Truth of everything, and what the definition errs in the same dtype."""

    def __init__(self, operands: tuple[Tensor, Tensor, Tensor], passes: str) -> None:
        truth = region_step(naive, tuple(t.double() for t in operands), passes)()
        same = region_step(naive, operands, passes)()
        self._limits = {}
        for name, exact in truth.items():
            factor, error = FACTORS.get(name, 3.0), same[name].double() - exact
            scale = exact.square().mean().sqrt().item()
            most = factor * error.abs().max().item() + rounding(exact, operands[0].dtype)
            rms = factor * error.square().mean().sqrt().item() / scale
            self._limits[name] = (exact, most, rms, scale)

    def check(
        self, name: str, results: dict[str, Tensor], slack: float = 1.0
    ) -> dict[str, dict[str, float]]:
        """Errors per result, as `benchmarks.checks.Judge.check` gives them."""
        errors = {}
        for key, (exact, most, rms, scale) in self._limits.items():
            result = results[key]
            if result.shape != exact.shape or not torch.isfinite(result).all():
                raise WrongResult(f"{name}: {key} has {tuple(result.shape)} or is not finite")
            error = result.double() - exact
            found = {"max": error.abs().max().item(), "max_limit": most}
            found |= {"rms": error.square().mean().sqrt().item() / scale, "rms_limit": rms}
            for measure in ("max", "rms"):
                if not found[measure] <= slack * found[f"{measure}_limit"]:
                    raise WrongResult(
                        f"{name}: {measure} error of {key} is {found[measure]:.3g}, more than "
                        f"the allowed {found[f'{measure}_limit']:.3g}"
                    )
            errors[key] = found
        return errors


def measure_gate(
    case: GateCase,
    dtype_name: str,
    passes: str,
    device: torch.device,
    *,
    rounds: int,
    ceilings: Mapping[str, float],
    names: Sequence[str] = tuple(FUNCTIONS),
    graphs: bool = False,
    begin: Callable[[str], None] | None = None,
    lost: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Rows of `names` on one pooling; other arguments as in `benchmarks.measure.measure`."""
    dtype = getattr(torch, dtype_name)
    operands = make_operands(case, dtype, device)
    calls = {}
    for name in names:
        reason, status = (lost or {}).get(name, ""), "failed"
        if not reason and name in OURS:
            reason, status = _refusal(name, operands), "unserved"
        calls[name] = Call(region_step(FUNCTIONS[name], operands, passes), reason, status=status)
    head = {"case": case.name, "kind": case.kind, "dtype": dtype_name, "pass": passes}
    head["shape"] = case.shape
    judge = GateJudge(operands, passes)
    rows = compare(head, calls, judge, device, rounds=rounds, graphs=graphs, begin=begin)
    derive(rows, case.flop(passes), None)
    copied = case.traffic(passes, dtype.itemsize) / 1e6
    for row in rows:
        if row["provider"] == "auto" and row["status"] == "ok":
            row["backend"] = nlkernels.explain("channel_gate", *operands[:2]).backend
        if "time_ms" in row:
            row["share_of_copy"] = copied / row["time_ms"]["p50"] / ceilings["copy_gb_s"]
    return rows


def _refusal(backend: str, operands: tuple[Tensor, Tensor, Tensor]) -> str:
    try:
        nlkernels.explain("channel_gate", *operands[:2], backend=backend)
    except NotImplementedError as error:
        return str(error)
    return ""
