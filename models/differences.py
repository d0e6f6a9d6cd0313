"""Where a model computes something else than a system's networks do with the same weights."""

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from nlkernels._conversion import Shape, shape_of
from nlkernels._systems import BATCH, SYSTEMS, System
from nlkernels.models import registry
from nlkernels.models.design import ResNetDesign
from nlkernels.modules.base import NonLocalBlock
from nlkernels.modules.options import POOLS, REGION_KINDS, factor
from nlkernels.modules.presets import PRESETS

# Choices that change what a network computes before its classifier.
_FIELDS = (
    *("stem_kernel_t", "stem_stride_t", "pool1_kernel_t", "pool1_stride_t", "pool1_padding"),
    *("pool2", "norm", "norm_eps", "shift", "shift_div"),
)
_INCEPTION = ("padding", "norm_eps")
# Those that change what it makes of an image, or of a clip of equal frames.
_IMAGE = ("stem_kernel_t", "pool1_padding", "norm", "norm_eps", "shift")

# Choices that a system's own configuration has, with their values; None for any.
_SHIFTS: Mapping[str, Collection[Any] | None] = {"shift": None, "shift_div": None, "pool2": (0, 3)}
_OFFERED: dict[str, Mapping[str, Collection[Any] | None]] = {
    "caffe2": {"norm_eps": None},
    "slowfast": {"norm_eps": None, "pool2": (0, 2)},
    "pytorchvideo": {"norm_eps": None, "pool2": (0, 2)},
    "mmaction": {**_SHIFTS, "norm_eps": None, "pool2": None},
    "tsm": _SHIFTS,
    "rnl": _SHIFTS,
}
# A fork and what it was forked from: one code, one choice of shifts.
_FORK = {"tsm", "rnl"}


def is_own(model: nn.Module, system: str) -> bool:
    """Whether a model is a network of this system's code."""
    systems = {model.design.system, system}
    return len(systems) == 1 or systems == _FORK


def block_differences(
    model: nn.Module,
    system: str,
    preset: str | None,
    *,
    paths: Collection[str] | None = None,
    folds: bool = False,
) -> list[str]:
    """How blocks of a model differ from a system's in what no key and no shape shows.

    Args:
        model: a model of ours.
        system: the system; what its own configuration lets one choose is no difference in a model
            of that system.
        preset: the system's blocks; None for one without blocks, of which there is nothing to say.
        paths: the blocks to compare; None for all.
        folds: scales and epsilons are folded into weights, and make no difference.

    Returns:
        One sentence for every difference, empty if there is none.
    """
    found: dict[str, None] = {}
    for path, block in model.named_modules() if preset is not None else ():
        if isinstance(block, NonLocalBlock) and (paths is None or path in paths):
            name = nearest_preset(block, preset)
            each = _block_differences(block, name, free_options(model, system, name), folds)
            found |= dict.fromkeys(f"{path}: {difference}" for difference in each)
    return list(found)


def nearest_preset(block: NonLocalBlock, preset: str) -> str:
    """Which of a system's presets a block is nearest to: mmaction2 has two for the same keys."""
    presets = [name for name in PRESETS if name.split("_")[0] == preset.split("_")[0]]
    return min(presets, key=lambda name: len(_block_differences(block, name, (), folds=False)))


def free_options(model: nn.Module, system: str, preset: str) -> tuple[str, ...]:
    """Options of a block that a system's configuration has, for a model of that system."""
    if not is_own(model, system):
        return ()
    eps = ("norm_eps",) if "norm_eps" in _OFFERED.get(system, ()) else ()
    return (*PRESETS[preset].offers, *eps)


