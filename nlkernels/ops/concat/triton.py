"""The concatenation in Triton: sums over sorted scores, and what every row takes of them.

With the keys sorted by falling score, b(1) >= b(2) >= ..., and k of them above -a, a row is

  out M = sum over t <= k of (a + b(t)) v(t) = (a + b(k)) G(k) + T(k)
  G(k)  = v(1) + ... + v(k)
  T(k)  = sum over t < k of (b(t) - b(t+1)) G(t)

Every factor of a value is positive, whatever the scores: the shorter a G(k) + sum b(t) v(t)
subtracts almost equal numbers where a and b are large and a + b is not. In the backward dv is the
same of dy sorted by a, da = dy.G(k) / M, and db = v.G'(k') / M with the G' of dy.

torch sorts (stable) and counts; then four kernels in a row:
  sums    G and T of each chunk of sorted values, which are read where they lie
  carry   G and T before each chunk
  scan    G and T of each row: a prefix sum within the chunk (tl.cumsum: a product with a triangle
          of ones would spread infinities) upon what the chunks before it carry
  gather  what a row takes of its G and T, or the dot product with its G
Launches: forward 4, backward 8, beside those of torch's sorts, counts and conversions. Sums are
float32 (dot products with float32 values: float64, in which a product is exact; GEMMs do not round
it either), each number is summed by one program in a fixed order: results are bitwise repeatable.

Memory beyond inputs and outputs, in bytes, for chunks of 64 rows:
  forward   : 8 B M V for G and T, 16 B ceil(M / 64) V for chunks, 20 B M + 8 B N for scores;
  backward  : 8 B N V, 16 B ceil(N / 64) V and 24 B (N + M) at once; or, where that is more,
              4 B M V, 16 B ceil(M / 64) V and 24 B (N + M);
and what torch's sort takes for itself. Any strides are read as they are.

A NaN in query_score makes its row NaN, one in key_score its batch item, as relu(NaN) v would be.

Unverified: no GPU has run these kernels.
"""

import torch
import triton
import triton.language as tl

from nlkernels import _launch, _tune
from nlkernels._launch import Config
from nlkernels._spec import Problem
from nlkernels.ops.concat.problem import problem as described
from nlkernels.ops.concat.triton_scan import (
    Ranked,
    offsets,
    place,
    prefix_sums,
    scan_configs,
    unit,
)


