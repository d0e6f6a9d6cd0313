"""Pointwise products and their sums in C++ and plain PyTorch: numbers, strides, threads, memory."""

import os
import random

import pytest
import torch

from nlkernels import _ext
from nlkernels._memory import MIB, PeakMemory
from nlkernels.ops._tiles import accumulator_dtype
from nlkernels.ops.pointwise import chunked, cpp, op, reference
from tests.helpers import SHORT, assert_not_worse
from tests.ops import isas
from tests.ops.cpp_attention import dtypes, needs_compiler, threads
from tests.ops.pointwise import (
    LAYOUTS,
    assert_bad_number_touches_its_position_only,
    assert_float16_is_added_in_float32,
    laid_out,
)

pytestmark = [needs_compiler, pytest.mark.usefixtures("poison")]

# A failure of random problems prints the number of the problem; these begin with problem S.
FIRST = int(os.environ.get("NLKERNELS_TEST_SEED", "0"))
BACKENDS = {"chunked": chunked, "cpp": cpp}
# (B, N, C of each source, P): tails of vectors, of panels and of blocks; one position and many;
# one channel and more than are written at once; parts of the depth.
CASES = [
    (2, 101, (37,), 50),
    (1, 300, (64, 16), 96),
    (2, 150, (7, 33, 20), 38),
    (5, 1, (40,), 130),
    (1, 17, (130, 1), 600),
    (1, 700, (24,), 40),
    (1, 33, (520,), 31),
]

backends = pytest.mark.parametrize("backend", BACKENDS.values(), ids=list(BACKENDS))
cases = pytest.mark.parametrize("case", CASES, ids=str)
layouts = pytest.mark.parametrize("layout", LAYOUTS)
maps = pytest.mark.parametrize("maps", [False, True], ids=["to_rows", "to_maps"])


def operands(case, dtype, layout="rows", seed=0):
    """Sources, shift and base; the weights of every other source are transposed."""
    batch, positions, depths, channels = case
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    sources = []
    for number, depth in enumerate(depths):
        weight = (drawn(channels, depth) * depth**-0.5).to(dtype)
        weight = weight.mT.contiguous().mT if number % 2 else weight
        sources.append((laid_out(drawn(batch, positions, depth).to(dtype), layout), weight))
    base = laid_out(drawn(batch, positions, channels).to(dtype), layout)
    return sources, drawn(channels).to(accumulator_dtype(dtype)), base


def defined(sources, shift, base, dtype):
    """The definition in a dtype; float16 is computed in float32."""
    wide = torch.float32 if dtype == torch.float16 else dtype
    sources = [tuple(t.to(wide) for t in source) for source in sources]
    shift, base = (None if t is None else t.to(wide) for t in (shift, base))
    return reference.product(sources, shift, base).to(dtype)


def assert_product_right(backend, sources, shift, base, to_maps):
    """Hold a product to the 2x rule; return it."""
    dtype = sources[0][0].dtype
    got = backend.product(sources, shift, base, to_maps)
    same, truth = (defined(sources, shift, base, each) for each in (dtype, torch.float64))
    assert_not_worse("out", got, same, truth, 2)
    assert (got.mT if to_maps else got).is_contiguous()
    return got


def assert_sums_right(backend, left, right):
    """Hold both sums to the 3x rule of a gradient, in their dtype; return them."""
    dtype = left.dtype
    wide = torch.float32 if dtype == torch.float16 else dtype
    got = backend.outer(left, right)
    same = reference.outer(left.to(wide), right.to(wide))
    truth = reference.outer(left.double(), right.double())
    for name, *each in zip(("outer", "sums"), got, same, truth, strict=True):
        assert each[0].dtype == accumulator_dtype(dtype) and each[0].is_contiguous()
        assert_not_worse(name, each[0].to(dtype), each[1].to(dtype), each[2], 3)
    return got


