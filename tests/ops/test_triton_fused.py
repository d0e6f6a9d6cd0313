"""The fused softmax forward in Triton: accuracy, bounds, strides, memory, repeats."""

import contextlib
import itertools
import math
import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from nlkernels import _launch, _tune
from nlkernels._spec import Problem
from nlkernels.ops._triton_tiles import arrangement
from nlkernels.ops.softmax import reference, triton_fused, triton_fused_plan
from tests.helpers import DEVICE, SHORT, Case, assert_not_worse, runnable

ROWS = (1, 2, 15, 16, 17, 63, 65, 127, 1037)
CHANNELS = (1, 3, 16, 40, 64, 80, 128, 256, 512)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ARCHITECTURES = runnable(80, 89, 90, 120)
BOTH = runnable(80, 90)  # without and with descriptors
LAYOUTS = ("rows", "channels", "odd", "expanded", "sparse")
NAME = "softmax_fused"

# The interpreter computes with numpy, which warns where a row is meant to become NaN.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(invalid value|divide by zero|All-NaN|overflow):RuntimeWarning"
)


def place(values, layout):
    """`values` with other strides, inside memory full of NaN."""
    batch, rows, channels = values.shape
    if layout == "channels":
        return place(values.mT, "rows").mT
    if layout == "expanded":
        return place(values[:1], "rows").expand(batch, -1, -1)
    step = 2 if layout == "sparse" else 1
    start = 17 if layout == "odd" else 16
    memory = values.new_full((batch, rows + 2, 48 + step * (channels + -channels % 16)), math.nan)
    inside = memory[:, 1 : rows + 1, start : start + step * channels : step]
    return inside.copy_(values)


