"""The options of a non-local block, checked and completed before anything is built."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from nlkernels._spec import check_choice, default_scale

REGION_KINDS = ("region_softmax", "region_relu")
BLOCK_KINDS = ("softmax", "gaussian", "dot_product", "relu", "concat", *REGION_KINDS)
POOL_ORDERS = ("before", "after")
NORMS = ("batch", "affine")
ZERO_INITS = ("gamma", "weight")
INITS = ("normal", "kaiming", "default")

# By the number of dimensions: names of the axes, what is pooled, the neighbourhood of a region.
AXES = {1: ("L",), 2: ("H", "W"), 3: ("T", "H", "W")}
POOLS = {1: (2,), 2: (2, 2), 3: (1, 2, 2)}
REGIONS = {1: (7,), 2: (7, 7), 3: (3, 7, 7)}

Norm = str | Callable[[int], nn.Module] | None


class BlockOptions(NamedTuple):
    """Keyword arguments of a block, as its constructor takes them."""

    inner: int | None
    kind: str
    pool: tuple[int, ...] | str | None
    pool_order: str | None
    scale: float | None
    qkv_bias: bool
    out_bias: bool
    norm: Norm
    norm_eps: float
    norm_momentum: float | None
    zero_init: str | None
    init: str | float
    out_init: str | float | None
    temporal_group: int | None
    region_kernel: tuple[int, ...] | None
    region_l2norm: bool
    input_size: tuple[int, ...] | None
    backend: str | None


def complete(where: str, dims: int, dim: int, options: BlockOptions) -> BlockOptions:
    """Check options of a block of `dims` dimensions; put in what depends on others.

    Args:
        where: the block's name for error messages.
        dims: 1, 2 or 3.
        dim: channels of the block.
        options: as the constructor got them.

    Returns:
        Options in which `inner`, `pool`, `pool_order`, `out_init` and, for the region kinds,
        `region_kernel` have their final values.

    Raises:
        ValueError: a value that no block has, or two that do not go together.
        TypeError: a norm that is a module already.
    """
    _check_count(where, "dim", dim)
    if options.inner is None:
        options = options._replace(inner=max(dim // 2, 1))
    _check_count(where, "inner", options.inner)
    check_choice(where, "kind", options.kind, BLOCK_KINDS)
    options = options._replace(
        pool=_pool(where, dims, options.pool),
        pool_order=_pool_order(where, options),
        region_kernel=_region_kernel(where, dims, options),
        out_init=options.init if options.out_init is None else options.out_init,
    )
    _check_scale(where, options)
    _check_norm(where, options)
    for name in ("init", "out_init"):
        _check_init(where, name, getattr(options, name))
    for name in ("qkv_bias", "out_bias", "region_l2norm"):
        _check_flag(where, name, getattr(options, name))
    if options.region_l2norm and options.kind not in REGION_KINDS:
        raise ValueError(
            f"{where}: expected region_l2norm with kind region_softmax or region_relu, got "
            f"kind={options.kind!r}; leave it out, other kinds have no regions"
        )
    _check_group(where, dims, options)
    _check_input_size(where, dims, dim, options.input_size)
    return options


def factor(kind: str, scale: float | None, inner: int) -> float:
    """The factor of a block's scores: inner**-0.5 by default for softmax, 1 for other kinds."""
    return default_scale(kind, inner) if scale is None else float(scale)


def check_batch_norm(where: str, norm_eps: object, norm_momentum: object) -> None:
    """Raise ValueError unless a batch norm can have these options."""
    if not _is_finite(norm_eps) or norm_eps < 0:
        raise ValueError(
            f"{where}: expected norm_eps to be a finite number of 0 or more, got "
            f"{norm_eps!r}; leave it out for the default"
        )
    if norm_momentum is not None and not (_is_finite(norm_momentum) and 0 <= norm_momentum <= 1):
        raise ValueError(
            f"{where}: expected norm_momentum to be a number from 0 to 1 or None, got "
            f"{norm_momentum!r}; None averages the statistics of all steps"
        )


def _is_int(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool)


def _is_finite(number: object) -> bool:
    plain = isinstance(number, int | float) and not isinstance(number, bool)
    return plain and -math.inf < number < math.inf


def _sizes(sizes: object, dims: int) -> bool:
    return (
        isinstance(sizes, tuple | list)
        and len(sizes) == dims
        and all(_is_int(size) and size >= 1 for size in sizes)
    )


def _axes(dims: int) -> str:
    words = {1: "one positive size", 2: "two positive sizes", 3: "three positive sizes"}
    return f"{words[dims]} ({', '.join(axis.lower() for axis in AXES[dims])})"


