"""What a block is given, checked before any work."""

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nlkernels._spec import autocasts, describe
from nlkernels.modules.options import AXES

if TYPE_CHECKING:
    from nlkernels.modules.base import NonLocalBlock


def check(block: "NonLocalBlock", x: Any) -> None:
    """Raise TypeError or ValueError unless `x` is an input of the block."""
    where, held = block._name, stored(block.out)
    if not isinstance(x, torch.Tensor):
        raise TypeError(
            f"{where}: expected a tensor, got {type(x).__name__}; convert it with torch.as_tensor"
        )
    if x.device != held.device:
        raise ValueError(
            f"{where}: expected input on {held.device}, got {describe(x)}; "
            "move it or the block with .to(device)"
        )
    if x.dtype != held.dtype and not autocasts(x.device.type):
        raise TypeError(
            f"{where}: expected input of {held.dtype}, got {describe(x)}; "
            "cast it or the block with .to(dtype), or use autocast"
        )
    if x.dim() != block.dims + 2 or x.shape[1] != block.dim or 0 in x.shape[2:]:
        raise ValueError(
            f"{where}: expected (B, {block.dim}, {', '.join(AXES[block.dims])}), got "
            f"{describe(x)}; the block is built for one number of channels and dimensions"
        )
    check_positions(block, where, tuple(x.shape[2:]))


def stored(layer: nn.Module) -> torch.Tensor:
    """A tensor of a layer, for its device and dtype.

    A parametrized weight is computed whenever it is read, and some change what they store then.
    """
    held = layer._parameters.get("weight")
    held = next(layer.parameters(), None) if held is None else held
    # Replicas of DataParallel have weights that are no parameters.
    return layer.weight if held is None else held


def check_positions(block: "NonLocalBlock", where: str, positions: tuple[int, ...]) -> None:
    """Raise ValueError unless the block can pool and group an input of these sizes."""
    pool = block.pool_size
    if pool is not None and any(n < p for n, p in zip(positions, pool, strict=True)):
        raise ValueError(
            f"{where}: expected an input of at least {pool} to pool, got {positions}; "
            "use pool=None or larger inputs"
        )
    group = block.temporal_group
    if group is not None and positions[0] > group and positions[0] % group:
        raise ValueError(
            f"{where}: expected T to be a multiple of temporal_group={group}, got "
            f"T={positions[0]}; choose another group or clip length"
        )


def position(query: Any, x: torch.Tensor) -> tuple[int, ...]:
    """`query` as a position of x (B, C, *positions); raise ValueError unless it is one."""
    sizes = tuple(x.shape[2:])
    listed = isinstance(query, tuple | list) and len(query) == len(sizes)
    found = tuple(map(_index, query)) if listed else (-1,) * len(sizes)
    if not all(0 <= q < n for q, n in zip(found, sizes, strict=True)):
        names = ", ".join({1: ("i",), 2: ("y", "x"), 3: ("t", "y", "x")}[len(sizes)])
        raise ValueError(
            f"attention_map: expected query ({names}) inside {sizes}, got "
            f"{query}; positions count from 0 in the block's input"
        )
    return found


def _index(number: Any) -> int:
    """An integer of any library as one of Python's; -1 for anything else."""
    try:
        return -1 if isinstance(number, bool) else operator.index(number)
    except TypeError:  # NumPy's bool among others
        return -1
