"""Projections of a block: theta, phi and g, pooled ones too, as the rows that attention reads.

Saved for backward: x, which the block's caller has, and the weights; pooled "after" the
convolutions also the winners, at most a byte for each number of key and value. Pooled "before"
them, x is pooled once more in the backward. One backward adds all gradients of x, that of the
residual connection included, in the buffer that it returns.

Memory beyond inputs and outputs, E bytes an element, C channels, M pooled positions:
  forward   before: E B C M for pooled x;  after: E B N (K + V) for key and value before pooling;
  backward  before: 2 E B C M for pooled x and its gradient, and its winners;
            after:  E B N (K + V) for gradients before pooling;
and what `nlkernels/ops/pointwise` and `nlkernels/ops/pool` state.
"""

import math
from typing import NamedTuple

import torch
from torch.utils.flop_counter import register_flop_formula

from nlkernels.ops._autograd import differentiated, differentiates_again, signed
from nlkernels.ops._library import define
from nlkernels.ops._tiles import accumulator_dtype
from nlkernels.ops.block import reference
from nlkernels.ops.block.layout import map_of, rows_of
from nlkernels.ops.pointwise import op as _pointwise
from nlkernels.ops.pointwise.problem import like
from nlkernels.ops.pool import op as _pool
from nlkernels.ops.pool import problem as pooling
from nlkernels.ops.region.problem import is_channels_last
from nlkernels.ops.region.problem import like as map_like

Optional = torch.Tensor | None


class Rows(NamedTuple):
    """What attention reads, and x, for the residual connection."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    x: torch.Tensor


def project(
    x: torch.Tensor,
    query: tuple[Optional, Optional],
    key: tuple[Optional, Optional],
    value: tuple[Optional, Optional],
    window: list[int],
    after: bool,
    backend: str = "auto",
) -> Rows:
    """Rows of a block's projections; gradients go back to x in one piece.

    Args:
        x: (B, C, T, H, W), any strides; read without a copy in NCDHW and channels_last_3d.
        query: weight (P, C) and bias (P,), which may be None, as of key and value. Without a
            weight query is x itself.
        key: without a weight key is x, pooled where there is a window.
        value: without a weight there is neither key nor value.
        window: sizes of the max pooling of key and value; empty for none.
        after: pool them, not x before them.
        backend: of the products and the pooling.

    Returns:
        query (B,N,Q), key (B,M,K) and value (B,M,V); x as the residual connection is to take it.
    """
    rows = _Project.apply(x, *query, *key, *value, list(window), after, backend)
    found = Rows(*rows[:4])
    if query[0] is None:
        found = found._replace(query=rows_of(found.x))
    if key[0] is None and value[0] is not None and not window:
        found = found._replace(key=rows_of(found.x))
    return found


@signed
class _Project(torch.autograd.Function):
    @staticmethod
    def forward(x, wq, bq, wk, bk, wv, bv, window, after, backend):
        rows = torch.ops.nlkernels.block_project(x, wq, bq, wk, bk, wv, bv, window, after, backend)
        query, key, value, *winners = rows
        return query, key, value, x.view_as(x), *winners

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.window, ctx.after, ctx.backend = inputs
        ctx.mark_non_differentiable(*output[4:])
        ctx.save_for_backward(*tensors, *output[4:])

    @staticmethod
    def backward(ctx, d_query, d_key, d_value, d_x, *_):
        *tensors, key_winners, value_winners = ctx.saved_tensors
        if differentiates_again():
            arguments = (*tensors, ctx.window, ctx.after)
            return *differentiated(_defined, arguments, d_query, d_key, d_value, d_x), None
        x, wq, _, wk, _, wv, _ = tensors
        wanted = [ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:7])]
        grads = torch.ops.nlkernels.block_project_backward(
            d_query, d_key, d_value, d_x, x, wq, wk, wv, key_winners, value_winners,
            ctx.window, ctx.after, wanted, ctx.backend,
        )  # fmt: skip
        given = [
            grad if needed else None
            for grad, needed in zip(grads, ctx.needs_input_grad, strict=False)
        ]
        return *given, None, None, None


def _defined(x, wq, bq, wk, bk, wv, bv, window, after):
    """The definition; empty is what the operator leaves empty."""
    rows = reference.project(x, wq, bq, wk, bk, wv, bv, window, after)
    has = (wq is not None, _has_key(wk, wv, window), wv is not None)
    rows = [r if present else x.new_empty(0) for r, present in zip(rows, has, strict=True)]
    return *rows, x.view_as(x)


def _has_key(wk: Optional, wv: Optional, window: list[int]) -> bool:
    """Whether the operator makes a key: x unpooled is no new tensor."""
    return wk is not None or (wv is not None and bool(window))


@define(
    "block_project(Tensor x, Tensor? wq, Tensor? bq, Tensor? wk, Tensor? bk, Tensor? wv, "
    "Tensor? bv, int[] window, bool after, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def _forward(x, wq, bq, wk, bk, wv, bv, window, after, backend):
    source = _pool.forward(x, window, backend)[0] if window and not after and wv is not None else x

    def rows(source, weight, bias, pools):
        """Rows of a projection, and the winners of its pooling."""
        if weight is not None:
            shift = None if bias is None else bias.to(accumulator_dtype(bias.dtype))
            found = _pointwise.product([(rows_of(source), weight)], shift, None, False, backend)
            source = map_of(found, source.shape[2:])
        if not pools:
            return rows_of(source), _nothing(x)[1]
        found, winners = _pool.forward(source, window, backend)
        return rows_of(found), winners

    pools = after and bool(window)
    query, _ = _nothing(x) if wq is None else rows(x, wq, bq, False)
    key, key_winners = rows(source, wk, bk, pools) if _has_key(wk, wv, window) else _nothing(x)
    value, value_winners = _nothing(x) if wv is None else rows(source, wv, bv, pools)
    return query, key, value, key_winners, value_winners


@define(
    "block_project_backward(Tensor d_query, Tensor d_key, Tensor d_value, Tensor d_x, Tensor x, "
    "Tensor? wq, Tensor? wk, Tensor? wv, Tensor key_winners, Tensor value_winners, int[] window, "
    "bool after, bool[] wanted, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def _backward(
    d_query, d_key, d_value, d_x, x, wq, wk, wv, key_winners, value_winners, window, after, wanted,
    backend,
):  # fmt: skip
    pools = bool(window) and wv is not None
    source, winners = _pool.forward(x, window, backend) if pools and not after else (x, None)
    if pools and after:
        d_value = _unpooled(d_value, value_winners, x, window, backend)
        if wk is not None:
            d_key = _unpooled(d_key, key_winners, x, window, backend)
    query, others = (d_query, wq), [(d_key, wk), (d_value, wv)]
    found = [x.new_empty(0) for _ in range(7)]
    if wanted[0]:
        if winners is None:
            found[0] = d_x = _input_gradient([query, *others], d_x, x, backend)
            if pools and wk is None:
                d_key = map_of(d_key, pooling.pooled_sizes(x, window)[2:])
                _pool.spread(d_key, key_winners, d_x, window, backend)
        else:
            found[0] = d_x = _input_gradient([query], d_x, x, backend)
            base = None if wk is not None else map_of(d_key, source.shape[2:])
            d_source = _input_gradient(others, base, source, backend)
            _pool.spread(d_source, winners, d_x, window, backend)
    if wanted[1]:
        for number, (grad, weight) in enumerate([query, *others]):
            if weight is not None:
                outer, sums = _pointwise.outer(grad, rows_of(source if number else x), backend)
                found[2 * number + 1] = outer.to(weight.dtype)
                found[2 * number + 2] = sums.to(weight.dtype)
    return tuple(found)


def _unpooled(grad, winners, x, window, backend) -> torch.Tensor:
    """Gradient (B,N,P) before pooling of rows (B,M,P)."""
    full = map_of(grad.new_zeros(x.shape[0], math.prod(x.shape[2:]), grad.shape[2]), x.shape[2:])
    sizes = pooling.pooled_sizes(x, window)[2:]
    return rows_of(_pool.spread(map_of(grad, sizes), winners, full, window, backend))


def _input_gradient(parts, base, model, backend) -> torch.Tensor:
    """base + gradients (B,N,P) of projections through their weights (P,C), laid out as model."""
    sources = [(grad, weight.mT) for grad, weight in parts if weight is not None]
    if not sources:
        return map_like(model).copy_(base)
    base = None if base is None else rows_of(base)
    maps = not is_channels_last(model)
    return map_of(_pointwise.product(sources, None, base, maps, backend), model.shape[2:])


def _nothing(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and winners of what a block does not have."""
    return x.new_empty(0), x.new_empty(0, dtype=torch.uint8)


