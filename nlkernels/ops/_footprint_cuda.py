"""How many bytes the CUDA kernels take: the formulas of `_cuda_attention` and `concat/cuda`.

With what dispatch keeps for them: statistics of a softmax, and zeros for the statistics' gradient.
"""

import torch

from nlkernels._spec import Problem

# A batch item in float16 without a softmax, in the forward: two peaks, their bound, and what units
# are made of; in the backward also the units that are there.
_FORWARD_UNITS, _BACKWARD_UNITS = 28, 32
# A score of concat: what is kept sorted; with what torch's sort takes for itself, which on a GPU
# nobody measured.
_SCORE_BYTES, _SORT_BYTES = 20, 80
# Steps of a chunk and channels of a block of concat.cu.
_STEPS, _CHANNELS = 64, 64


def softmax_forward(problem: Problem) -> int:
    """Statistics."""
    return 8 * problem.batch * problem.queries


def softmax_backward(problem: Problem) -> int:
    """Statistics twice, and a sum for each query."""
    return 20 * problem.batch * problem.queries


def quadratic_forward(problem: Problem) -> int:
    """Units of one product's weights."""
    return _FORWARD_UNITS * problem.batch if problem.dtype == torch.float16 else 0


def quadratic_backward(problem: Problem) -> int:
    """Units of two products' weights."""
    return _BACKWARD_UNITS * problem.batch if problem.dtype == torch.float16 else 0


def concat_forward(problem: Problem) -> int:
    """Sorted scores and sums of chunks, or what sorting takes before."""
    return _concat(problem, products=0)


def concat_backward(problem: Problem) -> int:
    """The same, and products of blocks of channels."""
    blocks = -(-problem.value_depth // _CHANNELS)
    return _concat(problem, products=4 * max(problem.queries, problem.keys) * blocks)


def _concat(problem: Problem, products: int) -> int:
    steps = problem.queries + problem.keys
    chunks = 8 * -(-steps // _STEPS) * problem.value_depth
    return problem.batch * max(_SORT_BYTES * steps, _SCORE_BYTES * steps + chunks + products)
