"""Attention in C++ on CPUs, for every kind of it: the module's calls (csrc/cpu/attention*.h).

forward   keys and values of a batch item are packed once; blocks of query rows, each by one thread,
          then compute their scores with all keys, whole rows of weights, and the product with the
          values
backward  superblocks of rows: P, dS and dQ by blocks of rows; then dV^T += dO^T P and
          dK^T += Q^T dS by panels of keys. The weights, and for a softmax the row sums of P dP, are
          computed again, so that their rounding cancels; nothing of the forward is needed.

linear    state = K^T V, over chunks of positions; out = Q state; in the backward also Q^T dO, and
          three products with the two states, which are rounded as the other factor is. The backward
          starts from the sums of the forward where it is given them: the same bits

Products of bfloat16 operands are summed in float32 by AVX512_BF16 where the CPU has it (subnormal
operands count as zero there); other 16-bit operands are converted to float32, and all is computed
in that; float64 in float64. Scores are never rounded to 16 bits. Each number is summed by one
thread in a fixed order: results do not depend on the number of threads.

Memory beyond inputs and outputs, for F bytes a factor (2 for pairs of bfloat16, else those of the
sums) and A bytes a sum (4, or 8 in float64), with sizes rounded up to whole vectors:
  forward  : F M (D + V) for an item; for each thread 12 to 192 rows of A (M + V) + F D;
  backward : F M (2 D + V) + A M (D + V) for an item; F (2 M + D + V) for each row of a superblock,
             which has at least one block of rows for each thread, rounded up to 128 rows (256 of
             pairs); for each thread 12 to 192 rows of 2 A M + A D + F (D + V);
  linear   : 2 F R max(D, V), with R positions, 512 KiB of packed ones or 128 (256 of pairs), and
             (A + F) D V, + F D V in the backward, for an item; for each thread 96 rows of (A + F)
             max(D, V).
These least sizes apply whatever `workspace_mib` (10 where None) is. Where the batch is a multiple
of the threads, and all this for one thread and one item times the threads is within it, each thread
has it for items of its own. Else several items are taken at a time where theirs is at most 4 MiB. A
thread takes more rows as long as its scores are within 1 MiB, 36 where all threads' scores take no
more than what is packed, and a superblock more, where its factors are within 8 MiB.
"""

from __future__ import annotations

import torch

from nlkernels import _ext
from nlkernels.ops._tiles import DEFAULT_WORKSPACE_MIB, MIB, accumulator_dtype

# nlk::Affinity.
SOFTMAX, RELU, SCORES, LINEAR = range(4)
# Below, a further thread costs more than it saves: some 20 us of one core's work.
_PRODUCTS_OF_THREAD = 2**21


def forward(
    affinity: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    workspace_mib: float | None,
    state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out (B,N,V) and, of a softmax, stats (2,B,N): extremes of the products, and sums.

    The linear order fills a `state` (B,D,V), dense and of the type of sums, but not an empty one.
    """
    batch, rows, _ = query.shape
    out = value.new_empty(batch, rows, value.shape[2])
    wide = accumulator_dtype(query.dtype)
    stats = query.new_empty(2, batch, rows if affinity == SOFTMAX else 0, dtype=wide)
    if out.numel() == 0:
        return out, stats
    native, isa = _ext.native()
    problem = _problem(native, affinity, query, key, value, scale, workspace_mib)
    workspace = _workspace(native.attention_forward_workspace(isa, problem))
    operands = (_operand(t) for t in (query, key, value, out))
    native.attention_forward(
        isa, problem, *operands, stats.data_ptr(), _address(state), workspace.data_ptr()
    )
    return out, stats


def backward(
    affinity: int,
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    workspace_mib: float | None,
    state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query, key and value, in their dtypes.

    The linear order takes a `state` that is not empty from its forward, and sums another itself.
    """
    grads = tuple(torch.empty_like(t) for t in (query, key, value))
    if 0 in (*query.shape[:2], *value.shape):
        return tuple(t.zero_() for t in grads)
    native, isa = _ext.native()
    problem = _problem(native, affinity, query, key, value, scale, workspace_mib)
    workspace = _workspace(native.attention_backward_workspace(isa, problem))
    operands = (_operand(t) for t in (grad, query, key, value, *grads))
    state = None if state is None else state.contiguous()
    native.attention_backward(isa, problem, *operands, _address(state), workspace.data_ptr())
    return grads


def _problem(native, affinity, query, key, value, scale, workspace_mib):
    if workspace_mib is None:
        workspace_mib = DEFAULT_WORKSPACE_MIB["cpu"]
    sizes = (*query.shape[:2], key.shape[1])
    depth, value_depth = query.shape[2], value.shape[2]
    limit = int(min(workspace_mib * MIB, 2**62))
    return native.AttentionProblem(
        affinity, _ext.DTYPES[query.dtype], scale, (*sizes, depth, value_depth), limit,
        threads(*sizes, depth, value_depth),
    )  # fmt: skip


def threads(batch: int, queries: int, keys: int, depth: int, value_depth: int) -> int:
    """Threads that a call takes: fewer than torch has where it is small."""
    worth = 1 + batch * queries * keys * (depth + value_depth) // _PRODUCTS_OF_THREAD
    return min(torch.get_num_threads(), worth)


def _workspace(nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8)


def _address(tensor: torch.Tensor | None) -> int:
    """0 for none, and for one without elements."""
    return 0 if tensor is None or tensor.numel() == 0 else tensor.data_ptr()


def _operand(tensor: torch.Tensor) -> tuple[int, ...]:
    return tensor.data_ptr(), *tensor.stride()
