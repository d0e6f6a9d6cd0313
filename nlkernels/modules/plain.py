"""A block layer after layer, as torch does: where something watches or replaces the layers."""

from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from nlkernels.modules import layers
from nlkernels.modules.affinity import scores
from nlkernels.modules.options import REGION_KINDS

if TYPE_CHECKING:
    from nlkernels.modules.base import NonLocalBlock


def forward(
    block: "NonLocalBlock", x: torch.Tensor
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """The block's output, and the operands of its attention."""
    folded = fold(block, x)
    rows = as_operands(block, *_features(block, folded))
    maps = block._attend(*rows).mT.unflatten(2, folded.shape[2:])
    out = block.out(maps.contiguous(memory_format=layers.memory_format(folded)))
    out = folded + (out if block.norm is None else block.norm(out))
    return unfold(out, x), rows


def operands(block: "NonLocalBlock", x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Operands of the attention: query (B,N,D), key (B,M,D) and value (B,M,V).

    They are views. For "concat" query and key are scores (B,N) and (B,M).
    """
    return as_operands(block, *_features(block, fold(block, x)))


def as_operands(block: "NonLocalBlock", *features: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Maps of query, key and, if given, value as operands of the attention."""
    rows = layers.rows(*features)
    if block.kind == "concat":
        rows[:2] = map(scores, rows[:2], block.concat_weight)
    return tuple(rows)


def fold(block: "NonLocalBlock", x: torch.Tensor) -> torch.Tensor:
    """Groups of frames as items of the batch: (B T/t, C, t, H, W)."""
    group = block.temporal_group
    if group is None or group >= x.shape[2]:
        return x
    return x.unflatten(2, (-1, group)).transpose(1, 2).flatten(0, 1)


def unfold(out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Groups of frames back in their clips, laid out as x."""
    if out.shape == x.shape:
        return out
    out = out.unflatten(0, (x.shape[0], -1)).transpose(1, 2).flatten(2, 3)
    return out.contiguous(memory_format=layers.memory_format(x))


def _features(
    block: "NonLocalBlock", x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Maps (B, channels, *positions) of query, key and value; one that is two is computed once.

    Of a region kind, query and key are theta's aggregated map and the value is theta's own.
    """
    if block.kind in REGION_KINDS:
        value = block.theta(x)
        query = aggregated(block, value)
        return query, pooled(block, query, "after"), pooled(block, value, "after")
    source = pooled(block, x, "before")
    return query_map(block, x), key_map(block, source), pooled(block, block.g(source), "after")


def query_map(block: "NonLocalBlock", x: torch.Tensor) -> torch.Tensor:
    """Map of the query."""
    return x if block.kind == "gaussian" else block.theta(x)


def key_map(block: "NonLocalBlock", source: torch.Tensor) -> torch.Tensor:
    """Map of the key, of x that is pooled where the block pools "before"."""
    return pooled(block, source if block.kind == "gaussian" else block.phi(source), "after")


def pooled(block: "NonLocalBlock", features: torch.Tensor, order: str) -> torch.Tensor:
    """The features, pooled if this block pools at this point."""
    pools = block.pool is not None and block.pool_order == order
    return block.pool(features) if pools else features


def aggregated(block: "NonLocalBlock", features: torch.Tensor) -> torch.Tensor:
    """The query's and key's map of a region kind."""
    if block.region is not None:
        features = block.region(features, layers.region_backend(block.backend))
    if block.region_l2norm:
        wide = features.to(torch.promote_types(features.dtype, torch.float32))
        features = F.normalize(wide, dim=1).to(features.dtype)
    return features
