"""Where a network's non-local blocks look from chosen points of a clip, one row at a time.

A row is what `NonLocalBlock.attention_map` gives: the affinity of one query position to all key
positions. The whole N x M matrix is never computed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nlkernels.modules.base import NonLocalBlock

Position = tuple[int, int, int]


@dataclass(frozen=True)
class Row:
    """Where one block looks from one point.

    Attributes:
        block: Name of the block.
        point: Number of the point.
        query: (t, y, x) in the block's input.
        size: (T, H, W) of the block's input.
        weights: (T', H', W'), float32 on the CPU: the affinity of every key position of the clip,
            0 in other temporal groups. Of the softmax kinds it sums to 1.
    """

    block: str
    point: int
    query: Position
    size: Position
    weights: Tensor

    @property
    def mean(self) -> float:
        """Mean size of a weight: 1 / M for the softmax kinds."""
        return self.weights.abs().mean().item()

    @property
    def peak(self) -> tuple[float, Position]:
        """The weight of largest size, and its (t, y, x) among the keys."""
        place = self.weights.abs().argmax()
        at = torch.unravel_index(place, self.weights.shape)
        return self.weights[at].item(), tuple(int(one) for one in at)


def find_blocks(model: nn.Module, names: Sequence[str] = ()) -> dict[str, NonLocalBlock]:
    """The non-local blocks of a network for clips by name, such as "layer3.1".

    Args:
        model: The network.
        names: Which of them; none of all.

    Raises:
        ValueError: No blocks at all, or an unknown name.

    Example:
        >>> from nlkernels.models import create_model
        >>> list(find_blocks(create_model("c2d_tiny", num_classes=2, blocks=2)))
        ['layers.3', 'layers.4']
    """
    found = {
        name.removesuffix(".nl"): module
        for name, module in model.named_modules()
        if isinstance(module, NonLocalBlock)
    }
    if not found:
        raise ValueError(
            "attention: expected a network with non-local blocks, got one without; leave the "
            "attention out, or take weights of a network with blocks"
        )
    wanted = [name.removesuffix(".nl") for name in names]
    for name in wanted:
        if name not in found:
            raise ValueError(
                f"attention: expected blocks from {', '.join(found)}, got {name!r}; "
                "choose some of them"
            )
    return {name: block for name, block in found.items() if not wanted or name in wanted}


def attend(
    model: nn.Module, clip: Tensor, points: Sequence[Position], blocks: dict[str, NonLocalBlock]
) -> list[Row]:
    """Rows of attention of some points of a clip, in every one of some blocks.

    Args:
        model: In evaluation mode.
        clip: (1, C, T, H, W) on its device, as the network takes it.
        points: (t, y, x) in the clip.
        blocks: From `find_blocks(model)`.

    Returns:
        By point, then by block in the order in which they run.

    Raises:
        ValueError: A point outside of the clip.

    Memory:
        That of the forward pass, one row at a time, and the rows themselves.
    """
    sizes = tuple(clip.shape[2:])
    for point in points:
        if len(point) != 3 or not all(0 <= p < n for p, n in zip(point, sizes, strict=True)):
            raise ValueError(
                f"attention: expected points (t, y, x) inside {sizes}, got {tuple(point)}; "
                "count from 0"
            )
    names = {block: name for name, block in blocks.items()}
    rows: list[Row] = []

    def record(block: NonLocalBlock, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        size = tuple(x.shape[2:])
        for number, point in enumerate(points):
            query = tuple(place(p, n, own) for p, n, own in zip(point, sizes, size, strict=True))
            row = block.attention_map(x, query)[0].float().cpu()
            rows.append(Row(names[block], number, query, size, _whole(block, row, query[0], size)))

    handles = [block.register_forward_pre_hook(record) for block in blocks.values()]
    try:
        with torch.inference_mode():
            model(clip)
    finally:
        for handle in handles:
            handle.remove()
    return sorted(rows, key=lambda row: row.point)


def strongest(
    model: nn.Module, clip: Tensor, block: NonLocalBlock, count: int
) -> list[tuple[Position, float]]:
    """Places of a clip that a block changes most, apart from each other.

    How much it changes a place is the length of what it adds to the features there, in relation to
    the length of these features. A place within a quarter of the map's height and width of a
    stronger one is passed over, whichever its frame, and so is the rim of the map where it is at
    least five places wide: there convolutions see the padding.

    Args:
        model: In evaluation mode.
        clip: (1, C, T, H, W) on its device.
        block: One of its blocks.
        count: Most places.

    Returns:
        (t, y, x) in the clip, the centre of the place, and the change, strongest first.
    """
    changes: list[Tensor] = []

    def measure(module: NonLocalBlock, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0][0].float()
        added = (output[0].float() - x).norm(dim=0)
        changes.append((added / x.norm(dim=0).clamp_min(1e-12)).cpu())

    handle = block.register_forward_hook(measure)
    try:
        with torch.inference_mode():
            model(clip)
    finally:
        handle.remove()
    change = changes[-1].clone()
    height, width = change.shape[1:]
    if min(height, width) >= 5:
        inner = change[:, 1:-1, 1:-1].clone()
        change.fill_(-1)[:, 1:-1, 1:-1] = inner
    found = []
    while len(found) < count and change.max() >= 0:
        at = torch.unravel_index(change.argmax(), change.shape)
        t, y, x = (int(one) for one in at)
        centre = tuple(
            int((p + 0.5) * whole / n)
            for p, n, whole in zip((t, y, x), change.shape, clip.shape[2:], strict=True)
        )
        found.append((centre, change[t, y, x].item()))
        top, left = max(0, y - height // 4), max(0, x - width // 4)
        change[:, top : y + height // 4 + 1, left : x + width // 4 + 1] = -1
    return found


def place(position: int, whole: int, size: int) -> int:
    """The place of a map of `size` that holds the middle of a position among `whole`.

    Example:
        >>> [place(position, 8, 4) for position in range(8)]
        [0, 0, 1, 1, 2, 2, 3, 3]
    """
    return min(int((position + 0.5) * size / whole), size - 1)


def _whole(block: NonLocalBlock, row: Tensor, t: int, size: Position) -> Tensor:
    """A row over all key positions of the clip: other temporal groups have 0."""
    group = block.temporal_group
    if group is None or size[0] <= group:
        return row
    whole = row.new_zeros(len(row) * (size[0] // group), *row.shape[1:])
    start = t // group * len(row)
    whole[start : start + len(row)] = row
    return whole