@torch.library.register_fake("nlkernels::block_project")
def _(x, wq, bq, wk, bk, wv, bv, window, after, backend):
    bare = bool(window) and not after and wv is not None
    source = pooling.like(x, window) if bare else x

    def rows(source, weight, pools):
        if weight is not None:
            source = map_of(like(rows_of(source), weight.shape[0], False), source.shape[2:])
        if not pools:
            return rows_of(source), _nothing(x)[1]
        return rows_of(pooling.like(source, window)), pooling.winners_like(source, window)

    pools = after and bool(window)
    query, _ = _nothing(x) if wq is None else rows(x, wq, False)
    key, key_winners = rows(source, wk, pools) if _has_key(wk, wv, window) else _nothing(x)
    value, value_winners = _nothing(x) if wv is None else rows(source, wv, pools)
    return query, key, value, key_winners, value_winners


@torch.library.register_fake("nlkernels::block_project_backward")
def _(
    d_query, d_key, d_value, d_x, x, wq, wk, wv, key_winners, value_winners, window, after, wanted,
    backend,
):  # fmt: skip
    found = [x.new_empty(0) for _ in range(7)]
    if wanted[0]:
        found[0] = map_like(x)
    for number, weight in enumerate((wq, wk, wv)):
        if weight is not None and wanted[1]:
            found[2 * number + 1] = weight.new_empty(weight.shape)
            found[2 * number + 2] = weight.new_empty(weight.shape[:1])
    return tuple(found)


@register_flop_formula(torch.ops.nlkernels.block_project)
def _(x, wq, bq, wk, bk, wv, bv, window, after, *args, out_shape=None, **kwargs) -> int:
    return _flop(x, wq, wk, wv, window, after)


@register_flop_formula(torch.ops.nlkernels.block_project_backward)
def _(
    d_query, d_key, d_value, d_x, x, wq, wk, wv, key_winners, value_winners, window, after, wanted,
    *args, out_shape=None, **kwargs,
) -> int:  # fmt: skip
    return sum(wanted) * _flop(x, wq, wk, wv, window, after)


def _flop(x, wq, wk, wv, window, after) -> int:
    """Multiplications and additions of the products of a forward, of shapes."""
    batch, channels, *sizes = x
    keys = [n // k for n, k in zip(sizes, window, strict=True)] if window and not after else sizes
    rows = [(math.prod(sizes), wq), (math.prod(keys), wk), (math.prod(keys), wv)]
    return sum(2 * batch * n * channels * weight[0] for n, weight in rows if weight is not None)
