"""One row of a block's affinity, without the others."""

from typing import TYPE_CHECKING

import torch

from nlkernels.modules import fast, plain
from nlkernels.modules.affinity import affinity
from nlkernels.modules.options import REGION_KINDS

if TYPE_CHECKING:
    from nlkernels.modules.base import NonLocalBlock


def row(block: "NonLocalBlock", x: torch.Tensor, query: tuple[int, ...]) -> torch.Tensor:
    """(B, *key positions): the affinity of one position of x to every key of its group."""
    if block.temporal_group is not None:
        start = query[0] // block.temporal_group * block.temporal_group
        x = x[:, :, start : start + block.temporal_group]
        query = (query[0] - start, *query[1:])
    at = (slice(None), slice(None), *(slice(position, position + 1) for position in query))
    if block.kind in REGION_KINDS:
        region = plain.aggregated(block, block.theta(x))
        point, keys = region[at], plain.pooled(block, region, "after")
    else:
        source = plain.pooled(block, x, "before")
        if block.kind == "concat" and not block._obstacles():
            return _concatenated(block, x[at], source)
        point, keys = plain.query_map(block, x[at]), plain.key_map(block, source)
    rows = plain.as_operands(block, point, keys)
    return affinity(block.kind, *rows, block._factor).squeeze(1).unflatten(1, keys.shape[2:])


def _concatenated(block, point, source):
    """The same of the scores that the fast path computes."""
    scores, sizes = fast.score(block, source, 1), source.shape[2:]
    if block.pool is not None and block.pool_order == "after":
        keys = plain.key_map(block, source)
        _, scores = plain.as_operands(block, keys, keys)
        sizes = keys.shape[2:]
    rows = fast.score(block, point, 0), scores
    return affinity(block.kind, *rows, block._factor).squeeze(1).unflatten(1, sizes)
