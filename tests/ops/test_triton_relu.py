"""The Triton kernels of kinds without a softmax: accuracy, layouts, tiles, memory, promises."""

import itertools
import math
import random

import pytest
import torch

pytest.importorskip("triton")

from nlkernels import _launch, _tune
from nlkernels._spec import Problem
from nlkernels.ops import _triton_quadratic, _triton_units
from nlkernels.ops.dot_product import reference as dot_product_reference
from nlkernels.ops.dot_product import triton as dot_product_triton
from nlkernels.ops.relu import reference as relu_reference
from nlkernels.ops.relu import triton as relu_triton
from tests.helpers import SHORT, Case, assert_not_worse, results, runnable
from tests.ops import staged

# Numpy, with which the interpreter computes, warns where an element is meant to become NaN.
pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning"),
]

MODULES = {
    "relu": (relu_triton, relu_reference),
    "dot_product": (dot_product_triton, dot_product_reference),
}
kinds = pytest.mark.parametrize("kind", MODULES)
# Both share their kernels, of which one leaves out a step.
relu_first = pytest.mark.parametrize(
    "kind", ["relu", pytest.param("dot_product", marks=pytest.mark.gate)]
)
dtypes = pytest.mark.parametrize("dtype", staged.DTYPES, ids=SHORT.get)
# The fused and the staged forward; the backward is the same. Half of them are long tests.
FUSED, STAGED = 24, 264
SHORT_ONES = [(torch.float32, FUSED), (torch.float16, STAGED), (torch.bfloat16, FUSED)]
forms = pytest.mark.parametrize(
    ("dtype", "value_depth"),
    [
        pytest.param(
            *each,
            id=f"{SHORT[each[0]]}-{'fused' if each[1] == FUSED else 'staged'}",
            marks=[pytest.mark.gate] * (each not in SHORT_ONES),
        )
        for each in itertools.product(staged.DTYPES, (FUSED, STAGED))
    ],
)
BOTH = runnable(80, 90)  # without and with descriptors


def run(kind, tensors, scale, workspace_mib=None):
    """Output and gradients of the kernels."""
    (*qkv, grad), module = tensors, MODULES[kind][0]
    found = module.forward(*qkv, scale, workspace_mib)
    out, *state = found if kind == "dot_product" else (found,)
    assert all(each.numel() == 0 for each in state)
    grads = module.backward(grad, *qkv, *state, scale, workspace_mib)
    return dict(zip(staged.NAMES, (out, *grads), strict=True))


def check(kind, tensors, scale, workspace_mib=None):
    """Hold output and gradients to the 2x/3x rule."""
    got = run(kind, tensors, scale, workspace_mib)
    define = lambda *t: MODULES[kind][1].attention(*t, scale)  # noqa: E731
    same, truth = results(define, tensors), results(define, [t.double() for t in tensors])
    for name, result in got.items():
        assert_not_worse(name, result, same[name], truth[name], 2 if name == "out" else 3)
    for name, operand in zip(staged.NAMES[1:], tensors, strict=False):
        assert got[name].stride() == torch.empty_like(operand).stride()
    assert got["out"].is_contiguous()
    return got