def _check_count(where: str, name: str, number: object) -> None:
    if not _is_int(number) or number < 1:
        raise ValueError(f"{where}: expected {name} of 1 or more, got {number!r}; pass channels")


def _check_flag(where: str, name: str, flag: object) -> None:
    if not isinstance(flag, bool):
        raise ValueError(f"{where}: expected {name} to be a bool, got {flag!r}; pass True or False")


def _pool(where: str, dims: int, pool: object) -> tuple[int, ...] | None:
    if isinstance(pool, str) and pool == "default":
        return POOLS[dims]
    if pool is not None and not _sizes(pool, dims):
        raise ValueError(
            f"{where}: expected pool to be {_axes(dims)} or None, got {pool!r}; "
            f"the published blocks use {POOLS[dims]}"
        )
    return None if pool is None else tuple(pool)


def _pool_order(where: str, options: BlockOptions) -> str:
    region = options.kind in REGION_KINDS
    if options.pool_order is None:
        return "after" if region else "before"
    check_choice(where, "pool_order", options.pool_order, POOL_ORDERS)
    if region and options.pool_order == "before":
        raise ValueError(
            f"{where}: expected pool_order 'after' with kind {options.kind!r}, got 'before'; "
            "regions are aggregated at every position, then keys and values are pooled"
        )
    return options.pool_order


def _region_kernel(where: str, dims: int, options: BlockOptions) -> tuple[int, ...] | None:
    kernel = options.region_kernel
    if options.kind not in REGION_KINDS:
        if kernel is None:
            return None
        raise ValueError(
            f"{where}: expected no region_kernel with kind {options.kind!r}, got {kernel!r}; "
            "use kind='region_softmax' or 'region_relu'"
        )
    if kernel is None:
        return REGIONS[dims]
    if not _sizes(kernel, dims) or any(size % 2 == 0 for size in kernel):
        raise ValueError(
            f"{where}: expected region_kernel to be {_axes(dims)}, all odd, got {kernel!r}; "
            f"the default is {REGIONS[dims]}, and {(1,) * dims} aggregates nothing"
        )
    return tuple(kernel)


def _check_scale(where: str, options: BlockOptions) -> None:
    if options.scale is None:
        return
    if not _is_finite(options.scale):
        raise ValueError(
            f"{where}: expected scale to be a finite number, got {options.scale!r}; "
            "leave it out for the default"
        )
    if options.kind == "concat":
        raise ValueError(
            f"{where}: expected no scale with kind 'concat', got {options.scale!r}; "
            "leave it out, or scale concat_weight"
        )


def _check_norm(where: str, options: BlockOptions) -> None:
    norm = options.norm
    if isinstance(norm, nn.Module):
        raise TypeError(
            f"{where}: expected norm to make a module from the channels, got the module {norm}; "
            "pass its class, or functools.partial of its class and its options"
        )
    if norm is not None and not callable(norm):
        check_choice(where, "norm", norm, NORMS)
    check_batch_norm(where, options.norm_eps, options.norm_momentum)
    if options.zero_init is None:
        return
    check_choice(where, "zero_init", options.zero_init, ZERO_INITS)
    if options.zero_init == "gamma" and norm is None:
        raise ValueError(
            f"{where}: expected a norm for zero_init='gamma', got norm=None; use zero_init='weight'"
        )


def _check_init(where: str, name: str, init: object) -> None:
    if isinstance(init, str):
        check_choice(where, name, init, INITS)
    elif not _is_finite(init) or init < 0:
        raise ValueError(
            f"{where}: expected {name} to be one of {', '.join(INITS)} or a standard deviation, "
            f"got {init!r}; 'normal' is one of 0.01"
        )


def _check_group(where: str, dims: int, options: BlockOptions) -> None:
    group, pool = options.temporal_group, options.pool
    if group is None:
        return
    if dims != 3:
        raise ValueError(
            f"{where}: expected no temporal_group, got {group!r}; "
            "use NonLocalBlock3d, the other blocks have no time axis"
        )
    if not _is_int(group) or group < 1:
        raise ValueError(
            f"{where}: expected temporal_group to be a positive number of frames, "
            f"got {group!r}; None attends to all frames"
        )
    if pool is not None and pool[0] > group:
        raise ValueError(
            f"{where}: expected temporal_group of at least {pool[0]} frames to pool, got {group}; "
            "choose another group or pool"
        )


def _check_input_size(where: str, dims: int, dim: int, size: Any) -> None:
    if size is None or _sizes(size, dims) or (_sizes(size, dims + 2) and size[1] == dim):
        return
    axes = ", ".join(AXES[dims])
    raise ValueError(
        f"{where}: expected input_size ({axes}) or (B, {dim}, {axes}), got {size!r}; "
        "it is only used to say how much memory the block takes"
    )
