"""The concatenation in C++, for CPUs: exact, and linear in N and M but for sorting the scores.

A query of score a sees the keys whose threshold t = -key_score lies below a. Queries and keys are
sorted together by a and t; where they are equal the query comes first, as it does not see that key.
Walking up these stairs only two rows are kept,

  G  the sum of the values passed,    S  the sum of (here - t) value over the values passed

from one level to the next S grows by (the distance) G, a key adds its value to G, and a query's
out is S / M. All factors are distances, none is negative: nothing large cancels, however far the
scores lie from zero. The backward walks up again for d_query_score = grad . G / M, then down, with
the grads of the queries passed in the place of values, for d_value = S / M and
d_key_score = value . G / M. Rows are read where they lie, out and gradients written once; a task
takes 64 channels and at most 4096 steps, and starts from the sums of the steps before its own.

Sums are float64 for every dtype, in an order that depends on N, M and V only: results are bitwise
the same for any batch and number of threads. No sum of 16- or 32-bit numbers overflows; where one
of float64 might, the item's rows are summed in a unit, a power of two.

Scores that are NaN or infinite rank with the largest finite ones of their sign, NaN as positive.
They make NaN or Inf of what the definition does: for a query its row of out and its batch item's
d_value, for a key its batch item's out and its own row of d_value. Sums of scores are not rounded:
a sum beyond float32 gives Inf only where the result is beyond it.

Only query_score, key_score and value are kept for the backward. Any strides are read as they are.

Memory beyond inputs and outputs, A = 8 for float64, else 4, c = ceil((N + M) / 4096) chunks and
v = ceil(V / 64) blocks of channels:
  forward  : B (2 (A + 4) (N + M) + 64) for sorting, 1024 B c v for sums where c > 1;
  backward : the same, 8 B (N + M) v for products, 512 B c v more where c > 1;
  either   : up to 512 for alignment.

Source: `csrc/cpu/concat.cpp`.
"""

import torch

from nlkernels import _ext
from nlkernels._ext import DTYPES


def forward(
    query_score: torch.Tensor, key_score: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """(B,N), (B,M), (B,M,V) -> (B,N,V)."""
    sizes = _sizes(query_score, value)
    if 0 in sizes:
        return value.new_zeros(sizes[0], sizes[1], sizes[3])
    out = value.new_empty(sizes[0], sizes[1], sizes[3])
    (module, isa), dtype = _ext.native(), DTYPES[value.dtype]
    workspace = _workspace(module.concat_workspace(dtype, sizes, False))
    module.concat_forward(
        isa,
        torch.get_num_threads(),
        dtype,
        sizes,
        *(part for t in (query_score, key_score, value) for part in (t.data_ptr(), t.stride())),
        out.data_ptr(),
        workspace.data_ptr(),
    )
    return out


def backward(
    grad: torch.Tensor, query_score: torch.Tensor, key_score: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query_score, key_score and value, in their dtypes."""
    operands = (query_score, key_score, value)
    sizes = _sizes(query_score, value)
    if 0 in sizes:
        return tuple(t.new_zeros(t.shape) for t in operands)
    grads = tuple(t.new_empty(t.shape) for t in operands)
    (module, isa), dtype = _ext.native(), DTYPES[value.dtype]
    workspace = _workspace(module.concat_workspace(dtype, sizes, True))
    module.concat_backward(
        isa,
        torch.get_num_threads(),
        dtype,
        sizes,
        *(part for t in (grad, *operands) for part in (t.data_ptr(), t.stride())),
        *(t.data_ptr() for t in grads),
        workspace.data_ptr(),
    )
    return grads


def _sizes(query_score: torch.Tensor, value: torch.Tensor) -> tuple[int, int, int, int]:
    batch, keys, depth = value.shape
    return batch, query_score.shape[1], keys, depth


def _workspace(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8)
