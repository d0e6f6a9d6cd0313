"""Pointwise products by the library's matrix products, on any device.

float16 is computed in float32 on CPUs, whose library has no fast product of it; sums of 16-bit
operands that have to be float32 are computed from float32 copies of pieces of positions there.

Memory beyond inputs and outputs, A bytes a sum, C channels of the operands:
  product : A B N P for a result that is rounded at the end or lies otherwise; copies of operands in
            float32 where these are float16 on CPUs;
  outer   : 8 P Q, and 8 MiB of converted positions of 16-bit operands, on CPUs of float32, too.
"""

import torch

from nlkernels.ops._tiles import MIB, accumulator_dtype, compute_dtype
from nlkernels.ops.pointwise.problem import Sources, like

# Of operands that are converted at a time.
_PIECE = 8 * MIB


def product(
    sources: Sources,
    shift: torch.Tensor | None = None,
    base: torch.Tensor | None = None,
    maps: bool = False,
) -> torch.Tensor:
    """Features (B,N,C), weights (P,C), shift (P,), base (B,N,P) -> (B,N,P), as maps or rows."""
    features = sources[0][0]
    channels = sources[0][1].shape[0]
    dtype = compute_dtype(features.dtype) if features.device.type == "cpu" else features.dtype
    if shift is not None:
        start = shift.to(dtype) if base is None else base + shift
    else:
        start = base
    out = start if start is None else start.to(dtype).expand(*features.shape[:2], channels)
    for rows, weight in sources:
        weight = weight.to(dtype).expand(rows.shape[0], -1, -1)
        out = _multiply(rows.to(dtype), weight, out, maps)
    out = out.to(features.dtype)
    wanted = like(features, channels, maps)
    return out if out.stride() == wanted.stride() else wanted.copy_(out)


def _multiply(rows, weight, start, maps):
    """start + rows weight^T, computed so that the result lies as it is wanted."""
    left, right = (weight, rows.mT) if maps else (rows, weight.mT)
    if start is None:
        out = torch.bmm(left, right)
    else:
        out = torch.baddbmm(start.mT if maps else start, left, right)
    return out.mT if maps else out


def outer(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(B,N,P), (B,N,Q) -> outer (P,Q) and sums (P,), in at least float32."""
    dtype = accumulator_dtype(left.dtype)
    # The library adds float32 in chains, by which a norm's gradients, taken from these sums, would
    # be more than 3 times as wrong as torch's own.
    exact = torch.float64 if left.dtype == torch.float32 and left.device.type == "cpu" else dtype
    products = left.new_zeros(left.shape[2], right.shape[2], dtype=exact)
    row_bytes = (left.shape[2] + right.shape[2]) * exact.itemsize
    step = max(1, left.shape[1] if left.dtype == exact else _PIECE // row_bytes)
    for one, other in zip(left, right, strict=True):
        for rows, columns in zip(one.split(step), other.split(step), strict=True):
            products.addmm_(rows.to(exact).mT, columns.to(exact))
    return products.to(dtype), left.sum((0, 1), dtype=exact).to(dtype)
