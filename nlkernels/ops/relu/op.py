"""The relu operation: the backends of kind "relu", and what each of them serves."""

from functools import partial

from nlkernels._operations import Operation
from nlkernels.ops import _quadratic, _unnormalised
from nlkernels.ops.relu import chunked, cpp, reference
from nlkernels.ops.relu.choice import TABLE

NAME = "relu"
# By name where a module can only be imported when its package is there.
_INSIDE = {
    "chunked": chunked,
    "cpp": cpp,
    "triton": "nlkernels.ops.relu.triton",
    "cuda": "nlkernels.ops.relu.cuda",
}

# (query, key, value, scale, backend="auto", workspace_mib=None) -> out
attention = partial(_unnormalised.attention, NAME)
# (backend, problem) -> why the backend cannot serve the problem; an empty list when it can
supports = partial(_unnormalised.supports, NAME)

_unnormalised.define(
    NAME,
    reference.attention,
    Operation(_unnormalised.BACKENDS, supports, _INSIDE, TABLE, suite="nlkernels.ops.relu.suite"),
    flops=_quadratic.flops,
    backward_flops=_quadratic.backward_flops,
)
