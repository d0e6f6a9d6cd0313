"""The region operation, a depthwise 3-D convolution, against the other ways to compute it.

`conv3d` is torch's convolution with a group per channel, `masked_dense` the published code's: a
convolution in groups of 32 channels whose weight a fixed mask leaves one channel of each;
`slices_2d` is the sum over the weight's frames of depthwise 2-D convolutions. Ours are those of
`benchmarks.features`. Truth is computed in float64 on some channels; what these leave out is
compared between providers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import nlkernels

from .features import (
    FORMATS,
    NAMES,
    OURS,
    FeatureJudge,
    Function,
    Operands,
    Operation,
    step,
)
from .measure import PEER_SLACK

GROUP = 32
SAMPLE = 6
"""Channels that are compared with the truth."""


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
    groups: tuple[str, ...] = ()

    @property
    def shape(self) -> dict[str, int]:
        """Sizes by letter, as rows hold them."""
        sizes = (self.batch, self.channels, *self.positions, *self.taps)
        return dict(zip(("B", "C", "T", "H", "W", "KT", "KH", "KW"), sizes, strict=True))

    def make_weight(self, generator: torch.Generator) -> Tensor:
        """One value for each channel and tap."""
        return torch.randn(self.channels, *self.taps, generator=generator) / 8

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
ONE_CLIP = RegionCase(
    "rnl_r50_8seg/layer2@224/one_clip",
    1,
    256,
    (8, 28, 28),
    (3, 7, 7),
    "contiguous",
    groups=("acceptance", "targets"),
)
CASES = (ONE_CLIP, *(case for layer in LAYERS for case in layer))


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


def slices_2d(x: Tensor, weight: Tensor) -> Tensor:
    batch, channels, frames, height, width = x.shape
    depth, *taps = weight.shape[1:]
    # Frames beside each other, each in the layout that torch's 2-D kernels are fastest in.
    moved = F.pad(x.transpose(1, 2), (0, 0) * 3 + (depth // 2,) * 2)
    total: Tensor | int = 0
    for tap in range(depth):
        seen = moved[:, tap : tap + frames].reshape(-1, channels, height, width)
        seen = seen.contiguous(memory_format=torch.channels_last)
        padding = [count // 2 for count in taps]
        total = total + F.conv2d(seen, weight[:, None, tap], padding=padding, groups=channels)
    return total.view(batch, frames, channels, height, width).transpose(1, 2)


def _ours(backend: str) -> Function:
    return lambda x, weight: nlkernels.region_aggregate(x, weight, backend=backend)


FUNCTIONS = {
    "conv3d": conv3d,
    "masked_dense": masked_dense,
    "slices_2d": slices_2d,
    **{name: _ours(backend) for name, (backend, _) in OURS.items()},
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


class RegionJudge(FeatureJudge):
    """Truth of some channels, and the first result that passed for all others."""

    def __init__(self, operands: Operands, passes: str) -> None:
        x, weight, grad = operands
        channels = torch.linspace(0, x.shape[1] - 1, SAMPLE, device=x.device).long().unique()
        part = x[:, channels], weight[channels], grad[:, channels]
        truth = dict(zip(NAMES, truth_of(*part), strict=True))
        same = step(conv3d, part, passes)()

        def take(name: str, result: Tensor) -> Tensor:
            return result[channels] if name == "grad_weight" else result[:, channels]

        super().__init__({name: truth[name] for name in same}, same, x.dtype, take)


OPERATION = Operation("region_aggregate", FUNCTIONS, RegionJudge, PEER_SLACK)
