"""Context pooling in CUDA: x is read once forward and once backward, d_x written once. Unverified.

For tiles of positions with all their channels in the registers of one block, l_p = weight . x_p,
and the largest logit so far subtracted ("online" softmax, a_p = exp(l_p - top), in a unit that
keeps P of them below 1 in sum, so that no sum of theirs exceeds the largest x):

forward   read      sums += a_p x_p, total += a_p                       a block: a split of an item
          combine   context = sum over splits of sums / sum of totals
backward  read      u_p = grad . x_p - grad . context;  sums += a_p u_p x_p, error += a_p u_p
          combine   e = sum of errors / sum of totals;  sums / totals - e context
          weight    d_weight = those, added up over the items
          write     d_x_p = a_p / total (grad + (u_p - e) weight)       does not read x

The mean of u is taken from the u themselves (e), whose rounding then cancels. Sums are float32,
splits are added in the order of their positions: results are bitwise repeatable.

Any strides are read as they are; fast are positions or channels that are neighbours in memory.
Memory beyond inputs and outputs, E bytes an element, P positions, S splits (S B at most 512 or B,
and at most one for each tile of 8 to 32 positions):
  forward   : 4 B S (C + 3) for parts, E C for a copy of a weight that is not contiguous;
  backward  : the same, + 8 B P for l and u, 4 B (C + 3) for sums, and copies of grad and context
              that are not contiguous.

Source: `csrc/cuda/gate.cu`.
"""

import torch

from nlkernels import _cuda
from nlkernels._ext import DTYPES
from nlkernels.ops.gate.problem import axes, is_channels_last, like


def forward(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(B,C,*positions), (C,) -> (B,C)."""
    out = x.new_empty(x.shape[:2])
    if x.shape[0] == 0:
        return out
    module, gate, weight = _cuda.module(x), _gate(x), weight.contiguous()
    parts, stats = _parts(module, gate, x)
    operands = (x, weight, None, None, parts, stats)
    module.gate_forward(_cuda.stream(x), gate, _addresses(*operands), axes(x)[1], out.data_ptr())
    return out


def backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, context: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of x and weight, in their dtypes."""
    d_x, d_weight = like(x), weight.new_empty(weight.shape)
    if x.shape[0] == 0:
        return d_x, d_weight.zero_()
    module, gate = _cuda.module(x), _gate(x)
    grad, weight, context = (t.contiguous() for t in (grad, weight, context))
    parts, stats = _parts(module, gate, x)
    batch, channels = x.shape[:2]
    shapes = (2, x[0, 0].numel()), (channels,), (3,)
    sums = [x.new_empty(batch, *shape, dtype=torch.float32) for shape in shapes]
    module.gate_backward(
        _cuda.stream(x),
        gate,
        _addresses(x, weight, grad, context, parts, stats),
        axes(x)[1],
        _addresses(*sums),
        d_x.data_ptr(),
        axes(d_x)[1],
        d_weight.data_ptr(),
    )
    return d_x, d_weight


def _gate(x: torch.Tensor) -> tuple:
    return DTYPES[x.dtype], axes(x)[0], is_channels_last(x)


def _parts(module, gate: tuple, x: torch.Tensor) -> list[torch.Tensor]:
    """Room for the sums (B,S,C) and statistics (B,S,3) of all splits."""
    splits, (batch, channels) = module.gate_splits(gate), x.shape[:2]
    return [x.new_empty(batch, splits, n, dtype=torch.float32) for n in (channels, 3)]


def _addresses(*tensors: torch.Tensor | None) -> tuple[int, ...]:
    return tuple(0 if t is None else t.data_ptr() for t in tensors)
