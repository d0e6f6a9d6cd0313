"""A block's memory line: its sizes, its formulas against what the allocator reports."""

import random
import time
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import nlkernels
from nlkernels import _cuda, _ext
from nlkernels._memory import PeakMemory
from nlkernels._spec import Problem
from nlkernels.modules import NonLocalBlock1d, NonLocalBlock2d, NonLocalBlock3d
from nlkernels.ops import _cpp, _footprint, _staged_products, _tiles
from nlkernels.ops import _footprint_cpp as cpp
from nlkernels.ops.softmax import staged_backward
from tests.cuda import emulated
from tests.helpers import SHORT
from tests.ops import isas
from tests.ops.cpp_attention import needs_compiler, threads

OPERATIONS = ("softmax", "relu", "dot_product", "concat")
# B, N, M, D, V: several items in a tile, several tiles in an item, fewer keys than channels (where
# dot_product costs fewer operations by tiles).
SIZES = ((6, 100, 60, 32, 48), (2, 300, 200, 32, 16), (8, 160, 12, 64, 64))


@pytest.fixture
def small_workspace(monkeypatch):
    """Tiles that small problems need several of."""
    monkeypatch.setitem(_tiles.DEFAULT_WORKSPACE_MIB, "cpu", 0.25)


def sizes_id(sizes: tuple[int, ...]) -> str:
    return "-".join(f"{letter}{n}" for letter, n in zip("BNMDV", sizes, strict=True))


def measured(
    op: str, sizes: tuple[int, ...], dtype: torch.dtype, backend: str, training: bool
) -> tuple[int, Problem]:
    """Peak bytes beyond operands and results, and the problem."""
    batch, rows, keys, depth, value_depth = sizes
    query, key = torch.randn(batch, rows, depth), torch.randn(batch, keys, depth)
    value, grad = torch.randn(batch, keys, value_depth), torch.randn(batch, rows, value_depth)
    # As a block's projections lie in memory.
    operands = [t.to(dtype).mT.contiguous().mT for t in (query, key, value)]
    grad, call = grad.to(dtype), nlkernels.nonlocal_attention
    options = {"kind": op, "backend": backend}
    if op == "concat":
        operands[:2] = (t[:, :, 0].contiguous() for t in operands[:2])
        depth, call, options = 1, nlkernels.nonlocal_concat, {"backend": backend}

    def step() -> list[torch.Tensor]:
        if not training:
            with torch.no_grad():
                return [call(*operands, **options)]
        leaves = [t.detach().requires_grad_() for t in operands]
        out = call(*leaves, **options)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    step()
    with PeakMemory() as peak:
        results = step()
    extra = peak.live_mib * 2**20 - sum(t.numel() * t.element_size() for t in results)
    return round(extra), Problem(batch, rows, keys, depth, value_depth, dtype, "cpu")


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(
    ("dtype", "sizes"),
    list(zip((torch.float32, torch.float64, torch.float16), SIZES, strict=True)),
    ids=["fp32-few rows", "fp64-many rows", "fp16-few keys"],
)
@pytest.mark.parametrize("op", OPERATIONS)
def test_naive_form_is_exact(op, dtype, sizes, training):
    extra, problem = measured(op, sizes, dtype, "reference", training)
    assert _footprint.naive(op, problem, training) == pytest.approx(extra, rel=0.02)


@pytest.mark.parametrize("op", ["softmax", "dot_product"])
def test_naive_form_in_bfloat16(op):
    # Large enough that what a CPU's library packs for itself is less than 2 %.
    extra, problem = measured(op, (1, 2200, 2200, 16, 16), torch.bfloat16, "reference", True)
    assert _footprint.naive(op, problem, training=True) == pytest.approx(extra, rel=0.02)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        *((SIZES[0], dtype) for dtype in SHORT),
        *((SIZES[1], dtype) for dtype in (torch.float32, torch.bfloat16)),
        (SIZES[2], torch.float32),
        ((1, 1, 1, 8, 8), torch.float64),
    ],
    ids=lambda value: SHORT[value] if isinstance(value, torch.dtype) else sizes_id(value),
)
@pytest.mark.parametrize("op", OPERATIONS)
def test_chunked_takes_no_more_and_at_least_half(op, dtype, sizes, training, small_workspace):
    extra, problem = measured(op, sizes, dtype, "chunked", training)
    bound = _footprint.bound(op, ("chunked",) * (1 + training), problem)
    assert extra <= bound
    # A mebibyte for what 16-bit products pack on some CPUs and not on others.
    assert bound <= 2 * extra + (2**20 if dtype.itemsize == 2 else 2**15)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(
    "sizes", [(512, 1, 1, 1, 1024), (1024, 4, 4, 1, 512), (64, 100, 50, 1, 256)], ids=sizes_id
)
def test_the_concatenation_of_few_keys_takes_no_more(sizes, training):
    extra, problem = measured("concat", sizes, torch.float32, "chunked", training)
    assert extra <= _footprint.bound("concat", ("chunked",) * (1 + training), problem)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("sizes", [(4, 640, 320, 64, 64)], ids=sizes_id)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=SHORT.get)
