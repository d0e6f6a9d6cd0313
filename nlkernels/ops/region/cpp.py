"""Region aggregation in C++ on CPUs (csrc/cpu/region*.h): forward, input and weight gradient.

forward   out[c,p] = sum_o weight[c,o] x[c,p+o]             o: kt*kh*kw offsets around zero
backward  d_x[c,p] = sum_o weight[c,-o] grad[c,p+o]         the same kernel, taps flipped
          d_weight[c,o] = sum_b,p grad[b,c,p] x[b,c,p+o]

A direct convolution: a vector holds neighbouring channels where these are neighbours in memory,
else neighbouring positions of one channel, of all frames one after the other. A task packs the rows
of one item that it reads, in what is computed in; then, for one frame and one column of the
kernel, a vector of input serves every output row below and above it from registers. Computed in
float32, in float64 for that. Sums of d_weight are those of up to a few thousand products for each
lane of a vector, added up in float64. What lies outside of x takes no part in any sum, and
every number is summed by one thread in an order that depends on sizes and layout only.

Any strides are read as they are. Memory beyond inputs and outputs, A = 4 bytes (8 for float64),
L lanes of A in a vector of at most 64 bytes, R rows of a task, at most H:
  forward  : for each thread 2 A P (R + kh) + A L kt kh kw, where P is T (W + kw/2) + 2 L plus the
             zeros around, (kt - 1)(W + kw/2) + kw, or L (T W + 1) where a vector holds channels; R
             is so small that A P R is at most 448 KiB, unless that is less than 8 rows;
  backward : the same, + 8 L kt kh kw for each thread and 8 S C kt kh kw with S at most 32 parts of
             the sums, one where there are 32 channels, or vectors of channels.
"""

import torch

from nlkernels import _ext
from nlkernels._ext import DTYPES
from nlkernels.ops.region.problem import like


def forward(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(B,C,T,H,W), (C,kt,kh,kw) -> (B,C,T,H,W)."""
    out = like(x)
    _run("region_forward", x, weight, None, out, None)
    return out


def backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of x and weight, in their dtypes."""
    d_x, d_weight = like(x), weight.new_empty(weight.shape)
    _run("region_backward", x, weight, grad, d_x, d_weight)
    return d_x, d_weight


def _run(entry: str, x, weight, grad, out, d_weight) -> None:
    native, isa = _ext.native()
    call = native.RegionArguments(
        dtype=DTYPES[x.dtype],
        threads=torch.get_num_threads(),
        sizes=tuple(x.shape),
        kernel=tuple(weight.shape[1:]),
        x=_features(x),
        weight=weight.data_ptr(),
        weight_strides=weight.stride(),
        grad=_features(grad),
        out=_features(out),
        d_weight=0 if d_weight is None else d_weight.data_ptr(),
    )
    workspace = torch.empty(native.region_workspace(isa, call), dtype=torch.uint8)
    getattr(native, entry)(isa, call, workspace.data_ptr())


def _features(tensor: torch.Tensor | None) -> tuple[int, tuple[int, ...]]:
    return (0, (0,) * 5) if tensor is None else (tensor.data_ptr(), tensor.stride())
