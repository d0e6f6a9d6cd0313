"""The norm operation: schema, fakes, FLOPs and backend choice; `ops/block` differentiates.

A forward is the product with its statistics, and then the norm; between the two come the statistics
of other processes, as they do between the two halves of a backward. A backend that does not take
statistics with a product has them of what `ops/pointwise` returns.
"""

import math
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from nlkernels import _ext, _launch, _operations, _select
from nlkernels.ops._library import define
from nlkernels.ops._tiles import accumulator_dtype
from nlkernels.ops.norm import chunked, cpp
from nlkernels.ops.norm.choice import TABLE
from nlkernels.ops.norm.problem import NormProblem, are_maps, like
from nlkernels.ops.pointwise.op import BACKENDS as product_backends
from nlkernels.ops.pointwise.op import product
from nlkernels.ops.pointwise.problem import like as product_like

NAME = "norm"
BACKENDS = ("chunked", "cpp", "triton")
_INSIDE = {"chunked": chunked, "cpp": cpp, "triton": "nlkernels.ops.norm.triton"}


def supports(backend: str, problem: NormProblem) -> list[str]:
    """Why `backend` cannot serve `problem`; an empty list when it can."""
    if backend not in BACKENDS:
        return [f"{NAME} has no backend {backend!r}"]
    if backend == "cpp":
        return _ext.unserved(problem)
    return _launch.unserved(problem) if backend == "triton" else []


def head(problem: NormProblem) -> tuple[int, ...]:
    """Channels, rounded up to a power of two of at least 16, and the layout."""
    return max(16, 1 << (problem.channels - 1).bit_length()), int(problem.maps)


def sizes(problem: NormProblem) -> tuple[int, ...]:
    """The other sizes, of which only the magnitude matters."""
    return problem.batch, problem.positions


_operations.OPERATIONS[NAME] = _operations.Operation(
    BACKENDS,
    supports,
    _INSIDE,
    TABLE,
    describe=NormProblem.of,
    head=head,
    sizes=sizes,
    suite="nlkernels.ops.norm.suite",
    drawback="has no definition of its own",
)


def _module(backend: str, direction: str, z: torch.Tensor):
    return _select.module(NAME, _own(backend), direction, z, z.shape[2], are_maps(z))


def _own(backend: str) -> str:
    """The backend of a norm for that of its product, which may have more of them."""
    return "chunked" if backend in product_backends and backend not in BACKENDS else backend


def product_of(
    module: Any,
    features: torch.Tensor,
    weight: torch.Tensor,
    shift: torch.Tensor | None,
    maps: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A product and its statistics by a norm's backend; `backend` is that of a product alone."""
    if hasattr(module, "product"):
        return module.product(features, weight, shift, maps)
    z = product([(features, weight)], shift, None, maps, backend)
    return z, module.moments(z)


@define(
    "norm_product(Tensor features, Tensor weight, Tensor? shift, bool maps, str backend) "
    "-> (Tensor, Tensor)"
)
def _product(features, weight, shift, maps, backend):
    module = _select.module(NAME, _own(backend), "forward", features, weight.shape[0], maps)
    return product_of(module, features, weight, shift, maps, backend)


@define(
    "norm_forward(Tensor z, Tensor moments, Tensor gamma, Tensor beta, Tensor? base, float eps, "
    "str backend) -> Tensor"
)
def _forward(z, moments, gamma, beta, base, eps, backend):
    return _module(backend, "forward", z).forward(z, moments, gamma, beta, base, eps)


@define("norm_sums(Tensor grad, Tensor z, Tensor moments, float eps, str backend) -> Tensor")
def _sums(grad, z, moments, eps, backend):
    return _module(backend, "backward", z).sums(grad, z, moments, eps)


@define(
    "norm_gradient(Tensor grad, Tensor z, Tensor gamma, Tensor moments, Tensor means, float eps, "
    "str backend) -> Tensor"
)
def _gradient(grad, z, gamma, moments, means, eps, backend):
    return _module(backend, "backward", z).gradient(grad, z, gamma, moments, means, eps)


@define(
    "norm_backward(Tensor grad, Tensor z, Tensor gamma, Tensor moments, float eps, str backend) "
    "-> (Tensor, Tensor)"
)
def _backward(grad, z, gamma, moments, eps, backend):
    return _module(backend, "backward", z).backward(grad, z, gamma, moments, eps)


@torch.library.register_fake("nlkernels::norm_product")
def _(features, weight, shift, maps, backend):
    channels, dtype = weight.shape[0], accumulator_dtype(features.dtype)
    return product_like(features, channels, maps), features.new_empty(2, channels, dtype=dtype)


@torch.library.register_fake("nlkernels::norm_forward")
def _(z, moments, gamma, beta, base, eps, backend):
    return like(z)


@torch.library.register_fake("nlkernels::norm_sums")
def _(grad, z, moments, eps, backend):
    return torch.empty_like(moments)


@torch.library.register_fake("nlkernels::norm_gradient")
def _(grad, z, gamma, moments, means, eps, backend):
    return like(z)


@torch.library.register_fake("nlkernels::norm_backward")
def _(grad, z, gamma, moments, eps, backend):
    return like(z), torch.empty_like(moments)


@register_flop_formula(torch.ops.nlkernels.norm_product)
def _(features, weight, *args, out_shape=None, **kwargs) -> int:
    return 2 * features[0] * features[1] * math.prod(weight)
