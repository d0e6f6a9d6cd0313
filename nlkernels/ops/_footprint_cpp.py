"""How many bytes attention in C++ takes on CPUs beyond its operands and results.

The plans of csrc/cpu/attention_forward.h, attention_backward.h, linear.h and shares.h, in their
terms, for the instruction set that is in use: known without loading the module.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from nlkernels import _ext
from nlkernels._spec import Problem
from nlkernels.ops import _cpp
from nlkernels.ops._tiles import DEFAULT_WORKSPACE_MIB, MIB, accumulator_dtype

# simd.h: bytes of a vector.
VECTOR_BYTES = {"portable": 16, "avx2": 32, "avx512": 64, "avx512_bf16": 64}
# product.h, pack.h and attention_plan.h.
TALL_PANEL, ROW_STEP, LINE, WAY = 48, 3, 64, 4096
LEAST_ROWS, MOST_ROWS, BLOCKS_OF_THREAD = 36, 192, 4
SCORE_BYTES, ITEMS_BYTES, FACTOR_BYTES = MIB, 4 * MIB, 8 * MIB
# linear.h.
LINEAR_ROWS, CHUNK_BYTES = 96, MIB // 2


def forward(problem: Problem) -> int:
    """Packed keys and values of some items; rows of scores, queries and results of each thread."""
    return forward_workspace(problem) + 2 * _statistics(problem)


def backward(problem: Problem) -> int:
    """Packed operands and sums of some items; factors of a superblock; each thread's rows."""
    # Autograd has zeros for the gradient of the statistics.
    return backward_workspace(problem) + 4 * _statistics(problem)


def forward_workspace(problem: Problem) -> int:
    """What csrc/cpu/attention_forward.h lays out, by shares."""
    return _of_shares(problem, _forward)


