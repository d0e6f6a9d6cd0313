"""How many bytes an attention takes beyond its operands and results: each backend's formula.

`naive` is the peak of the definition, exactly; `bound` is at least the peak of a backend, its
documented formula with the sizes of the tiles that it takes. Both are the peak of all live tensors
less operands and results, gradients among both when training. Formulas of GPU kernels are reckoned:
nobody measured them on a GPU.
"""

import math
from collections.abc import Callable

import torch

from nlkernels._spec import Problem, check_choice
from nlkernels.ops import _footprint_cpp as cpp
from nlkernels.ops import _footprint_cuda as cuda
from nlkernels.ops._tiles import (
    MIB,
    STAGED_ROWS,
    accumulator_dtype,
    compute_dtype,
    padded,
    scores_per_tile,
    staged_tiles,
    tiles,
)
from nlkernels.ops.concat import chunked as concat
from nlkernels.ops.dot_product import order
from nlkernels.ops.softmax import cuda_hopper_backward_plan

# Of the Triton kernels: the widest channels of the fused forwards, the fewest keys of a key tile,
# the multiprocessors that split keys are meant to fill (an H200's), the rows of a scan's chunk, and
# what the units of a batch item take.
FUSED_DEPTH = 256
NARROWEST = 64
PROCESSORS = 132
SCANNED_ROWS = 64
UNIT_BYTES = 528

# Factors that torch wraps into tensors.
_SCALARS = 64
# Score matrices of the definition that live together, in the forward and in the backward.
_MATRICES = {"softmax": (2, 3), "relu": (2, 3), "dot_product": (2, 2), "concat": (2, 3)}


def naive(op: str, problem: Problem, training: bool) -> int:
    """Bytes of the definition (backend "reference").

    In the forward its matrices live without any result; in the backward beside the output and the
    gradient of the values; the last matrix lives until every result is there.

    Raises:
        ValueError: there is no formula for such an operation.
    """
    check_choice("footprint", "op", op, tuple(_MATRICES))
    forward, backward = _MATRICES[op]
    matrix = _scores(problem) * problem.dtype.itemsize
    out, d_query, d_key, d_value = (size * problem.dtype.itemsize for size in _results(problem))
    # The concatenation divides its output, not its scores, by the number of keys.
    undivided = out if op == "concat" else 0
    if not training:
        return max(forward * matrix - out, matrix + undivided)
    early = forward * matrix - out - d_query - d_key - d_value
    late = max(backward * matrix, 2 * matrix + undivided) - d_query - d_key
    return max(early, late, matrix)


def bound(op: str, backends: tuple[str, ...], problem: Problem) -> int | None:
    """Bytes of the backend of the forward and, where training, that of the backward.

    None where the operation has no such backend; an error as for `naive`.
    """
    check_choice("footprint", "op", op, tuple(_MATRICES))
    passes = zip(backends, ("forward", "backward"), strict=False)
    needs = [workspace(op, backend, direction, problem) for backend, direction in passes]
    if None in needs:
        return None
    return max(needs) + (_state(op, problem) if len(needs) > 1 else 0)


def workspace(op: str, backend: str, direction: str, problem: Problem) -> int | None:
    """Bytes that one pass takes beyond what it is given and returns; None as for `bound`."""
    if (op, backend) not in _FORMULAS:
        return None
    formula = _FORMULAS[op, backend][("forward", "backward").index(direction)]
    return formula(problem) + _SCALARS


def _state(op: str, problem: Problem) -> int:
    """What a forward of dot_product in the linear order keeps for the backward."""
    if op != "dot_product" or not order.keeps_state(*problem[:6]):
        return 0
    elements = problem.batch * problem.depth * problem.value_depth
    return elements * accumulator_dtype(problem.dtype).itemsize


def _scores(problem: Problem) -> int:
    return problem.batch * problem.queries * problem.keys


def _results(problem: Problem) -> tuple[int, int, int, int]:
    """Elements of the output and of the gradients of query, key and value."""
    batch, rows, keys, depth, value_depth, *_ = problem
    return (
        batch * rows * value_depth,
        batch * rows * depth,
        batch * keys * depth,
        batch * keys * value_depth,
    )


def _tile(problem: Problem, bytes_per_score: int) -> tuple[int, int]:
    """Batch items and rows of the largest tile of a chunked backend."""
    device = torch.device(problem.device)
    scores = scores_per_tile(device, bytes_per_score, None)
    first = next(tiles(problem.batch, problem.queries, problem.keys, scores), None)
    if first is None:
        return 0, 0
    items, rows = first
    return items.stop - items.start, rows.stop - rows.start


