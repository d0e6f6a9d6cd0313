"""Context pooling in plain PyTorch, a tile of positions after the other, on any device.

forward   l_p = weight . x_p;  a_p = exp(l_p - max l);  context = sum a_p x_p / sum a_p
backward  u_p = grad . x_p - grad . context;  e = sum a_p u_p / sum a_p, zero but for rounding;
          d_weight = sum a_p u_p x_p / sum a_p - e context;
          d_x_p = a_p / sum a_p (grad + (u_p - e) weight)

A tile is read twice while it is in the cache; its maximum so far is subtracted, and what was summed
before it is scaled to that. The a are kept in a unit in which all P sum to less than 1: no sum of
theirs exceeds the largest x. The mean of u is taken from the u themselves (e), whose rounding then
cancels; grad . context, its value but for rounding, only keeps the sums small. Nothing is kept
between the passes but x, weight and context, and d_x is written without reading x again.

Sums are float32, float64 for float64. Memory beyond inputs and outputs, A = max(bytes an element,
4), for P positions of an item, C channels and tiles of n = max(1, 4 MiB / (A C)) positions:
  forward   : A (3 min(n, P) + 4 C) for logits, shares and sums;
  backward  : A (2 P + 2 min(n, P) + 8 C) more for l and u of an item;
  16 bits   : + 4 C min(n, P), a tile in float32;
  strides   : + the bytes of an item of x whose positions are neither equally far from each other
              nor so within each frame (NCDHW, channels_last and clips of frames are).
"""

import math
from collections.abc import Iterator

import torch

from nlkernels.ops._tiles import MIB, Buffer, accumulator_dtype
from nlkernels.ops.gate.problem import frames_of, like, unit_of

TILE_BYTES = 4 * MIB
_GROUP = 128


def forward(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(B,C,*positions), (C,) -> (B,C)."""
    dtype = accumulator_dtype(x.dtype)
    weight, buffer = weight.to(dtype), Buffer(dtype, x.device)
    context = x.new_empty(x.shape[:2])
    for item, out in zip(x, context, strict=True):
        out.copy_(_mean(item, weight, buffer))
    return context


def backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, context: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of x and weight, in their dtypes."""
    dtype = accumulator_dtype(x.dtype)
    factors, buffer = weight.to(dtype), Buffer(dtype, x.device)
    d_x, d_weight = like(x), torch.zeros_like(factors)
    scores = factors.new_empty(2, math.prod(x.shape[2:]))
    for item, d_item, *rows in zip(x, d_x, grad.to(dtype), context.to(dtype), strict=True):
        _score(item, factors, *rows, d_weight, scores, buffer)
        _write(d_item, torch.stack((rows[0], factors), dim=1), scores, buffer)
    return d_x, d_weight.to(weight.dtype)


def _mean(item, weight, buffer) -> torch.Tensor:
    """Context (C,) of one item."""
    top, total = weight.new_full((), -torch.inf), weight.new_zeros(())
    sums = torch.zeros_like(weight)
    unit = unit_of(math.prod(item.shape[1:]))
    for tile in _tiles(item, buffer):
        top, fade, shares = _shares(top, _product(tile, weight), unit)
        total = total * fade + shares.sum()
        sums.mul_(fade).addmv_(tile, shares)
    return sums.div_(total)


def _score(item, weight, grad, context, d_weight, scores, buffer) -> None:
    """Add an item's part to d_weight; write the factors (2,P) of grad and weight in d_x."""
    expected = torch.dot(grad, context)
    logits, above = scores
    top, total = weight.new_full((), -torch.inf), weight.new_zeros(())
    error, sums, start = torch.zeros_like(total), torch.zeros_like(weight), 0
    unit = unit_of(logits.numel())
    for tile in _tiles(item, buffer):
        part = slice(start, start := start + tile.shape[1])
        torch.sub(_product(tile, grad), expected, out=above[part])
        logits[part] = _product(tile, weight)
        top, fade, shares = _shares(top, logits[part], unit)
        total = total * fade + shares.sum()
        shares.mul_(above[part])
        error = error * fade + shares.sum()
        sums.mul_(fade).addmv_(tile, shares)
    error = error / total
    d_weight.add_(sums.div_(total)).sub_(context * error)
    logits.sub_(_origin(top)).exp_().mul_(unit).div_(total)
    above.sub_(error).mul_(logits)


def _product(tile: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """(C,n), (C,) -> (n,), a group of channels after the other: one long sum rounds more."""
    groups = zip(tile.split(_GROUP), factors.split(_GROUP), strict=True)
    total, *others = (torch.mv(group.t(), factor) for group, factor in groups)
    for other in others:
        total.add_(other)
    return total


def _shares(top, logits, unit) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The largest logit so far, exp(old - new largest) and unit exp(logits - largest)."""
    largest = torch.maximum(top, logits.amax())
    origin = _origin(largest)
    return largest, torch.exp(top - origin), torch.exp(logits - origin).mul_(unit)


def _origin(largest: torch.Tensor) -> torch.Tensor:
    """What is subtracted: nothing where every logit is -inf, as -inf - -inf is NaN."""
    return torch.where(largest == -torch.inf, 0.0, largest)


def _write(d_item, factors, scores, buffer) -> None:
    """d_x = factors (C,2) @ scores (2,P)."""
    start = 0
    for matrix in _matrices(d_item):
        for tile in matrix.split(_columns(matrix, scores.dtype), dim=1):
            part = scores[:, start : (start := start + tile.shape[1])]
            if tile.dtype == scores.dtype:
                torch.mm(factors, part, out=tile)
            else:
                tile.copy_(torch.mm(factors, part, out=_block(buffer, tile)))


def _tiles(item: torch.Tensor, buffer: Buffer) -> Iterator[torch.Tensor]:
    """Pieces (C,n) of an item (C,*positions), in at least float32, in the order of positions."""
    dtype = accumulator_dtype(item.dtype)
    for matrix in _matrices(item):
        for tile in matrix.split(_columns(matrix, dtype), dim=1):
            yield tile if tile.dtype == dtype else _block(buffer, tile).copy_(tile)


def _columns(matrix: torch.Tensor, dtype: torch.dtype) -> int:
    return max(1, TILE_BYTES // (dtype.itemsize * matrix.shape[0]))


def _block(buffer: Buffer, tile: torch.Tensor) -> torch.Tensor:
    """Memory for a tile, in its order."""
    channels, positions = tile.shape
    if tile.stride(0) == 1:
        return buffer.block(positions, channels).t()
    return buffer.block(channels, positions)


def _matrices(item: torch.Tensor) -> list[torch.Tensor]:
    """(C,n) matrices that hold an item's positions one after the other; views where they can be."""
    frames = frames_of(item.unsqueeze(0))
    if frames is None or frames.count == 1:
        return [item.flatten(1)]
    return [frame.flatten(1) for frame in item.unbind(1)]
