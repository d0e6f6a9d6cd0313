"""The Triton kernels of pointwise products, in Triton's interpreter where there is no GPU."""

import pytest
import torch

pytest.importorskip("triton")

from nlkernels import _device, _launch, _operations, _select, _trust, _tune, _warmup
from nlkernels._memory import MIB, PeakMemory
from nlkernels.ops.pointwise import chunked, op, reference, suite, triton_outer
from nlkernels.ops.pointwise import triton as kernels
from nlkernels.ops.pointwise.problem import PointwiseProblem
from tests.helpers import DEVICE, assert_not_worse, runnable
from tests.ops.pointwise import (
    assert_bad_number_touches_its_position_only,
    assert_float16_is_added_in_float32,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# (B, N, C of each source, P): one position, one channel, tails, whole tiles, several tiles.
CASES = [
    ((2, 72, (40,), 24), "bf16"),
    ((1, 33, (37,), 19), "fp32"),
    ((3, 1, (5,), 1), "fp16"),
    ((1, 136, (72, 8), 72), "fp16"),
    ((2, 64, (64, 24, 16), 128), "fp32"),
    ((1, 17, (3, 20, 9), 70), "bf16"),
]
LAYOUTS = ("rows", "maps", "apart")

dtypes = pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=list(DTYPES))
lying = pytest.mark.parametrize("layout", LAYOUTS)
maps = pytest.mark.parametrize("maps", [False, True], ids=["to_rows", "to_maps"])


def laid_out(x, layout):
    """The same features (B,N,C): contiguous rows or maps, or with a stride nowhere 1, in NaN."""
    if layout == "maps":
        return x.mT.contiguous().mT
    if layout == "rows":
        return x
    around = x.new_full((x.shape[0], x.shape[1] + 2, 3 * x.shape[2]), float("nan"))
    return around[:, 1:-1, 1::3].copy_(x)


def operands(size, dtype=torch.float32, layout="rows"):
    """Sources, shift and base; the weights of every other source are transposed."""
    batch, positions, depths, channels = size
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)

    sources = []
    for number, depth in enumerate(depths):
        weight = drawn(channels, depth) * depth**-0.5
        weight = weight.mT.contiguous().mT if number % 2 else weight
        sources.append((laid_out(drawn(batch, positions, depth), layout), weight))
    base = laid_out(drawn(batch, positions, channels), layout)
    return sources, drawn(channels).float(), base


def defined(sources, shift, base, dtype):
    sources = [(features.to(dtype), weight.to(dtype)) for features, weight in sources]
    shift, base = (t if t is None else t.to(dtype) for t in (shift, base))
    return reference.product(sources, shift, base)


def assert_right(sources, shift, base, maps):
    """Hold a product to the 2x rule; return it."""
    dtype = sources[0][0].dtype
    got = kernels.product(sources, shift, base, maps)
    same, truth = (defined(sources, shift, base, each) for each in (dtype, torch.float64))
    assert_not_worse("out", got, same, truth, 2)
    assert got.is_contiguous() or got.mT.is_contiguous()
    assert (got.mT if maps else got).is_contiguous()
    return got


def assert_sums_right(left, right):
    """Hold both sums to the 3x rule of a gradient in their dtype; return them."""
    got = kernels.outer(left, right)
    same = reference.outer(left, right)
    truth = reference.outer(left.double(), right.double())
    for name, *each in zip(("outer", "sums"), got, same, truth, strict=True):
        assert each[0].dtype == torch.float32
        assert_not_worse(name, each[0].to(left.dtype), each[1], each[2], 3)
    return got


@pytest.mark.usefixtures("poison")
@maps
@lying
@pytest.mark.parametrize(("size", "dtype"), CASES, ids=str)
def test_products_are_not_worse_than_pytorchs(size, dtype, layout, maps):
    assert_right(*operands(size, DTYPES[dtype], layout), maps)


@pytest.mark.usefixtures("poison")
@maps
@pytest.mark.parametrize("given", ["shift", "base", "neither"])
@dtypes
def test_shift_and_base_may_be_absent(dtype, given, maps):
    sources, shift, base = operands((2, 40, (24,), 20), dtype)
    shift, base = shift if given == "shift" else None, base if given == "base" else None
    assert_right(sources, shift, base, maps)


@pytest.mark.usefixtures("poison")
@lying
@pytest.mark.parametrize("other", LAYOUTS)
@dtypes
def test_sums_are_not_worse_than_pytorchs(dtype, layout, other):
    (left, _), (right, _) = operands((2, 45, (24, 72), 1), dtype)[0]
    assert_sums_right(laid_out(left, layout), laid_out(right, other))


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (3, 1, 7, 130), (1, 200, 130, 5)], ids=str)
def test_sums_of_few_and_many(sizes):
    batch, positions, rows, columns = sizes
    (left, _), (right, _) = operands((batch, positions, (rows, columns), 1))[0]
    assert_sums_right(left, right)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("programs", [1, 6, 128])
