"""Where a model computes something else than a system's networks do with the same weights."""

import math
from typing import Any

from torch import nn

from nlkernels._conversion import shape_of
from nlkernels.models import registry
from nlkernels.models.design import ResNetDesign
from nlkernels.modules.base import NonLocalBlock
from nlkernels.modules.options import REGION_KINDS, factor
from nlkernels.modules.presets import PRESETS

# Choices that change what a network computes before its classifier.
_FIELDS = (
    *("stem_kernel_t", "stem_stride_t", "pool1_kernel_t", "pool1_stride_t", "pool1_padding"),
    *("pool2", "norm", "norm_eps", "shift", "shift_div"),
)
_INCEPTION = ("padding", "norm_eps")


def block_differences(model: nn.Module, preset: str | None) -> list[str]:
    """How blocks of a model differ from a system's in what no weight shows.

    Args:
        model: a model of ours.
        preset: the system's blocks; None for one without blocks, of which there is nothing to say.

    Returns:
        One sentence for every difference, empty if there is none.
    """
    if preset is None:
        return []
    # mmaction2 has two, with and without scale, for the same keys.
    presets = [name for name in PRESETS if name.split("_")[0] == preset.split("_")[0]]
    found: dict[str, None] = {}
    for path, block in model.named_modules():
        if isinstance(block, NonLocalBlock) and block.kind not in REGION_KINDS:
            options = [_differences(block, name) for name in presets]
            found |= dict.fromkeys(f"{path}: {each}" for each in min(options, key=len))
    return list(found)


def _differences(block: NonLocalBlock, preset: str) -> list[str]:
    options, own = PRESETS[preset].options, shape_of(block)
    found = []
    if own.pools and options["pool_order"] != own.pool_order:
        found.append(f"pool_order {own.pool_order!r} instead of {options['pool_order']!r}")
    if block.kind != "concat":
        theirs = factor(block.kind, options["scale"], block.inner)
        if not math.isclose(theirs, own.scale, rel_tol=1e-9):
            found.append(f"scale {own.scale:g} instead of {theirs:g}")
    return found


def design_differences(model: nn.Module, system: str) -> list[str]:
    """How a model differs from the nearest network of a system, its blocks and head apart.

    Args:
        model: a model of ours.
        system: a system that registered models are of.

    Returns:
        One sentence for every difference, empty if there is none.
    """
    designs = [
        design
        for name in registry.list_models()
        if (design := registry.registered(name).design) is not None and design.system == system
    ]
    same = [design for design in designs if _comparable(design, model.design)]
    if not same:
        return [f"no network of this shape in {system}"]
    return min((_design_differences(model.design, each) for each in same), key=len)


def _comparable(design: Any, own: Any) -> bool:
    if type(design) is not type(own):
        return False
    if isinstance(own, ResNetDesign):
        return design.kernels_t() == own.kernels_t()
    return design.in_channels == own.in_channels


def _design_differences(own: Any, theirs: Any) -> list[str]:
    fields = _FIELDS if isinstance(own, ResNetDesign) else _INCEPTION
    return [
        f"{name} {getattr(own, name)!r} instead of {getattr(theirs, name)!r}"
        for name in fields
        if not _same(getattr(own, name), getattr(theirs, name))
    ]


def _same(mine: Any, theirs: Any) -> bool:
    # Caffe2 writes its 1e-5 with an eighth digit.
    numbers = isinstance(mine, float) and isinstance(theirs, float)
    return math.isclose(mine, theirs, rel_tol=1e-6) if numbers else mine == theirs