def test_sdpa_takes_no_more(dtype, sizes, training):
    extra, problem = measured("softmax", sizes, dtype, "sdpa", training)
    bound = _footprint.bound("softmax", ("sdpa",) * (1 + training), problem)
    assert extra <= bound <= 4 * extra


@needs_compiler
@pytest.mark.parametrize(
    "isa", ["", *(pytest.param(isa, marks=pytest.mark.gate) for isa in isas.ISAS)]
)
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=SHORT.get
)
def test_cpp_workspace_is_exact(isa, dtype, monkeypatch):
    """Of each plan of the C++ kernels, for sizes around every edge of it."""
    if isa:
        isas.use(isa, monkeypatch)
    native, draw = _ext.load(), random.Random(f"{isa} {dtype}")
    plans = [
        (_cpp.SOFTMAX, native.attention_forward_workspace, cpp.forward_workspace),
        (_cpp.SOFTMAX, native.attention_backward_workspace, cpp.backward_workspace),
        (_cpp.LINEAR, native.attention_forward_workspace, cpp.linear_forward),
        (_cpp.LINEAR, native.attention_backward_workspace, cpp.linear_backward),
    ]
    for _ in range(200):
        sizes = [int(2 ** draw.uniform(0, top)) for top in (5, 14, 13, 11, 11)]
        mib = draw.choice((0.125, 1, 10, 100))
        monkeypatch.setitem(_tiles.DEFAULT_WORKSPACE_MIB, "cpu", mib)
        problem = Problem(*sizes, dtype, "cpu")
        batch, rows, keys, depth, value_depth = sizes
        shapes = ((batch, rows, depth), (batch, keys, depth), (batch, keys, value_depth))
        operands = [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]
        with threads(draw.choice((1, 2, 7, 16))):
            for affinity, actual, reckoned in plans:
                plan = _cpp._problem(native, affinity, *operands, 1.0, None)
                assert reckoned(problem) == actual(_ext.isa(), plan), (sizes, mib, affinity)


@needs_compiler
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(
    "sizes",
    [(4, 640, 320, 64, 64), (1, 2000, 1200, 48, 130), (9, 100, 30, 300, 300), (1, 9000, 40, 8, 8)],
    ids=sizes_id,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=SHORT.get)
@pytest.mark.parametrize("op", ["softmax", "relu", "dot_product"])
@pytest.mark.parametrize("count", [2, pytest.param(8, marks=pytest.mark.gate)])
def test_cpp_takes_no_more_and_at_least_half(op, dtype, sizes, training, count):
    with threads(count):
        extra, problem = measured(op, sizes, dtype, "cpp", training)
        bound = _footprint.bound(op, ("cpp",) * (1 + training), problem)
    assert extra <= bound <= 2 * extra + 2**18


def nothing(*given, **options) -> None:
    """In the place of kernels, which allocate nothing."""


@pytest.fixture
def no_kernels(monkeypatch):
    """The CUDA kernels' module without what they compute."""
    silent = ("attention_forward", "attention_backward", "attention_delta")
    silent += ("hopper_forward", "hopper_d_scores")
    module = SimpleNamespace(AttentionProblem=nothing, **dict.fromkeys(silent, nothing))
    monkeypatch.setattr(_cuda, "_emulation", module)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=SHORT.get)
