"""Max pooling in C++, for CPUs: x is read once, results and winners are written once.

Any strides are read as they are, fast where channels or the positions of a line are neighbours in
memory. Memory beyond inputs and outputs: none.

Source: `csrc/cpu/pool.cpp`.
"""

import torch

from nlkernels import _ext
from nlkernels.ops.pool import problem
from nlkernels.ops.region.problem import is_channels_last


def forward(x: torch.Tensor, window: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(B,C,T,H,W) -> pooled (B,C,T',H',W') and winners."""
    out, winners = problem.like(x, window), problem.winners_like(x, window)
    if out.numel() > 0:
        native, isa = _ext.native()
        native.pool_forward(
            isa,
            *_common(x, window),
            x.data_ptr(),
            x.stride(),
            out.data_ptr(),
            out.stride(),
            winners.data_ptr(),
        )
    return out, winners


def backward(
    grad: torch.Tensor, winners: torch.Tensor, d_x: torch.Tensor, window: list[int]
) -> torch.Tensor:
    """d_x (B,C,T,H,W), with the gradients of the pooled numbers added to their winners."""
    if grad.numel() > 0:
        native, isa = _ext.native()
        native.pool_backward(
            isa,
            *_common(d_x, window),
            grad.data_ptr(),
            grad.stride(),
            d_x.data_ptr(),
            d_x.stride(),
            winners.data_ptr(),
        )
    return d_x


def _common(x: torch.Tensor, window: list[int]) -> tuple:
    """Threads, dtype, order of the winners, sizes and window of a call."""
    last, sizes = is_channels_last(x), tuple(x.shape)
    return torch.get_num_threads(), _ext.DTYPES[x.dtype], last, sizes, tuple(window)
