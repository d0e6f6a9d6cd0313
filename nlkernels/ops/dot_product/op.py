"""The dot-product operation: the backends of kind "dot_product", and what each of them serves."""

from functools import partial

from nlkernels._operations import Operation
from nlkernels._spec import Problem
from nlkernels.ops import _unnormalised
from nlkernels.ops.dot_product import chunked, cpp, reference
from nlkernels.ops.dot_product.choice import TABLE

NAME = "dot_product"
# By name where a module can only be imported when its package is there.
_INSIDE = {"chunked": chunked, "cpp": cpp, "triton": "nlkernels.ops.dot_product.triton"}

# (query, key, value, scale, backend="auto", workspace_mib=None) -> out
attention = partial(_unnormalised.attention, NAME)


def supports(backend: str, problem: Problem) -> list[str]:
    """Why `backend` cannot serve `problem`; an empty list when it can."""
    reasons = _unnormalised.supports(NAME, backend, problem)
    if backend == "triton" and _is_linear_cheaper(problem):
        reasons.append("two matrix products in the linear order cost fewer FLOPs than the scores")
    return reasons


def _is_linear_cheaper(problem: Problem) -> bool:
    """Whether forward and backward together cost fewer FLOPs without the scores."""
    forward, backward = (count(*problem[:5]) for count in (chunked.flops, chunked.backward_flops))
    return forward[0] + backward[0] < forward[1] + backward[1]


_unnormalised.define(
    NAME,
    reference.attention,
    Operation(
        _unnormalised.BACKENDS, supports, _INSIDE, TABLE, suite="nlkernels.ops.dot_product.suite"
    ),
    flops=lambda *sizes: min(chunked.flops(*sizes)),
    backward_flops=lambda *sizes: min(chunked.backward_flops(*sizes)),
)
