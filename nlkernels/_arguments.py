"""A call's arguments, checked and made ready: casts of autocast regions, defaults, the backend."""

import math

import torch

from nlkernels import _env
from nlkernels._spec import (
    BACKENDS,
    DTYPES,
    KINDS,
    autocasts,
    check_choice,
    check_operands,
    default_scale,
)
from nlkernels.ops.concat.problem import check_operands as check_concat
from nlkernels.ops.gate.problem import check_operands as check_gate
from nlkernels.ops.region.problem import check_operands as check_region


def attention_operands(query, key, value, kind: str, scale: float | None):
    """Check a call's arguments; cast for autocast; resolve the scale."""
    if kind == "concat":
        raise ValueError(
            f"nonlocal_attention: expected kind to be one of {', '.join(KINDS)}, got 'concat'; its "
            "scores are sums of two numbers: call nonlocal_concat(query_score, key_score, value)"
        )
    check_choice("nonlocal_attention", "kind", kind, KINDS)
    query, key, value = autocast(query, key, value)
    check_operands(query, key, value)
    if scale is None:
        scale = default_scale(kind, query.shape[2])
    elif not isinstance(scale, int | float):
        raise TypeError(
            f"nonlocal_attention: expected scale to be a number or None, got "
            f"{type(scale).__name__}; pass float(scale)"
        )
    elif not -math.inf < scale < math.inf:
        raise ValueError(
            f"nonlocal_attention: expected a finite scale, got {scale}; "
            "None gives the kind's default"
        )
    return query, key, value, float(scale)


def concat_operands(query_score, key_score, value):
    """Cast for autocast; check the operands."""
    operands = autocast(query_score, key_score, value)
    check_concat(*operands)
    return operands


def gate_operands(x, weight, bias):
    """Cast for autocast; check the operands."""
    operands = autocast(x, weight, bias)
    check_gate(*operands)
    return operands


def region_operands(x, weight):
    """Cast for autocast; check the operands."""
    x, weight = autocast(x, weight)
    check_region(x, weight)
    return x, weight


def autocast(*operands: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """In an autocast region, cast floating operands except float64 to its dtype."""
    device = operands[0].device.type if isinstance(operands[0], torch.Tensor) else "meta"
    if not autocasts(device):
        return operands
    dtype = torch.get_autocast_dtype(device)
    # By identity: one tensor that is query and key is cast once.
    cast = {
        id(t): t.to(dtype) if isinstance(t, torch.Tensor) and t.dtype in DTYPES[:3] else t
        for t in operands
    }
    return tuple(cast[id(t)] for t in operands)


def _is_size(number: object) -> bool:
    return isinstance(number, int | float) and 0 <= number < math.inf


def requested_backend(
    backend: str, workspace_mib: float | None, where: str = "nonlocal_attention"
) -> str:
    """The backend that a call asks for, by argument or environment."""
    if backend == "auto":
        backend = _env.read("NLKERNELS_BACKEND")
        check_choice("NLKERNELS_BACKEND", "the value", backend, BACKENDS)
    else:
        check_choice(where, "backend", backend, BACKENDS)
    if workspace_mib is not None and not _is_size(workspace_mib):
        raise ValueError(
            "nonlocal_attention: expected workspace_mib to be a finite number of 0 or more, got "
            f"{workspace_mib!r}; None gives the device's default"
        )
    return backend