def operands(case, dtype, layouts=("rows",) * 3, seed=0):
    """Random query, key and value."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (case.queries, case.depth), (case.keys, case.depth), (case.keys, case.value_depth)
    return [
        place(torch.randn(case.batch, *size, generator=generator).to(DEVICE, dtype), layout)
        for size, layout in zip(sizes, layouts, strict=True)
    ]


def check(tensors, scale, **launch):
    """Run the kernel; hold out to the 2x rule, stats to the rounding of float32 sums."""
    with _launch.pretend(**launch):
        out, stats = triton_fused.forward(*tensors, scale)
    query, key, value = (t.double() for t in tensors)
    truth = reference.attention(query, key, value, scale)
    standard = reference.attention(*tensors, scale)
    if not standard.isfinite().all():  # products beyond float16
        standard = reference.attention(*(t.float() for t in tensors), scale).to(out.dtype)
    assert_not_worse("out", out, standard, truth, 2)
    products = query @ key.mT
    top = products.amax(-1) if scale >= 0 else products.amin(-1)
    depth, keys = query.shape[2], key.shape[1]
    rounding = (depth + 2) * 2**-24 * (query.abs() @ key.abs().mT).amax(-1)
    assert ((stats[0] - top).abs() <= rounding).all(), "top"
    lse = (scale * products).logsumexp(-1)
    got = scale * stats[0].double() + stats[1].double().log()
    bound = 2 * abs(scale) * rounding + (keys + 16) * 2**-24
    assert ((got - lse).abs() <= bound).all(), "total"
    return out, stats


@contextlib.contextmanager
def collected():
    """The launches, which do not happen."""
    launches = []
    with _launch.pretend(architecture=90, launcher=lambda *launch: launches.append(launch)):
        yield launches


def work(sizes, dtype, architecture, layouts):
    """Turns of the kernel's loops."""
    case = Case(2, *sizes)
    configs = triton_fused.candidates(Problem(*vars(case).values(), dtype, "cpu"), architecture)
    config = configs[-1 if "odd" in layouts else 0]
    tiles = arrangement(config, case.depth, case.value_depth, dtype)
    turns = case.batch * -(-case.queries // config.rows) * -(-case.keys // config.columns)
    return turns * tiles["VALUE_TILES"] * -(-case.depth // tiles["DEPTH"])


def cover():
    """At most 60 problems that contain most pairs of levels: each is the best of 60 drawn."""
    draw = random.Random(0)
    levels = (ROWS, ROWS, CHANNELS, CHANNELS, DTYPES, ARCHITECTURES, *(LAYOUTS[:4],) * 3)
    met, chosen = set(), []

    def pairs(levels):
        return set(itertools.combinations(enumerate(levels), 2)) - met

    for sizes in ((65, 63, 1024, 3), (17, 65, 40, 1024), (16, 17, 1024, 1024)):
        for dtype in DTYPES:
            chosen.append((Case(1, *sizes), dtype, BOTH[-1], ("rows",) * 3))
    while len(chosen) < 60:
        drawn = [tuple(map(draw.choice, levels)) for _ in range(60)]
        fast = [d for d in drawn if work(d[:4], d[4], d[5], d[6:]) <= 60]
        best = max(fast, key=lambda d: len(pairs(d)))
        met |= pairs(best)
        chosen.append((Case(2, *best[:4]), best[4], best[5], best[6:]))
    return chosen


@pytest.mark.parametrize(
    ("case", "dtype", "architecture", "layouts"),
    [
        pytest.param(
            *each,
            id=f"{each[0]}-{SHORT[each[1]]}-sm_{each[2]}-{'-'.join(each[3])}",
            marks=[pytest.mark.gate] * (number >= 24),
        )
        for number, each in enumerate(cover())
    ],
)
def test_accuracy(case, dtype, architecture, layouts):
    check(operands(case, dtype, layouts), case.depth**-0.5, architecture=architecture)


def shipped():
    """Every configuration once for each dtype and width at which an architecture has it."""
    found = {}
    for architecture, dtype in itertools.product(ARCHITECTURES, DTYPES):
        for depth, values in ((64, 16), (40, 80), (144, 192), (272, 40)):
            case = Case(1, 65, 72, depth, values)
            problem = Problem(*vars(case).values(), dtype, "cpu")
            for config in triton_fused.candidates(problem, architecture):
                tiles = arrangement(config, depth, values, dtype)
                key = (config, dtype, tiles["DEPTH"], tiles["STREAMED"])
                found.setdefault(key, (case, dtype, architecture, config))
    return list(found.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
def test_every_candidate(dtype):
    for number, (case, held, architecture, config) in enumerate(shipped()):
        if held == dtype:
            layouts = [("rows", "channels")[number >> i & 1] for i in range(3)]
            with _tune.forced({NAME: config}):
                check(operands(case, dtype, layouts), 0.2, architecture=architecture)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_candidates_are_few_and_end_with_pointers(architecture):
    for dtype, depth, values in itertools.product(DTYPES, CHANNELS, (*CHANNELS, 1024)):
        problem = Problem(2, 3136, 784, depth, values, dtype, "cpu")
        configs = triton_fused.candidates(problem, architecture)
        assert 1 <= len(configs) <= 6 and len(set(configs)) == len(configs)
        assert not configs[-1].descriptors


def test_descriptors_read_any_mixture_of_layouts_without_copies():
    case = Case(2, 80, 64, 48, 32)
    for layouts in itertools.product(("rows", "channels"), repeat=3):
        with collected() as launches:
            triton_fused.forward(*operands(case, torch.bfloat16, layouts), 1.0)
        options = launches[0][3]
        first = [options[f"{name}_FIRST"] for name in ("QUERY", "KEY", "VALUE")]
        assert options["LOADS"] in ("host", "device")
        assert first == [layout == "channels" for layout in layouts]
    check(operands(case, torch.bfloat16, ("rows", "channels", "rows")), 1.0, architecture=BOTH[-1])


@pytest.mark.parametrize("layout", ["odd", "expanded", "sparse"])
def test_other_strides_are_read_through_pointers(layout):
    tensors = operands(Case(2, 33, 20, 24, 40), torch.bfloat16, (layout,) * 3)
    with collected() as launches:
        triton_fused.forward(*tensors, 1.0)
    assert launches[0][3]["LOADS"] == "pointer"
    check(tensors, 0.3)


@pytest.mark.parametrize("architecture", BOTH)
@pytest.mark.parametrize("scale", [-0.7, 0.0, 1e-60, 1e-30, 3.0])
def test_scales_of_either_sign(scale, architecture):
    check(operands(Case(1, 20, 70, 16, 24), torch.float32), scale, architecture=architecture)
    check(operands(Case(1, 20, 400, 16, 24), torch.float32), scale, architecture=architecture)


def test_exact_tiles_have_no_masks():
    with collected() as launches:
        triton_fused.forward(*operands(Case(8, 784, 3136, 256, 256), torch.bfloat16), 1.0)
    assert all(launches[0][3][f"EVEN_{name}"] for name in ("KEYS", "DEPTH", "VALUES"))


@pytest.mark.parametrize("scale", [0.25, -0.25, 0.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
def test_split_keys(dtype, scale, monkeypatch):
    tensors = operands(Case(2, 33, 700, 24, 40), dtype)
    out, stats = check(tensors, scale)
    again = triton_fused.forward(*tensors, scale)
    assert torch.equal(out, again[0]) and torch.equal(stats, again[1])
    whole = lambda config, batch, queries, keys, *_: (1, -(-keys // config.columns))  # noqa: E731
    monkeypatch.setattr(triton_fused, "split", whole)
    check(tensors, scale)


def test_splits_depend_on_sizes_alone_and_respect_the_cap():
    config = _launch.Config(64, 64)
    for batch, queries, keys, values in itertools.product(
        (1, 3, 40), ROWS, (1, 500, 10**6), (1, 1024)
    ):
        programs = batch * -(-queries // 64)
        splits, tiles = triton_fused_plan.split(config, batch, queries, keys, values, programs, 132)
        total = -(-keys // 64)
        assert splits == 1 or programs < 0.8 * 132
        assert (splits - 1) * tiles < total <= splits * tiles, "no split is empty, none too large"
        if splits > 1:
            assert 4 * splits * batch * queries * (values + 2) <= 40 * 2**20


class Allocations(TorchDispatchMode):
    """Bytes of the tensors that are made."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if "empty" in str(function) or "zeros" in str(function) or "clone" in str(function):
            self.bytes += result.nbytes
        return result


@pytest.mark.parametrize("case", [Case(1, 65, 63, 16, 24), Case(2, 33, 700, 24, 40)], ids=str)
def test_memory(case):
    for layout in ("rows", "channels", "odd"):
        tensors = operands(case, torch.bfloat16, (layout,) * 3)
        with collected() as launches, Allocations() as made:
            out, stats = triton_fused.forward(*tensors, 1.0)
        parts = 0
        if len(launches) == 2:
            splits = launches[0][2][3].shape[0]
            parts = 4 * splits * case.batch * case.queries * (case.value_depth + 2)
        assert made.bytes == out.nbytes + stats.nbytes + parts
        assert len(launches) == 1 + (case.keys == 700)


@pytest.mark.parametrize("layouts", [("rows",) * 3, ("odd", "channels", "sparse")])
def test_wide_offsets_change_nothing(layouts):
    for case in (Case(2, 65, 63, 40, 24), Case(2, 17, 200, 24, 40)):
        tensors = operands(case, torch.bfloat16, layouts)
        results = []
        for wide in (False, True):
            with _launch.pretend(architecture=80, wide=wide):
                results.append(triton_fused.forward(*tensors, 0.5))
        for narrow, wide in zip(*results, strict=True):
            assert torch.equal(narrow, wide)


@pytest.mark.parametrize("architecture", BOTH)
def test_repeats_are_bitwise_equal(architecture):
    tensors = operands(Case(2, 65, 130, 80, 40), torch.float16)
    with _launch.pretend(architecture=architecture):
        first, *others = [triton_fused.forward(*tensors, 0.5) for _ in range(3)]
    for other in others:
        assert all(map(torch.equal, first, other))


@pytest.mark.parametrize("architecture", BOTH)
def test_writes_its_rows_only(architecture):
    case = Case(2, 33, 40, 24, 40)
    with _launch.pretend(architecture, launcher=lambda *launch: launches.append(launch)):
        launches = []
        out, stats = triton_fused.forward(*operands(case, torch.float32), 0.5)
    ((kernel, grid, arguments, options),) = launches
    memory = [t.new_full((t.numel() + 2048,), 7.0) for t in (out, stats)]
    inside = [m[1024:-1024].view(t.shape) for m, t in zip(memory, (out, stats), strict=True)]
    kernel[grid](*arguments[:3], *inside, *arguments[5:], **options)
    for guarded, written in zip(memory, inside, strict=True):
        assert (guarded[:1024] == 7).all() and (guarded[-1024:] == 7).all()
        assert not (written == 7).any()


@pytest.mark.parametrize("keys", [70, 700])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_query_stays_in_its_row(bad, keys):
    tensors = operands(Case(1, 20, keys, 16, 24), torch.float32)
    clean = triton_fused.forward(*tensors, 0.5)[0]
    tensors[0][0, 7, 3] = bad
    out = triton_fused.forward(*tensors, 0.5)[0]
    others = torch.arange(20) != 7
    assert out[0, 7].isnan().all()
    assert torch.equal(out[0, others], clean[0, others])


@pytest.mark.parametrize("scale", [1.0, -1.0])
@pytest.mark.parametrize("keys", [200, 700])
def test_infinite_products(keys, scale):
    query, key, value = operands(Case(1, 3, keys, 16, 24), torch.float32)
    query.copy_(torch.tensor([1.0, -1.0, 0.5])[:, None]).mul_(scale)
    key[:, :, 1:] = 0
    key[:, :140, 0] = -math.inf
    out, _ = triton_fused.forward(query, key, value, scale)
    truth = reference.attention(*(t.double() for t in (query, key, value)), scale)
    assert torch.equal(out.isnan(), truth.isnan())
    torch.testing.assert_close(out.double(), truth, equal_nan=True, atol=1e-5, rtol=1e-5)
    key[:, :, 0] = -math.inf
    out, _ = triton_fused.forward(query, key, value, scale)
    assert out.isnan().all()


@pytest.mark.parametrize("scale", [1.0, -1.0, 0.0])
def test_extreme_values(scale):
    half = operands(Case(1, 17, 70, 16, 24), torch.float16)
    for tensor in half[:2]:
        tensor.copy_(torch.where(tensor > 0, 1e4, -1e4))
    check(half, scale)
    for dtype in (torch.float32, torch.bfloat16):
        query, key, value = operands(Case(1, 17, 300, 16, 24), dtype)
        query.zero_()[..., 0] = 1e19
        key.zero_()[..., 0] = torch.where(torch.arange(300) % 7 == 0, 3e19, -3e19)
        value.fill_(3e38)
        out, stats = triton_fused.forward(query, key, value, scale)
        torch.testing.assert_close(out, torch.full_like(out, 3e38))
        assert stats.isfinite().all()


def test_equal_products_weigh_the_same():
    query, key, value = operands(Case(1, 5, 700, 16, 24), torch.float32)
    key.copy_(key[:, :1].clone())
    query.mul_(1e6)
    check([query, key, value], 1e3)


def test_empty():
    for batch, queries in ((0, 5), (2, 0)):
        sizes = (batch, queries, 4), (batch, 3, 4), (batch, 3, 6)
        out, stats = triton_fused.forward(*(torch.ones(size, device=DEVICE) for size in sizes), 1.0)
        assert out.shape == (batch, queries, 6) and stats.shape == (2, batch, queries)