@pytest.mark.parametrize("op", ["softmax", "relu", "dot_product"])
def test_cuda_attention_allocates_what_its_formula_says(op, dtype, training, no_kernels):
    # Few channels: no Hopper kernel would run.
    extra, problem = measured(op, (8, 160, 12, 56, 56), dtype, "cuda", training)
    bound = _footprint.bound(op, ("cuda",) * (1 + training), problem)
    assert bound == extra + _footprint._SCALARS


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=SHORT.get)
@pytest.mark.parametrize(
    "sizes", [(8, 160, 16, 64, 64), (2, 3000, 2000, 64, 136), (1, 304, 200, 512, 512)], ids=sizes_id
)
def test_hopper_takes_no_more(sizes, dtype, no_kernels, monkeypatch):
    """The library's products, which on a GPU allocate nothing either, do not run."""
    monkeypatch.setattr(_cuda, "architecture", lambda tensor: 90)
    for module in (staged_backward, _staged_products):
        monkeypatch.setattr(module, "multiply", nothing)
    monkeypatch.setattr(torch.Tensor, "baddbmm_", nothing)
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor)
    for training in (False, True):
        extra, problem = measured("softmax", sizes, dtype, "cuda", training)
        bound = _footprint.bound("softmax", ("cuda",) * (1 + training), problem)
        assert extra <= bound <= 1.25 * extra


@pytest.mark.gate
@needs_compiler
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(
    "sizes", [(2, 300, 200, 1, 64), (1, 20, 4000, 1, 130), (3, 65, 64, 1, 17)], ids=sizes_id
)
def test_cuda_concatenation_takes_no_more(sizes, training):
    with emulated.emulation():
        extra, problem = measured("concat", sizes, torch.float32, "cuda", training)
    bound = _footprint.bound("concat", ("cuda",) * (1 + training), problem)
    scores = problem.batch * (problem.queries + problem.keys)
    assert extra <= bound <= extra + 60 * scores + 2**10


def test_operation_without_a_formula():
    problem = Problem(1, 4, 4, 8, 8, torch.float32, "cpu")
    for reckon in (
        lambda: _footprint.naive("gate", problem, training=True),
        lambda: _footprint.bound("gate", ("chunked",), problem),
    ):
        with pytest.raises(ValueError, match=r"footprint: expected op to be one of .*got 'gate'"):
            reckon()


@pytest.mark.parametrize("op", OPERATIONS)
def test_no_formula_grows_with_the_score_matrix(op):
    """Of every backend, on either device: eight times the positions take eight times at most."""
    backends = [backend for name, backend in _footprint._FORMULAS if name == op]
    assert {"chunked", "triton", "cuda"} <= set(backends)
    for backend in backends:
        for device in ("cpu", "cuda"):
            for training in (False, True):
                small, large = (
                    _footprint.bound(
                        op,
                        (backend,) * (1 + training),
                        Problem(4, 12544 * n, 3136 * n, 256, 256, torch.bfloat16, device),
                    )
                    for n in (1, 8)
                )
                assert 0 < large <= 8 * max(small, 40 * 2**20), (backend, device, training)


def test_sizes_of_the_published_layer():
    found = NonLocalBlock3d(512, backend="chunked").footprint((8, 512, 4, 28, 28))
    assert found[:4] == (3136, 784, 8, "softmax")
    assert found.dtype == torch.float32
    matrix = 8 * 3136 * 784 * 4
    assert 2 * matrix < found.naive_bytes < 3 * matrix
    assert found.bytes < matrix / 5


@pytest.mark.parametrize(
    ("block", "size", "expected"),
    [
        (NonLocalBlock3d(8, temporal_group=4), (2, 8, 12, 6, 6), (6, 144, 36)),
        (NonLocalBlock3d(8, temporal_group=4), (2, 8, 3, 6, 6), (2, 108, 27)),
        (NonLocalBlock3d(8), (1, 8, 3, 7, 5), (1, 105, 18)),
        (NonLocalBlock3d(8, pool=(2, 2, 2), pool_order="after"), (1, 8, 3, 7, 5), (1, 105, 6)),
        (NonLocalBlock3d(8, pool=None), (0, 8, 3, 7, 5), (0, 105, 105)),
        (NonLocalBlock2d(8), (3, 8, 7, 5), (3, 35, 6)),
        (NonLocalBlock1d(8), (3, 8, 7), (3, 7, 3)),
        (NonLocalBlock3d(8), (3, 7, 5), (1, 105, 18)),
    ],
    ids=["groups", "short clip", "floor", "after", "no pool", "2d", "1d", "positions alone"],
)
def test_positions_and_batch(block, size, expected):
    found = block.footprint(size)
    assert (found.batch, found.queries, found.keys) == expected


