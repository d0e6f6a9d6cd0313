"""Products of two features summed over all positions: the gradients of a pointwise weight.

outer[p,q] = sum_b,n left[b,n,p] right[b,n,q];  sums[p] = sum_b,n left[b,n,p], in float32

Positions are shared out among programs, in equal runs of tiles whose number depends on sizes
alone; a second kernel adds the runs in a fixed order. Every number is summed by one program: no
atomics. Sums of left come from the tiles that are multiplied: left is not read again for them.

Memory beyond inputs and outputs: 4 S P (Q + 1) for S runs, none for one run. There is a run for
each tile of positions, but at most 128 over the tiles of the result, so that this is no more than
128 tiles with their sums: 8.1 MiB, 16.1 MiB where the widest tiles were measured to be faster.

Unverified: no GPU has run these kernels.
"""

import torch
import triton
import triton.language as tl

from nlkernels import _launch, _tune
from nlkernels._launch import Config
from nlkernels.ops import _triton_tiles as tile
from nlkernels.ops._triton_tiles import operand
from nlkernels.ops.pointwise.problem import PointwiseProblem

# About one program for each of the largest GPUs' multiprocessors: what they write is read again.
PROGRAMS = 128
# The kernel that adds runs: so many of them at a time, by so many numbers.
_COMBINED = Config(16, 128, warps=4, stages=1)


