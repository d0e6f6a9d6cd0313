"""Pointwise products in C++, for CPUs: operands of any strides are read where they lie.

product   weights are packed once; a thread packs a block of positions, and adds shift and base as
          it writes the results
outer     chunks of positions are packed by all threads together; each tile of the result adds one
          chunk after another

Products of bfloat16 are summed in float32 by AVX512_BF16 where the CPU has it, other 16-bit
operands are converted to float32, and all is computed in that; float64 in float64. Every number is
summed by one thread in a fixed order: results do not depend on the number of threads.

Memory beyond inputs and outputs, F bytes a factor (2 for pairs of bfloat16, else those of the
sums), A bytes a sum, sizes rounded up to whole vectors:
  product : F P C for each source; for each thread at most 128 positions of F C for each source, and
            192 x 128 or 96 x 512 results of A; with statistics 16 P for each block of positions,
            and 3 x 512 A for each thread;
  outer   : F (P + Q) for each of some 1 MiB of positions, at least 128 (256 of pairs); A P Q.

Source: `csrc/cpu/pointwise*.h`.
"""

import torch

from nlkernels import _ext
from nlkernels.ops._tiles import accumulator_dtype
from nlkernels.ops.pointwise.problem import Sources, like

# Below, a further thread costs more than it saves: some 20 us of one core's work.
_PRODUCTS_OF_THREAD = 2**20


def product(
    sources: Sources,
    shift: torch.Tensor | None = None,
    base: torch.Tensor | None = None,
    maps: bool = False,
) -> torch.Tensor:
    """Features (B,N,C), weights (P,C), shift (P,), base (B,N,P) -> (B,N,P), as maps or rows."""
    return _product(sources, shift, base, maps, None)


def product_and_moments(
    sources: Sources,
    shift: torch.Tensor | None = None,
    base: torch.Tensor | None = None,
    maps: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, and mean and biased variance (2,P) of its channels, as they are rounded.

    Blocks of positions, of which these are put together, depend on the number of threads.
    """
    features, (channels, _) = sources[0][0], sources[0][1].shape
    wide = accumulator_dtype(features.dtype)
    # Of no positions there are none.
    moments = features.new_full((2, channels), float("nan"), dtype=wide)
    return _product(sources, shift, base, maps, moments), moments


def _product(sources, shift, base, maps, moments):
    features, (channels, _) = sources[0][0], sources[0][1].shape
    out = like(features, channels, maps)
    if out.numel() == 0:
        return out
    sizes = (*out.shape[:2], channels)
    depth = sum(weight.shape[1] for _, weight in sources)
    native, isa = _ext.native()
    call = native.PointwiseArguments(
        dtype=_ext.DTYPES[out.dtype],
        threads=_threads(*sizes, depth),
        sizes=sizes,
        sources=[(_operand(f), w.data_ptr(), *w.stride(), w.shape[1]) for f, w in sources],
        shift=0 if shift is None else shift.data_ptr(),
        base=_operand(base),
        out=_operand(out),
        moments=0 if moments is None else moments.data_ptr(),
    )
    workspace = torch.empty(native.pointwise_workspace(isa, call), dtype=torch.uint8)
    native.pointwise(isa, call, workspace.data_ptr())
    return out


def outer(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(B,N,P), (B,N,Q) -> outer (P,Q) and sums (P,), in at least float32."""
    batch, positions, rows = left.shape
    columns, dtype = right.shape[2], accumulator_dtype(left.dtype)
    products = left.new_empty(rows, columns, dtype=dtype)
    sums = left.new_empty(rows, dtype=dtype)
    if batch * positions == 0:
        return products.zero_(), sums.zero_()
    sizes = (batch, positions, rows, columns)
    native, isa = _ext.native()
    call = native.OuterArguments(
        dtype=_ext.DTYPES[left.dtype],
        threads=_threads(*sizes),
        sizes=sizes,
        left=_operand(left),
        right=_operand(right),
        outer=products.data_ptr(),
        sums=sums.data_ptr(),
    )
    workspace = torch.empty(native.outer_workspace(isa, call), dtype=torch.uint8)
    native.outer(isa, call, workspace.data_ptr())
    return products, sums


def _threads(batch: int, positions: int, channels: int, depth: int) -> int:
    worth = 1 + batch * positions * channels * depth // _PRODUCTS_OF_THREAD
    return min(torch.get_num_threads(), worth)


def _operand(tensor: torch.Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0, 0) if tensor is None else (tensor.data_ptr(), *tensor.stride())
