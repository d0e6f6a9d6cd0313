"""The scores of a concatenation, and normalised affinities written out: for attention maps."""

import torch


def affinity(kind: str, query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """Affinities as a matrix; the softmax kinds' rows sum to 1.

    Args:
        kind: a block's kind.
        query: (B, N, D); for "concat" the query scores (B, N).
        key: (B, M, D); for "concat" the key scores (B, M).
        scale: factor of the scores; "concat" has none.

    Returns:
        (B, N, M) in at least float32: a float16 score may exceed its range while the affinity does
        not.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        query, key = query.to(wide), key.to(wide)
        if kind == "concat":
            products = query[:, :, None] + key[:, None, :]
        else:
            products = torch.bmm(query, key.mT) * scale
        if kind in ("softmax", "gaussian", "region_softmax"):
            return torch.softmax(products, dim=-1)
        if kind in ("relu", "concat", "region_relu"):
            products = torch.relu(products)
        return products / products.shape[2]


def scores(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """rows (B, N, D) . weight (D,): a product that torch accumulates in at least float32."""
    return torch.bmm(weight.expand(rows.shape[0], 1, -1), rows.mT).squeeze(1)


def block_diagonal(weights: torch.Tensor, batch: int) -> torch.Tensor:
    """(B groups, n, m) -> (B, groups n, groups m), zero outside of the groups."""
    if weights.shape[0] == batch:
        return weights
    groups = weights.unflatten(0, (batch, -1)).unbind(1)
    return torch.stack([torch.block_diag(*item) for item in zip(*groups, strict=True)])
