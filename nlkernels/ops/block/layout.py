"""Maps as rows of positions and back, without a copy."""

import torch


def rows_of(features: torch.Tensor) -> torch.Tensor:
    """(B,C,T,H,W) -> (B,N,C), a view where positions lie at one distance."""
    return features.flatten(2).mT


def map_of(rows: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
    """(B,N,C) -> (B,C,*sizes), a view."""
    found = rows.mT.unflatten(2, sizes)
    if found.shape[0] != 1:
        return found
    # A view gives a single item any stride, by which torch's batch norm takes channels_last_3d for
    # NCDHW: where a gradient lies otherwise, torch 2.13 then returns wrong numbers.
    return found.as_strided(found.shape, (rows.stride(0), *found.stride()[1:]))
