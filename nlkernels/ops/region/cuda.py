"""Depthwise 3-D correlation in CUDA: forward, input gradient and weight gradient. Unverified.

forward   out[c,p] = sum_o weight[c,o] x[c,p+o]             o: kt*kh*kw offsets around zero
backward  d_x[c,p] = sum_o weight[c,-o] grad[c,p+o]         the same kernel, mirrored
          d_weight[c,o] = sum_b,p grad[b,c,p] x[b,c,p+o]

A block brings a tile of x with its halo to shared memory, in float32. A thread sums 7 neighbours
along W in 2 or 4 frames from rows that it holds in registers; for d_weight a warp sums the taps of
one row of the kernel. 3x7x7 and 3x3x3 have kernels of their own, other odd sizes up to 15x15x15
share one that goes frame by frame. Sums are float32, those of d_weight tile by tile; every number
is summed by one thread or one warp in a fixed order.

Any strides are read as they are. Zeros stand outside of x, as in torch's convolution: they meet
weights that are infinite. Memory beyond inputs and outputs, E bytes an element:
  backward  : 4 C kt kh kw parts for float32 sums, with parts at most 1024 over the groups of 1, 4
              or 16 channels, and at most one for each tile of B T H W positions;
              + E B C T H W for a copy of a grad whose layout is not that of x.

Source: `csrc/cuda/region.cu`.
"""

import torch

from nlkernels import _cuda
from nlkernels._ext import DTYPES
from nlkernels.ops.region.problem import is_channels_last, like


def forward(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(B,C,T,H,W), (C,kt,kh,kw) -> (B,C,T,H,W)."""
    return _correlate(x, weight, like(x), flip=False)


def backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of x and weight, in their dtypes."""
    d_x, d_weight = like(x), weight.new_empty(weight.shape)
    if x.numel() == 0:
        return d_x, d_weight.zero_()
    if is_channels_last(grad) != is_channels_last(x):
        grad = like(x).copy_(grad)
    _correlate(grad, weight, d_x, flip=True)
    module, region = _cuda.module(x), _region(x, weight)
    parts = x.new_empty(module.region_weight_parts(region), *weight.shape, dtype=torch.float32)
    module.region_weight_gradient(
        _cuda.stream(x),
        region,
        _cuda.operand(x),
        _cuda.operand(grad),
        parts.data_ptr(),
        d_weight.data_ptr(),
    )
    return d_x, d_weight


def _correlate(
    x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, flip: bool
) -> torch.Tensor:
    if x.numel() > 0:
        _cuda.module(x).region_correlate(
            _cuda.stream(x),
            _region(x, weight),
            _cuda.operand(x),
            weight.data_ptr(),
            weight.stride(),
            _cuda.operand(out),
            flip,
        )
    return out


def _region(x: torch.Tensor, weight: torch.Tensor) -> tuple:
    return DTYPES[x.dtype], tuple(x.shape), tuple(weight.shape[1:]), is_channels_last(x)
