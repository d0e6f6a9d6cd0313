"""Non-local operations as functions, in the manner of torch.nn.functional."""

import inspect
from collections.abc import Callable

import torch

from nlkernels import _select
from nlkernels._arguments import (
    attention_operands,
    concat_operands,
    gate_operands,
    region_operands,
    requested_backend,
)
from nlkernels._spec import Problem, check_choice, describe
from nlkernels.ops.concat import op as concat
from nlkernels.ops.concat.problem import problem as concat_problem
from nlkernels.ops.dot_product import op as dot_product
from nlkernels.ops.gate import op as gate
from nlkernels.ops.gate.problem import GateProblem
from nlkernels.ops.region import op as region
from nlkernels.ops.region.problem import RegionProblem
from nlkernels.ops.relu import op as relu
from nlkernels.ops.softmax import op as softmax

_OP_OF_KIND = {"softmax": softmax, "gaussian": softmax, "dot_product": dot_product, "relu": relu}


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
    relu:               out[i] = sum_j relu(scale * query[i].key[j]) / M * value[j]

    Args:
        query: (B, N, D), float16, bfloat16, float32 or float64, any strides.
        key: (B, M, D), same dtype and device.
        value: (B, M, V), same dtype and device; V may differ from D.
        kind: "softmax" (embedded Gaussian), "gaussian" (the same function, unscaled by default),
            "dot_product" or "relu". Where M = 0 the last two give zeros.
        scale: factor of every query.key; None means D**-0.5 for softmax and 1 otherwise.
        backend: "auto" (the environment variable NLKERNELS_BACKEND when set, else the fastest
            measured), "reference" (plain autograd, materialises the scores), "chunked", "cpp" (on
            CPUs), "triton" or "cuda" (on GPUs, unverified there; "auto" takes a kernel that was
            right on this GPU, "cuda" only where `warmup` also timed it), or "sdpa" (softmax and
            gaussian only).
        workspace_mib: MiB for tiles of scores; None is 10 on CPUs and 40 on GPUs, 0 the least, 16
            rows of scores, and in the forward of the backend triton none.

    Returns:
        (B, N, V), dtype of the operands, contiguous. In an autocast region the operands are cast
        to its dtype first, as torch.matmul does.

    Raises:
        TypeError: an operand is no tensor or has another dtype.
        ValueError: sizes or devices do not fit; unknown kind or backend; no key for a softmax.
        NotImplementedError: the named backend cannot serve this problem.

    Memory:
        The backends chunked, cpp and triton: at most `workspace_mib`, and what the docstrings of
        nlkernels/ops/<op>/ add. Kept for the backward, by every backend but "reference" and, on
        GPUs, "sdpa": the operands; for softmax and gaussian also the output and 8 bytes a query
        (16 in float64); for dot_product, computed in the linear order, key^T value, 4 D V bytes for
        an item (8 D V in float64), where that is at most a quarter of the operands. A tensor that
        is several operands is kept, and cast, once.

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
        facebookresearch/video-nonlocal-net. relu: G. Huang, A. G. Bors, "Region-based Non-local
        Operation for Video Classification", ICPR 2020.
    """
    query, key, value, scale = attention_operands(query, key, value, kind, scale)
    backend = requested_backend(backend, workspace_mib)
    return _OP_OF_KIND[kind].attention(query, key, value, scale, backend, workspace_mib)


def nonlocal_concat(
    query_score: torch.Tensor,
    key_score: torch.Tensor,
    value: torch.Tensor,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """Every query position's sum of all values, weighted by the rectified sum of two scores.

    out[i] = sum_j relu(query_score[i] + key_score[j]) * value[j] / M

    This is the affinity of concatenated embeddings, relu(w . [theta_i, phi_j]): its weight vector
    splits into two, and so the score of a pair into w_theta . theta_i + w_phi . phi_j. It is exact
    in time linear in N and M, apart from sorting the scores.

    Args:
        query_score: (B, N), float16, bfloat16, float32 or float64, any strides.
        key_score: (B, M), same dtype and device.
        value: (B, M, V), same dtype and device.
        backend: "auto" (the environment variable NLKERNELS_BACKEND when set, else the fastest
            measured), "reference" (plain autograd, materialises the scores), "chunked", "cpp" or
            "triton".

    Returns:
        (B, N, V), dtype of the operands, contiguous; zeros where M = 0. In an autocast region the
        operands are cast to its dtype first, as torch.matmul does.

    Raises:
        TypeError: an operand is no tensor or has another dtype.
        ValueError: sizes or devices do not fit; unknown backend.
        NotImplementedError: the named backend cannot serve this problem.

    Memory:
        What the docstrings of nlkernels/ops/concat/chunked.py and triton.py state: linear in N and
        M. Kept for the backward: the operands.

    Determinism:
        Bitwise repeatable, forward and backward, for a device and thread count: no atomics.

    Differentiation:
        The derivative of relu at 0 is 0. Gradients of gradients go through the definition, tile by
        tile; gradients of those through the whole definition, in N x M memory. vmap, forward mode
        and nested torch.func gradients raise RuntimeError.

    Example:
        >>> import torch, nlkernels
        >>> query_score, key_score = torch.randn(2, 3136), torch.randn(2, 784)
        >>> nlkernels.nonlocal_concat(query_score, key_score, torch.randn(2, 784, 64)).shape
        torch.Size([2, 3136, 64])

    Source:
        X. Wang, R. Girshick, A. Gupta, K. He, "Non-local Neural Networks", CVPR 2018, concatenation
        (without their bias, as in open-mmlab/mmcv and AlexHex7/Non-local_pytorch).
    """
    operands = concat_operands(query_score, key_score, value)
    return concat.attend(*operands, requested_backend(backend, None, "nonlocal_concat"))


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
            measured), "reference" (torch's conv3d), "chunked", "cpp" or "triton".

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
    x, weight = region_operands(x, weight)
    return region.aggregate(x, weight, requested_backend(backend, None, "region_aggregate"))


def channel_gate(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    transform: Callable[[torch.Tensor], torch.Tensor],
    backend: str = "auto",
) -> torch.Tensor:
    """Add to every position a function of one context, the attended mean of all positions.

    context[b] = sum_p softmax_p(weight . x[b,:,p] + bias) * x[b,:,p]
    out[b,:,p] = x[b,:,p] + transform(context)[b]

    Args:
        x: (B, C, *positions) with 1 to 3 axes of positions, float16, bfloat16, float32 or float64,
            any strides; read without a copy in NCDHW, channels last, and as frames (B T, C, H, W)
            seen as a clip.
        weight: (C,), same dtype and device.
        bias: (1,) or None. It shifts every logit alike, so it changes nothing; its gradient is 0.
        transform: context (B, C) -> (B, C); what it holds is trained through it.
        backend: of the context: "auto" (the environment variable NLKERNELS_BACKEND when set, else
            the fastest measured), "reference" (plain autograd), "chunked", "cpp" or "triton".

    Returns:
        x + transform(context), shape of x; its dtype is x's where transform returns that or, as in
        an autocast region, a narrower one. There the operands of the context are cast to the
        region's dtype first.

    Raises:
        TypeError: an operand is no tensor or has another dtype; transform is not callable.
        ValueError: sizes or devices do not fit, there is no position, transform returns another
            shape; unknown backend.
        NotImplementedError: the named backend cannot serve this problem.

    Memory:
        What the docstrings of nlkernels/ops/gate/chunked.py and triton.py state: a few numbers a
        position. Kept for the backward: x, weight, bias and the context, and what transform keeps.

    Determinism:
        Bitwise repeatable, forward and backward, for a device and thread count: no atomics; as far
        as transform is.

    Differentiation:
        Gradients of gradients go through the definition, an item at a time. vmap, forward mode and
        nested torch.func gradients raise RuntimeError.

    Example:
        >>> import torch, nlkernels
        >>> x, weight = torch.randn(2, 64, 4, 14, 14), torch.randn(64)
        >>> nlkernels.channel_gate(x, weight, transform=torch.nn.Linear(64, 64)).shape
        torch.Size([2, 64, 4, 14, 14])

    Source:
        Y. Cao, J. Xu, S. Lin, F. Wei, H. Hu, "GCNet", 2019; guoxih/region-based-non-local-network.
    """
    operands = gate_operands(x, weight, bias)
    if not callable(transform):
        raise TypeError(
            f"channel_gate: expected transform to be callable, got {type(transform).__name__}; "
            "pass a module or function of the context (B, C)"
        )
    added = transform(gate.pool(*operands, requested_backend(backend, None, "channel_gate")))
    if not isinstance(added, torch.Tensor) or added.shape != x.shape[:2]:
        raise ValueError(
            f"channel_gate: expected transform to return {tuple(x.shape[:2])}, got "
            f"{describe(added)}; it maps the context to one number a channel"
        )
    return x + added[(..., *[None] * (x.dim() - 2))]


def explain(op_name: str, *operands: torch.Tensor, **options) -> _select.Explanation:
    """Say which backend a call would use, and why each other one would not run.

    Args:
        op_name: name of a public operation: "nonlocal_attention", "nonlocal_concat",
            "region_aggregate" or "channel_gate".
        *operands: the tensors of that call.
        **options: its keyword arguments.

    Returns:
        An `Explanation` with `backend` and `reasons`; `print` shows it as a table.

    Raises:
        What the operation itself raises for these operands and options; ValueError for an unknown
        operation, TypeError for an option that it does not have.

    Example:
        >>> import torch, nlkernels
        >>> query, key, value = (torch.randn(2, n, 64) for n in (49, 12, 12))
        >>> nlkernels.explain("nonlocal_attention", query, key, value, kind="dot_product").backend
        'chunked'
    """
    check_choice("explain", "op_name", op_name, tuple(_EXPLAINERS))
    explainer = _EXPLAINERS[op_name]
    known = list(inspect.signature(explainer).parameters)
    for name in options:
        if name not in known:
            raise TypeError(
                f"explain: expected arguments of {op_name} out of {', '.join(known)}, got "
                f"{name!r}; leave it out"
            )
    return explainer(*operands, **options)


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
    query, key, value, _ = attention_operands(query, key, value, kind, scale)
    backend = requested_backend(backend, workspace_mib)
    return _select.explain(_OP_OF_KIND[kind].NAME, Problem.of(query, key, value), backend)


def _explain_concat(
    query_score: torch.Tensor,
    key_score: torch.Tensor,
    value: torch.Tensor,
    *,
    backend: str = "auto",
) -> _select.Explanation:
    operands = concat_operands(query_score, key_score, value)
    backend = requested_backend(backend, None, "nonlocal_concat")
    return _select.explain(concat.NAME, concat_problem(*operands), backend)


def _explain_region(
    x: torch.Tensor, weight: torch.Tensor, *, backend: str = "auto"
) -> _select.Explanation:
    x, weight = region_operands(x, weight)
    backend = requested_backend(backend, None, "region_aggregate")
    return _select.explain(region.NAME, RegionProblem.of(x, weight), backend)


def _explain_gate(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
    backend: str = "auto",
) -> _select.Explanation:
    x, weight, _ = gate_operands(x, weight, bias)
    backend = requested_backend(backend, None, "channel_gate")
    return _select.explain(gate.NAME, GateProblem.of(x, weight), backend)


_EXPLAINERS: dict[str, Callable[..., _select.Explanation]] = {
    "nonlocal_attention": _explain_attention,
    "nonlocal_concat": _explain_concat,
    "region_aggregate": _explain_region,
    "channel_gate": _explain_gate,
}