def _forward(problem: Problem, threads: int, limit: int) -> int:
    kind, batch, queries, keys = _sizes(problem)
    depth, value_columns = kind.grouped(problem.depth), kind.columns(problem.value_depth)
    key_columns, key_depth = kind.columns(keys), kind.grouped(keys)
    score_row = kind.stride(key_columns, kind.number)
    query_row = kind.stride(problem.depth, kind.factor)
    item_bytes = (key_columns * depth + value_columns * key_depth) * kind.factor
    items = _items_at_a_time(batch, item_bytes, threads, limit)
    row_bytes = score_row * kind.number
    free = (limit - items * item_bytes) // threads
    all_bytes = row_bytes + query_row * kind.factor + value_columns * kind.number
    most = min(MOST_ROWS, SCORE_BYTES // row_bytes, free // all_bytes)
    most = max(_least_rows(row_bytes, item_bytes, threads), most)
    rows = kind.rows_of_block(queries, most, _blocks_of(BLOCKS_OF_THREAD * threads, items))
    shared = (
        items * key_columns * depth * kind.factor,
        items * value_columns * key_depth * kind.factor,
    )
    own = (
        rows * query_row * kind.factor,
        rows * row_bytes,
        rows * value_columns * kind.number,
    )
    return _pieces(shared) + threads * _pieces(own)


def backward_workspace(problem: Problem) -> int:
    """What csrc/cpu/attention_backward.h lays out, by shares."""
    return _of_shares(problem, _backward)


def _backward(problem: Problem, threads: int, limit: int) -> int:
    kind, batch, queries, keys = _sizes(problem)
    depth, value_depth = kind.grouped(problem.depth), kind.grouped(problem.value_depth)
    depth_columns, value_columns = kind.columns(problem.depth), kind.columns(problem.value_depth)
    key_columns, key_depth = kind.columns(keys), kind.grouped(keys)
    key_rows = _up(keys, TALL_PANEL)
    score_bytes = kind.stride(key_columns, kind.number) * kind.number

    packed = key_columns * (depth + value_depth) + depth_columns * key_depth
    sums = key_rows * (depth_columns + value_columns)
    item_bytes = packed * kind.factor + sums * kind.number
    row_bytes = (2 * key_rows + depth_columns + value_columns) * kind.factor
    most = min(MOST_ROWS, SCORE_BYTES // (2 * score_bytes))
    most = max(_least_rows(2 * score_bytes, packed * kind.factor, threads), most)
    least = min(_up(max(most, 1), kind.depth), _up(queries, kind.tile_rows))
    items = _items_at_a_time(batch, item_bytes + row_bytes * least, threads, limit)

    rows = kind.rows_of_block(queries, most, _blocks_of(BLOCKS_OF_THREAD * threads, items))
    free = max(0, limit - items * item_bytes)
    blocks = min(FACTOR_BYTES, free) // (row_bytes * items * rows)
    blocks = max(blocks, _blocks_of(threads, items))
    even = _blocks_of(queries, _blocks_of(queries, _up(blocks * rows, kind.depth)))
    superblock = min(_up(even, kind.depth), _up(queries, rows))

    of_row = (key_rows, key_rows, value_columns, depth_columns)
    shared = (
        items * key_columns * depth * kind.factor,
        items * key_columns * value_depth * kind.factor,
        items * depth_columns * key_depth * kind.factor,
        *(items * numbers * superblock * kind.factor for numbers in of_row),
        items * key_rows * value_columns * kind.number,
        items * key_rows * depth_columns * kind.number,
    )
    own = (
        rows * kind.stride(problem.depth, kind.factor) * kind.factor,
        rows * kind.stride(problem.value_depth, kind.factor) * kind.factor,
        rows * score_bytes,
        rows * score_bytes,
        rows * depth_columns * kind.number,
    )
    return _pieces(shared) + threads * _pieces(own)


def linear_forward(problem: Problem) -> int:
    """Packed positions of some items, their states twice; each thread's rows (linear.h)."""
    return _of_shares(problem, functools.partial(_linear, packed_states=1))


def linear_backward(problem: Problem) -> int:
    """As the forward, with the other state."""
    return _of_shares(problem, functools.partial(_linear, packed_states=2))


def _linear(problem: Problem, threads: int, limit: int, packed_states: int) -> int:
    kind, batch, queries, keys = _sizes(problem)
    depth, value_depth = _up(problem.depth, TALL_PANEL), _up(problem.value_depth, TALL_PANEL)
    area, widest, most = depth * value_depth, max(depth, value_depth), max(queries, keys)
    row_bytes = (depth + value_depth) * kind.factor
    chunk = kind.grouped(min(most, max(kind.depth, CHUNK_BYTES // row_bytes)))
    item_bytes = area * (kind.factor + kind.number) + row_bytes * chunk
    items = _items_at_a_time(batch, item_bytes, threads, limit)
    rows = kind.rows_of_block(most, LINEAR_ROWS, _blocks_of(BLOCKS_OF_THREAD * threads, items))
    factor_row = max(kind.stride(n, kind.factor) for n in (problem.depth, problem.value_depth))
    shared = (
        items * widest * chunk * kind.factor,
        items * widest * chunk * kind.factor,
        items * area * kind.number,
        *(items * area * kind.factor for _ in range(packed_states)),
    )
    own = (rows * factor_row * kind.factor, rows * widest * kind.number)
    return _pieces(shared) + threads * _pieces(own)


@dataclass(frozen=True)
class _Kind:
    """An instruction set's layouts for a dtype; sizes of numbers in bytes."""

    factor: int  # of what products multiply
    number: int  # of a sum
    lanes: int
    tile_rows: int

    @property
    def group(self) -> int:
        """Numbers of the depth that one instruction multiplies and adds."""
        return 2 if self.factor == 2 else 1

    @property
    def depth(self) -> int:
        """Depth of a part of a panel."""
        return 128 * self.group

    def grouped(self, numbers: int) -> int:
        return _up(numbers, self.group)

    def columns(self, columns: int) -> int:
        """Columns with the pads of panels, of which the last may be half as wide."""
        return _up(columns, self.lanes)

    def stride(self, columns: int, size: int) -> int:
        """Numbers from one packed row to the next: never whole ways of a cache."""
        numbers = _up(columns, 2 if size == 2 else 1)
        return numbers + LINE // size if numbers * size % WAY == 0 else numbers

    def rows_of_block(self, rows: int, most: int, blocks: int) -> int:
        """Rows of a block so that there are at least so many blocks."""
        most = max(self.tile_rows, most // self.tile_rows * self.tile_rows)
        needed = _blocks_of(rows, most)
        even = _blocks_of(rows, max(blocks, needed))
        step = 2 * ROW_STEP if needed < 2 * blocks else self.tile_rows
        return min(most, _up(even, step))


@functools.cache
def _kind(isa: str, dtype: torch.dtype) -> _Kind:
    number = accumulator_dtype(dtype).itemsize
    pairs = isa == "avx512_bf16" and dtype == torch.bfloat16
    vector = VECTOR_BYTES[isa]
    return _Kind(2 if pairs else number, number, vector // number, 12 if vector == 64 else 6)


def _of_shares(problem: Problem, plan: Callable[[Problem, int, int], int]) -> int:
    """Bytes of each thread's own share of the batch, or of the whole (csrc/cpu/shares.h)."""
    if 0 in (*problem[:3], problem.value_depth):
        return 0
    threads, limit = _threads(problem), _limit()
    if problem.batch % threads == 0:
        share = problem._replace(batch=problem.batch // threads)
        own = plan(share, 1, limit // threads)
        if own <= limit // threads:
            return threads * own
    return plan(problem, threads, limit)


def _sizes(problem: Problem) -> tuple[_Kind, int, int, int]:
    """Layouts, batch, queries and keys."""
    return _kind(_ext.isa_name(), problem.dtype), *problem[:3]


def _threads(problem: Problem) -> int:
    return _cpp.threads(*problem[:5])


def _statistics(problem: Problem) -> int:
    wide = accumulator_dtype(problem.dtype).itemsize
    return problem.batch * problem.queries * wide


def _least_rows(score_bytes: int, packed_bytes: int, threads: int) -> int:
    """Rows that a block may have in any case."""
    return min(LEAST_ROWS, packed_bytes // (score_bytes * threads))


def _items_at_a_time(batch: int, item_bytes: int, threads: int, limit: int) -> int:
    if threads == 1:
        return 1
    return max(1, min(batch, min(ITEMS_BYTES, limit // 2) // item_bytes))


def _limit() -> int:
    return int(DEFAULT_WORKSPACE_MIB["cpu"] * MIB)


def _pieces(sizes: tuple[int, ...]) -> int:
    """Pieces of a workspace, each of whole lines."""
    return sum(_up(size, LINE) for size in sizes)


def _blocks_of(number: int, size: int) -> int:
    return -(-number // size)


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