@dtypes
def test_runs_change_nothing_but_rounding(programs, dtype, monkeypatch):
    monkeypatch.setattr(triton_outer, "PROGRAMS", programs)
    (left, _), (right, _) = operands((5, 72, (16, 24), 1), dtype, "maps")[0]
    assert_sums_right(left, right)


def test_more_runs_than_are_added_at_once():
    (left, _), (right, _) = operands((20, 40, (16, 8), 1))[0]
    assert_sums_right(left, right)


def shipped():
    """(kernel name, configuration, dtype), each configuration of published channels once."""
    found = {}
    for architecture in (80, 89, 90, 120):
        for channels in (64, 256):
            for dtype in (torch.float32, torch.bfloat16):
                problem = PointwiseProblem(2, 3136, 512, channels, dtype, "cuda", 0)
                for name, candidates in kernels.KERNELS.items():
                    configs = candidates(problem, architecture)
                    assert 1 <= len(configs) <= 6 and not configs[-1].descriptors
                    for config in configs:
                        found.setdefault((name, config), dtype)
    return [(name, config, dtype) for (name, config), dtype in found.items()]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("name", "config", "dtype"), shipped(), ids=str)
def test_every_shipped_configuration(name, config, dtype):
    sources, shift, base = operands((1, 136, (72,), 80), dtype)
    (rows, _), features = sources[0], laid_out(base, "maps")
    with _tune.forced({name: config}):
        if name == "pointwise_outer":
            assert_sums_right(rows, features)
        else:
            assert_right(sources, shift, features, True)
            assert_right([(laid_out(rows, "maps"), sources[0][1])], shift, base, False)


@pytest.mark.parametrize("architecture", runnable(80, 89, 120))
@maps
def test_other_architectures(architecture, maps):
    with _launch.pretend(architecture=architecture):
        assert_right(*operands((2, 40, (24,), 20), torch.bfloat16, "maps"), maps)
        (left, _), (right, _) = operands((2, 40, (24, 16), 1), torch.bfloat16)[0]
        assert_sums_right(left, right)


@maps
def test_expanded_and_odd_operands(maps):
    (features, weight), *_ = operands((1, 9, (12,), 10))[0]
    shift = torch.randn(20, device=DEVICE)[::2]
    base = torch.randn(3, 1, 1, device=DEVICE).expand(3, 9, 10)
    features, weight = features[..., :1].expand(3, 9, 12), weight[:1].expand(10, 12)
    assert_right([(features, weight)], shift, base, maps)
    assert_sums_right(base, features)


@lying
def test_64_bit_offsets_and_repeats_change_no_bit(layout):
    sources, shift, base = operands((2, 40, (24, 8), 20), torch.bfloat16, layout)
    results = []
    for wide in (None, True, False):
        with _launch.pretend(wide=wide):
            out = kernels.product(sources, shift, base, True)
            results.append((out, *kernels.outer(base, sources[0][0])))
    for again in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(results[0], again, strict=True))


def collected(call):
    """Kernels, grids and constants of what a call would launch on a Hopper GPU."""
    asked = []

    def collect(kernel, grid, _, options):
        asked.append((kernel.__name__, grid, options))

    with _launch.pretend(architecture=90, launcher=collect):
        call()
    return asked


def test_items_beyond_32_bits_are_read_with_64_bit_offsets():
    x = torch.empty(2, 2**21 + 2, 1024, device="meta", dtype=torch.bfloat16)
    weight = x.new_empty(16, 1024)
    for call in (
        lambda: kernels.product([(x, weight)], None, None, False),
        lambda: kernels.product([(x[..., :16], weight[:, :16])], None, None, True),
        lambda: kernels.outer(x[..., :16], x),
    ):
        assert [options.get("WIDE", True) for _, _, options in collected(call)].count(False) == 0
    # Strides between items are 64 bits wide in any case.
    items = torch.empty(4096, 512, 1024, device="meta", dtype=torch.bfloat16)
    ((_, _, options),) = collected(lambda: kernels.product([(items, weight)], None, None, False))
    assert not options["WIDE"]


def test_launches_and_how_operands_are_read():
    x = torch.empty(8, 512, 3136, device="meta", dtype=torch.bfloat16).mT
    weights = [x.new_empty(256, 512) for _ in range(3)]
    rows = x.new_empty(8, 3136, 256)
    ((name, grid, options),) = collected(lambda: kernels.product([(x, weights[0])], None, None))
    assert (name, grid) == ("_product_kernel", (8 * 25 * 2,))
    assert [options[each] for each in ("FIRST", "FIRST_WEIGHT", "OUT")] == [2, 1, 1]
    sources = [(rows, weight.mT) for weight in weights]
    ((_, _, options),) = collected(lambda: kernels.product(sources, None, x, True))
    assert options["SOURCES"] == 3 and options["MAPS"]
    assert [options[each] for each in ("THIRD", "THIRD_WEIGHT", "BASE_LAYOUT", "OUT")] == [
        1,
        2,
        1,
        1,
    ]
    names = [name for name, *_ in collected(lambda: kernels.outer(rows, x))]
    assert names == ["_outer_kernel", "_outer_combine"]
    wide = x.new_empty(8, 3136, 2048)
    assert [name for name, *_ in collected(lambda: kernels.outer(wide, wide))] == ["_outer_kernel"]


