"""Non-local operations as functions, in the manner of torch.nn.functional."""

import math
from collections.abc import Callable

import torch

from nlkernels import _env, _select
from nlkernels._spec import (
    BACKENDS,
    DTYPES,
    KINDS,
    Problem,
    autocasts,
    check_choice,
    check_operands,
    default_scale,
)
from nlkernels.ops.dot_product import op as dot_product
from nlkernels.ops.region import op as region
from nlkernels.ops.region.problem import RegionProblem
from nlkernels.ops.region.problem import check_operands as check_region
from nlkernels.ops.softmax import op as softmax

_OP_OF_KIND = {"softmax": softmax, "gaussian": softmax, "dot_product": dot_product}


def nonlocal_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    kind: str = "softmax",
    scale: float | None = None,
    backend: str = "auto",
    workspace_mib: float | None = None,
) -> torch.Tensor:
    """Every query position's sum of all values, weighted by its affinity to their keys.

    softmax, gaussian:  out[i] = sum_j softmax_j(scale * query[i].key[j]) * value[j]
    dot_product:        out[i] = sum_j scale * query[i].key[j] / M * value[j]

    Args:
        query: (B, N, D), float16, bfloat16, float32 or float64, any strides.
        key: (B, M, D), same dtype and device.
        value: (B, M, V), same dtype and device; V may differ from D.
        kind: "softmax" (embedded Gaussian), "gaussian" (the same function, unscaled by default) or
            "dot_product".
        scale: factor of every query.key; None means D**-0.5 for softmax and 1 otherwise.
        backend: "auto" (the environment variable NLKERNELS_BACKEND when set, else the fastest
            measured), "reference" (plain autograd, materialises the scores), "chunked" or "sdpa".
        workspace_mib: MiB for the tiles of the backend chunked; None is 10 on CPUs and 40 on GPUs,
            0 the least, 16 rows of scores.

    Returns:
        (B, N, V), dtype of the operands, contiguous. In an autocast region the operands are cast
        to its dtype first, as torch.matmul does.

    Raises:
        TypeError: an operand is no tensor or has another dtype.
        ValueError: sizes or devices do not fit; unknown kind or backend; no key for a softmax.
        NotImplementedError: the named backend cannot serve this problem.

    Memory:
        The backend chunked: at most `workspace_mib`, and for 16-bit dtypes what the docstring of
        nlkernels/ops/<op>/chunked.py adds. Kept for the backward, by every backend but "reference"
        and, on GPUs, "sdpa": the operands; for softmax and gaussian also the output and 8 bytes a
        query (16 in float64).

    Determinism:
        Bitwise repeatable, forward and backward, for a device and thread count: no atomics. On GPUs
        the backend "sdpa" is as repeatable as torch's kernels; "auto" leaves it while
        torch.use_deterministic_algorithms is on.

    Differentiation:
        Gradients of gradients go through the definition, tile by tile; gradients of those through
        the whole definition, in N x M memory. vmap, forward mode and nested torch.func gradients
        raise RuntimeError.

    Example:
        >>> import torch, nlkernels
        >>> query, key, value = (torch.randn(2, n, 64) for n in (3136, 784, 784))
        >>> nlkernels.nonlocal_attention(query, key, value).shape
        torch.Size([2, 3136, 64])

    Source:
        X. Wang, R. Girshick, A. Gupta, K. He, "Non-local Neural Networks", CVPR 2018;
        facebookresearch/video-nonlocal-net.
    """
    query, key, value, scale = _prepare(query, key, value, kind, scale)
    backend = _requested(backend, workspace_mib)
    return _OP_OF_KIND[kind].attention(query, key, value, scale, backend, workspace_mib)


