"""The concatenation in plain PyTorch: exact, and linear in N and M but for sorting the scores.

A query sees the keys whose threshold, -key_score, its score a exceeds. With the thresholds in
order, t_1 <= t_2 <= ..., the values v in that order, and k the number of keys that a query sees,

  G_k = v_1 + ... + v_k,    T_k = sum_{j<k} (t_(j+1) - t_j) G_j,
  out = [(a - t_k) G_k + T_k] / M,    d_query_score = grad . G_k / M

Every factor is a difference of neighbours, none is negative: nothing large cancels, however far the
scores lie from zero. The gradients of keys climb the same stairs from the largest threshold down.
With A_j the sum of grad over the queries that see key j, and F_j those of them that see none above,

  S_j = S_(j+1) + (t_(j+1) - t_j) A_(j+1) + sum_{F_j} (a - t_j) grad,
  d_key_score = A_j . v_j / M,    d_value = S_j / M

G, T, A and S are tables with a row for each key. They are summed in blocks of sqrt(M) rows, over
the blocks in float64; the queries of F_j in groups of at most 32. torch's embedding bag adds up
weighted rows of a table in one pass: G_k and T_k for a query, the queries of a group for a key.

Scores that are NaN or infinite rank with the largest finite ones of their sign, NaN as positive.
They make NaN or Inf of what the definition does: for a query its row of out and its batch item's
d_value, for a key its batch item's out and its own row of d_value.

Where an item's values or gradients are so large that sums of M or N of them might overflow though
their means do not, its tables hold them in a unit, a power of two. In it, numbers that are smaller
than the item's largest by the dtype's range fade.

Only query_score, key_score and value are kept for the backward.

Memory beyond inputs and outputs, E bytes an element, A = max(E, 4), R = M + 2 + ceil(N / 32):
  forward  : 2 B (M + 1) V A for two tables, 12 B V (sqrt(M + 1) + 2) for their blocks, M V E for
             one batch item;
  backward : 2 B R V A for two tables, 12 B V (sqrt(R) + 2) for their blocks, R V A for one batch
             item; also N V A for one batch item where grad is in 16 bits or its rows are not
             contiguous;
  either   : at most 160 bytes for every query and key, and a tile of max(2^19, V) A.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from nlkernels.ops._tiles import Buffer, accumulator_dtype

# Numbers in a tile of rows that are dotted with grad or rounded to 16 bits.
TILE = 2**19
# Queries that are added up one after another, before sums of sums.
GROUP = 32


def forward(
    query_score: torch.Tensor, key_score: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """Return out (B,N,V)."""
    batch, keys, depth = value.shape
    queries = query_score.shape[1]
    if batch == 0 or queries == 0 or keys == 0:
        return value.new_zeros(batch, queries, depth)
    stairs = _Stairs(query_score, key_score)
    wide = stairs.height.dtype
    sums, steps = tables = torch.empty(2, batch, keys + 1, depth, dtype=wide, device=value.device)
    highest = stairs.query_score + stairs.key_score.amax(1, keepdim=True)
    unit = _unit(keys, _largest(value).to(wide), highest.amax(1))
    stairs.sum_values(value, unit, sums)
    steps[:, :2] = 0
    torch.mul(sums[:, 1:keys], stairs.gaps[:, :-1].unsqueeze(2), out=steps[:, 2:])
    _accumulate(steps)
    # A query's row is G_k times its height above t_k, plus T_k.
    height = torch.where(highest < math.inf, stairs.height, highest)
    factors = torch.stack([height, torch.ones_like(height)], dim=2)
    factors = factors.div_((keys * unit)[:, None, None]).flatten(0, 1)
    first = torch.arange(batch, device=value.device).mul_(keys + 1).unsqueeze(1) + stairs.seen
    places = torch.stack([first, first + batch * (keys + 1)], dim=2).flatten(0, 1)
    table = tables.flatten(0, 2)
    if value.dtype == wide:
        out = F.embedding_bag(places, table, mode="sum", per_sample_weights=factors)
        return out.view(batch, queries, depth)
    out = value.new_empty(batch * queries, depth)
    for part in _parts(batch * queries, depth):
        weights = factors[part]
        out[part] = F.embedding_bag(places[part], table, mode="sum", per_sample_weights=weights)
    return out.view(batch, queries, depth)


def backward(
    grad: torch.Tensor, query_score: torch.Tensor, key_score: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query_score, key_score and value, in their dtypes."""
    operands = (query_score, key_score, value)
    d_query, d_key, d_value = (t.new_empty(t.shape) for t in operands)
    batch, keys, depth = value.shape
    queries = query_score.shape[1]
    if batch == 0 or queries == 0 or keys == 0:
        return d_query.zero_(), d_key.zero_(), d_value.zero_()
    stairs = _Stairs(query_score, key_score)
    wide = stairs.height.dtype
    largest, largest_grad = (_largest(t).to(wide) for t in (value, grad))
    unit = _unit(keys, largest, largest_grad * depth)
    divisor = keys * unit
    tile = Buffer(wide, value.device)
    sums = torch.empty(batch, keys + 1, depth, dtype=wide, device=value.device)
    stairs.sum_values(value, unit, sums)
    for item in range(batch):
        _dot(d_query[item], sums[item], stairs.seen[item], grad[item], divisor[item], tile)
    del sums
    unit = _unit(max(queries, keys), largest_grad, largest * depth)
    divisor = keys * unit
    order, starts, firsts = stairs.groups()
    height = stairs.height.gather(1, order).div_(keys)
    units = unit.unsqueeze(1).expand_as(height).contiguous()
    seers, steps = torch.empty(2, *starts.shape, depth, dtype=wide, device=value.device)
    for item in range(batch):
        rows = grad[item].to(wide, memory_format=torch.contiguous_format).contiguous()
        groups = (order[item], rows, starts[item])
        seers[item] = F.embedding_bag(*groups, mode="sum", per_sample_weights=units[item])
        steps[item] = F.embedding_bag(*groups, mode="sum", per_sample_weights=height[item])
    _accumulate(seers)
    # What the scores make Inf or NaN for a key, they make so for all keys of lower thresholds.
    highest = stairs.key_score + stairs.query_score.amax(1, keepdim=True)
    highest = highest.gather(1, stairs.order)
    gaps = (stairs.gaps / divisor.unsqueeze(1)).clamp_(max=torch.finfo(wide).max)
    gaps = torch.where(highest < math.inf, gaps, highest).flip(1)
    gaps = gaps.new_zeros(starts.shape).scatter_(1, firsts[:, :-1], gaps)
    steps[:, 1:].addcmul_(seers[:, :-1], gaps[:, 1:].unsqueeze(2))
    _accumulate(steps)
    places = torch.empty_like(stairs.order)
    places.scatter_(1, stairs.order, (firsts[:, 1:] - 1).flip(1))
    for item in range(batch):
        _dot(d_key[item], seers[item], places[item], value[item], divisor[item], tile)
        _pick(steps[item], places[item], d_value[item])
    return d_query, d_key, d_value