def features(sizes, dtype, of_left="rows", of_right="rows", seed=0):
    """Left (B,N,P) and right (B,N,Q)."""
    batch, positions, rows, columns = sizes
    sources, _, _ = operands((batch, positions, (rows, columns), 1), dtype, seed=seed)
    (left, _), (right, _) = sources
    return laid_out(left, of_left), laid_out(right, of_right)


@dtypes
@maps
@cases
@backends
def test_products_are_not_worse_than_pytorchs(backend, case, maps, dtype):
    for layout in ("rows", "maps"):
        assert_product_right(backend, *operands(case, dtype, layout), maps)


@dtypes
@maps
def test_few_channels_of_several_sources(maps, dtype):
    # The library adds products of three channels one by one: 2.8 times PyTorch's error in float32.
    assert_product_right(cpp, *operands((2, 150, (7, 33, 20), 3), dtype), maps)


@dtypes
@maps
@pytest.mark.parametrize("given", ["shift", "base", "neither"])
@backends
def test_shift_and_base_may_be_absent(backend, given, maps, dtype):
    sources, shift, base = operands((2, 40, (24,), 35), dtype)
    shift, base = shift if given == "shift" else None, base if given == "base" else None
    assert_product_right(backend, sources, shift, base, maps)


# (B, N, P, Q): few and many channels on either side; several chunks of positions.
@dtypes
@pytest.mark.parametrize(
    "sizes",
    [(2, 45, 24, 72), (3, 1, 7, 130), (1, 200, 130, 5), (2, 7, 1, 49), (1, 1500, 300, 200)],
    ids=str,
)
@backends
def test_sums_are_not_worse_than_pytorchs(backend, sizes, dtype):
    for of_left in ("rows", "maps"):
        for of_right in ("rows", "maps"):
            assert_sums_right(backend, *features(sizes, dtype, of_left, of_right))


@dtypes
@layouts
@backends
def test_strides_do_not_matter_and_nothing_outside_is_read(backend, layout, dtype):
    case = (2, 53, (20, 33), 34)
    for to_maps in (False, True):
        plain = backend.product(*operands(case, dtype), to_maps)
        got = assert_product_right(backend, *operands(case, dtype, layout), to_maps)
        assert backend is chunked or torch.equal(got, plain)
    for other in ("rows", "maps", layout):
        assert_sums_right(backend, *features((2, 53, 20, 34), dtype, layout, other))


@maps
@backends
def test_expanded_operands(backend, maps):
    sources, shift, _ = operands((1, 9, (12,), 10), torch.float32)
    (x, weight), base = sources[0], torch.randn(3, 1, 1).expand(3, 9, 10)
    x, weight = x[..., :1].expand(3, 9, 12), weight[:1].expand(10, 12)
    assert_product_right(backend, [(x, weight)], shift, base, maps)
    assert_sums_right(backend, base, x)