def cover():
    """Parameters of a test: problems in which any two sizes, dtypes, workspaces and so on meet."""
    levels = (
        staged.POSITIONS, staged.POSITIONS, staged.CHANNELS, staged.CHANNELS, staged.DTYPES,
        tuple(MODULES), (None, 0), tuple(BOTH),
    )  # fmt: skip
    found = []
    for number, row in enumerate(staged.pairwise(*levels)):
        queries, keys, depth, value_depth, *options = row
        case = Case(min(2, -(-2048 // max(queries, keys))), queries, keys, depth, value_depth)
        work = queries * keys * (depth + value_depth)
        name = f"{options[1]}-{case}-{SHORT[options[0]]}-ws{options[2]}-sm_{options[3]}"
        long = number % 5 or work > 2**17
        marks = [pytest.mark.gate] * bool(long)
        found.append(pytest.param(case, *options, id=name, marks=marks))
    return found


@pytest.mark.parametrize(("case", "dtype", "kind", "workspace_mib", "architecture"), cover())
def test_not_worse_than_pytorch(case, dtype, kind, workspace_mib, architecture, device):
    with _launch.pretend(architecture=architecture):
        check(kind, staged.made(case, dtype, device), case.depth**-0.5, workspace_mib)


@pytest.mark.gate
@kinds
@dtypes
@pytest.mark.parametrize("architecture", BOTH)
@pytest.mark.parametrize("value_depth", [72, 136, 264])
def test_every_shipped_candidate(value_depth, architecture, dtype, kind, device):
    tensors = staged.made(Case(1, 70, 65, 40, value_depth), dtype, device)
    with _launch.pretend(architecture=architecture):
        for name, candidates in MODULES[kind][0].KERNELS.items():
            found = candidates(Problem.of(*tensors[:3]), architecture)
            assert 1 <= len(found) <= 6 and not found[-1].descriptors
            for config in found:
                for workspace_mib in {None, 0} if name == "quadratic_fused" else {None}:
                    with _tune.forced({name: config}):
                        check(kind, tensors, 0.1, workspace_mib)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=SHORT.get)
def test_architectures_share_the_tested_candidates(dtype):
    for depth in (16, 128, 256, 512):
        problem = Problem(1, 150, 270, depth, 136, dtype, "cuda")
        for candidates in _triton_quadratic.CANDIDATES.values():
            for architecture in (86, 89, 120):
                assert candidates(problem, architecture) == candidates(problem, 80)
            assert candidates(problem, 100) == candidates(problem, 90)


@forms
@pytest.mark.parametrize("workspace_mib", [0.01, pytest.param(0.1, marks=pytest.mark.gate)])
def test_several_tiles(workspace_mib, dtype, value_depth, device):
    check("relu", staged.made(Case(3, 40, 70, 24, value_depth), dtype, device), 0.3, workspace_mib)


@forms
@pytest.mark.parametrize("layout", staged.LAYOUTS)
def test_any_strides(layout, dtype, value_depth, device):
    tensors = staged.made(Case(2, 24, 40, 16, value_depth), dtype, device)
    check("relu", [staged.LAYOUTS[layout](t) for t in tensors], 0.2)


@kinds
def test_layouts_mix_and_expand(kind, device):
    query, key, value, grad = staged.made(Case(2, 24, 40, 16, 24), torch.bfloat16, device)
    channel_first = staged.LAYOUTS["channel_first"]
    check(kind, [channel_first(query), key[:1].expand(2, -1, -1), value, grad], 0.2)
    check(kind, [query, key, channel_first(value), grad[:1, :1, :1].expand_as(grad)], 0.2)


@relu_first
@dtypes
@pytest.mark.parametrize("scale", [0.0, -0.3, 2.0, 1e-30])
def test_any_scale(scale, dtype, kind, device):
    got = check(kind, staged.made(Case(1, 20, 40, 16, 24), dtype, device), scale)
    if scale == 0:
        assert not got["d_query"].any() and not got["d_key"].any()


def extreme(name, tensors):
    query, key, value, grad = tensors
    tiny, largest = torch.finfo(query.dtype).smallest_normal, torch.finfo(query.dtype).max
    if name == "large":
        query, key = query.sign() * 1e4, key.sign() * 1e4
    elif name == "one_huge_logit":
        query[0, 3], key[0, 5] = 50.0, 50.0
    elif name == "denormal":
        query, value = query.sign() * tiny / 4, value.sign() * tiny / 4
    elif name == "large_values":
        value = value.sign() * 6e4
    elif name == "largest_values":
        query, key, value = query.abs().clamp(0.5, 1), key.abs().clamp(0.5, 1), value * 0 + largest
        query, key = query / 8, key / 4
    elif name == "zeros":
        query.zero_(), value.zero_()
    return [query, key, value, grad]


def magnitudes(kind, tensors):
    """Sums of the magnitudes of what output and gradients add up."""
    query, key, value, grad = tensors
    scores, d_scores = query @ key.mT / key.shape[1], grad @ value.mT / key.shape[1]
    if kind == "relu":
        scores, d_scores = scores.relu(), d_scores * (scores > 0)
    scores, d_scores = scores.abs(), d_scores.abs()
    return {
        "out": scores @ value.abs(),
        "d_query": d_scores @ key.abs(),
        "d_key": d_scores.mT @ query.abs(),
        "d_value": scores.mT @ grad.abs(),
    }


@forms
@pytest.mark.parametrize(
    "name", ["large", "one_huge_logit", "denormal", "large_values", "largest_values", "zeros"]
)
@relu_first
def test_extreme_values_stay_finite_and_right(kind, name, dtype, value_depth, device):
    tensors = extreme(name, staged.made(Case(1, 24, 40, 32, value_depth), dtype, device))
    define = lambda *t: MODULES[kind][1].attention(*t, 1.0)  # noqa: E731
    truth, same = results(define, [t.double() for t in tensors]), results(define, tensors)
    limits = magnitudes(kind, [t.double() for t in tensors])
    for key, got in run(kind, tensors, 1.0).items():
        if name == "largest_values" and key != "out" and dtype != torch.float16:
            continue  # sums of products that overflow float32
        # Of one rounding of each weight.
        limit = torch.finfo(dtype).eps * limits[key] + torch.finfo(dtype).smallest_normal / 1024
        keep = truth[key].abs() + limit <= torch.finfo(dtype).max
        assert bool((got.isfinite() | ~keep).all()), f"{key} is not finite"
        if dtype == torch.float16:  # PyTorch's own overflows
            error = (got.double() - truth[key]).abs()
            assert bool((error <= limit)[keep].all()), f"{key} is wrong"
            continue
        factor = 2 if key == "out" else 3
        assert_not_worse(key, got[keep], same[key][keep], truth[key][keep], factor)


@kinds
def test_float16_keeps_rows_of_very_different_size(kind, device):
    tensors = staged.made(Case(1, 40, 70, 32, 24), torch.float16, device)
    sizes = torch.logspace(-3, 3, 40, dtype=torch.float16, device=device)[None, :, None]
    query, key, value, grad = tensors
    for row in (0, 20, 39):
        moved = [query * sizes, key, value, grad]
        out = run(kind, moved, 0.2)["out"][:, row]
        truth = MODULES[kind][1].attention(*(t.double() for t in moved[:3]), 0.2)[:, row]
        error = (out.double() - truth).abs().max() / truth.abs().max()
        assert error < 2 * torch.finfo(torch.float16).eps


@pytest.mark.parametrize("factor", [1.0, 1e-3, -7.0])
@pytest.mark.parametrize("rows", [1, 33, 2000])
def test_units_are_powers_of_two_from_finite_maxima(rows, factor, device):
    draw = random.Random(rows)
    first = torch.zeros(3, rows, 20, dtype=torch.float16, device=device)
    second = torch.ones(3, 7, 20, dtype=torch.float16, device=device)
    for item, peak in enumerate((0.0, 3.0, 60000.0)):
        first[item, draw.randrange(rows), draw.randrange(20)] = -peak
    if rows > 1:
        second[:, 3, 5], second[:, 4, 6], second[:, 2] = math.nan, -math.inf, 0.5
    units = _triton_units.units(first, second, factor)[:, 0]
    bounds = abs(factor) * 20 * torch.tensor([3.0, 60000.0], device=device)
    assert torch.equal(units.frexp().mantissa, torch.full_like(units, 0.5))
    ratio = bounds / units[1:]
    assert bool(((ratio >= 2**14) & (ratio < 2**15)).all()) and units[0] == 2.0**-74


@forms
def test_repeats_and_wide_offsets_are_bitwise_equal(dtype, value_depth, device):
    for layout in ("inside_aligned", "sliced"):
        tensors = staged.made(Case(2, 20, 40, 16, value_depth), dtype, device)
        tensors = [staged.LAYOUTS[layout](t) for t in tensors]
        first, again = (run("relu", tensors, 0.2) for _ in range(2))
        with _launch.pretend(wide=True):
            wide = run("relu", tensors, 0.2)
        for name in staged.NAMES:
            assert torch.equal(first[name], again[name])
            assert torch.equal(first[name], wide[name])


@forms
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@relu_first
def test_a_bad_row_touches_what_depends_on_it(kind, bad, dtype, value_depth, device):
    tensors = staged.made(Case(2, 20, 40, 16, value_depth), dtype, device)
    clean = run(kind, tensors, 0.2)
    for place in (0, 3):
        dirty = [t.clone() for t in tensors]
        dirty[place][1, 7, 3] = bad
        got = run(kind, dirty, 0.2)
        others = torch.ones(2, 20, dtype=torch.bool)
        others[1, 7] = False
        for name in ("out", "d_query"):
            assert torch.equal(got[name][others], clean[name][others])
        for name in ("d_key", "d_value"):
            assert torch.equal(got[name][0], clean[name][0])


@forms
def test_keys_that_are_rectified_away_weigh_nothing(dtype, value_depth, device):
    query, key, value, _ = staged.made(Case(1, 20, 70, 16, value_depth), dtype, device)
    query[..., 0], key[0, 5] = 1.0, 0.0
    key[0, 5, 0] = -math.inf
    out = relu_triton.forward(query, key, value, 0.5)
    truth = relu_reference.attention(*(t.double() for t in (query, key, value)), 0.5)
    same = relu_reference.attention(query, key, value, 0.5)
    keep = truth.isfinite()
    assert bool(keep.all())
    assert_not_worse("out", out, same, truth, 2)
    query[0, 2], key[..., :] = 0.0, key.abs()
    query[0, 2, 0] = -math.inf
    out = relu_triton.forward(query, key.clamp(0.1, 5), value, 0.5)
    assert not out[0, 2].any() and out.isfinite().all()


def test_relu_has_no_slope_at_zero_and_lets_nan_pass(device):
    query, key, value, grad = (t.abs() for t in staged.made(Case(1, 6, 5, 4, 3), torch.float32))
    query[0, 1], query[0, 2], query[0, 3] = 0.0, -1.0, math.nan
    got = run("relu", [t.to(device) for t in (query, key, value, grad)], 1.0)
    assert not got["out"][0, 1:3].any() and not got["d_query"][0, 1:3].any()
    assert got["out"][0, 3].isnan().all() and got["d_query"][0, 3].all()
    assert got["out"][0, 4:].isfinite().all()


@kinds
@pytest.mark.parametrize(
    "case", [Case(0, 5, 3, 8, 8), Case(2, 0, 3, 8, 8), Case(2, 5, 0, 8, 9), Case(2, 5, 1, 8, 300)]
)
def test_few_or_no_rows(case, kind, device):
    got = check(kind, staged.made(case, torch.float16, device), 0.5)
    if not case.keys:
        assert not got["out"].any() and not got["d_query"].any()
    if not case.queries:
        assert not got["d_key"].any() and not got["d_value"].any()


@pytest.mark.parametrize(("case", "dtype", "mib"), staged.MEASURED, ids=str)
def test_memory_is_what_the_docstrings_say(case, dtype, mib):
    query, key, value, grad = (t.to(dtype) for t in staged.meta(case))
    size, width, half = dtype.itemsize, case.keys + -case.keys % 8, dtype == torch.float16
    positions, channels = case.batch * case.queries, case.depth + case.value_depth
    units = 528 * case.batch * half
    with _launch.pretend(architecture=90, launcher=lambda *_: None):
        peak = staged.Peak(query, key, value)
        with peak:
            out = relu_triton.forward(query, key, value, 0.1, mib)
        rows = min(staged.rows_of_a_tile(case, size, size, mib), positions)
        allowed = units + size * rows * width + 4 * rows * case.value_depth * half
        if max(case.depth, case.value_depth) <= _triton_quadratic.FUSED_DEPTH:
            allowed = units
        assert peak.bytes - out.nbytes <= allowed
        peak = staged.Peak(query, key, value, grad)
        with peak:
            grads = relu_triton.backward(grad, query, key, value, 0.1, mib)
    rows = min(staged.rows_of_a_tile(case, 2 * size, size, mib), positions)
    items = max(1, rows // max(1, case.queries))
    allowed = 2 * size * rows * width + 2 * units
    if half:
        allowed += 4 * items * case.keys * channels + 4 * rows * case.depth
    if dtype != torch.float32 and rows < case.queries:
        allowed += 4 * case.keys * channels
    extra = peak.bytes - sum(t.nbytes for t in grads)
    assert 0 < extra <= allowed, (extra, allowed)


@pytest.mark.usefixtures("repeatable")
@forms
def test_twenty_repeats_are_bitwise_equal(dtype, value_depth, device):
    # The interpreter has no order that could change; where there is one, many programs run.
    sizes = (8, 1500, 700) if device == "cuda" else (1, 20, 30)
    tensors = staged.made(Case(*sizes, 16, value_depth), dtype, device)
    first = run("relu", tensors, 0.2, 0.05)
    for _ in range(20):
        again = run("relu", tensors, 0.2, 0.05)
        assert all(torch.equal(again[name], first[name]) for name in first)
