"""torch's scaled_dot_product_attention, only where it runs a fused kernel.

On CPUs the flash kernel is called through the operator that also returns the log-sum-exp, so it
keeps the contract of the other backends. On GPUs it is a composite outside the operator: torch
chooses among its fused kernels and saves what it needs, and its backward need not be repeatable.

Memory beyond inputs and outputs: a row-major copy of each operand whose last stride is not 1, as
the fused kernels read only such; on CPUs per thread float32 buffers of at most 256 x 512 scores and
256 rows of V, in the backward a row-major copy of the incoming gradient; nothing of N x M.
"""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from nlkernels._spec import Problem

FUSED = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
# Fused GPU kernels load 16 bytes at a time.
ALIGNMENT = {torch.float16: 8, torch.bfloat16: 8, torch.float32: 4}


def unsupported(problem: Problem) -> list[str]:
    """Why torch would fall back to its materialising math path; empty when a fused kernel runs."""
    reasons = []
    if problem.queries == 0 or problem.keys == 0 or problem.batch == 0:
        reasons.append("its fused kernels refuse empty operands")
    if problem.device == "cpu":
        if problem.depth != problem.value_depth:
            reasons.append("its CPU kernel needs D == V; torch would materialise the scores")
        if not hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"):
            reasons.append(f"torch {torch.__version__} has no CPU flash kernel")
    elif problem.device == "cuda":
        multiple = ALIGNMENT.get(problem.dtype)
        if multiple is None:
            reasons.append(f"its fused kernels do not take {problem.dtype}")
        elif problem.depth % multiple or problem.value_depth % multiple:
            reasons.append(f"its fused kernels need D and V divisible by {multiple}")
    else:
        reasons.append(f"no fused kernel is known for device {problem.device}")
    return reasons


def composite(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attention on a GPU by torch's fused kernels, never by its math path."""
    with sdpa_kernel(FUSED):
        out = scaled_dot_product_attention(*_heads(query, key, value), scale=scale)
    return out.squeeze(1)


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    workspace_mib: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out (B,N,V) and stats (2,B,N), on a CPU."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *_heads(query, key, value), scale=scale
    )
    out, lse = out.squeeze(1).contiguous(), lse.view(query.shape[:2])
    undefined = ~lse.isfinite()
    if undefined.any():
        # The kernel turns rows with an infinite score into zeros, the definition into NaN.
        out.masked_fill_(undefined.unsqueeze(-1), float("nan"))
    # The kernel gives a row's logarithm alone: the sum relative to it is 1.
    if scale == 0:
        return out, torch.stack([torch.zeros_like(lse), lse.exp()])
    return out, torch.stack([lse / scale, torch.ones_like(lse)])


def backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    stats: torch.Tensor,
    scale: float,
    workspace_mib: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query, key and value, on a CPU."""
    lse = (stats[0] * scale + stats[1].log()).unsqueeze(1)
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *_heads(grad, query, key, value, out), lse, 0.0, False, scale=scale
    )
    likes = (query, key, value)
    return tuple(torch.empty_like(t).copy_(g.squeeze(1)) for t, g in zip(likes, grads, strict=True))


def _heads(*operands: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(B,1,N,D) forms with a last stride of 1: the CPU kernel misreads others in silence."""
    return tuple((t if t.stride(-1) == 1 else t.contiguous()).unsqueeze(1) for t in operands)