class _Stairs:
    """The scores of one call in order: thresholds, and who exceeds them.

    Attributes:
        query_score, key_score: (B,N), (B,M), in at least float32.
        order: (B,M), keys by their thresholds.
        thresholds: (B,M), in that order.
        gaps: (B,M), from each threshold to the next, 0 for the last.
        seen: (B,N), number of keys that each query sees.
        height: (B,N), of each query above the last threshold it exceeds, 0 where there is none.
    """

    def __init__(self, query_score: torch.Tensor, key_score: torch.Tensor) -> None:
        wide = accumulator_dtype(query_score.dtype)
        self.query_score = query_score.to(wide).contiguous()
        self.key_score = key_score.to(wide).contiguous()
        most = torch.finfo(wide).max
        self._scores = self.query_score.nan_to_num(nan=most)
        negative = self.key_score.nan_to_num(nan=most).neg_()
        self.thresholds, self.order = negative.sort(dim=1, stable=True)
        self.gaps = F.pad(self.thresholds.diff(dim=1).clamp_(max=most), (0, 1))
        self.seen = torch.searchsorted(self.thresholds, self._scores)
        last = self.thresholds.gather(1, (self.seen - 1).clamp_(min=0))
        self.height = (self._scores - last).clamp_(min=0)

    def sum_values(self, value: torch.Tensor, unit: torch.Tensor, table: torch.Tensor) -> None:
        """Fill (B,M+1,V): row k is the sum of the k values of the lowest thresholds, times unit."""
        table[:, 0] = 0
        for rows, item, order, factor in zip(table, value, self.order, unit, strict=True):
            _pick(item, order, rows[1:])
            rows.mul_(factor)
        _accumulate(table)

    def groups(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries in order of their scores, from the highest down, cut into short groups.

        Returns:
            order: (B,N).
            starts: (B,rows), where in that order each group starts. All queries of a group see the
                same keys; the first group is empty.
            firsts: (B,M+1), the first group whose queries see each key and none above, from the
                highest threshold down, and the first whose queries see none.
        """
        queries = self._scores.shape[1]
        negative, order = self._scores.neg().sort(dim=1, stable=True)
        ends = torch.searchsorted(negative, self.thresholds.flip(1).neg_())
        begins = F.pad(ends, (1, 0))
        marks = torch.arange(0, queries, GROUP, device=ends.device).expand(len(ends), -1)
        starts = torch.cat([begins, marks], dim=1).sort(dim=1).values
        keys_before = torch.arange(1, begins.shape[1] + 1, device=ends.device)
        firsts = (begins + (GROUP - 1)).div_(GROUP, rounding_mode="floor").add_(keys_before)
        return order, F.pad(starts, (1, 0)), firsts


def _largest(rows: torch.Tensor) -> torch.Tensor:
    """(B,): the largest magnitude of every batch item, NaN where it holds one."""
    lowest, highest = zip(*(item.aminmax() for item in rows), strict=True)
    return torch.maximum(torch.stack(highest), -torch.stack(lowest))


def _unit(terms: int, largest: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """(B,): 1 where sums of so many terms, also times factor, stay finite; else a power of two.

    In that sums stay below twice the largest term. It is chosen on the device: nothing waits.
    """
    safe = largest * factor.clamp(min=1) <= torch.finfo(largest.dtype).max / (2 * terms)
    return torch.where(safe, largest.new_ones(()), 2.0 ** (1 - terms.bit_length()))


def _pick(rows: torch.Tensor, places: torch.Tensor, out: torch.Tensor) -> None:
    """out[i] = rows[places[i]], in the dtype of out."""
    if rows.dtype == out.dtype:
        torch.index_select(rows, 0, places, out=out)
    else:
        out.copy_(rows.index_select(0, places))


def _accumulate(table: torch.Tensor) -> None:
    """Add to each row of (B, rows, V) all rows before it, in place.

    Torch's own sums along a dimension are slower on CPUs and not repeatable on GPUs.
    """
    size = math.isqrt(table.shape[1])
    whole = table.shape[1] // size * size
    blocks, rest = table[:, :whole].unflatten(1, (-1, size)), table[:, whole:]
    for part in (blocks, rest.unsqueeze(1)):
        for row in range(1, part.shape[2]):
            part[:, :, row].add_(part[:, :, row - 1])
    sums = blocks[:, :, -1].to(torch.float64, copy=True)
    for block in range(1, sums.shape[1]):
        sums[:, block].add_(sums[:, block - 1])
    sums = sums.to(table.dtype).unsqueeze(2)
    blocks[:, 1:].add_(sums[:, :-1])
    rest.add_(sums[:, -1])


def _dot(
    out: torch.Tensor,
    table: torch.Tensor,
    places: torch.Tensor,
    rows: torch.Tensor,
    divisor: torch.Tensor,
    tile: Buffer,
) -> None:
    """out[i] = table[places[i]] . rows[i] / divisor, a tile of rows at a time."""
    for part in _parts(*rows.shape):
        picked = tile.block(*rows[part].shape)
        torch.index_select(table, 0, places[part], out=picked)
        out[part] = picked.mul_(rows[part]).sum(dim=1).div_(divisor)


def _parts(rows: int, depth: int) -> Iterator[slice]:
    """Slices of a tile's rows."""
    step = max(1, TILE // depth)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))
