"""How many bytes attention in C++ takes on CPUs beyond its operands and results, at most.

The plans of csrc/cpu/attention_forward.h, attention_backward.h and linear.h for the widest vectors,
and with factors as wide as sums: the pairs of bfloat16 that some CPUs multiply take half of that.
"""

from nlkernels._spec import Problem
from nlkernels.ops import _cpp
from nlkernels.ops._tiles import DEFAULT_WORKSPACE_MIB, MIB, accumulator_dtype

# product.h and attention_plan.h.
PANEL, TALL_PANEL, ROW_STEP, TILE_ROWS, DEPTH = 32, 48, 3, 12, 256
MOST_ROWS, SCORE_BYTES, ITEMS_BYTES, FACTOR_BYTES = 192, MIB, 4 * MIB, 8 * MIB
LINEAR_ROWS, LINEAR_BYTES = 96, MIB
# What keeps rows apart in a cache, and pieces at multiples of its lines.
LINE = 64


def forward(problem: Problem) -> int:
    """Packed keys and values of some items; rows of scores, queries and results of each thread."""
    wide, keys, depth, value_depth = _padded(problem)
    item = wide * keys * (depth + value_depth)
    scores = wide * keys + LINE
    fewest = problem.dtype.itemsize * problem.keys * (problem.depth + problem.value_depth)
    rows = _rows(problem, scores, _most_items(problem, fewest))
    own = rows * (scores + wide * (depth + value_depth) + LINE)
    statistics = 2 * problem.batch * problem.queries * wide
    return _of_items(problem, item, item) + _threads(problem) * own + statistics + 16 * LINE


def backward(problem: Problem) -> int:
    """Packed operands and sums of some items; factors of a superblock; each thread's rows."""
    wide, keys, depth, value_depth = _padded(problem)
    wider = depth + value_depth
    scores = 2 * (wide * keys + LINE)
    factors = wide * (2 * keys + wider)
    item = wide * keys * (2 * depth + value_depth + wider)
    fewest = problem.dtype.itemsize * problem.keys * (2 * problem.depth + problem.value_depth)
    fewest += wide * problem.keys * (problem.depth + problem.value_depth)
    items = _most_items(problem, fewest)
    rows = _rows(problem, scores, items)
    # Of all items: rows that fit, or two blocks a thread, in whole parts of a product's depth.
    several = max(FACTOR_BYTES // factors, (2 * _threads(problem) + items) * rows)
    several = min(several + items * DEPTH, items * (problem.queries + rows))
    own = rows * (scores + wide * (wider + depth) + 2 * LINE)
    statistics = 4 * problem.batch * problem.queries * wide
    shared = _of_items(problem, item, item) + several * factors
    return shared + _threads(problem) * own + statistics + 16 * LINE


def linear_forward(problem: Problem) -> int:
    """Packed positions of some items, their states twice; each thread's rows."""
    return _linear(problem, states=2)


def linear_backward(problem: Problem) -> int:
    """As the forward, with the other state."""
    return _linear(problem, states=3)


def _linear(problem: Problem, states: int) -> int:
    wide = accumulator_dtype(problem.dtype).itemsize
    depth, value_depth = (_up(n, TALL_PANEL) for n in (problem.depth, problem.value_depth))
    widest, row = max(depth, value_depth), wide * (depth + value_depth)
    positions = max(problem.queries, problem.keys)
    chunk = min(positions, max(LINEAR_ROWS, LINEAR_BYTES // row)) + 1
    state = wide * depth * value_depth
    packed = 2 * wide * widest * chunk + states * state
    shared = _of_items(problem, packed, 2 * state + row * chunk)
    own = min(LINEAR_ROWS, positions + TILE_ROWS) * (2 * wide * widest + LINE)
    return shared + _threads(problem) * own + 16 * LINE


def _padded(problem: Problem) -> tuple[int, int, int, int]:
    """Bytes of a number, and keys and depths in whole panels."""
    wide = accumulator_dtype(problem.dtype).itemsize
    depths = (_up(n, PANEL) for n in (problem.depth, problem.value_depth))
    return wide, _up(problem.keys, TALL_PANEL), *depths


def _threads(problem: Problem) -> int:
    return _cpp.threads(*problem[:5])


def _rows(problem: Problem, bytes_of_row: int, items: int) -> int:
    """Rows of a thread's block, at most: four blocks a thread where there are so many rows."""
    most = max(TILE_ROWS, min(MOST_ROWS, SCORE_BYTES // bytes_of_row) // TILE_ROWS * TILE_ROWS)
    blocks = max(-(-4 * _threads(problem) // items), -(-problem.queries // most))
    return min(most, _up(-(-problem.queries // blocks), TILE_ROWS))


def _most_items(problem: Problem, fewest: int) -> int:
    """Items that are taken at a time, at most: of the fewest bytes that one can have."""
    return max(1, min(problem.batch, _most_bytes() // fewest))


def _of_items(problem: Problem, item: int, counted: int) -> int:
    """Bytes of the items that are taken at a time, of which `counted` each are within the limit."""
    return max(item, min(problem.batch * item, -(-_most_bytes() * item // counted)))


def _most_bytes() -> int:
    return min(ITEMS_BYTES, int(DEFAULT_WORKSPACE_MIB["cpu"] * MIB) // 2)


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
