"""A block's weights rewritten for another form of the same function, in evaluation mode.

What one form has and the other lacks is folded away: a scale into theta, a bias of `out` into the
running mean, a norm into `out`. Entries are keyed as in a block's `state_dict()`. All arithmetic is
in float64; what needs none is passed on untouched.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from nlkernels._spec import default_scale
from nlkernels._systems import AFFINE, BATCH, MODULE, System
from nlkernels.modules.layers import Affine
from nlkernels.modules.options import POOLS, REGION_KINDS

Entries = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """The function a block computes, besides its weights."""

    kind: str
    dims: int
    pool: tuple[int, ...] | None
    pool_order: str
    scale: float
    temporal_group: int | None
    norm: str | None
    norm_eps: float
    qkv_bias: bool
    out_bias: bool
    l2norm: bool = False

    @property
    def pools(self) -> bool:
        return self.pool is not None and any(size > 1 for size in self.pool)


def shape_of(block: torch.nn.Module) -> Shape:
    """What a block is."""
    projection = block.theta if hasattr(block, "theta") else block.g
    scale = default_scale(block.kind, block.inner) if block.scale is None else block.scale
    return Shape(
        kind=block.kind,
        dims=block.dims,
        pool=block.pool_size,
        pool_order=block.pool_order,
        scale=float(scale),
        temporal_group=block.temporal_group,
        norm=norm_form(block.norm),
        norm_eps=getattr(block.norm, "eps", 0.0),
        qkv_bias=projection.bias is not None,
        out_bias=block.out.bias is not None,
        l2norm=block.region_l2norm,
    )


def norm_form(norm: torch.nn.Module | None) -> str | None:
    """Which of the forms a norm has."""
    if norm is None:
        return None
    if isinstance(norm, torch.nn.modules.batchnorm._BatchNorm):
        return BATCH if norm.affine and norm.running_var is not None else MODULE
    return AFFINE if isinstance(norm, Affine) else MODULE


def wanted_norm(norm: str | Callable | None, dim: int, eps: float) -> tuple[str | None, float]:
    """Form and epsilon of the norm that a block's options `norm` and `norm_eps` ask for.

    A module is no such option, though it is callable: the block's constructor refuses it.
    """
    if not callable(norm) or isinstance(norm, torch.nn.Module):
        return norm, eps
    made = norm(dim)
    return norm_form(made), getattr(made, "eps", eps)


def target_shape(
    where: str,
    source: Shape,
    system: System,
    settings: Mapping[str, Any],
    options: Mapping[str, Any],
    dim: int,
    inner: int,
) -> Shape:
    """What the block of a system is to be that computes what `source` does.

    Args:
        where: the caller, for error messages.
        source: the block.
        system: the target.
        settings: all options of the target's block, with those of `options` among them.
        options: those that the caller named; they win over what the system is known to have.
        dim: channels of the block.
        inner: channels of its projections.

    Returns:
        A shape that `convert` reaches.

    Raises:
        ValueError: the system has no block that computes this function.
    """
    kind = options.get("kind", source.kind)
    if source.kind not in system.kinds or kind != source.kind:
        expected = options.get("kind", ", ".join(system.kinds))
        raise _different(where, "kind", expected, source.kind)
    pool = _target_pool(source, system, settings, options)
    if _effective(pool) != _effective(source.pool):
        raise _different(where, "pool", pool, source.pool)
    order = settings.get("pool_order") or ("after" if source.kind in REGION_KINDS else "before")
    if source.pools and order != source.pool_order:
        raise _different(where, "pool_order", order, source.pool_order)
    if source.kind == "gaussian" and source.pools and not system.pooled_gaussian:
        raise _different(where, "pool (its gaussian kind has none)", None, source.pool)
    group = options.get("temporal_group", source.temporal_group if system.groups else None)
    if group != source.temporal_group:
        raise _different(where, "temporal_group", group, source.temporal_group)
    if "region_l2norm" in options and options["region_l2norm"] != source.l2norm:
        raise _different(where, "region_l2norm", options["region_l2norm"], source.l2norm)
    asked, eps = wanted_norm(settings.get("norm"), dim, settings.get("norm_eps", 1e-5))
    norm = asked if "norm" in options else _nearest_norm(source, system)
    if MODULE in (norm, source.norm) and norm != source.norm:
        raise ValueError(
            f"{where}: expected a norm that is a batch norm, an affine one or none, got a "
            f"conversion of {_spoken(source.norm)} to {_spoken(norm)}; their statistics differ"
        )
    scale = settings.get("scale")
    return Shape(
        kind=kind,
        dims=source.dims,
        pool=pool,
        pool_order=source.pool_order,
        scale=default_scale(kind, inner) if scale is None else float(scale),
        temporal_group=group,
        norm=norm,
        norm_eps=eps if norm == BATCH else source.norm_eps,
        qkv_bias=_flag(options, "qkv_bias", system.qkv_bias, source.qkv_bias),
        out_bias=_target_bias(source, system, options, norm),
        l2norm=source.l2norm,
    )


def convert(where: str, entries: Entries, source: Shape, target: Shape) -> Entries:
    """Entries of `target` that compute what `entries` compute in `source`, in evaluation mode.

    Raises:
        ValueError: nothing in the target can hold a scale or a bias of the source.
    """
    before, entries = entries, dict(entries)
    _fold_scale(where, entries, source, target)
    _convert_projection_bias(where, entries, source, target)
    _convert_norm(where, entries, source, target)
    # New entries take the dtype of the layer that they come from.
    return {
        name: tensor.to(before.get(name, before["out.weight"]).dtype)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in entries.items()
    }


def _different(where: str, name: str, expected: object, got: object) -> ValueError:
    return ValueError(
        f"{where}: expected {name} {expected}, got a block with {got}; the same weights would "
        "compute a different function there, so convert the block's design first, or name the "
        "option if that system's block was changed"
    )


def _effective(pool: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """A pooling by one everywhere is none."""
    return tuple(pool) if pool is not None and any(size > 1 for size in pool) else None


def _target_pool(
    source: Shape, system: System, settings: Mapping[str, Any], options: Mapping[str, Any]
) -> tuple[int, ...] | None:
    if "pool" in options or system.pools == "fixed":
        return POOLS[source.dims] if settings["pool"] == "default" else settings["pool"]
    if system.pools == "any":
        return source.pool
    return POOLS[source.dims] if source.pools else None


def _flag(options: Mapping[str, Any], name: str, system: bool | None, source: bool) -> bool:
    return options.get(name, source if system is None else system)


def _nearest_norm(source: Shape, system: System) -> str | None:
    """The form of the norm that the system's block has when the caller names none."""
    if source.norm in system.norms and not _stranded(source, system):
        return source.norm
    if source.norm == AFFINE and None in system.norms and system.out_bias is not False:
        return None  # unlike a batch norm, the same in training, too
    return system.norms[0]


