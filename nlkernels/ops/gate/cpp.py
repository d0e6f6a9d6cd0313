"""Context pooling in C++, for CPUs: x is read from memory once each pass, d_x is written once.

forward   l_p = weight . x_p;  a_p = exp(l_p - max l);  context = sum a_p x_p / sum a_p
backward  u_p = grad . x_p - grad . context;  e = sum a_p u_p / sum a_p, zero but for rounding;
          d_weight = sum a_p u_p x_p / sum a_p - e context;
          d_x_p = a_p / sum a_p (grad + (u_p - e) weight)

A tile of positions is read for its l and u, and again from the cache for the sums; the largest
logit so far is subtracted ("online" softmax). The a are kept in a unit in which all P sum to less
than 1: no sum of theirs exceeds the largest x. The mean of u is taken from the u themselves (e),
whose rounding then cancels. Splits of about 1 MiB of x are read by any thread and added in their
order, which depends on C and P only: results are bitwise the same for any batch and number of
threads. Nothing is kept between the passes but x, weight and context.

Sums are float64 for float64 and float32, where an error of a logit would be a relative error of its
share, and float32 for 16 bits. Fast where positions or channels are neighbours in memory: NCDHW,
channels_last_3d, frames seen as a clip, slices of these. Other strides are read as they are, a tile
being copied.

Memory beyond inputs and outputs, A = 4 in 16 bits, else 8, E bytes an element, P positions, tiles
of n <= 256 positions and about 256 KiB, s <= min(128, ceil(P / n), E C P / 1 MiB + 1) splits:
  forward   : B s (A C + 24) for parts; for each thread 64 C + 2 A C for sums and factors;
  backward  : the same, 2 A B P for l and u, 8 B C + 24 B for parts of d_weight;
  strides   : E C (n + 16) for each thread where x lies neither way;
  either    : up to 64 for alignment of each of these.

Source: `csrc/cpu/gate.cpp`.
"""

import torch

from nlkernels import _ext
from nlkernels._ext import DTYPES
from nlkernels.ops.gate.problem import axes, like


def forward(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(B,C,*positions), (C,) -> (B,C)."""
    out = x.new_empty(x.shape[:2])
    if x.shape[0] == 0:
        return out
    (module, isa), threads, dtype = _ext.native(), torch.get_num_threads(), DTYPES[x.dtype]
    sizes, strides = axes(x)
    workspace = _workspace(module.gate_workspace(dtype, threads, sizes, strides, False))
    module.gate_forward(
        isa,
        threads,
        dtype,
        sizes,
        x.data_ptr(),
        strides,
        weight.data_ptr(),
        weight.stride(0),
        out.data_ptr(),
        workspace.data_ptr(),
    )
    return out


def backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, context: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of x and weight, in their dtypes."""
    d_x, d_weight = like(x), weight.new_empty(weight.shape)
    if x.shape[0] == 0:
        return d_x, d_weight.zero_()
    (module, isa), threads, dtype = _ext.native(), torch.get_num_threads(), DTYPES[x.dtype]
    sizes, strides = axes(x)
    workspace = _workspace(module.gate_workspace(dtype, threads, sizes, strides, True))
    module.gate_backward(
        isa,
        threads,
        dtype,
        sizes,
        x.data_ptr(),
        strides,
        weight.data_ptr(),
        weight.stride(0),
        grad.data_ptr(),
        grad.stride(),
        context.data_ptr(),
        context.stride(),
        d_x.data_ptr(),
        axes(d_x)[1],
        d_weight.data_ptr(),
        workspace.data_ptr(),
    )
    return d_x, d_weight


def _workspace(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8)
