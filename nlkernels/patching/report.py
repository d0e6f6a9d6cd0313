"""What was replaced or inserted in a model, as a table; and the way back."""

from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Self

import torch
from torch import nn

if TYPE_CHECKING:
    from nlkernels.modules.base import NonLocalBlock
    from nlkernels.patching.foreign import View

_HEAD = ("where", "system", "kind", "pool", "N x M", "backend", "MiB saved")


class Row(NamedTuple):
    """One block.

    Attributes:
        where: its name in the model; "" for the model itself.
        system: whose block it is, or the preset of an inserted one.
        kind: of its affinity.
        pool_order: "before" or "after" the projections; None without pooling.
        queries: N; None if no clip was run.
        keys: M, likewise.
        backend: that would run for that clip; the one asked for if no clip was run.
        saved_mib: peak of the naive attention less ours for that clip, as `footprint` reckons it,
            backward included in training mode; None if no clip was run.
    """

    where: str
    system: str
    kind: str
    pool_order: str | None
    queries: int | None
    keys: int | None
    backend: str
    saved_mib: float | None


def row_of(
    where: str,
    system: str,
    block: "NonLocalBlock | View",
    shape: tuple[int, ...] | None,
    training: bool,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Row:
    """The row of a block that gets an input of `shape`; None where that is unknown."""
    order = None if block.pool is None else block.pool_order
    if shape is None:
        return Row(where, system, block.kind, order, None, None, block.backend or "auto", None)
    found = block.footprint(shape, dtype, device, training)
    saved = None if found.bytes is None else (found.naive_bytes - found.bytes) / 2**20
    sizes = (found.queries, found.keys)
    return Row(where, system, block.kind, order, *sizes, found.backend, saved)


class Report(Sequence[Row]):
    """Rows of blocks, printable; a context manager at whose end `restore` is called.

    Attributes:
        rows: a row for each block.
        blocks: the blocks themselves, by name.
        difference: largest difference of the model's outputs before and after, relative to the
            largest output; None if none was asked for.
    """

    def __init__(self, rows: Sequence[Row], blocks: dict[str, nn.Module]) -> None:
        self.rows, self.blocks = tuple(rows), blocks
        self.difference: float | None = None
        self._undo: list[Callable[[], None]] = []

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def on_restore(self, undo: Callable[[], None]) -> None:
        """Add what `restore` has to do, the last first."""
        self._undo.append(undo)

    def restore(self) -> None:
        """Give the model back as it was; a second call does nothing.

        What the model learned meanwhile stays in the parameters it has; those of inserted blocks
        leave it, and stay in `blocks`. What was taken back, removed or replaced anew since is left
        as it is.

        Raises:
            RuntimeError: a module's class was changed since, as by parametrizations or fully_shard;
                nothing is changed.
        """
        while self._undo:
            self._undo[-1]()
            self._undo.pop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.restore()

    def __str__(self) -> str:
        table = [_HEAD, *(_cells(row) for row in self.rows)]
        widths = [max(len(cells[i]) for cells in table) for i in range(len(_HEAD))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
            for cells in table
        ]
        if self.difference is not None:
            lines.append(f"outputs before and after differ by {self.difference:.1e} of the largest")
        return "\n".join(lines)

    __repr__ = __str__


def _cells(row: Row) -> tuple[str, ...]:
    size = "-" if row.queries is None else f"{row.queries} x {row.keys}"
    saved = "-" if row.saved_mib is None else f"{row.saved_mib:.1f}"
    pool = row.pool_order or "none"
    return row.where or "(the model)", row.system, row.kind, pool, size, row.backend, saved
