"""Context pooling of the channel gate: schema, fakes, FLOPs, autograd and backend choice.

Saved for backward: x, weight, bias and context. The bias shifts every logit of a softmax alike:
no backend needs it, and its gradient is given as the zero that it is. The backend "reference"
(plain autograd) is a composite outside the operator and adds it.
"""

import math

import torch
from torch.utils.flop_counter import register_flop_formula

from nlkernels import _cuda, _ext, _launch, _operations, _select
from nlkernels.ops._autograd import differentiates_again, signed
from nlkernels.ops._library import define
from nlkernels.ops._tiles import accumulator_dtype
from nlkernels.ops.gate import chunked, cpp, reference
from nlkernels.ops.gate.choice import TABLE
from nlkernels.ops.gate.problem import WIDEST, GateProblem, like

NAME = "gate"
BACKENDS = ("reference", "chunked", "cpp", "triton", "cuda")
_INSIDE = {
    "chunked": chunked,
    "cpp": cpp,
    "triton": "nlkernels.ops.gate.triton",
    "cuda": "nlkernels.ops.gate.cuda",
}


def supports(backend: str, problem: GateProblem) -> list[str]:
    """Why `backend` cannot serve `problem`; an empty list when it can."""
    if backend not in BACKENDS:
        return [f"{NAME} has no backend {backend!r}"]
    if backend == "cpp":
        return _ext.unserved(problem)
    if backend not in ("triton", "cuda"):
        return []
    reasons = list((_launch if backend == "triton" else _cuda).unserved(problem))
    if problem.channels > WIDEST:
        reasons.append(f"its kernels serve at most {WIDEST} channels, not {problem.channels}")
    return reasons


def head(problem: GateProblem) -> tuple[int, ...]:
    """C, rounded up to a power of two of at least 16: what decides about a kernel's code."""
    return (max(16, 1 << (problem.channels - 1).bit_length()),)


def sizes(problem: GateProblem) -> tuple[int, ...]:
    """The other sizes, of which only the magnitude matters."""
    return problem.batch, problem.positions


def pool(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Context (B,C) of operands that `problem.check_operands` has accepted."""
    if backend == "reference":
        return reference.pool(x, weight, bias)
    return _Pool.apply(x, weight, bias, backend)


@signed
class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(x, weight, bias, backend):
        return torch.ops.nlkernels.gate_forward(x, weight, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, ctx.backend = inputs
        ctx.save_for_backward(x, weight, bias, output)

    @staticmethod
    def backward(ctx, grad):
        x, weight, bias, context = ctx.saved_tensors
        arguments = (grad, x, weight, context, ctx.backend)
        if differentiates_again():
            grads = _PoolBackward.apply(*arguments)
        else:
            grads = torch.ops.nlkernels.gate_backward(*arguments)
        return *grads, None if bias is None else torch.zeros_like(bias), None


class _PoolBackward(torch.autograd.Function):
    @staticmethod
    def forward(grad, x, weight, context, backend):
        return torch.ops.nlkernels.gate_backward(grad, x, weight, context, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:3])

    @staticmethod
    def backward(ctx, *cotangents):
        return *_second(*ctx.saved_tensors, *cotangents), None, None


def _second(grad, x, weight, d_x, d_weight) -> tuple[torch.Tensor, ...]:
    """Differentiate the definition's gradients of x and weight, an item at a time.

    Returns the gradients of grad, x and weight, accumulated in at least float32; part of a graph
    where gradients are enabled.
    """
    again, dtype = torch.is_grad_enabled(), accumulator_dtype(x.dtype)
    found = []
    with torch.autocast(x.device.type, enabled=False), torch.enable_grad():
        for rows in zip(grad.split(1), x.split(1), d_x.split(1), strict=True):
            cotangents = (rows[2].to(dtype), d_weight.to(dtype))
            inputs = [t.to(dtype) for t in (*rows[:2], weight)]
            inputs = [
                t.view_as(t) if again and t.requires_grad else t.detach().requires_grad_()
                for t in inputs
            ]
            context = reference.pool(*inputs[1:])
            first = torch.autograd.grad(context, inputs[1:], inputs[0], create_graph=True)
            found.append(
                torch.autograd.grad(
                    first, inputs, cotangents, create_graph=again, materialize_grads=True
                )
            )
        of_grad, of_x, of_weight = zip(*found, strict=True)
        results = torch.cat(of_grad), torch.cat(of_x), torch.stack(of_weight).sum(dim=0)
    return tuple(t.to(x.dtype) for t in results)


_operations.OPERATIONS[NAME] = _operations.Operation(
    BACKENDS,
    supports,
    _INSIDE,
    TABLE,
    describe=GateProblem.of,
    head=head,
    sizes=sizes,
    suite="nlkernels.ops.gate.suite",
    drawback="reads x once more, forward and backward",
    function="channel_gate",
)


@define("gate_forward(Tensor x, Tensor weight, str backend) -> Tensor")
def _forward(x, weight, backend):
    module = _select.module(NAME, backend, "forward", x, weight)
    return module.forward(x, weight)


@define(
    "gate_backward(Tensor grad, Tensor x, Tensor weight, Tensor context, str backend) "
    "-> (Tensor, Tensor)"
)
def _backward(grad, x, weight, context, backend):
    module = _select.module(NAME, backend, "backward", x, weight)
    return module.backward(grad, x, weight, context)


@torch.library.register_fake("nlkernels::gate_forward")
def _(x, weight, backend):
    return x.new_empty(x.shape[:2])


@torch.library.register_fake("nlkernels::gate_backward")
def _(grad, x, weight, context, backend):
    return like(x), weight.new_empty(weight.shape)


@register_flop_formula(torch.ops.nlkernels.gate_forward)
def _(x, weight, *args, out_shape=None, **kwargs) -> int:
    return 4 * math.prod(x)


@register_flop_formula(torch.ops.nlkernels.gate_backward)
def _(grad, x, weight, *args, out_shape=None, **kwargs) -> int:
    return 10 * math.prod(x)
