"""Context pooling, the channel gate's attention with one query, against the published form.

`naive` is the definition: logits by a product, softmax, a product. Ours are those of
`benchmarks.features`. The transform is the identity: out = x + context. Truth is computed in
float64, whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import nlkernels

from .features import FORMATS, OURS, FeatureJudge, Function, Operands, Operation, step


@dataclass(frozen=True)
class GateCase:
    """One pooling: x (batch, channels, *positions), a weight for each channel."""

    name: str
    batch: int
    channels: int
    positions: tuple[int, int, int]
    format: str
    kind: str = "gate"
    groups: tuple[str, ...] = ()

    @property
    def shape(self) -> dict[str, int]:
        """Sizes by letter, as rows hold them."""
        sizes = (self.batch, self.channels, *self.positions)
        return dict(zip(("B", "C", "T", "H", "W"), sizes, strict=True))

    def make_weight(self, generator: torch.Generator) -> Tensor:
        """One value for each channel."""
        return torch.randn(self.channels, generator=generator) / self.channels**0.5

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
CASES = LAYERS


def naive(x: Tensor, weight: Tensor) -> Tensor:
    """The published form: a 1x1 convolution's logits, softmax, product."""
    rows = x.flatten(2)
    shares = torch.softmax(weight @ rows, dim=-1)
    context = (rows @ shares.unsqueeze(-1)).squeeze(-1)
    return x + context[:, :, None, None, None]


def _ours(backend: str) -> Function:
    return lambda x, weight: nlkernels.channel_gate(
        x, weight, transform=lambda context: context, backend=backend
    )


FUNCTIONS = {"naive": naive, **{name: _ours(backend) for name, (backend, _) in OURS.items()}}


class GateJudge(FeatureJudge):
    """Truth of everything, and what the definition errs in the same dtype."""

    def __init__(self, operands: Operands, passes: str) -> None:
        truth = step(naive, tuple(t.double() for t in operands), passes)()
        super().__init__(truth, step(naive, operands, passes)(), operands[0].dtype)


OPERATION = Operation("channel_gate", FUNCTIONS, GateJudge)