def _widened(problem: Problem, passes: int) -> int:
    """float32 copies of operands and results of float16, in the first or the second pass."""
    if compute_dtype(problem.dtype) == problem.dtype:
        return 0
    out, *gradients = _results(problem)
    return 4 * (out + passes * sum(gradients))


def _sums(problem: Problem, one_tile: bool) -> int:
    """float32 sums of the keys' and values' gradients of one batch item, in bfloat16."""
    if problem.dtype != torch.bfloat16 or one_tile:
        return 0
    _, _, keys, depth, value_depth, *_ = problem
    return keys * (4 * (depth + value_depth) + 6 * max(depth, value_depth))


def _packed(problem: Problem, rows: int) -> int:
    """What CPUs' bfloat16 products pack and pad: one factor, and up to 3/8 MiB a thread."""
    if problem.dtype != torch.bfloat16 or problem.device != "cpu":
        return 0
    factor = max(problem.keys, rows) * max(problem.depth, problem.value_depth)
    return 2 * factor + torch.get_num_threads() * 3 * MIB // 8


def _tiled(problem: Problem, matrices: int) -> tuple[int, bool]:
    """Bytes of a chunked softmax's tile with its rows, and whether the tile is a whole item."""
    dtype = compute_dtype(problem.dtype)
    wide = accumulator_dtype(dtype).itemsize
    narrow = dtype.itemsize if dtype.itemsize < wide else 0
    items, rows = _tile(problem, matrices * wide + narrow)
    scores = items * rows * problem.keys
    own = scores * (matrices * wide + narrow) + (matrices + 1) * items * rows * wide
    return own + _packed(problem, rows), rows == problem.queries


def _softmax_chunked_forward(problem: Problem) -> int:
    return _tiled(problem, 1)[0] + _statistics(problem) + _widened(problem, 1)


def _softmax_chunked_backward(problem: Problem) -> int:
    tile, whole = _tiled(problem, 2)
    # Autograd has zeros for the gradient of the statistics.
    tile += 2 * _statistics(problem) + _sums(problem, whole)
    return tile + _widened(problem, 2)


def _statistics(problem: Problem) -> int:
    wide = accumulator_dtype(problem.dtype).itemsize
    return 2 * problem.batch * problem.queries * wide


def _is_linear(problem: Problem) -> tuple[bool, bool]:
    """Whether forward and backward of dot_product take the linear order, when training."""
    sizes, kept = problem[:5], order.keeps_state(*problem[:6])
    passes = order.flops(*sizes), order.backward_flops(*sizes, kept=kept)
    forward, backward = (linear <= quadratic for linear, quadratic in passes)
    return forward, backward


def _dot_product_chunked_forward(problem: Problem) -> int:
    linear, _ = _is_linear(problem)
    return _states(problem, 1) if linear else _relu_chunked_forward(problem)


def _dot_product_chunked_backward(problem: Problem) -> int:
    _, linear = _is_linear(problem)
    return _states(problem, 2) if linear else _relu_chunked_backward(problem)


def _dot_product_cpp_forward(problem: Problem) -> int:
    linear, _ = _is_linear(problem)
    return (cpp.linear_forward if linear else cpp.forward)(problem)


def _dot_product_cpp_backward(problem: Problem) -> int:
    _, linear = _is_linear(problem)
    return (cpp.linear_backward if linear else cpp.backward)(problem)


def _states(problem: Problem, matrices: int) -> int:
    """What is summed over keys, or over queries, for all items of the batch."""
    elements = matrices * problem.batch * problem.depth * problem.value_depth
    size = compute_dtype(problem.dtype).itemsize
    return elements * size + _packed(problem, 0) + _widened(problem, matrices)


def _relu_chunked_forward(problem: Problem) -> int:
    size = compute_dtype(problem.dtype).itemsize
    items, rows = _tile(problem, size)
    tile = items * rows * problem.keys * size
    return tile + _packed(problem, rows) + _widened(problem, 1)


def _relu_chunked_backward(problem: Problem) -> int:
    size = compute_dtype(problem.dtype).itemsize
    items, rows = _tile(problem, 2 * size)
    tile = 2 * items * rows * problem.keys * size + _sums(problem, rows == problem.queries)
    return tile + _packed(problem, rows) + _widened(problem, 2)


