"""Small problems that show whether pointwise kernels are right; see `nlkernels._trust`.

Tails in every tile, rows and maps in every place, several sources, operands that no descriptor can
read; many positions, and many items of few, are several runs of the sums. The backward is that of a
weight, a shift and features: sums of products, and a product with the weight transposed.
"""

from typing import Any, NamedTuple

import torch

from nlkernels.ops._tiles import accumulator_dtype
from nlkernels.ops.pointwise import reference
from nlkernels.ops.pointwise.problem import PointwiseProblem

# Channels of features and results that `nlk verify` checks when none are named: projections of the
# published blocks, and their gradients.
HEADS = ((512, 256), (256, 512), (1024, 512), (512, 1024))
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
GRADIENTS = ("d_features", "d_weight", "d_shift", "d_base")


class Trial(NamedTuple):
    """One problem: sizes, and how features, base and result lie.

    `sources`: features are given in so many pieces, each with its weight; `bare`: shift and base
    are not given, but added to the result.
    """

    batch: int
    positions: int
    depth: int
    channels: int
    layouts: tuple[str, str, str] = ("rows", "rows", "rows")
    sources: int = 1
    bare: bool = False

    def __str__(self) -> str:
        sizes = f"B={self.batch} N={self.positions} C={self.depth} P={self.channels}"
        options = f"{self.sources} sources" + " without shift and base" * self.bare
        return f"{sizes} {' '.join(self.layouts)} {options}"


def large(head: tuple[int, int]) -> tuple[Trial, ...]:
    """Problems of those channels, for every configuration of a kernel."""
    return (
        Trial(3, 1032, *head, ("maps", "rows", "rows"), 2),
        Trial(2, 1571, *head, ("rows", "maps", "maps")),
        Trial(70, 48, *head, ("rows", "rows", "maps"), 3, True),
        Trial(2, 300, *(size - 1 for size in head), ("maps", "maps", "rows")),
    )


def trials(head: tuple[int, int]) -> tuple[Trial, ...]:
    """Problems of fewer positions, for Triton's interpreter too."""
    sizes = [size - 8 for size in head]
    return (
        Trial(2, 136, *sizes, ("maps", "rows", "rows")),
        Trial(2, 136, *sizes, ("rows", "maps", "maps"), 3),
        Trial(1, 72, *sizes, ("rows", "rows", "rows"), 2, True),
        Trial(1, 51, *(size - 5 for size in head), ("maps", "maps", "maps")),
    )


def problem(head: tuple[int, int], dtype: torch.dtype, device: torch.device) -> PointwiseProblem:
    """A problem of those channels, to ask who serves it."""
    return PointwiseProblem(2, 136, *head, dtype, device.type, device.index)


def operands(trial: Trial, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Random features, weight, shift, base, and a gradient of the output."""
    generator = torch.Generator(device).manual_seed(0)
    batch, positions, depth, channels, (of_features, of_base, of_out), *_ = trial

    def drawn(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device)

    def features(channels: int, layout: str) -> torch.Tensor:
        rows = drawn(batch, positions, channels).to(dtype)
        return rows.mT.contiguous().mT if layout == "maps" else rows

    weight = (drawn(channels, depth) * depth**-0.5).to(dtype)
    shift = drawn(channels).to(dtype)
    base, grad = features(channels, of_base), features(channels, of_out)
    return features(depth, of_features), weight, shift, base, grad


def definition(trial: Trial, *tensors: torch.Tensor) -> torch.Tensor:
    """The output in plain PyTorch, differentiable."""
    features, weight, shift, base = tensors
    return reference.product([(features, weight)], shift, base)


def forward(module: Any, trial: Trial, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Output of a backend."""
    features, weight, shift, base = tensors
    maps = trial.layouts[2] == "maps"
    # Pieces of whole 16 bytes; where there are several, their weights lie the other way.
    step = max(8, -(-trial.depth // trial.sources // 8) * 8)
    if trial.sources > 1:
        weight = weight.mT.contiguous().mT
    sources = list(zip(features.split(step, 2), weight.split(step, 1), strict=True))
    if trial.bare:
        return (module.product(sources, None, None, maps) + shift + base,)
    return (module.product(sources, shift.to(accumulator_dtype(shift.dtype)), base, maps),)


def backward(
    module: Any,
    trial: Trial,
    grad: torch.Tensor,
    tensors: tuple[torch.Tensor, ...],
    kept: tuple[torch.Tensor, ...],
) -> tuple[torch.Tensor, ...]:
    """Gradients of a backend."""
    features, weight, *_ = tensors
    maps = trial.layouts[0] == "maps"
    d_features = module.product([(grad, weight.mT)], None, None, maps)
    outer, sums = module.outer(grad, features)
    return d_features, outer.to(grad.dtype), sums.to(grad.dtype), grad


def like(seen: tuple[Any, ...]) -> Trial:
    """The trial that describes features and channels which a model brought."""
    features, depth, channels = seen
    maps = features.stride(1) == 1 and features.stride(2) != 1
    layouts = ("maps", "rows", "rows") if maps else ("rows", "rows", "rows")
    return Trial(*features.shape[:2], depth, channels, layouts)
