"""The dot-product operation: the backends of kind "dot_product", and what each of them serves."""

import math
from functools import partial

import torch

from nlkernels._operations import Operation
from nlkernels._spec import Problem
from nlkernels.ops import _unnormalised
from nlkernels.ops.dot_product import chunked, cpp, order, reference
from nlkernels.ops.dot_product.choice import TABLE

NAME = "dot_product"
# By name where a module can only be imported when its package is there.
_INSIDE = {
    "chunked": chunked,
    "cpp": cpp,
    "triton": "nlkernels.ops.dot_product.triton",
    "cuda": "nlkernels.ops.dot_product.cuda",
}

# (query, key, value, scale, backend="auto", workspace_mib=None) -> out
attention = partial(_unnormalised.attention, NAME)


def supports(backend: str, problem: Problem) -> list[str]:
    """Why `backend` cannot serve `problem`; an empty list when it can."""
    reasons = _unnormalised.supports(NAME, backend, problem)
    if backend in ("triton", "cuda") and _is_linear_cheaper(problem):
        reasons.append("two matrix products in the linear order cost fewer FLOPs than the scores")
    return reasons


def _is_linear_cheaper(problem: Problem) -> bool:
    """Whether forward and backward together cost fewer FLOPs without the scores.

    So wherever there is a state: no backend that refuses these problems is asked for one.
    """
    sizes, kept = problem[:5], order.keeps_state(*problem[:6])
    forward, backward = order.flops(*sizes), order.backward_flops(*sizes, kept=kept)
    return forward[0] + backward[0] < forward[1] + backward[1]


def _backward_flops(*sizes: int, state: torch.Size) -> int:
    return min(order.backward_flops(*sizes, kept=math.prod(state) > 0))


_unnormalised.define(
    NAME,
    reference.attention,
    Operation(
        _unnormalised.BACKENDS, supports, _INSIDE, TABLE, suite="nlkernels.ops.dot_product.suite"
    ),
    flops=lambda *sizes: min(order.flops(*sizes)),
    backward_flops=_backward_flops,
    new_state=order.new_state,
)
