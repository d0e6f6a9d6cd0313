"""The output projection of dot-product attention, folded into its state: for inference.

    weight (query S)^T = (weight S^T) query^T,    S = scale / M  key^T value  (D,V)

so that one product of the query's rows writes the block's output: (N + V) C D products take the
place of N D V + N V C. Where no gradient is asked for; every item has a state of its own, so that
only a single one is worth it.

Memory beyond inputs and outputs: D V and two times C D numbers of the type that sums have.
"""

import torch

from nlkernels._spec import default_scale
from nlkernels.ops._tiles import accumulator_dtype
from nlkernels.ops.dot_product.order import flops
from nlkernels.ops.pointwise import op as _pointwise  # noqa: F401 - its operators


def pays(kind: str, rows: tuple[torch.Tensor, ...], weight: torch.Tensor) -> bool:
    """Whether a block computes less with its output projection (C,V) folded into the state."""
    if kind != "dot_product" or torch.is_grad_enabled() or rows[0].shape[0] != 1:
        return False
    (_, queries, depth), (_, keys, value_depth) = rows[0].shape, rows[2].shape
    linear, quadratic = flops(1, queries, keys, depth, value_depth)
    channels = weight.shape[0]
    folded = (queries + value_depth) * channels * depth
    apart = queries * depth * value_depth + queries * value_depth * channels
    return 0 < linear <= quadratic and folded < apart


def folded(
    rows: tuple[torch.Tensor, ...], weight: torch.Tensor, scale: float | None, backend: str
) -> torch.Tensor:
    """weight (C,V) of query, key and value of one item -> the query's own weight (C,D)."""
    query, key, value = rows
    if scale is None:
        scale = default_scale("dot_product", query.shape[2])
    state, _ = torch.ops.nlkernels.pointwise_outer(key, value, backend)
    wide = accumulator_dtype(weight.dtype)
    with torch.autocast(weight.device.type, enabled=False):
        found = weight.to(wide) @ state.mT
        return found.mul_(scale / key.shape[1]).to(weight.dtype)