def forward(
    query_score: torch.Tensor, key_score: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """(B,N), (B,M), (B,M,V) -> (B,N,V)."""
    batch, keys, channels = value.shape
    out = value.new_empty(batch, query_score.shape[1], channels)
    if keys == 0:
        return out.zero_()
    problem = described(query_score, key_score, value)
    queries, ranked = _float(query_score), _ranked(key_score)
    active = _active(queries, ranked)
    prefixes = prefix_sums(problem, ranked, value, stairs=True)
    _gather(problem, queries, ranked, active, prefixes, keys, out=out)
    return out


def backward(
    grad: torch.Tensor, query_score: torch.Tensor, key_score: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query_score, key_score and value, in their dtypes."""
    given = query_score, key_score, value
    if any(t.numel() == 0 for t in given):
        return tuple(t.new_zeros(t.shape) for t in given)
    d_query, d_key, d_value = (t.new_empty(t.shape) for t in given)
    problem = described(*given)
    swapped = problem._replace(queries=problem.keys, keys=problem.queries)
    queries, keys = _ranked(query_score), _ranked(key_score)

    active = _active(queries.scores, keys)
    prefixes = prefix_sums(problem, keys, value, stairs=False)
    _gather(problem, queries.scores, keys, active, prefixes, problem.keys, other=grad, dots=d_query)

    del prefixes  # what the queries took from must not stay beside what the keys take from
    active = _active(keys.scores, queries)
    prefixes = prefix_sums(swapped, queries, grad, stairs=True)
    _gather(
        swapped, keys.scores, queries, active, prefixes, problem.keys,
        out=d_value, other=value, dots=d_key,
    )  # fmt: skip
    return d_query, d_key, d_value


def _float(scores: torch.Tensor) -> torch.Tensor:
    return scores.float().contiguous()


def _ranked(scores: torch.Tensor) -> Ranked:
    """NaN ranks highest."""
    scores = _float(scores)
    return Ranked(scores, *torch.sort(scores, dim=1, descending=True, stable=True))


def _active(scores: torch.Tensor, others: Ranked) -> torch.Tensor:
    """How many of the other side's scores have a positive sum with each score, or a NaN.

    A sum is positive where -other < score: those of a sum 0 are left out, rounding moves none.
    """
    return torch.searchsorted(others.levels.neg(), scores, out_int32=True)


def _gather(
    problem: Problem,
    scores: torch.Tensor,
    ranked: Ranked,
    active: torch.Tensor,
    prefixes: torch.Tensor,
    divisor: int,
    out: torch.Tensor | None = None,
    other: torch.Tensor | None = None,
    dots: torch.Tensor | None = None,
) -> None:
    """Fill out (B,rows,V), and dots (B,rows) with the products of other (B,rows,V) and G."""
    (batch, rows), ranks = scores.shape, ranked.levels.shape[1]
    channels = prefixes.shape[3]
    # What is absent is neither read nor written.
    target, factor = other if out is None else out, out if other is None else other
    results = scores if dots is None else dots
    wide = _launch.wide(prefixes[0], target, factor)

    def run(config: Config) -> None:
        parts = triton.cdiv(channels, config.columns) if dots is None else 1
        _launch.launch(
            _gather_kernel,
            (batch * triton.cdiv(rows, config.rows) * parts,),
            target,
            factor,
            results,
            scores,
            active,
            ranked.levels,
            prefixes[0],
            prefixes[-1],
            rows,
            ranks,
            channels,
            *factor.stride(),
            1 / (divisor * unit(ranks)),
            config=config,
            OUT=out is not None,
            DOTS=dots is not None,
            ROWS=config.rows,
            COLUMNS=config.columns,
            WIDE=wide,
        )

    candidates = _gather_configs(problem, _launch.architecture(scores.device))
    _tune.run_best("concat_gather", problem, scores.device, candidates, run)


def _gather_configs(problem: Problem, architecture: int) -> list[Config]:
    columns = min(128, max(16, triton.next_power_of_2(problem.value_depth)))
    return [Config(2048 // columns, columns)]


KERNELS = {"concat_scan": scan_configs, "concat_gather": _gather_configs}


@triton.jit
def _gather_kernel(
    out,
    other,
    dots,
    scores,
    active,
    levels,
    totals,
    stairs,
    rows,
    ranks,
    channels,
    other_item,
    other_row,
    other_channel,
    factor,
    OUT: tl.constexpr,
    DOTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    # A dot product goes over all channels.
    item, tile, part = place(rows, COLUMNS if DOTS else channels, ROWS, COLUMNS)
    own = tile * ROWS + tl.arange(0, ROWS)
    present = own < rows
    row = item * rows + own
    count = tl.load(active + row, mask=present, other=0)
    last = tl.maximum(count - 1, 0)
    totals += item * ranks * channels
    stairs += item * ranks * channels
    out += item * rows * channels
    other += item * other_item
    if OUT:
        weight = tl.load(scores + row, mask=present, other=0.0)
        weight += tl.load(levels + item * ranks + last)
        # Of a row without active keys the weight is not positive, or NaN and stays it.
        weight = tl.where(weight <= 0.0, 0.0, weight)
        top = tl.load(levels + item * ranks)
        weight = tl.where(top == top, weight, float("nan"))
    # A product of a 16-bit number is exact enough in float32.
    exact: tl.constexpr = tl.float64 if other.dtype.element_ty == tl.float32 else tl.float32
    products = tl.zeros([ROWS], exact)
    first = part * COLUMNS
    end = channels if DOTS else tl.minimum(first + COLUMNS, channels)
    for start in range(first, end, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = present[:, None] & (column < channels)[None, :]
        at = offsets(last, column, channels, 1, WIDE)
        total = tl.load(totals + at, mask=inside & (count > 0)[:, None], other=0.0)
        if OUT:
            stair = tl.load(stairs + at - channels, mask=inside & (count > 1)[:, None], other=0.0)
            result = (weight[:, None] * total + stair) * factor
            at = offsets(own, column, channels, 1, WIDE)
            tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)
        if DOTS:
            at = offsets(own, column, other_row, other_channel, WIDE)
            numbers = tl.load(other + at, mask=inside, other=0.0)
            products += tl.sum(total.to(exact) * numbers.to(exact), 1)
    if DOTS:
        tl.store(dots + row, (products * factor).to(dots.dtype.element_ty), mask=present)