@maps
@dtypes
def test_chunked_and_cpp_agree(dtype, maps):
    given = operands((2, 77, (40, 13), 29), dtype)
    close = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 20 * torch.finfo(dtype).eps}
    expected = chunked.product(*given, maps)
    got = cpp.product(*given, maps)
    assert got.stride() == expected.stride()
    torch.testing.assert_close(got, expected, **close)
    left, right = features((2, 77, 40, 13), dtype)
    for one, other in zip(cpp.outer(left, right), chunked.outer(left, right), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@dtypes
@maps
def test_repeats_and_threads_change_no_bit(maps, dtype):
    # Enough products that many threads are worth their start.
    given = operands((3, 301, (130, 70), 140), dtype, "maps")
    left, right = features((3, 301, 140, 130), dtype, "rows", "maps" if maps else "rows")
    first = (cpp.product(*given, maps), *cpp.outer(left, right))
    for count in (1, 2, 3, 16, 2):
        with threads(count):
            again = (cpp.product(*given, maps), *cpp.outer(left, right))
        assert all(torch.equal(*pair) for pair in zip(first, again, strict=True)), count
    for item in range(3):
        sources, shift, base = given
        alone = [(x[item : item + 1], weight) for x, weight in sources]
        assert torch.equal(
            cpp.product(alone, shift, base[item : item + 1], maps)[0], first[0][item]
        )


@pytest.mark.parametrize("case", [(0, 4, (8,), 6), (2, 0, (8,), 6)], ids=str)
@maps
@backends
def test_nothing_gives_empty_results(backend, case, maps):
    sources, shift, base = operands(case, torch.float32)
    assert backend.product(sources, shift, base, maps).shape == base.shape
    products, sums = backend.outer(base, sources[0][0])
    assert products.shape == (6, 8) and not products.any() and not sums.any()


@dtypes
@maps
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_number_touches_its_position_only(value, maps, dtype):
    sources, shift, base = operands((2, 40, (24, 8), 20), dtype)
    assert_bad_number_touches_its_position_only(cpp, sources, shift, base, maps, value)


@backends
def test_sums_beyond_float16_are_added_in_float32(backend):
    left, right = (t.abs() * 100 for t in features((2, 40, 16, 16), torch.float16))
    assert_float16_is_added_in_float32(backend, left, right)


@pytest.mark.gate
@pytest.mark.parametrize("isa", isas.ISAS)
def test_every_instruction_set_of_this_machine(isa, monkeypatch):
    isas.use(isa, monkeypatch)
    for dtype in SHORT:
        for case in CASES:
            for layout in ("rows", "maps"):
                for to_maps in (False, True):
                    assert_product_right(cpp, *operands(case, dtype, layout), to_maps)
        for layout in LAYOUTS:
            given = operands((2, 53, (20, 33), 34), dtype, layout)
            assert_product_right(cpp, *given, False)
            assert_sums_right(cpp, *features((1, 301, 49, 70), dtype, layout))
            assert_sums_right(cpp, *features((2, 45, 24, 130), dtype, "rows", layout))


SIZES = [1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 48, 64, 65, 100, 127, 196, 260]


def drawn_problem(seed):
    """A random problem: what it is, instruction set, threads, operands of a product and of sums."""
    draw = random.Random(seed)
    dtype, isa = draw.choice(list(SHORT)), draw.choice(isas.ISAS)
    depths = tuple(draw.choice(SIZES) for _ in range(draw.choice([1, 1, 2, 3])))
    batch, positions, channels = draw.choice([1, 2, 3]), draw.choice(SIZES), draw.choice(SIZES)
    # Enough numbers that the errors of PyTorch's own are not small by luck.
    batch = max(batch, -(-256 // (positions * channels)))
    sources, shift, base = operands((batch, positions, depths, channels), dtype, seed=seed)
    sources = [(laid_out(x, draw.choice(LAYOUTS)), weight) for x, weight in sources]
    base, to_maps = laid_out(base, draw.choice(LAYOUTS)), draw.random() < 0.5
    shift, beside = draw.choice([None, shift]), draw.choice([None, base])
    count = draw.choice([1, 2, 3])
    described = f"{seed=} {isa} {SHORT[dtype]} {batch=} {positions=} {depths=} {channels=} {count=}"
    described += f" {to_maps=} shift={shift is not None} {[x.stride() for x, _ in sources]}"
    # The same holds for sums, of which there are as many as channels.
    sizes = (batch, positions, max(48, channels), depths[0])
    outer = features(sizes, dtype, draw.choice(LAYOUTS), draw.choice(LAYOUTS), seed)
    return described, isa, count, (sources, shift, beside, to_maps), outer


@pytest.mark.gate
def test_random_problems(monkeypatch):
    served = [isa for isa in isas.ISAS if not missing(isa, monkeypatch)]
    for seed in range(FIRST, FIRST + 200):
        described, isa, count, product, outer = drawn_problem(seed)
        if isa not in served:
            continue
        isas.use(isa, monkeypatch)
        with threads(count):
            try:
                assert_product_right(cpp, *product)
                assert_sums_right(cpp, *outer)
            except AssertionError as error:
                raise AssertionError(f"{described}: {error}") from error


def missing(isa, monkeypatch):
    monkeypatch.setenv("NLKERNELS_CPU_ISA", isa)
    return _ext.missing()


measured = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=SHORT.get)


def up(number, multiple=48):
    return -(-number // multiple) * multiple


@measured
@maps
@pytest.mark.parametrize("case", [(1, 784, (512,), 256), (2, 300, (256, 64, 64), 1024)], ids=str)
def test_memory_of_a_product_is_what_is_documented(case, maps, dtype):
    _, _, depths, channels = case
    given = operands(case, dtype, "maps")
    factor = 2 if dtype == torch.bfloat16 and _ext.isa() == 3 else accumulator_dtype(dtype).itemsize
    wide, count = accumulator_dtype(dtype).itemsize, torch.get_num_threads()
    # Rows that would lie whole ways of a cache apart are a line longer.
    depths = [factor * up(depth, 2) + 64 for depth in depths]
    with PeakMemory() as peak:
        out = cpp.product(*given, maps)
    weights = up(channels) * sum(depths)
    results = wide * (192 * 128 if maps else 96 * 512)
    bound = weights + count * (128 * sum(depths) + results) + 64 * (4 + 4 * count)
    assert 0 < peak.live_mib * MIB - out.nbytes <= bound


@measured
@pytest.mark.parametrize("layout", ["rows", "maps"])
@pytest.mark.parametrize(
    "sizes",
    [(1, 3136, 256, 512), (1, 6272, 1024, 8), (1, 4096, 512, 64), (1, 3137, 8, 1024)],
    ids=str,
)
def test_memory_of_sums_is_what_is_documented(sizes, layout, dtype):
    _, _, rows, columns = sizes
    left, right = features(sizes, dtype, layout)
    pairs = dtype == torch.bfloat16 and _ext.isa() == 3
    factor = 2 if pairs else accumulator_dtype(dtype).itemsize
    with PeakMemory() as peak:
        products, sums = cpp.outer(left, right)
    least = factor * (up(rows) + up(columns)) * (256 if pairs else 128)
    tall = 64 * up(max(rows, columns))  # where rows would lie whole ways of a cache apart
    bound = max(2**20, least) * 1.1 + tall + products.element_size() * up(rows) * up(columns) + 1024
    assert 0 < peak.live_mib * MIB - products.nbytes - sums.nbytes <= bound


@maps
def test_opcheck(maps):
    operators = torch.ops.nlkernels
    for backend in BACKENDS:
        for layout in ("rows", "maps"):
            ((x, weight),), shift, base = operands((2, 6, (5,), 4), torch.float32, layout)
            for given in ((shift, base), (None, None)):
                arguments = (x, weight, *given, maps, backend)
                torch.library.opcheck(operators.pointwise.default, arguments)
            torch.library.opcheck(operators.pointwise_outer.default, (base, x, backend))


def test_operators_count_their_operations():
    sources, shift, base = operands((2, 6, (5,), 4), torch.float32)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        torch.ops.nlkernels.pointwise(*sources[0], shift, base, False, "cpp")
    assert counter.get_total_flops() == 2 * 2 * 6 * 5 * 4
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        torch.ops.nlkernels.pointwise_outer(base, sources[0][0], "cpp")
    assert counter.get_total_flops() == 2 * 2 * 6 * 5 * 4


def test_why_it_does_not_run(monkeypatch):
    sources, _, _ = operands((1, 3, (4,), 2), torch.float32)
    monkeypatch.setattr(_ext, "missing", lambda: "there is no compiler; install g++")
    assert op.product(sources, None, None, False, "chunked").shape == (1, 3, 2)
    with pytest.raises(NotImplementedError, match="there is no compiler; install g"):
        op.product(sources, None, None, False, "cpp")
