"""How the positions of features (B, C, *positions) lie in memory, for operations that keep them."""

import torch


def position_stride(x: torch.Tensor) -> int | None:
    """Distance between positions that follow each other in (T, H, W) order, when it is one."""
    step, inner = None, 1
    for size, stride in zip(reversed(x.shape[2:]), reversed(x.stride()[2:]), strict=True):
        if size == 1:
            continue
        if step is None:
            step = stride
        elif stride != inner * step:
            return None
        inner *= size
    return 0 if step is None else step
