"""The definitions: a sum of pointwise convolutions, and the products of its weights' gradients.

product   out[b,n,p] = base[b,n,p] + shift[p] + sum_s sum_c features_s[b,n,c] weight_s[p,c]
outer     outer[p,q] = sum_b,n left[b,n,p] right[b,n,q];  sums[p] = sum_b,n left[b,n,p]
"""

import torch

from nlkernels.ops.pointwise.problem import Sources


def product(
    sources: Sources, shift: torch.Tensor | None = None, base: torch.Tensor | None = None
) -> torch.Tensor:
    """Features (B,N,C), weights (P,C), shift (P,), base (B,N,P) -> (B,N,P), by autograd."""
    out = sum(features @ weight.mT for features, weight in sources)
    out = out if shift is None else out + shift
    return out if base is None else out + base


def outer(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(B,N,P), (B,N,Q) -> outer (P,Q) and sums (P,), by autograd."""
    return torch.einsum("bnp,bnq->pq", left, right), left.sum((0, 1))
