"""The pointwise operation: schema, fakes, FLOPs and backend choice; `ops/block` differentiates.

Its two passes are the product ("forward") and the sums that are a weight's gradient ("backward").
"""

import math

import torch
from torch.utils.flop_counter import register_flop_formula

from nlkernels import _ext, _launch, _operations, _select
from nlkernels.ops._library import define
from nlkernels.ops._tiles import accumulator_dtype
from nlkernels.ops.pointwise import chunked, cpp
from nlkernels.ops.pointwise.choice import TABLE
from nlkernels.ops.pointwise.problem import PointwiseProblem, Sources, like

NAME = "pointwise"
BACKENDS = ("chunked", "cpp", "triton")
_INSIDE = {"chunked": chunked, "cpp": cpp, "triton": "nlkernels.ops.pointwise.triton"}


def supports(backend: str, problem: PointwiseProblem) -> list[str]:
    """Why `backend` cannot serve `problem`; an empty list when it can."""
    if backend not in BACKENDS:
        return [f"{NAME} has no backend {backend!r}"]
    if backend == "cpp":
        return _ext.unserved(problem)
    return _launch.unserved(problem) if backend == "triton" else []


def head(problem: PointwiseProblem) -> tuple[int, ...]:
    """Channels, rounded up to powers of two of at least 16: kernels differ for few and many."""
    return tuple(max(16, 1 << (n - 1).bit_length()) for n in (problem.depth, problem.channels))


def sizes(problem: PointwiseProblem) -> tuple[int, ...]:
    """The other sizes, of which only the magnitude matters."""
    return problem.batch, problem.positions


_operations.OPERATIONS[NAME] = _operations.Operation(
    BACKENDS,
    supports,
    _INSIDE,
    TABLE,
    describe=PointwiseProblem.of,
    head=head,
    sizes=sizes,
    suite="nlkernels.ops.pointwise.suite",
    drawback="has no definition of its own",
)


def product(
    sources: Sources,
    shift: torch.Tensor | None,
    base: torch.Tensor | None,
    maps: bool,
    backend: str,
) -> torch.Tensor:
    """What `reference.product` defines, by a backend, without autograd; as maps or as rows."""
    features, (channels, _) = sources[0][0], sources[0][1].shape
    depth = sum(weight.shape[1] for _, weight in sources)
    module = _select.module(NAME, backend, "forward", features, depth, channels)
    return module.product(sources, shift, base, maps)


def outer(
    left: torch.Tensor, right: torch.Tensor, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `reference.outer` defines, by a backend, without autograd.

    To dispatch it is the gradient of a product: of right's channels, with left the gradient.
    """
    sizes = right.shape[2], left.shape[2]
    return _select.module(NAME, backend, "backward", right, *sizes).outer(left, right)


@define(
    "pointwise(Tensor features, Tensor weight, Tensor? shift, Tensor? base, bool maps, "
    "str backend) -> Tensor"
)
def _product(features, weight, shift, base, maps, backend):
    return product([(features, weight)], shift, base, maps, backend)


@define("pointwise_outer(Tensor left, Tensor right, str backend) -> (Tensor, Tensor)")
def _outer(left, right, backend):
    return outer(left, right, backend)


@torch.library.register_fake("nlkernels::pointwise")
def _(features, weight, shift, base, maps, backend):
    return like(features, weight.shape[0], maps)


@torch.library.register_fake("nlkernels::pointwise_outer")
def _(left, right, backend):
    dtype = accumulator_dtype(left.dtype)
    return (
        left.new_empty(left.shape[2], right.shape[2], dtype=dtype),
        left.new_empty(left.shape[2], dtype=dtype),
    )


@register_flop_formula(torch.ops.nlkernels.pointwise)
def _(features, weight, *args, out_shape=None, **kwargs) -> int:
    return 2 * features[0] * features[1] * math.prod(weight)


@register_flop_formula(torch.ops.nlkernels.pointwise_outer)
def _(left, right, *args, out_shape=None, **kwargs) -> int:
    return 2 * math.prod(left) * right[2]