def outer(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(B,N,P), (B,N,Q) -> outer (P,Q) and sums (P,), in float32."""
    batch, positions, rows = left.shape
    columns, device = right.shape[2], left.device
    products = left.new_empty(rows, columns, dtype=torch.float32)
    sums = left.new_empty(rows, dtype=torch.float32)
    if batch * positions == 0:
        return products.zero_(), sums.zero_()
    problem = PointwiseProblem.of(right, columns, rows)

    def run(config: Config) -> None:
        tiles = triton.cdiv(rows, config.rows) * triton.cdiv(columns, config.columns)
        steps = batch * triton.cdiv(positions, config.depth)
        per_run = triton.cdiv(steps, max(1, min(steps, PROGRAMS // max(1, tiles))))
        runs = triton.cdiv(steps, per_run)
        whole = rows * (columns + 1)
        parts = left.new_empty(runs if runs > 1 else 0, whole, dtype=torch.float32)
        # One run is the result itself.
        into = (products, sums) if runs == 1 else (parts, parts[:, rows * columns :])
        a, b = (
            operand(tensor, config.depth, size, config)
            for tensor, size in ((left, config.rows), (right, config.columns))
        )
        _launch.launch(
            _outer_kernel,
            (tiles * runs,),
            a.source,
            b.source,
            *into,
            *a.strides,
            *b.strides,
            positions,
            rows,
            columns,
            steps,
            per_run,
            whole,
            config=config,
            LEFT=a.layout,
            RIGHT=b.layout,
            ROWS=config.rows,
            COLUMNS=config.columns,
            DEPTH=config.depth,
            WIDE=_launch.wide(left[:1], right[:1]),
            PRECISION=_launch.precision(left.dtype),
        )
        if runs > 1:
            add_runs(parts, products, sums)

    shipped = suited(candidates(problem, _launch.architecture(device)), left, right)
    _tune.run_best("pointwise_outer", problem, device, shipped, run)
    return products, sums


def add_runs(parts: torch.Tensor, products: torch.Tensor, sums: torch.Tensor) -> None:
    """Add the rows of parts into products and, behind these in every row, sums; all contiguous."""
    runs, whole = parts.shape
    rows = sums.shape[0]
    _launch.launch(
        _outer_combine,
        (triton.cdiv(whole, _COMBINED.columns),),
        parts,
        products,
        sums,
        rows,
        whole // rows - 1,
        runs,
        config=_COMBINED,
        RUNS=_COMBINED.rows,
        NUMBERS=_COMBINED.columns,
    )


def candidates(problem: PointwiseProblem, architecture: int) -> list[Config]:
    """Channels of left and of right of a tile, and positions of a step; as of a product."""
    hopper, few = has_much_shared(architecture), problem.channels <= 64
    if problem.dtype == torch.float32:
        wide = [Config(64, 128, 32, warps=8, stages=3, descriptors=True)]
        return wide * hopper + [Config(64, 64, 32, warps=8, stages=3)]
    if few:
        best = Config(64, 128, 64, stages=4, descriptors=True)
        return [best if hopper else Config(64, 128, 32, stages=3), Config(64, 64, 32, stages=3)]
    if not hopper:
        return [Config(128, 128, 32, warps=8, stages=3), Config(64, 128, 32, warps=8, stages=3)]
    return [
        Config(128, 128, 64, warps=8, stages=4, descriptors=True),
        Config(128, 256, 64, warps=8, stages=3, descriptors=True),
        Config(64, 128, 32, warps=8, stages=3),
    ]


def suited(configs: list[Config], *operands: torch.Tensor) -> list[Config]:
    """The configurations for these operands, the last one for those of any strides.

    Numbers that are not read 16 bytes at a time have addresses of their own: these, and the sums of
    a large tile, are more than a thread's registers hold.
    """
    described = not any(_launch.undescribable(t) and _launch.undescribable(t, 1) for t in operands)
    return configs[:-1] or configs if described else configs[-1:]


def has_much_shared(architecture: int) -> bool:
    """Whether programs may use more than 200 KB of shared memory: Hopper's tiles fit."""
    return _launch.SHARED_MEMORY.get(architecture, 0) > 200_000


@triton.jit(do_not_specialize=["steps", "per_run"])
def _outer_kernel(
    left,
    right,
    outer,
    sums,
    left_item,
    left_row,
    left_channel,
    right_item,
    right_row,
    right_channel,
    positions,
    rows,
    columns,
    steps,
    per_run,
    whole,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """ROWS by COLUMNS of the sums of one run. Results and parts are below 2**31 numbers."""
    # Programs that read the same positions are neighbours.
    program = tl.program_id(0)
    row = program % tl.cdiv(rows, ROWS) * ROWS
    program = program // tl.cdiv(rows, ROWS)
    column = program % tl.cdiv(columns, COLUMNS) * COLUMNS
    run = program // tl.cdiv(columns, COLUMNS)
    per_item = tl.cdiv(positions, DEPTH)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    added = tl.zeros([ROWS, DEPTH], tl.float32)
    for step in tl.range(run * per_run, tl.minimum(steps, (run + 1) * per_run)):
        item = step // per_item
        position = step % per_item * DEPTH
        a = tile.load(
            left, LEFT, item, position, row, positions, rows,
            left_item, left_row, left_channel, DEPTH, ROWS, WIDE,
        )  # fmt: skip
        b = tile.load(
            right, RIGHT, item, position, column, positions, columns,
            right_item, right_row, right_channel, DEPTH, COLUMNS, WIDE,
        )  # fmt: skip
        a = a.trans()
        total = tl.dot(a, b, total, input_precision=PRECISION)
        added += a.to(tl.float32)
    own = row + tl.arange(0, ROWS)
    column += tl.arange(0, COLUMNS)
    tl.store(
        outer + run * whole + own[:, None] * columns + column[None, :],
        total,
        mask=(own < rows)[:, None] & (column < columns)[None, :],
    )
    first = program % tl.cdiv(columns, COLUMNS) == 0
    tl.store(sums + run * whole + own, tl.sum(added, 1), mask=(own < rows) & first)


@triton.jit(do_not_specialize=["runs"])
def _outer_combine(
    parts,
    outer,
    sums,
    rows,
    columns,
    runs,
    RUNS: tl.constexpr,
    NUMBERS: tl.constexpr,
):
    """NUMBERS of all runs, RUNS of them at a time."""
    products = rows * columns
    number = tl.program_id(0) * NUMBERS + tl.arange(0, NUMBERS)
    inside = number < products + rows
    added = tl.zeros([NUMBERS, RUNS], tl.float32)
    for start in range(0, runs, RUNS):
        run = start + tl.arange(0, RUNS)
        added += tl.load(
            parts + run[None, :] * (products + rows) + number[:, None],
            mask=(run < runs)[None, :] & inside[:, None],
            other=0.0,
        )
    total = tl.sum(added, 1)
    tl.store(outer + number, total, mask=number < products)
    tl.store(sums + number - products, total, mask=inside & (number >= products))