@pytest.mark.parametrize(
    ("kind", "op", "depth"),
    [
        ("softmax", "softmax", 24),
        ("gaussian", "softmax", 64),
        ("dot_product", "dot_product", 24),
        ("relu", "relu", 24),
        ("concat", "concat", 1),
        ("region_softmax", "softmax", 24),
        ("region_relu", "relu", 24),
    ],
)
def test_every_kind_is_its_operation(kind, op, depth):
    block = NonLocalBlock3d(64, inner=24, kind=kind, backend="chunked")
    found = block.footprint((2, 64, 8, 14, 14), torch.bfloat16)
    problem = Problem(2, 1568, 392, depth, 24, torch.bfloat16, "cpu")
    assert found.naive_bytes == _footprint.naive(op, problem, training=True)
    assert found.bytes == _footprint.bound(op, ("chunked", "chunked"), problem)
    assert (found.kind, found.backend) == (kind, "chunked")


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("kind", ["softmax", "dot_product", "concat"])
def test_backends_are_those_that_explain_names(kind, training):
    block, x = NonLocalBlock3d(32, kind=kind), torch.zeros(2, 32, 4, 14, 14)
    chosen = block.footprint(tuple(x.shape), training=training).backend.split("+")
    explanation = block.explain(x)
    assert chosen[0] == explanation.backend
    for backward in chosen[1:]:
        assert f"the backward runs in {backward}" in explanation.reasons[explanation.backend]


def test_line():
    block = NonLocalBlock3d(512, backend="chunked", input_size=(8, 512, 4, 28, 28))
    line = (
        "N x M = 3136 x 784: naive 194.5 MiB, chunked 9.8 MiB (B=8, float32, forward and backward)"
    )
    assert str(block.footprint((8, 512, 4, 28, 28))) == line
    assert line in repr(block)
    small = block.footprint((1, 2, 2), torch.float64, training=False)
    assert str(small).endswith("KiB (B=1, float64, forward)")


def test_reference_takes_what_the_naive_form_takes():
    found = NonLocalBlock3d(32, backend="reference").footprint((2, 32, 4, 14, 14))
    assert found.bytes == found.naive_bytes


def test_backend_that_does_not_serve_the_kind():
    found = NonLocalBlock3d(32, kind="dot_product", backend="sdpa").footprint((2, 32, 4, 14, 14))
    assert found.bytes is None
    assert "sdpa not served" in str(found)


def test_environment_names_the_backend(monkeypatch):
    monkeypatch.setenv("NLKERNELS_BACKEND", "reference")
    assert NonLocalBlock3d(32).footprint((4, 14, 14)).backend == "reference"


class NothingAllocated(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        assert not isinstance(result, torch.Tensor), func
        return result


@pytest.mark.parametrize("place", ["cpu", "cuda", "meta"])
def test_nothing_is_allocated_and_long_clips_take_no_time(place):
    block = NonLocalBlock3d(512)
    block.footprint((1, 512, 4, 14, 14), device=place)
    begun = time.perf_counter()
    with NothingAllocated():
        found = block.footprint((8, 512, 128, 28, 28), torch.bfloat16, place)
    assert time.perf_counter() - begun < 0.05
    assert (found.queries, found.keys) == (100352, 25088)
    assert found.bytes < found.naive_bytes / 50


@pytest.mark.parametrize(
    ("options", "size", "word"),
    [
        ({}, (2, 16, 4, 6, 6), "32"),
        ({}, (2, 32, 4, 6), "B, 32, T, H, W"),
        ({}, (2, 32, 4, 6, 6.0), "input_size"),
        ({}, (2, 32, 4, 0, 6), "input_size"),
        ({}, 7, "input_size"),
        ({}, (2, 32, 4, 1, 6), "pool"),
        ({"temporal_group": 4}, (2, 32, 6, 6, 6), "temporal_group"),
    ],
    ids=["channels", "rank", "float", "empty", "number", "smaller than the pool", "group"],
)
def test_wrong_size(options, size, word):
    with pytest.raises(ValueError, match=word):
        NonLocalBlock3d(32, **options).footprint(size)


@pytest.mark.parametrize("name", ["foo", 3.5], ids=str)
def test_wrong_device(name):
    with pytest.raises(ValueError, match=rf"expected device to be .*, got {name!r}; pass 'cpu'"):
        NonLocalBlock3d(8).footprint((2, 4, 4), device=name)


def test_wrong_dtype():
    with pytest.raises(TypeError, match="float16, bfloat16"):
        NonLocalBlock3d(32).footprint((2, 32, 4, 6, 6), torch.int32)
