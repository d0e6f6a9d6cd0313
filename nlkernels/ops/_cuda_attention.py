"""Attention in CUDA on every GPU from compute capability 7.5 on: csrc/cuda/attention_pass.cuh.

forward   a block of 64 queries goes over all keys, for 256 channels of the output; a softmax online
backward  three such passes: d_query over the keys; d_key and d_value over the queries

Float32 operands are multiplied in float32, 16-bit ones by tensor cores with sums in float32. Where
D or V exceed 256, the scores are computed again for every 256 channels of a result. Any strides are
read and written; those of 1 whose rows begin at multiples of 16 bytes by copies in the background.
Bitwise repeatable: no atomics, and sums in an order that sizes fix.

Memory beyond inputs and outputs: 4 bytes for each query of a softmax in the backward; in float16,
without a softmax, 8 bytes a batch item.

Unverified: no GPU has run these kernels.
"""

from __future__ import annotations

import torch

from nlkernels import _cuda
from nlkernels._ext import DTYPES

# nlk::cuda::Affinity.
SOFTMAX, RELU, SCORES = range(3)
# In units of 2^e, the largest product is below 2^15.
_UNIT_BITS = 14


def forward(
    affinity: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out (B,N,V) and stats (2,B,N), which are empty without a softmax."""
    batch, rows, _ = query.shape
    out = value.new_empty(batch, rows, value.shape[2])
    softmax = affinity == SOFTMAX
    stats = query.new_empty(2, batch, rows if softmax else 0, dtype=torch.float32)
    if key.shape[1] == 0:
        return out.zero_(), stats
    if out.numel() == 0:
        return out, stats
    native, factor = _cuda.module(query), _factor(affinity, key, scale)
    units = _units(affinity, query, key, factor)
    problem = _problem(native, affinity, query, key, value, factor)
    operands = (_cuda.operand(t) for t in (query, key, value, out))
    native.attention_forward(
        _cuda.stream(query), problem, *operands, stats.data_ptr(), _address(units)
    )
    return out, stats


def backward(
    affinity: int,
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    out: torch.Tensor | None = None,
    stats: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query, key and value; a softmax needs its out and stats."""
    grads = tuple(torch.empty_like(t) for t in (query, key, value))
    batch, rows, _ = query.shape
    if 0 in (batch, rows, key.shape[1]):
        return tuple(t.zero_() for t in grads)
    native, factor = _cuda.module(query), _factor(affinity, key, scale)
    weight_units = _units(affinity, query, key, factor)
    gradient_units = _units(affinity, grad, value, factor)
    row_sums = query.new_empty(batch, rows if affinity == SOFTMAX else 0, dtype=torch.float32)
    problem = _problem(native, affinity, query, key, value, factor)
    inputs = (grad, query, key, value, grad if out is None else out)
    native.attention_backward(
        _cuda.stream(query),
        problem,
        *(_cuda.operand(t) for t in (*inputs, *grads)),
        _address(stats),
        row_sums.data_ptr(),
        _address(weight_units),
        _address(gradient_units),
    )
    return grads


def delta(grad: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Return the row sums (B,N) of grad out (B,N,V) in float32, which a softmax backward needs."""
    sums = grad.new_empty(grad.shape[:2], dtype=torch.float32)
    _cuda.module(grad).attention_delta(
        _cuda.stream(grad),
        DTYPES[grad.dtype],
        tuple(grad.shape),
        _cuda.operand(grad),
        _cuda.operand(out),
        sums.data_ptr(),
    )
    return sums


def _factor(affinity: int, key: torch.Tensor, scale: float) -> float:
    return scale if affinity == SOFTMAX else scale / key.shape[1]


def _problem(native, affinity, query, key, value, factor):
    sizes = (*query.shape[:2], key.shape[1], query.shape[2], value.shape[2])
    return native.AttentionProblem(affinity, DTYPES[query.dtype], factor, sizes)


def _units(
    affinity: int, rows: torch.Tensor, columns: torch.Tensor, factor: float
) -> torch.Tensor | None:
    """Powers of two (B,), by which float16 weights factor rows @ columns^T are divided.

    A product is at most C max|row| max|column|. Weights of a softmax need none. An item with an
    infinite or NaN element gets the unit 1: its other rows are as without units.
    """
    if rows.dtype != torch.float16 or affinity == SOFTMAX:
        return None
    peaks = [torch.linalg.vector_norm(t, float("inf"), dim=(1, 2)).float() for t in (rows, columns)]
    bound = peaks[0] * peaks[1] * (abs(factor) * rows.shape[2])
    one = 2.0**_UNIT_BITS
    exponent = torch.frexp(bound.nan_to_num(one, posinf=one))[1] - 1 - _UNIT_BITS
    return torch.ldexp(torch.ones_like(bound), exponent.clamp(-60 - _UNIT_BITS, 126))


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
