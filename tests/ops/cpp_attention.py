"""Problems of the C++ attention kernels, and how their results are judged."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch

from nlkernels import _ext
from nlkernels.ops import _cpp
from nlkernels.ops.dot_product import order
from nlkernels.ops.dot_product import reference as dot_product
from nlkernels.ops.relu import reference as relu
from nlkernels.ops.softmax import reference as softmax
from tests.helpers import SHORT, Case, assert_not_worse, operands
from tests.ops import staged

# Of a module of tests.
needs_compiler = pytest.mark.skipif(bool(_ext.missing()), reason=_ext.missing() or "never")
DTYPES = tuple(SHORT)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=list(SHORT.values()))


class Way(NamedTuple):
    """One order of products that the kernels have.

    Attributes:
        affinity: nlk::Affinity.
        definition: (query, key, value, scale) -> out.
    """

    affinity: int
    definition: Callable[..., torch.Tensor]


WAYS = {
    "softmax": Way(_cpp.SOFTMAX, softmax.attention),
    "relu": Way(_cpp.RELU, relu.attention),
    "scores": Way(_cpp.SCORES, dot_product.attention),
    "linear": Way(_cpp.LINEAR, lambda *operands: _linear(*operands)),
}
ways = pytest.mark.parametrize("way", list(WAYS))


def _linear(query, key, value, scale):
    sizes = (*query.shape[:2], *key.shape[1:], value.shape[2])
    linear, quadratic = order.flops(*sizes)
    if linear <= quadratic:
        return dot_product.attention(query, key, value, scale)
    # Nobody takes the linear order here, which rounds more: judge it by its like.
    return query @ (key.mT @ value) * (scale / key.shape[1])


def scale_of(way: str, depth: int) -> float:
    """The scale that nonlocal_attention takes by default."""
    return max(depth, 1) ** -0.5 if way == "softmax" else 1.0


def run(
    way: str, tensors: list[torch.Tensor], scale: float, workspace_mib: float | None = None
) -> dict[str, torch.Tensor]:
    """Output and gradients of the kernels."""
    *qkv, grad = tensors
    out, _ = _cpp.forward(WAYS[way].affinity, *qkv, scale, workspace_mib)
    grads = _cpp.backward(WAYS[way].affinity, grad, *qkv, scale, workspace_mib)
    return dict(zip(staged.NAMES, (out, *grads), strict=True))


def naive(way: str, tensors: list[torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    """Output and gradients of the definition, in the operands' dtype."""
    *qkv, grad = tensors
    qkv = [t.detach().requires_grad_() for t in qkv]
    out = WAYS[way].definition(*qkv, scale)
    grads = torch.autograd.grad(out, qkv, grad)
    return dict(zip(staged.NAMES, (out.detach(), *grads), strict=True))


def truth(way: str, tensors: list[torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    """Output and gradients of the definition, in float64."""
    return naive(way, [t.double() for t in tensors], scale)


def judge(
    got: dict[str, torch.Tensor], way: str, tensors: list[torch.Tensor], scale: float
) -> None:
    """Hold what is in `got` to the 2x/3x rule."""
    same, exact = naive(way, tensors, scale), truth(way, tensors, scale)
    for name, result in got.items():
        assert_not_worse(name, result, same[name], exact[name], 2 if name == "out" else 3)


def problems() -> list[tuple[str, Case, torch.dtype]]:
    """A pairwise cover of all that a problem has; then sizes at the edges of parts."""
    rows = staged.pairwise(
        staged.POSITIONS, staged.POSITIONS, staged.CHANNELS, staged.CHANNELS, DTYPES, tuple(WAYS)
    )
    # Parts of the depth that pass the first-level cache end at 128, 256 or 512.
    edges = [(127, 129), (257, 255), (511, 257), (513, 511), (1030, 7), (5, 1000), (0, 9)]
    rows += [
        (17, 31, depth, value_depth, dtype, way)
        for depth, value_depth in edges
        for dtype in DTYPES
        for way in WAYS
    ]
    found = []
    for queries, keys, depth, value_depth, dtype, way in rows:
        # Enough numbers that the errors of PyTorch's own are not small by luck.
        numbers = min(queries, keys) * min(max(depth, 1), value_depth)
        batch = min(-(-128 // min(128, numbers)), 16, -(-2048 // max(queries, keys)))
        found.append((way, Case(batch, queries, keys, depth, value_depth), dtype))
    return found


def parameters(quick: int = 70) -> list:
    """The problems as parameters of a test: few of them, and no large ones, in `make test`."""
    found, shown = [], 0
    for way, case, dtype in problems():
        work = case.batch * case.queries * case.keys * (case.depth + case.value_depth)
        # PyTorch's products of float16 take a hundred times as long as others.
        long = work > (2e6 if dtype == torch.float16 else 2e7) or shown >= quick
        shown += not long
        name = f"{way}-{case}-{SHORT[dtype]}"
        found.append(pytest.param(way, case, dtype, id=name, marks=[pytest.mark.gate] * long))
    return found


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads of torch, and so of the kernels."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def made(case: Case, dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    """Random query, key, value and grad."""
    return operands(case, dtype, seed=seed)


def assert_equal(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Fail unless all bits are equal."""
    for name, value in expected.items():
        assert torch.equal(got[name], value), name
