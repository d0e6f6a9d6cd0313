"""The region operation, a depthwise 3-D convolution, against the other ways to compute it.

`conv3d` is torch's convolution with a group per channel, `masked_dense` the published code's: a
convolution in groups of 32 channels whose weight a fixed mask leaves one channel of each. Ours are
`chunked`, `triton` and `auto`. Truth is computed in float64 on some channels; what these leave out
is compared between providers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import nlkernels
from benchmarks.checks import AGREEMENT, FACTORS, WrongResult, rounding
from benchmarks.measure import PEER_SLACK, Call, compare, derive

GROUP = 32
SAMPLE = 6
"""Channels that are compared with the truth."""

NAMES = ("out", "grad_x", "grad_weight")
_FACTORS = {"out": FACTORS["out"], "grad_x": 3.0, "grad_weight": 3.0}

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last_3d}


@dataclass(frozen=True)
class RegionCase:
    """One aggregation: x (batch, channels, *positions), a weight of `taps` for each channel."""

    name: str
    batch: int
    channels: int
    positions: tuple[int, int, int]
    taps: tuple[int, int, int]
    format: str
    kind: str = "region"

    @property
    def shape(self) -> dict[str, int]:
        """Sizes by letter, as rows hold them."""
        sizes = (self.batch, self.channels, *self.positions, *self.taps)
        return dict(zip(("B", "C", "T", "H", "W", "KT", "KH", "KW"), sizes, strict=True))

    def flop(self, passes: str) -> int:
        """Two operations a tap, and as many again for either gradient."""
        t, h, w = self.positions
        kt, kh, kw = self.taps
        forward = 2 * self.batch * self.channels * t * h * w * kt * kh * kw
        return forward if passes == "forward" else 3 * forward

    def traffic(self, passes: str, itemsize: int) -> int:
        """Fewest bytes: x and out; then their gradients, and x again."""
        t, h, w = self.positions
        tensor = self.batch * self.channels * t * h * w * itemsize
        return (2 if passes == "forward" else 5) * tensor


def _layer(stage: str, channels: int, size: int, taps: tuple[int, int, int]) -> list[RegionCase]:
    return [
        RegionCase(f"rnl_r50_8seg/{stage}@224/{form}", 8, channels, (8, size, size), taps, form)
        for form in FORMATS
    ]


LAYERS = (_layer("layer2", 256, 28, (3, 7, 7)), _layer("layer3", 512, 14, (3, 3, 3)))


def conv3d(x: Tensor, weight: Tensor) -> Tensor:
    padding = [taps // 2 for taps in weight.shape[1:]]
    return F.conv3d(x, weight[:, None], padding=padding, groups=x.shape[1])


def masked_dense(x: Tensor, weight: Tensor) -> Tensor:
    channels = x.shape[1]
    group = min(GROUP, channels)
    own = torch.arange(channels, device=x.device) % group
    mask = F.one_hot(own, group).to(weight.dtype)[:, :, None, None, None]
    padding = [taps // 2 for taps in weight.shape[1:]]
    return F.conv3d(x, weight[:, None] * mask, padding=padding, groups=channels // group)


def _ours(backend: str) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, weight: nlkernels.region_aggregate(x, weight, backend=backend)


OURS = ("chunked", "triton", "auto")
FUNCTIONS = {
    "conv3d": conv3d,
    "masked_dense": masked_dense,
    **{backend: _ours(backend) for backend in OURS},
}


def truth_of(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output and both gradients as sums over shifted inputs, in float64."""
    _, _, *positions = x.shape
    taps = weight.shape[1:]
    x, weight, grad = x.double(), weight.double(), grad.double()
    margins = [count // 2 for count in reversed(taps) for _ in range(2)]
    padded, padded_grad = F.pad(x, margins), F.pad(grad, margins)
    out, grad_x, grad_weight = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(weight)
    for tap in torch.cartesian_prod(*(torch.arange(count) for count in taps)).tolist():
        at = tuple(slice(a, a + n) for a, n in zip(tap, positions, strict=True))
        back = tuple(
            slice(count - 1 - a, count - 1 - a + n)
            for a, count, n in zip(tap, taps, positions, strict=True)
        )
        factor = weight[(slice(None), *tap)].view(1, -1, 1, 1, 1)
        shifted = padded[(..., *at)]
        out += factor * shifted
        grad_x += factor * padded_grad[(..., *back)]
        grad_weight[(slice(None), *tap)] = (shifted * grad).sum((0, 2, 3, 4))
    return out, grad_x, grad_weight


class RegionJudge:
    """Truth of some channels, and the first result that passed for all others."""

    def __init__(self, operands: tuple[Tensor, Tensor, Tensor], passes: str) -> None:
        x, weight, grad = operands
        channels = torch.linspace(0, x.shape[1] - 1, SAMPLE, device=x.device).long().unique()
        self._channels = channels
        part = x[:, channels], weight[channels], grad[:, channels]
        wanted = NAMES[:1] if passes == "forward" else NAMES
        truth = dict(zip(NAMES, truth_of(*part), strict=True))
        same = region_step(conv3d, part, passes)()
        self._truth = {name: truth[name] for name in wanted}
        self._limits = {}
        for name, exact in self._truth.items():
            error = same[name].double() - exact
            scale = exact.square().mean().sqrt().item()
            most = _FACTORS[name] * error.abs().max().item() + rounding(exact, x.dtype)
            rms = _FACTORS[name] * error.square().mean().sqrt().item() / scale
            self._limits[name] = (most, rms, scale)
        self._first: dict[str, Tensor] | None = None

    def check(
        self, name: str, results: dict[str, Tensor], slack: float = 1.0
    ) -> dict[str, dict[str, float]]:
        """Errors per result, as `benchmarks.checks.Judge.check` gives them."""
        errors = {}
        for key, exact in self._truth.items():
            result = results[key]
            sampled = result[self._channels] if key == "grad_weight" else result[:, self._channels]
            most, limit, scale = self._limits[key]
            error = sampled.double() - exact
            errors[key] = {
                "max": error.abs().max().item(),
                "max_limit": most,
                "rms": error.square().mean().sqrt().item() / scale,
                "rms_limit": limit,
            }
            for measure in ("max", "rms"):
                if not errors[key][measure] <= slack * errors[key][f"{measure}_limit"]:
                    raise WrongResult(f"{name}: {measure} error of {key} is {errors[key]}")
            if self._first is not None:
                other = self._first[key].float()
                gap = (result.float() - other).square().mean().sqrt().item() / scale
                if not gap <= slack * AGREEMENT * limit:
                    raise WrongResult(f"{name}: {key} differs from the first result by {gap:.3g}")
        if self._first is None:
            self._first = {key: results[key].detach().clone() for key in self._truth}
        return errors


def region_step(
    function: Callable[[Tensor, Tensor], Tensor],
    operands: tuple[Tensor, Tensor, Tensor],
    passes: str,
) -> Callable[[], dict[str, Tensor]]:
    """The call that is timed and judged: forward without a graph, or with both gradients."""
    x, weight, grad = operands

    def forward() -> dict[str, Tensor]:
        with torch.no_grad():
            return {"out": function(x, weight)}

    def forward_backward() -> dict[str, Tensor]:
        leaves = x.detach().requires_grad_(), weight.detach().requires_grad_()
        out = function(*leaves)
        return dict(
            zip(NAMES, (out.detach(), *torch.autograd.grad(out, leaves, grad)), strict=True)
        )

    return forward if passes == "forward" else forward_backward


def make_operands(
    case: RegionCase, dtype: torch.dtype, device: torch.device, seed: int = 0
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
    weight = torch.randn(case.channels, *case.taps, generator=generator) / 8
    return x, weight.to(device, dtype), grad


def measure_region(
    case: RegionCase,
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
    """Rows of `names` on one aggregation; other arguments as in `benchmarks.measure.measure`."""
    dtype = getattr(torch, dtype_name)
    operands = make_operands(case, dtype, device)
    calls = {}
    for name in names:
        function = FUNCTIONS[name]
        reason, status = (lost or {}).get(name, ""), "failed"
        if not reason and name in OURS:
            reason, status = _refusal(name, operands), "unserved"
        slack = 1.0 if name in OURS else PEER_SLACK
        step = region_step(function, operands, passes)
        calls[name] = Call(step, reason, status=status, slack=slack)
    head = {
        "case": case.name,
        "kind": case.kind,
        "dtype": dtype_name,
        "pass": passes,
        "shape": case.shape,
    }
    judge = RegionJudge(operands, passes)
    rows = compare(head, calls, judge, device, rounds=rounds, graphs=graphs, begin=begin)
    derive(rows, case.flop(passes), None)
    copied = case.traffic(passes, dtype.itemsize) / 1e6
    for row in rows:
        if row["provider"] == "auto" and row["status"] == "ok":
            row["backend"] = nlkernels.explain("region_aggregate", *operands[:2]).backend
        if "time_ms" in row:
            row["share_of_copy"] = copied / row["time_ms"]["p50"] / ceilings["copy_gb_s"]
    return rows


def _refusal(backend: str, operands: tuple[Tensor, Tensor, Tensor]) -> str:
    try:
        nlkernels.explain("region_aggregate", *operands[:2], backend=backend)
    except (NotImplementedError, AttributeError, ValueError) as error:
        return str(error)
    return ""