def _stranded(source: Shape, system: System) -> bool:
    """Whether only a batch norm can hold the bias of a block without norm."""
    return source.norm is None and source.out_bias and system.out_bias is False


def _spoken(norm: str | None) -> str:
    names = {BATCH: "a batch norm", AFFINE: "an affine norm", MODULE: "another module"}
    return names.get(norm, "no norm")


def _target_bias(
    source: Shape, system: System, options: Mapping[str, Any], norm: str | None
) -> bool:
    rule = (norm is None) if system.out_bias == "unnormed" else system.out_bias
    folds = norm is None and source.norm is not None
    return _flag(options, "out_bias", rule, source.out_bias or folds)


def _fold_scale(where: str, entries: Entries, source: Shape, target: Shape) -> None:
    if source.scale == target.scale:
        return
    ratio = source.scale / target.scale if target.scale else 0.0
    regional = source.kind in REGION_KINDS
    foldable = ratio != 0 and "theta.weight" in entries
    if regional:
        foldable = ratio > 0 and "region.weight" in entries and not source.l2norm
    if not foldable:
        reason = "its kind has no weight that could take the factor"
        if 0.0 in (source.scale, target.scale):
            reason = "no factor leads from 0 to another scale and back"
        raise ValueError(
            f"{where}: expected scale {target.scale:g}, got a block with {source.scale:g}; "
            f"{reason}, so pass the scale if that system's block was changed"
        )
    # Both sides of a region's product are the same features; its values must not change.
    names = ("region.weight",) if regional else ("theta.weight", "theta.bias")
    for name in names:
        if name in entries:
            entries[name] = entries[name].double() * (ratio**0.5 if regional else ratio)


