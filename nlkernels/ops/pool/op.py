"""The pooling operation: schema, fakes, autograd and backend choice.

Saved for backward: the winners, at most a byte for each maximum. Pooling is linear once these are
known: gradients of gradients are those of the definition.
"""

import torch

from nlkernels import _ext, _launch, _operations, _select
from nlkernels.ops._autograd import differentiated, differentiates_again, signed
from nlkernels.ops._library import define
from nlkernels.ops.pool import chunked, cpp, problem, reference
from nlkernels.ops.pool.choice import TABLE
from nlkernels.ops.pool.problem import LARGEST, PoolProblem
from nlkernels.ops.region.problem import like as region_like

NAME = "pool"
BACKENDS = ("reference", "chunked", "cpp", "triton")
_INSIDE = {"chunked": chunked, "cpp": cpp, "triton": "nlkernels.ops.pool.triton"}


def supports(backend: str, asked: PoolProblem) -> list[str]:
    """Why `backend` cannot serve a problem; an empty list when it can."""
    if backend not in BACKENDS:
        return [f"{NAME} has no backend {backend!r}"]
    reasons = _ext.unserved(asked) if backend == "cpp" else []
    reasons += _launch.unserved(asked) if backend == "triton" else []
    if problem.taps(asked.window) > LARGEST and backend != "reference":
        reasons.append(f"winners are at most bytes: windows of up to {LARGEST} numbers")
    return reasons


def head(asked: PoolProblem) -> tuple[int, ...]:
    """The window and the layout: what decides about a kernel's code."""
    return (*asked.window, int(asked.channels_last))


def sizes(asked: PoolProblem) -> tuple[int, ...]:
    """The other sizes, of which only the magnitude matters."""
    return asked.batch, asked.channels, asked.frames, asked.height, asked.width


def pool(x: torch.Tensor, window: list[int], backend: str = "auto") -> torch.Tensor:
    """Max pooling (B,C,T,H,W) -> (B,C,T//kt,H//kh,W//kw) of any strides."""
    if backend == "reference":
        return reference.pool(x, window)
    return _Pool.apply(x, window, backend)[0]


def forward(x: torch.Tensor, window: list[int], backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Pooled x and its winners, by a backend, without autograd."""
    return _select.module(NAME, backend, "forward", x, window).forward(x, window)


def spread(
    grad: torch.Tensor, winners: torch.Tensor, d_x: torch.Tensor, window: list[int], backend: str
) -> torch.Tensor:
    """d_x, to whose winners the gradients of the pooled numbers have been added, in place."""
    module = _select.module(NAME, backend, "backward", d_x, window)
    return module.backward(grad, winners, d_x, window)


@signed
class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(x, window, backend):
        return torch.ops.nlkernels.pool_forward(x, window, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.window, ctx.backend = inputs
        # Besides gradients of gradients, only the sizes and the layout of x are asked for.
        ctx.save_for_backward(x, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, grad, _):
        x, winners = ctx.saved_tensors
        if differentiates_again():
            return *differentiated(reference.pool, (x, ctx.window), grad)[:1], None, None
        arguments = (grad, winners, x, ctx.window, ctx.backend)
        return torch.ops.nlkernels.pool_backward(*arguments), None, None


_operations.OPERATIONS[NAME] = _operations.Operation(
    BACKENDS,
    supports,
    _INSIDE,
    TABLE,
    describe=PoolProblem.of,
    head=head,
    sizes=sizes,
    suite="nlkernels.ops.pool.suite",
    drawback="remembers 8 bytes for each maximum",
)


@define("pool_forward(Tensor x, int[] window, str backend) -> (Tensor, Tensor)")
def _forward(x, window, backend):
    return forward(x, window, backend)


@define("pool_backward(Tensor grad, Tensor winners, Tensor x, int[] window, str backend) -> Tensor")
def _backward(grad, winners, x, window, backend):
    return spread(grad, winners, region_like(x).zero_(), window, backend)


@torch.library.register_fake("nlkernels::pool_forward")
def _(x, window, backend):
    return problem.like(x, window), problem.winners_like(x, window)


@torch.library.register_fake("nlkernels::pool_backward")
def _(grad, winners, x, window, backend):
    return region_like(x)