@pytest.mark.parametrize("size", [(0, 4, (8,), 6), (2, 0, (8,), 6)], ids=str)
@maps
def test_nothing_gives_empty_results(size, maps):
    sources, shift, base = operands(size)
    out = kernels.product(sources, shift, base, maps)
    assert out.shape == base.shape
    products, sums = kernels.outer(base, sources[0][0])
    assert products.shape == (6, 8) and not products.any() and not sums.any()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@maps
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_number_touches_its_position_only(value, maps):
    sources, shift, base = operands((2, 40, (24, 8), 20))
    assert_bad_number_touches_its_position_only(kernels, sources, shift, base, maps, value)


def test_sums_beyond_float16_are_added_in_float32():
    (left, _), (right, _) = operands((2, 40, (16, 16), 1), torch.float16)[0]
    left, right = left.abs() * 100, right.abs() * 100
    assert_float16_is_added_in_float32(kernels, left, right)


@dtypes
@lying
def test_memory_is_what_is_documented(dtype, layout):
    sources, shift, base = operands((8, 196, (256,), 128), dtype, layout)
    features = sources[0][0]
    with _launch.pretend(architecture=90, launcher=lambda *_: None):
        with PeakMemory(DEVICE) as product:
            out = kernels.product(sources, shift, base, True)
        assert product.live_mib * MIB <= out.nbytes + 1024
        with PeakMemory(DEVICE) as sums:
            results = kernels.outer(base, features)
        whole, most = 4 * 128 * 257, 4 * 128 * 128 * (128 + 1)
        assert sums.live_mib * MIB - whole <= most + 1024
        assert sum(each.nbytes for each in results) == whole


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_verification_accepts_the_kernels(direction):
    head, device = (16, 16), torch.device(DEVICE)
    assert _trust.judge("pointwise", "triton", head, torch.float32, direction, device) == ""
    for head in ((16, 16), *suite.HEADS):
        for each in (*suite.large(head), *suite.trials(head)):
            asked = PointwiseProblem(*each[:4], torch.float32, "cuda", 0)
            assert op.head(asked) == head


@pytest.mark.parametrize("name", ["product", "outer"])
def test_verification_catches_kernels_that_forget_a_tail(name, monkeypatch):
    right = getattr(chunked, name)

    def product(sources, shift, base, maps):
        (features, weight), *others = sources
        return right([(features[..., :-1], weight[:, :-1]), *others], shift, base, maps)

    def outer(left, features):
        return right(left[:, :-1], features[:, :-1])

    monkeypatch.setattr(kernels, name, {"product": product, "outer": outer}[name])
    direction = "forward" if name == "product" else "backward"
    device = torch.device(DEVICE)
    wrong = _trust.judge("pointwise", "triton", (16, 16), torch.float32, direction, device)
    assert ("out" if name == "product" else "d_weight") + " max error" in wrong


@pytest.mark.parametrize("layout", ["rows", "maps"])
def test_a_problem_that_dispatch_saw_can_be_measured(layout, monkeypatch, tmp_path):
    monkeypatch.setenv("NLKERNELS_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(_device, "MEASURED", (DEVICE,))
    monkeypatch.setattr(_trust, "distrust", lambda *_: "")
    monkeypatch.setattr(_select, "inside", lambda *_: ["chunked", "triton"])
    seen = []
    monkeypatch.setattr(_select, "recorder", lambda *found: seen.append(found))
    sources, shift, base = operands((1, 24, (16, 8), 20), layout=layout)
    op.product(sources, shift, base, False, "chunked")
    op.outer(base, sources[0][0], "chunked")
    (name, product, given), (_, sums, _) = seen
    assert (product.depth, product.channels, sums.depth, sums.channels) == (24, 20, 16, 20)
    trial, tensors = _warmup._alike(name, _warmup._Layout.of(given))
    assert trial.layouts[0] == layout and tensors[0].stride(2 if layout == "rows" else 1) == 1
    entry = _warmup._measure(name, product, _warmup._Layout.of(given), _warmup.PASSES)
    assert entry.note == "" and set(entry.ms["backward"]) == {"chunked", "triton"}
    assert set(entry.configs) == set(kernels.KERNELS)


def test_what_is_not_served_is_said():
    sources, _, base = operands((1, 4, (8,), 6), torch.float64)
    with pytest.raises(NotImplementedError, match="not float64"):
        op.product(sources, None, None, False, "triton")
    with pytest.raises(NotImplementedError, match="not float64"):
        op.outer(base, base, "triton")
    wanted = PointwiseProblem(8, 3136, 512, 256, torch.bfloat16, "cuda", 0)
    assert _select.preference("pointwise", wanted)[0][0] == "triton"
    assert "unverified" in _operations.OPERATIONS["pointwise"].table["cuda"][0]["because"]