def _convert_projection_bias(where: str, entries: Entries, source: Shape, target: Shape) -> None:
    if source.qkv_bias == target.qkv_bias:
        return
    for name in ("theta", "phi", "g"):
        if f"{name}.weight" not in entries:
            continue
        if target.qkv_bias:
            entries[f"{name}.bias"] = _channels(entries[f"{name}.weight"], 0.0)
        elif bool(entries.pop(f"{name}.bias").any()):
            raise _homeless(where, f"{name}.bias")


def _convert_norm(where: str, entries: Entries, source: Shape, target: Shape) -> None:
    """Rewrite `out` and `norm` from weight, bias, mean, variance of the source to the target's."""
    same = source.norm == target.norm
    if same and source.out_bias == target.out_bias and source.norm_eps == target.norm_eps:
        return
    weight = entries["out.weight"]
    bias = entries.pop("out.bias").double() if source.out_bias else None
    if same and target.out_bias and bias is None:
        bias = _channels(weight, 0.0)
    elif same and not target.out_bias and bias is not None:
        _absorb_bias(where, entries, bias, target.norm)
        bias = None
    elif not same:
        bias = _replace_norm(where, entries, bias, source, target)
    if bias is not None:
        entries["out.bias"] = bias
    if same and source.norm == BATCH and source.norm_eps != target.norm_eps:
        variance = entries["norm.running_var"].double()
        ratio = ((variance + target.norm_eps) / (variance + source.norm_eps)).sqrt()
        entries["norm.weight"] = entries["norm.weight"].double() * ratio


def _absorb_bias(where: str, entries: Entries, bias: torch.Tensor, norm: str | None) -> None:
    """A bias in front of a norm moves behind or into it."""
    if norm == BATCH:
        entries["norm.running_mean"] = entries["norm.running_mean"].double() - bias
    elif norm == AFFINE:
        shift = entries["norm.weight"].double() * bias
        entries["norm.bias"] = entries["norm.bias"].double() + shift
    elif bool(bias.any()):
        raise _homeless(where, "out.bias")


def _replace_norm(
    where: str, entries: Entries, bias: torch.Tensor | None, source: Shape, target: Shape
) -> torch.Tensor | None:
    """Another form of norm around the same function; returns the bias of `out`."""
    weight = entries["out.weight"]
    factor, shift = _channels(weight, 1.0), _channels(weight, 0.0)
    if source.norm is not None:
        factor, shift = entries.pop("norm.weight").double(), entries.pop("norm.bias").double()
    if source.norm == BATCH:
        variance = entries.pop("norm.running_var").double() + source.norm_eps
        factor = factor / variance.sqrt()
        shift = shift - factor * entries.pop("norm.running_mean").double()
        entries.pop("norm.num_batches_tracked")
    if target.norm is None:
        entries["out.weight"] = weight.double() * factor.view(-1, *(1,) * (weight.dim() - 1))
        bias = shift if bias is None else shift + factor * bias
        if not target.out_bias and bool(bias.any()):
            raise _homeless(where, "out.bias")
        return bias if target.out_bias else None
    entries["norm.weight"], entries["norm.bias"] = factor, shift
    if target.norm == BATCH:  # with statistics that leave its input as it is
        entries["norm.running_mean"] = _channels(weight, 0.0)
        entries["norm.running_var"] = _channels(weight, 1.0 - target.norm_eps)
        entries["norm.num_batches_tracked"] = torch.zeros((), dtype=torch.int64).to(weight.device)
    if target.out_bias:
        return _channels(weight, 0.0) if bias is None else bias
    if bias is not None:
        _absorb_bias(where, entries, bias, target.norm)
    return None


def _channels(weight: torch.Tensor, value: float) -> torch.Tensor:
    return torch.full(weight.shape[:1], value, dtype=torch.float64, device=weight.device)


def _homeless(where: str, name: str) -> ValueError:
    return ValueError(
        f"{where}: expected {name} to be zero, got other values; the target has neither this bias "
        "nor a norm that could take it, so pass norm='batch' or the bias's option"
    )
