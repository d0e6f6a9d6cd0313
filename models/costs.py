"""What a network costs: parameters, and multiply-adds by two ways of counting."""

import math
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from nlkernels.models.registry import create_model
from nlkernels.modules import ChannelGate
from nlkernels.modules.base import NonLocalBlock
from nlkernels.modules.options import REGION_KINDS

# What the counters of two systems add for each number that a batch norm puts out.
NORM_COSTS = {"mmaction": 2, "pytorchvideo": 5}


class Costs(NamedTuple):
    """Costs of one network for one clip.

    Attributes:
        parameters: numbers that are trained or frozen, statistics of norms apart.
        multiply_adds: of convolutions, classifier, and in blocks the two products with the whole
            affinity, as the original and most papers count.
        published: by the convention of the network's own system: `multiply_adds`, to which the
            counters in `NORM_COSTS` add batch norms.
        executed: multiply-adds that this package computes for the same result: half of the FLOPs
            that `torch.utils.flop_counter` finds.
    """

    parameters: int
    multiply_adds: int
    published: int
    executed: int


def costs(
    name: str, frames: int, size: int | tuple[int, int], *, num_classes: int = 400, **options: Any
) -> Costs:
    """Costs of a registered model; nothing is computed.

    Args:
        name: one of `list_models()`.
        frames: T of the clip.
        size: its height and width, or one number for both.
        num_classes: number of classes.
        **options: of `create_model`.

    Raises:
        ValueError, TypeError: what `create_model` and the model raise.

    Memory:
        None to speak of.

    Example:
        >>> from nlkernels.models.costs import costs
        >>> found = costs("i3d_r50_8x8", 8, 224, blocks=5)
        >>> f"{found.parameters / 1e6:.1f}M {found.multiply_adds / 1e9:.1f}G"
        '35.4M 36.2G'
    """
    height, width = (size, size) if isinstance(size, int) else size
    with FakeTensorMode(), torch.no_grad():
        model = create_model(name, num_classes=num_classes, **options).eval()
        channels = getattr(getattr(model, "design", None), "in_channels", 3)
        clip = torch.empty(1, channels, frames, height, width)
        counter = FlopCounterMode(display=False)
        with counter:
            model(clip)
        products, normed = _counted(model, clip)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    norm_cost = NORM_COSTS.get(getattr(getattr(model, "design", None), "system", None), 0)
    published = products + norm_cost * normed
    return Costs(parameters, products, published, counter.get_total_flops() // 2)


def _counted(model: nn.Module, clip: torch.Tensor) -> tuple[int, int]:
    """Multiply-adds, and numbers that come out of batch norms, from the sizes one run shows."""
    products: list[int] = []
    normed: list[int] = []

    def count(module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        products.append(_COUNTERS[_kind(module)](module, inputs[0], output))
        norm = module.norm if isinstance(module, NonLocalBlock) else module
        normed.append(output.numel() if isinstance(norm, _BatchNorm) else 0)

    own = [module for module in model.modules() if _kind(module) in (NonLocalBlock, ChannelGate)]
    parts = {id(part) for module in own for part in module.modules() if part is not module}
    handles = [
        module.register_forward_hook(count)
        for module in model.modules()
        if _kind(module) is not None and id(module) not in parts
    ]
    model(clip)
    for handle in handles:
        handle.remove()
    return sum(products), sum(normed)


def _kind(module: nn.Module) -> type | None:
    """The class by which a module is counted; None for one that costs nothing."""
    return next((kind for kind in _COUNTERS if isinstance(module, kind)), None)


def _convolution(layer: nn.Conv3d, x: torch.Tensor, out: torch.Tensor) -> int:
    return out.numel() * layer.weight[0].numel()


def _linear(layer: nn.Linear, x: torch.Tensor, out: torch.Tensor) -> int:
    return out.numel() * layer.in_features


def _norm(norm: nn.Module, x: torch.Tensor, out: torch.Tensor) -> int:
    return 0


def _gate(gate: ChannelGate, x: torch.Tensor, out: torch.Tensor) -> int:
    """Scores and their mean at every position, and two layers for each item."""
    layers = gate.reduce.weight.numel() + gate.expand.weight.numel()
    return 2 * x.numel() + x.shape[0] * layers


def _block(block: NonLocalBlock, x: torch.Tensor, out: torch.Tensor) -> int:
    """Projections, and both products with the affinity, as the naive form computes them."""
    batch, channels, frames, *size = x.shape
    positions = frames * math.prod(size)
    group = min(block.temporal_group or frames, frames)
    pool = block.pool_size or (1, 1, 1)
    keys = math.prod(n // k for n, k in zip((group, *size), pool, strict=True))
    all_keys = keys * (frames // group)
    projected = positions * channels * block.inner  # each of theta and out; phi and g unless pooled
    pooled = all_keys * channels * block.inner if block.pool_order == "before" else projected
    depth = channels if block.kind == "gaussian" else block.inner
    if block.kind in REGION_KINDS:
        region = 0 if block.region is None else block.region.weight[0].numel()
        projections = 2 * projected + positions * block.inner * region
    else:
        projections = 2 * projected + 2 * pooled
        if block.kind == "gaussian":
            projections = projected + pooled
    if block.kind == "concat":
        depth = 2 * block.inner  # one weight for each channel of both features of a pair
    return batch * (projections + positions * keys * (depth + block.inner))


_COUNTERS = {
    NonLocalBlock: _block,
    ChannelGate: _gate,
    nn.Conv3d: _convolution,
    nn.Linear: _linear,
    _BatchNorm: _norm,
}