def _concat_chunked_forward(problem: Problem) -> int:
    batch, _, keys, _, depth, *_ = problem
    size, wide = problem.dtype.itemsize, accumulator_dtype(problem.dtype).itemsize
    tables = 2 * batch * (keys + 1) * depth * wide + keys * depth * size
    tables += _block_sums(problem, keys + 1)
    return tables + _ranks(problem) + (size < wide) * wide * _concat_tile(problem)


def _concat_chunked_backward(problem: Problem) -> int:
    batch, rows, keys, _, depth, *_ = problem
    wide = accumulator_dtype(problem.dtype).itemsize
    table_rows = keys + 2 + -(-rows // 32)
    table = table_rows * depth * wide
    # One item's gradient of the output, and of its values, in float32.
    copies = (rows + 2 * keys) * depth * wide if problem.dtype.itemsize == 2 else 0
    tile = wide * _concat_tile(problem._replace(batch=1))
    tables = (2 * batch + 1) * table + _block_sums(problem, table_rows)
    return tables + copies + tile + _ranks(problem)


def _concat_cpp_forward(problem: Problem) -> int:
    batch, rows, keys, _, depth, *_ = problem
    wide = accumulator_dtype(problem.dtype).itemsize
    chunks, blocks = -(-(rows + keys) // 4096), -(-depth // 64)
    sums = 1024 * batch * chunks * blocks if chunks > 1 else 0
    return batch * (2 * (wide + 4) * (rows + keys) + 64) + sums + 512


def _concat_cpp_backward(problem: Problem) -> int:
    batch, rows, keys, _, depth, *_ = problem
    chunks, blocks = -(-(rows + keys) // 4096), -(-depth // 64)
    sums = 512 * batch * chunks * blocks if chunks > 1 else 0
    return _concat_cpp_forward(problem) + 8 * batch * (rows + keys) * blocks + sums


def _block_sums(problem: Problem, rows: int) -> int:
    """A table's blocks, summed in float64 and copied to the table's dtype."""
    blocks = rows // math.isqrt(rows)
    return 12 * problem.batch * blocks * problem.value_depth


def _concat_tile(problem: Problem) -> int:
    elements = problem.batch * problem.queries * problem.value_depth
    return min(max(concat.TILE, problem.value_depth), elements)


def _ranks(problem: Problem) -> int:
    """Sorted scores, their ranks and gaps."""
    return 160 * problem.batch * (problem.queries + problem.keys)


def _sdpa_forward(problem: Problem) -> int:
    """Row-major copies of the operands, statistics, and the buffers of the CPU kernel's threads."""
    _, *operands = _results(problem)
    copies = sum(operands) * problem.dtype.itemsize
    return copies + 3 * _statistics(problem) + _thread_buffers(problem)


def _sdpa_backward(problem: Problem) -> int:
    """Copies of operands and gradient; on CPUs gradients in another layout, on GPUs in float32."""
    out, *gradients = _results(problem)
    copies = (out + sum(gradients)) * problem.dtype.itemsize
    if problem.device != "cpu":
        return copies + 4 * gradients[0] + 2 * _statistics(problem)
    again = sum(gradients) * problem.dtype.itemsize
    return copies + again + 3 * _statistics(problem) + 2 * _thread_buffers(problem)


def _thread_buffers(problem: Problem) -> int:
    if problem.device != "cpu":
        return 0
    size, wide = problem.dtype.itemsize, accumulator_dtype(problem.dtype).itemsize
    rows = 256 if problem.queries >= 768 else 64 if problem.queries >= 192 else 32
    scores = rows * min(problem.keys, 512)
    own = wide * (scores + rows * (2 + problem.value_depth)) + (size < wide) * size * scores
    return torch.get_num_threads() * own


def _softmax_triton_forward(problem: Problem) -> int:
    keys = problem.keys
    if max(problem.depth, problem.value_depth) <= FUSED_DEPTH:
        return _statistics(problem) + _split_parts(problem)
    part = _staged_rows(problem, 1)
    weights = problem.dtype.itemsize * part * padded(keys)
    return _statistics(problem) + weights + 8 * part * -(-keys // NARROWEST)


def _softmax_triton_backward(problem: Problem) -> int:
    batch, rows, keys, depth, value_depth, *_ = problem
    part = _staged_rows(problem, 2)
    tile = 2 * problem.dtype.itemsize * part * padded(keys)
    delta = 4 * batch * rows + 12 * part * -(-keys // NARROWEST)
    totals = 4 * keys * (depth + value_depth) if problem.dtype.itemsize == 2 else 0
    return 2 * _statistics(problem) + tile + delta + totals


def _softmax_cuda_backward(problem: Problem) -> int:
    """The staged form wherever Hopper's kernels could run: the portable ones take less."""
    if cuda_hopper_backward_plan.unserved(problem):
        return cuda.softmax_backward(problem)
    # The gradient, in the operands' order.
    copy = problem.dtype.itemsize * problem.batch * problem.queries * (problem.value_depth + 7)
    return _softmax_triton_backward(problem) + copy


def _quadratic_triton_forward(problem: Problem) -> int:
    units = 2 * UNIT_BYTES * problem.batch
    if max(problem.depth, problem.value_depth) <= FUSED_DEPTH:
        return units
    part = _staged_rows(problem, 1)
    units += 4 * part * problem.value_depth if problem.dtype == torch.float16 else 0
    return problem.dtype.itemsize * part * padded(problem.keys) + units


def _quadratic_triton_backward(problem: Problem) -> int:
    batch, _, keys, depth, value_depth, *_ = problem
    part, half = _staged_rows(problem, 2), problem.dtype.itemsize == 2
    tile = 2 * problem.dtype.itemsize * part * padded(keys)
    totals = 4 * keys * (depth + value_depth) if half else 0
    units = 0
    if problem.dtype == torch.float16:
        units = 4 * batch * keys * (depth + value_depth) + 4 * part * depth
    return tile + totals + units + 2 * UNIT_BYTES * batch


def _concat_triton_forward(problem: Problem) -> int:
    batch, _, keys, _, depth, *_ = problem
    chunks = 16 * batch * -(-keys // SCANNED_ROWS) * depth
    return 8 * batch * keys * depth + chunks + _ranks(problem)


def _concat_triton_backward(problem: Problem) -> int:
    batch, rows, keys, _, depth, *_ = problem
    long = max(2 * rows, keys)
    chunks = 16 * batch * -(-max(rows, keys) // SCANNED_ROWS) * depth
    return 4 * batch * long * depth + chunks + _ranks(problem)


def _staged_rows(problem: Problem, matrices: int) -> int:
    """Rows, of all items, of the largest tile of the staged GPU kernels."""
    size = problem.dtype.itemsize
    sizes = (problem.batch, problem.queries, problem.keys)
    first = next(staged_tiles(*sizes, matrices * size, size, None), None)
    if first is None:
        return 0
    return math.prod(part.stop - part.start for part in first)


def _split_parts(problem: Problem) -> int:
    """Parts of keys that are shared out: none where the rows alone fill the processors."""
    tiles_of_rows = problem.batch * -(-problem.queries // STAGED_ROWS)
    if tiles_of_rows >= PROCESSORS:
        return 0
    rows = min(2 * PROCESSORS * STAGED_ROWS, problem.batch * problem.queries * problem.keys // 64)
    return min(40 * MIB, 4 * rows * (problem.value_depth + 2))


_FORMULAS: dict[tuple[str, str], tuple[Callable[[Problem], int], Callable[[Problem], int]]] = {
    ("softmax", "chunked"): (_softmax_chunked_forward, _softmax_chunked_backward),
    ("softmax", "cpp"): (cpp.forward, cpp.backward),
    ("softmax", "sdpa"): (_sdpa_forward, _sdpa_backward),
    ("softmax", "triton"): (_softmax_triton_forward, _softmax_triton_backward),
    ("softmax", "cuda"): (cuda.softmax_forward, _softmax_cuda_backward),
    ("relu", "triton"): (_quadratic_triton_forward, _quadratic_triton_backward),
    ("relu", "cuda"): (cuda.quadratic_forward, cuda.quadratic_backward),
    ("relu", "cpp"): (cpp.forward, cpp.backward),
    ("relu", "chunked"): (_relu_chunked_forward, _relu_chunked_backward),
    ("dot_product", "chunked"): (_dot_product_chunked_forward, _dot_product_chunked_backward),
    ("dot_product", "cpp"): (_dot_product_cpp_forward, _dot_product_cpp_backward),
    ("dot_product", "triton"): (_quadratic_triton_forward, _quadratic_triton_backward),
    ("dot_product", "cuda"): (cuda.quadratic_forward, cuda.quadratic_backward),
    ("concat", "triton"): (_concat_triton_forward, _concat_triton_backward),
    ("concat", "cuda"): (cuda.concat_forward, cuda.concat_backward),
    ("concat", "cpp"): (_concat_cpp_forward, _concat_cpp_backward),
    ("concat", "chunked"): (_concat_chunked_forward, _concat_chunked_backward),
}
