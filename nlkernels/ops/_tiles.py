"""Tiles of the score matrix: the pieces that the chunked backends compute one after another."""

import math
from collections.abc import Iterator

import torch

MIB = 2**20
LOG2E = math.log2(math.e)
# CPU: of 3, 6, 12, 24 and 48 MiB, 12 was the fastest or within 5 % of it at (2,12544,3136,256) and
# (8,3136,784,256) in bfloat16 and float32; 10 keeps its extra memory under 5 % of the naive form's.
# CUDA: the cap of the staged kernels.
DEFAULT_WORKSPACE_MIB = {"cpu": 10, "cuda": 40}
# A tile has at least this many query rows, whatever the workspace: narrower matrix products crawl.
MIN_ROWS = 16
# Rows of a tile of the staged kernels: chunks are multiples of it where they can be.
STAGED_ROWS = 128


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype in which a chunked backend runs: float16 is computed in float32.

    float16 scores overflow for inputs far below the largest float16, and its matrix product is
    two hundred times slower than float32's on CPUs without float16 units.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def cast(dtype: torch.dtype, *operands: torch.Tensor) -> list[torch.Tensor]:
    """The operands in `dtype`; one that comes again, as itself or as a view, is cast once.

    Operators that are compiled get a view where the caller passed the same tensor.
    """
    done: list[torch.Tensor] = []
    for tensor in operands:
        known = (new for old, new in zip(operands, done, strict=False) if old.is_set_to(tensor))
        new = next(known, None)
        done.append(tensor.to(dtype) if new is None else new)
    return done


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for 16-bit dtypes, else the dtype itself."""
    return torch.promote_types(dtype, torch.float32)


def scores_per_tile(device: torch.device, bytes_per_score: int, workspace_mib: float | None) -> int:
    """How many scores of `bytes_per_score` bytes fit in the workspace."""
    if workspace_mib is None:
        workspace_mib = DEFAULT_WORKSPACE_MIB.get(device.type, DEFAULT_WORKSPACE_MIB["cuda"])
    return int(workspace_mib * MIB) // bytes_per_score


def tiles(
    batch: int, rows: int, columns: int, scores: int, multiple: int = 1
) -> Iterator[tuple[slice, slice]]:
    """Yield (batch slice, row slice) pairs that cover a (batch, rows, columns) score matrix.

    A tile spans several whole batch items when they fit into `scores`, else a run of rows of one
    item, a multiple of `multiple` when so many fit; in both cases the tiles are of almost equal
    size. Every batch item's tiles are adjacent.
    """
    if batch == 0 or rows == 0:
        return
    tile_rows = max(MIN_ROWS, scores // max(columns, 1))
    if tile_rows >= rows:
        items = max(1, tile_rows // rows)
        items = -(-batch // -(-batch // items))
        for start in range(0, batch, items):
            yield slice(start, min(start + items, batch)), slice(0, rows)
        return
    multiple = min(multiple, tile_rows)
    tile_rows -= tile_rows % multiple
    tile_rows = -(-rows // -(-rows // tile_rows))
    tile_rows += -tile_rows % multiple
    for item in range(batch):
        for start in range(0, rows, tile_rows):
            yield slice(item, item + 1), slice(start, min(start + tile_rows, rows))


def staged_tiles(
    batch: int,
    rows: int,
    columns: int,
    bytes_per_score: int,
    itemsize: int,
    workspace_mib: float | None,
) -> Iterator[tuple[slice, slice]]:
    """The tiles of the staged GPU kernels, whose workspace holds `bytes_per_score` for each score.

    A tile takes at most min(`workspace_mib` or 40 MiB, max(128 rows of every batch item, an eighth
    of the whole matrix in the operands' dtype)), with columns padded to a multiple of 8; where 16
    rows of one item take more, it is 16 rows.
    """
    if workspace_mib is None:
        workspace_mib = DEFAULT_WORKSPACE_MIB["cuda"]
    columns = padded(columns)
    tile = STAGED_ROWS * batch * columns * bytes_per_score
    eighth = batch * rows * columns * itemsize // 8
    limit = min(int(workspace_mib * MIB), max(tile, eighth))
    return tiles(batch, rows, columns, limit // bytes_per_score, multiple=STAGED_ROWS)


def padded(columns: int) -> int:
    """Columns of a workspace whose rows start at multiples of 16 bytes in 16-bit dtypes."""
    return columns + -columns % 8


class Buffer:
    """One allocation, reused as a block of every tile."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._storage = torch.empty(0, dtype=dtype, device=device)

    def block(self, *shape: int) -> torch.Tensor:
        """An uninitialised tensor of `shape`; grows only when no block was as large before."""
        size = math.prod(shape)
        if self._storage.numel() < size:
            self._storage = self._storage.new_empty(size)
        return self._storage[:size].view(shape)


class ProductSum:
    """Scaled sum of the matrix products of one batch item's tiles, added in at least float32.

    `term` holds one product at a time and may serve several sums. The scale comes last: with a
    factor of zero torch's own scaled product returns whatever its output held.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, term: Buffer) -> None:
        self._wide = accumulator_dtype(dtype)
        self._total = Buffer(self._wide, device)
        self._term = term

    def add(
        self,
        out: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
        *,
        first: bool,
        last: bool,
    ) -> None:
        """Add a @ b; after the tile that is `last`, `out` holds scale times the sum."""
        if first and last:
            torch.bmm(a, b, out=out).mul_(scale)
            return
        total = out if out.dtype == self._wide else self._total.block(*out.shape)
        if first:
            total.zero_()
        if total is out:
            total.baddbmm_(a, b)
        else:
            total.add_(torch.bmm(a, b, out=self._term.block(*out.shape)))
        if last:
            out.copy_(total.mul_(scale))
