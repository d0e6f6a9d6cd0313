"""The definition: max pooling without padding, windows side by side.

out[b,c,t,h,w] = max_ijk x[b,c,t kt+i,h kh+j,w kw+k]

What a last window would lack is left out. NaN counts as larger than all before it, and the gradient
goes to the first of equal maxima.
"""

import torch
from torch.nn import functional as F


def pool(x: torch.Tensor, window: list[int]) -> torch.Tensor:
    """(B,C,T,H,W) -> (B,C,T//kt,H//kh,W//kw), differentiable by autograd."""
    return F.max_pool3d(x, window)