def _block_differences(
    block: NonLocalBlock, name: str, free: Collection[str], folds: bool
) -> list[str]:
    preset, system, mine = PRESETS[name], SYSTEMS[name], shape_of(block)
    regional = block.kind in REGION_KINDS
    compared: list[tuple[str, Any, Any]] = []
    if system.pools != "any":
        compared.append(("pool", mine.pool if mine.pools else None, _pool(system, mine)))
    if mine.pools and not regional:
        compared.append(("pool_order", mine.pool_order, preset.options["pool_order"]))
    if not system.groups:
        compared.append(("temporal_group", mine.temporal_group, None))
    if "inner" not in preset.offers:
        compared.append(("inner", block.inner, max(block.dim // 2, 1)))
    if regional and "region_l2norm" not in free:
        compared.append(("region_l2norm", mine.l2norm, preset.options.get("region_l2norm", False)))
    if mine.norm == BATCH and "norm_eps" not in free and not folds:
        compared.append(("norm_eps", mine.norm_eps, preset.options.get("norm_eps", 1e-5)))
    foldable = folds and block.kind in ("softmax", "dot_product") and mine.scale != 0
    if block.kind != "concat" and "scale" not in free and not foldable:
        theirs = factor(block.kind, preset.options["scale"], block.inner)
        compared.append(("scale", mine.scale, theirs))
    return [
        f"{option} {_spoken(own)} instead of {_spoken(expected)}"
        for option, own, expected in compared
        if not _same(own, expected)
    ]


def _pool(system: System, mine: Shape) -> tuple[int, ...] | None:
    """The pooling of a system's block that is nearest to this one's."""
    pools = mine.pools or system.pools == "fixed"
    if not pools or (mine.kind == "gaussian" and not system.pooled_gaussian):
        return None
    return POOLS[mine.dims]


def design_differences(model: nn.Module, system: str) -> list[str]:
    """How a model differs from the nearest network of a system, its blocks and head apart.

    Args:
        model: a model of ours.
        system: a system that registered models are of, or "torchvision", which has images. What the
            system's own configuration lets one choose is no difference in a model of that system.

    Returns:
        One sentence for every difference, empty if there is none.
    """
    own = model.design
    fields = _FIELDS if isinstance(own, ResNetDesign) else _INCEPTION
    designs = designs_of(system)
    if system == "torchvision":
        fields = _IMAGE
        designs = [replace(design, depth=getattr(own, "depth", 50)) for design in designs]
    same = [design for design in designs if _comparable(design, own)]
    if not same and is_own(model, system):  # kernels show in the weights
        same = [design for design in designs if type(design) is type(own)]
    if not same:
        return [f"no network of this shape in {system}"]
    offered = _OFFERED.get(system, {}) if is_own(model, system) else {}
    return min((_design_differences(own, each, fields, offered) for each in same), key=len)


def designs_of(system: str) -> list[Any]:
    """Designs of a system's registered networks; that of a network of images for "torchvision"."""
    if system == "torchvision":
        return [ResNetDesign("torchvision")]
    designs = [registry.registered(name).design for name in registry.list_models()]
    return [design for design in designs if design is not None and design.system == system]


def _comparable(design: Any, own: Any) -> bool:
    if type(design) is not type(own):
        return False
    if isinstance(own, ResNetDesign):
        return design.kernels_t() == own.kernels_t()
    return design.in_channels == own.in_channels


def _design_differences(
    own: Any,
    theirs: Any,
    fields: Collection[str],
    offered: Mapping[str, Collection[Any] | None],
) -> list[str]:
    found = []
    for name in fields:
        mine, other = getattr(own, name), getattr(theirs, name)
        if _same(mine, other) or (name == "shift_div" and own.shift is None):
            continue
        values = offered.get(name, ())
        chosen = values is None or mine in values
        if not chosen or (name == "shift" and theirs.shift is None):
            found.append(f"{name} {mine!r} instead of {other!r}")
    return found


def _same(mine: Any, theirs: Any) -> bool:
    # Caffe2 writes its 1e-5 with an eighth digit.
    numbers = isinstance(mine, float) and isinstance(theirs, float)
    return math.isclose(mine, theirs, rel_tol=1e-6) if numbers else mine == theirs


def _spoken(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else repr(value)