def region_aggregate(
    x: torch.Tensor, weight: torch.Tensor, *, backend: str = "auto"
) -> torch.Tensor:
    """Every position's weighted sum of its neighbours, with one kernel for each channel.

    out[b,c,t,h,w] = sum_ijk weight[c,i,j,k] * x[b,c,t+i-(kt-1)/2,h+j-(kh-1)/2,w+k-(kw-1)/2]

    This is the depthwise 3-D correlation of region-based non-local blocks: stride 1, zeros around
    x, no bias.

    Args:
        x: (B, C, T, H, W), float16, bfloat16, float32 or float64, any strides; read without a copy
            in NCDHW and channels_last_3d.
        weight: (C, kt, kh, kw), same dtype and device, odd sizes; 3 x 7 x 7 where it was published.
        backend: "auto" (the environment variable NLKERNELS_BACKEND when set, else the fastest
            measured), "reference" (torch's conv3d), "chunked" or "triton".

    Returns:
        (B, C, T, H, W), dtype of the operands; channels_last_3d where x is, else contiguous. In an
        autocast region the operands are cast to its dtype first, as torch.conv3d does.

    Raises:
        TypeError: an operand is no tensor or has another dtype.
        ValueError: sizes or devices do not fit, a size of the kernel is even; unknown backend.
        NotImplementedError: the named backend cannot serve this problem.

    Memory:
        What the docstrings of nlkernels/ops/region/chunked.py and triton.py state: linear in x.
        Kept for the backward: x and weight.

    Determinism:
        Bitwise repeatable, forward and backward, for a device and thread count: no atomics. On GPUs
        "chunked" and "reference" are as repeatable as torch's convolutions.

    Differentiation:
        Of any order, in the same backend. vmap, forward mode and nested torch.func gradients raise
        RuntimeError.

    Example:
        >>> import torch, nlkernels
        >>> x, weight = torch.randn(1, 32, 8, 14, 14), torch.randn(32, 3, 7, 7)
        >>> nlkernels.region_aggregate(x, weight).shape
        torch.Size([1, 32, 8, 14, 14])

    Source:
        G. Huang, A. G. Bors, "Region-based Non-local Operation for Video Classification", ICPR
        2020; guoxih/region-based-non-local-network.
    """
    x, weight = _prepare_region(x, weight)
    return region.aggregate(x, weight, _requested(backend, None, "region_aggregate"))


def explain(op_name: str, *operands: torch.Tensor, **options) -> _select.Explanation:
    """Say which backend a call would use, and why each other one would not run.

    Args:
        op_name: name of a public operation: "nonlocal_attention" or "region_aggregate".
        *operands: the tensors of that call.
        **options: its keyword arguments.

    Returns:
        An `Explanation` with `backend` and `reasons`; `print` shows it as a table.

    Raises:
        What the operation itself raises for these operands and options; ValueError for an unknown
        operation.

    Example:
        >>> import torch, nlkernels
        >>> query, key, value = (torch.randn(2, n, 64) for n in (49, 12, 12))
        >>> nlkernels.explain("nonlocal_attention", query, key, value, kind="dot_product").backend
        'chunked'
    """
    check_choice("explain", "op_name", op_name, tuple(_EXPLAINERS))
    return _EXPLAINERS[op_name](*operands, **options)


def _explain_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    kind: str = "softmax",
    scale: float | None = None,
    backend: str = "auto",
    workspace_mib: float | None = None,
) -> _select.Explanation:
    query, key, value, _ = _prepare(query, key, value, kind, scale)
    backend = _requested(backend, workspace_mib)
    return _select.explain(_OP_OF_KIND[kind].NAME, Problem.of(query, key, value), backend)


def _explain_region(
    x: torch.Tensor, weight: torch.Tensor, *, backend: str = "auto"
) -> _select.Explanation:
    x, weight = _prepare_region(x, weight)
    backend = _requested(backend, None, "region_aggregate")
    return _select.explain(region.NAME, RegionProblem.of(x, weight), backend)


_EXPLAINERS: dict[str, Callable[..., _select.Explanation]] = {
    "nonlocal_attention": _explain_attention,
    "region_aggregate": _explain_region,
}


def _prepare(query, key, value, kind: str, scale: float | None):
    """Check a call's arguments; cast for autocast; resolve the scale."""
    check_choice("nonlocal_attention", "kind", kind, KINDS)
    query, key, value = _autocast(query, key, value)
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


def _prepare_region(x, weight):
    """Cast for autocast; check the operands."""
    x, weight = _autocast(x, weight)
    check_region(x, weight)
    return x, weight


def _autocast(*operands):
    """In an autocast region, cast floating operands except float64 to its dtype."""
    device = operands[0].device.type if isinstance(operands[0], torch.Tensor) else "meta"
    if not autocasts(device):
        return operands
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if isinstance(t, torch.Tensor) and t.dtype in DTYPES[:3] else t
        for t in operands
    )


def _is_size(number: object) -> bool:
    return isinstance(number, int | float) and 0 <= number < math.inf


def _requested(backend: str, workspace_mib: float | None, where: str = "nonlocal_attention") -> str:
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
