"""Gradients of gradients, for every operation whose rows are independent given key and value."""

import inspect
from collections.abc import Callable
from typing import ClassVar

import torch

from nlkernels.ops._tiles import cast, compute_dtype, scores_per_tile, tiles

# Plain autograd keeps about this many score matrices of a tile while it differentiates twice.
_MATRICES = 12


def differentiates_again() -> bool:
    """Whether a backward pass is itself recorded (create_graph=True), outside of tracing."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def differentiates(*operands: torch.Tensor) -> bool:
    """Whether a backward may follow, so that a forward keeps what spares it work.

    An exported program differentiates nothing: what it computes must not depend on who exported it.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_exporting():
        return False
    return any(t.requires_grad for t in operands)


class _AsGiven(inspect.Signature):
    """A signature whose arguments all come by position: there is nothing to bind."""

    def bind(self, *args):
        return _Bound(args)


class _Bound:
    kwargs: ClassVar[dict] = {}

    def __init__(self, args: tuple) -> None:
        self.args = args

    def apply_defaults(self) -> None:
        pass


def signed(function: type) -> type:
    """Decorator of an autograd.Function that is applied to all its arguments by position.

    torch asks for its forward's signature and binds them to it in every call, which takes longer
    than many an operation.
    """
    parameters = inspect.signature(function.forward).parameters.values()
    function.forward.__signature__ = _AsGiven(parameters)
    return function


def differentiated(
    definition: Callable, arguments: tuple, *grads: torch.Tensor
) -> list[torch.Tensor | None]:
    """Gradients by plain autograd through an operation's definition, as part of a graph.

    Args:
        definition: takes `arguments`, returns a tensor or several.
        arguments: of the call, tensors among them, as the graph of the caller knows them.
        grads: of what the definition returns.

    Returns:
        For each argument its gradient, None where it takes none.
    """
    # Views, as one argument may have been computed from another.
    own = [
        a.view_as(a) if isinstance(a, torch.Tensor) and a.requires_grad else a for a in arguments
    ]
    wanted = [a for a in own if isinstance(a, torch.Tensor) and a.requires_grad]
    with torch.autocast(grads[0].device.type, enabled=False):
        results = definition(*own)
        results = results if isinstance(results, tuple) else (results,)
        pairs = [pair for pair in zip(results, grads, strict=True) if pair[0].requires_grad]
        outputs, cotangents = zip(*pairs, strict=True)
        found = torch.autograd.grad(
            outputs, wanted, cotangents, create_graph=True, materialize_grads=True
        )
    gradients = iter(found)
    return [
        next(gradients) if isinstance(a, torch.Tensor) and a.requires_grad else None for a in own
    ]


def distinct(*operands: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The operands of an autograd.Function; while tracing, one that comes again as a view of it.

    Dynamo refuses to trace such a function when one tensor is two of its arguments.
    """
    if not torch.compiler.is_compiling():
        return operands
    found = []
    for tensor in operands:
        again = any(tensor is other for other in found)
        found.append(tensor.view_as(tensor) if again else tensor)
    return tuple(found)


def double_backward(
    attention: Callable,
    operands: tuple[torch.Tensor, ...],
    scale: float,
    cotangents: tuple[torch.Tensor, ...],
) -> tuple[torch.Tensor, ...]:
    """Differentiate the gradients of `attention`, the definition, a tile of query rows at a time.

    Args:
        attention: reference (query, key, value, scale) -> out, differentiable by autograd.
        operands: grad (B,N,V), query (B,N,D), key (B,M,D), value (B,M,V).
        scale: the factor of the scores.
        cotangents: of the gradients of query, key and value.

    Returns:
        Gradients of the four operands, accumulated in at least float32.
    """
    device = operands[1].device.type
    with torch.autocast(device, enabled=False):
        if torch.is_grad_enabled():
            return _differentiable(attention, operands, scale, cotangents)
        return _tiled(attention, operands, scale, cotangents)


def _tiled(attention, operands, scale, cotangents) -> tuple[torch.Tensor, ...]:
    original = operands[1].dtype
    dtype = torch.promote_types(compute_dtype(original), torch.float32)
    grad, query, key, value = (t.detach() for t in cast(dtype, *operands))
    d_query, d_key, d_value = (t.to(dtype) for t in cotangents)
    sums = [torch.zeros_like(t) for t in (grad, query, key, value)]
    columns = max(key.shape[1], query.shape[2], value.shape[2])
    budget = scores_per_tile(query.device, _MATRICES * dtype.itemsize, None)
    for items, part in tiles(query.shape[0], query.shape[1], columns, budget):
        tile = (grad[items, part], query[items, part], key[items], value[items])
        with torch.enable_grad():
            second = _second(
                attention,
                [t.detach().requires_grad_() for t in tile],
                scale,
                (d_query[items, part], d_key[items], d_value[items]),
            )
        sums[0][items, part] = second[0]
        sums[1][items, part] = second[1]
        sums[2][items] += second[2]
        sums[3][items] += second[3]
    return tuple(t.to(original) for t in sums)


def _differentiable(attention, operands, scale, cotangents) -> tuple[torch.Tensor, ...]:
    """The same as part of a graph, for gradients of a third order and above."""
    inputs = [t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in operands]
    return _second(attention, inputs, scale, cotangents, create_graph=True)


def _second(attention, inputs, scale, cotangents, create_graph=False) -> tuple[torch.Tensor, ...]:
    out = attention(*inputs[1:], scale)
    first = torch.autograd.grad(out, inputs[1:], inputs[0], create_graph=True)
    return torch.autograd.grad(
        first, inputs, cotangents, create_graph=create_graph, materialize_grads=True
    )
