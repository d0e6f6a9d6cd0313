"""Softmax backward on Hopper (sm_90a): P and dS of a chunk of queries by tensor copies and wgmma.

The form, and what it takes, is that of `staged_backward`; csrc/cuda/hopper/d_scores.cuh makes P and
dS of the whole chunk in one kernel, and a second one corrects the rows that need it. The three
products are the library's. `cuda_hopper_backward_plan` says how the kernel tiles what.

Memory beyond inputs and outputs is that of `staged_backward` with E = 2, and for R rows (of all its
items) in a chunk
  delta : 4 B N + 12 R ceil(M / C) unless M <= C, the keys of a key tile (64 to 192);
  grad  : 2 B N (V + 7) at most, a copy, where tensor copies cannot read it in the order of the
          operands: expanded, or rows beside channel-first operands.

Bitwise repeatable: every sum is one thread's or the library's, in one order.

Unverified: no GPU has run these kernels; the tests run them in a model of the machine.
"""

import functools

import torch

from nlkernels import _cuda, _tune
from nlkernels._ext import DTYPES
from nlkernels._spec import Problem
from nlkernels.ops import _cuda_attention
from nlkernels.ops._tiles import Buffer, padded
from nlkernels.ops.softmax import cuda_hopper, cuda_hopper_backward_plan, staged_backward
from nlkernels.ops.softmax.cuda_hopper_backward_plan import Chunk, Plan

KERNEL = "softmax_hopper_d_scores"


def serves(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether a Hopper kernel can run the backward of these operands, with any gradient."""
    return not unserved(query, key, value)


def unserved(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> str:
    """Why no Hopper kernel can run the backward of these operands; "" when one can."""
    return cuda_hopper.unserved(query, key, value, cuda_hopper_backward_plan.unserved)


def backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    stats: torch.Tensor,
    scale: float,
    workspace_mib: float | None = None,
    plan: Plan | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query, key and value, in their dtypes, of operands that are served.

    `plan`: one of `cuda_hopper_backward_plan.alternatives`, in the place of the best that is known.
    """
    order = bool(cuda_hopper.channel_first(query, key, value))
    grad = _readable(grad, order)
    chunks = _Chunks(grad, query, out, stats, scale, plan, order)
    return staged_backward.backward(chunks.fill, grad, query, key, value, workspace_mib)


def _readable(tensor: torch.Tensor, channel_first: bool) -> torch.Tensor:
    """The tensor, or a copy of it, such that tensor copies read it in that order."""
    if not cuda_hopper.undescribable(tensor, channel_first):
        return tensor
    if channel_first:
        return _readable(tensor.mT, channel_first=False).mT
    batch, rows, channels = tensor.shape
    copy = tensor.new_empty(batch, rows, padded(channels))[..., :channels]
    return copy.copy_(tensor)


class _Chunks:
    """Fills the workspace, chunk after chunk of queries."""

    def __init__(
        self,
        grad: torch.Tensor,
        query: torch.Tensor,
        out: torch.Tensor,
        stats: torch.Tensor,
        scale: float,
        plan: Plan | None,
        channel_first: bool,
    ) -> None:
        self._grad, self._query, self._out, self._scale = grad, query, out, scale
        self._stats = stats.contiguous()
        self._plan, self._channel_first = plan, channel_first
        self._sums = Buffer(torch.float32, grad.device)

    def fill(
        self,
        weights: torch.Tensor,
        d_scores: torch.Tensor,
        grad: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        where: tuple[slice, slice],
    ) -> None:
        """Compute P and dS of the rows `where` says."""
        if self._plan is not None:
            self._run(self._plan, weights, d_scores, key, value, where)
            return
        problem, device = Problem.of(self._query, key, value), query.device
        chunk = Chunk(*weights.shape[:2], cuda_hopper.multiprocessors(device))
        plans = cuda_hopper_backward_plan.candidates(problem, chunk, self._channel_first)

        def run(plan: Plan) -> None:
            self._run(plan, weights, d_scores, key, value, where)

        _tune.run_best(KERNEL, problem, device, plans, run)

    def _run(
        self,
        plan: Plan,
        weights: torch.Tensor,
        d_scores: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        where: tuple[slice, slice],
    ) -> None:
        items, part = where
        # Whole items: copies may begin at any row of them, other than at any address.
        query, grad = self._query[items], self._grad[items]
        count, rows, keys = weights.shape
        key_tiles = plan.key_tiles(keys)
        given = [self._stats[0, items], self._stats[1, items]]
        # One key tile reads and writes neither.
        given.append(self._delta[items] if key_tiles > 1 else given[0])
        sums = self._sums.block(3, key_tiles, count * rows if key_tiles > 1 else 0)
        tolerance = staged_backward.CORRECTED_ABOVE * torch.finfo(query.dtype).eps
        _cuda.module(query).hopper_d_scores(
            _cuda.stream(query),
            plan,
            DTYPES[query.dtype],
            cuda_hopper.multiprocessors(query.device),
            (cuda_hopper.factor(self._scale), self._scale, tolerance),
            (count, query.shape[1], part.start, rows, keys, query.shape[2], value.shape[2]),
            [_cuda.operand(tensor) for tensor in (query, key, grad, value)],
            [tensor.data_ptr() for tensor in given],
            [tensor.data_ptr() for tensor in (sums, weights, d_scores)],
        )

    @functools.cached_property
    def _delta(self) -> torch.Tensor:
        """(B,N), computed for all rows when it is first asked for."""
        return _cuda_attention.delta(self._grad, self._out)
