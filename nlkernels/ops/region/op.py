"""The region operation: schema, fakes, FLOPs, autograd and backend choice.

Saved for backward: x and weight. Aggregation is linear in both, so its gradients of gradients are
aggregations again, in the same backend and without end. The backend "reference" (plain autograd)
is a composite outside the operator.
"""

import math

import torch
from torch.utils.flop_counter import register_flop_formula

from nlkernels import _cuda, _ext, _launch, _operations, _select
from nlkernels.ops._autograd import differentiates_again, signed
from nlkernels.ops._library import define
from nlkernels.ops.region import chunked, cpp, reference
from nlkernels.ops.region.choice import TABLE
from nlkernels.ops.region.problem import TALLEST, RegionProblem, like

NAME = "region_aggregate"
BACKENDS = ("reference", "chunked", "cpp", "triton", "cuda")
_INSIDE = {
    "chunked": chunked,
    "cpp": cpp,
    "triton": "nlkernels.ops.region.triton",
    "cuda": "nlkernels.ops.region.cuda",
}


def supports(backend: str, problem: RegionProblem) -> list[str]:
    """Why `backend` cannot serve `problem`; an empty list when it can."""
    if backend not in BACKENDS:
        return [f"{NAME} has no backend {backend!r}"]
    if backend == "cpp":
        return _ext.unserved(problem)
    if backend == "cuda":
        return _cuda.unserved(problem) + _too_large(problem)
    if backend != "triton":
        return []
    reasons = _launch.unserved(problem)
    if problem.kernel[1] > TALLEST:
        reasons.append(f"its kernels serve a kh of at most {TALLEST}, not {problem.kernel[1]}")
    return reasons


def _too_large(problem: RegionProblem) -> list[str]:
    """Why the CUDA kernels do not serve a kernel's sizes."""
    if max(problem.kernel) <= TALLEST:
        return []
    sizes = "x".join(map(str, problem.kernel))
    return [f"its kernels serve kt, kh and kw of at most {TALLEST}, not {sizes}"]


def head(problem: RegionProblem) -> tuple[int, ...]:
    """The sizes of the kernel and the layout: what decides about a kernel's code."""
    return (*problem.kernel, int(problem.channels_last))


def sizes(problem: RegionProblem) -> tuple[int, ...]:
    """The other sizes, of which only the magnitude matters."""
    return problem.batch, problem.channels, problem.frames, problem.height, problem.width


def aggregate(x: torch.Tensor, weight: torch.Tensor, backend: str = "auto") -> torch.Tensor:
    """Region aggregation of operands that `problem.check_operands` has accepted."""
    if backend == "reference":
        return reference.aggregate(x, weight)
    return _Region.apply(x, weight, backend)


@signed
class _Region(torch.autograd.Function):
    @staticmethod
    def forward(x, weight, backend):
        return torch.ops.nlkernels.region_forward(x, weight, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, ctx.backend = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx, grad):
        arguments = (grad, *ctx.saved_tensors, ctx.backend)
        if differentiates_again():
            return *_RegionBackward.apply(*arguments), None
        return *torch.ops.nlkernels.region_backward(*arguments), None


class _RegionBackward(torch.autograd.Function):
    @staticmethod
    def forward(grad, x, weight, backend):
        return torch.ops.nlkernels.region_backward(grad, x, weight, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad, x, weight, ctx.backend = inputs
        ctx.save_for_backward(grad, x, weight)

    @staticmethod
    def backward(ctx, d_x, d_weight):
        # <d_x, gradient of x> = <grad, aggregate(d_x, weight)>, and likewise for the weight.
        grad, x, weight = ctx.saved_tensors
        again = _Region.apply(d_x, weight, ctx.backend) + _Region.apply(x, d_weight, ctx.backend)
        return again, *_RegionBackward.apply(grad, d_x, d_weight, ctx.backend), None


_operations.OPERATIONS[NAME] = _operations.Operation(
    BACKENDS,
    supports,
    _INSIDE,
    TABLE,
    describe=RegionProblem.of,
    head=head,
    sizes=sizes,
    suite="nlkernels.ops.region.suite",
    drawback="torch's convolution is slow in the backward",
)


@define("region_forward(Tensor x, Tensor weight, str backend) -> Tensor")
def _forward(x, weight, backend):
    module = _select.module(NAME, backend, "forward", x, weight)
    return module.forward(x, weight)


@define("region_backward(Tensor grad, Tensor x, Tensor weight, str backend) -> (Tensor, Tensor)")
def _backward(grad, x, weight, backend):
    module = _select.module(NAME, backend, "backward", x, weight)
    return module.backward(grad, x, weight)


@torch.library.register_fake("nlkernels::region_forward")
def _(x, weight, backend):
    return like(x)


@torch.library.register_fake("nlkernels::region_backward")
def _(grad, x, weight, backend):
    return like(x), weight.new_empty(weight.shape)


@register_flop_formula(torch.ops.nlkernels.region_forward)
def _(x, weight, *args, out_shape=None, **kwargs) -> int:
    batch, _, *positions = x
    return 2 * batch * math.prod(weight) * math.prod(positions)


@register_flop_formula(torch.ops.nlkernels.region_backward)
def _(grad, x, weight, *args, out_shape=None, **kwargs) -> int:
    batch, _, *positions = x
    return 4 * batch * math.prod(weight) * math.prod(positions)
