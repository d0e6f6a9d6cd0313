"""The portable CUDA kernels of attention, run on the CPU by the emulation, against float64."""

import itertools
import shutil

import pytest
import torch

from nlkernels import _operations, _trust, nonlocal_attention
from nlkernels.ops import _cuda_attention
from nlkernels.ops.softmax import chunked, cuda
from tests.cuda import emulated

pytestmark = [
    pytest.mark.gate,
    pytest.mark.skipif(
        all(shutil.which(name) is None for name in ("c++", "g++", "clang++")),
        reason="no C++ compiler",
    ),
]
CPU = torch.device("cpu")
KINDS = ("softmax", "relu", "dot_product")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Queries and keys with tails, D and V: below a chunk, odd, and beyond the channels of one block.
SIZES = ((2, 70, 97, 40, 24), (1, 33, 131, 61, 91), (1, 20, 40, 272, 96), (1, 20, 40, 24, 264))


@pytest.fixture(scope="module", autouse=True)
def kernels():
    with emulated.emulation() as module:
        yield module


def _wrong(kind: str, sizes, dtype: torch.dtype, direction: str, **options) -> str:
    """What is wrong with one pass, by the rule that verification on a GPU uses."""
    suite = _operations.loaded(_operations.OPERATIONS[kind].suite)
    plain, module = (_operations.implementation(kind, name) for name in ("chunked", "cuda"))
    trial = suite.Trial(*sizes, **options)
    return _trust._try(suite, trial, dtype, direction, CPU, (plain, plain, module), False)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_results_are_right(kind, sizes):
    for dtype, direction in itertools.product(DTYPES, ("forward", "backward")):
        assert _wrong(kind, sizes, dtype, direction) == "", (dtype, direction)


@pytest.mark.parametrize("kind", KINDS)
def test_channel_first_operands_and_negative_scales(kind):
    for dtype, direction in itertools.product(DTYPES, ("forward", "backward")):
        options = {"channel_first": True, "sign": -1}
        assert _wrong(kind, SIZES[0], dtype, direction, **options) == "", (dtype, direction)


def _operands(dtype: torch.dtype, batch=2, n=35, m=70, d=72, v=104) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = ((batch, n, d), (batch, m, d), (batch, m, v))
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


def _results(kind: str, tensors: list[torch.Tensor], backend: str = "cuda") -> list[torch.Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = nonlocal_attention(*leaves, kind=kind, scale=0.3, backend=backend)
    grad = torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides_give_the_same_bits(dtype):
    """Copies in the background and single elements: what is multiplied is the same."""
    tensors = _operands(dtype)
    expected = _results("softmax", tensors)
    layouts = {
        "channel first": lambda t: t.mT.contiguous().mT,
        "every other channel": lambda t: torch.stack((t, t), 3).flatten(2)[:, :, ::2],
        "address not divisible": lambda t: torch.cat((t.flatten()[:1], t.flatten()))[1:].view_as(t),
        "batch innermost": lambda t: t.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    }
    for name, layout in layouts.items():
        found = _results("softmax", [layout(t) for t in tensors])
        assert all(map(torch.equal, found, expected)), name


def test_repeated_items_are_read_in_place():
    query, key, value = _operands(torch.float16, batch=1)
    expected = nonlocal_attention(query, key, value, backend="cuda")
    wide = (t.expand(3, -1, -1) for t in (query, key, value))
    found = nonlocal_attention(*wide, backend="cuda")
    assert torch.equal(found, expected.expand(3, -1, -1))


@pytest.mark.parametrize("kind", KINDS)
def test_results_do_not_depend_on_the_order_of_threads(kind):
    """What threads do between two barriers is independent: no barrier is missing."""
    for dtype in DTYPES:
        tensors = _operands(dtype)
        expected = _results(kind, tensors)
        for order in (1, 7, 23):
            with emulated.emulation(order):
                found = _results(kind, tensors)
            assert all(map(torch.equal, found, expected)), (dtype, order)


def test_stats_are_those_of_every_backend():
    query, key, value = _operands(torch.float32)
    for scale in (0.5, -0.5):
        _, (tops, sums) = cuda.forward(query, key, value, scale)
        _, (known_tops, known_sums) = chunked.forward(query, key, value, scale)
        torch.testing.assert_close(tops, known_tops)
        torch.testing.assert_close(sums, known_sums)


@pytest.mark.parametrize("dtype", DTYPES)
def test_delta_alone(dtype):
    query, _, _ = _operands(dtype)
    for grad in (query.flip(1), query.mT.contiguous().mT, query[:, :1].expand_as(query)):
        expected = (grad.double() * query.double()).sum(2)
        found = _cuda_attention.delta(grad, query)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)


def test_large_scores_and_scale_zero():
    query, key, value = _operands(torch.float32)
    out = nonlocal_attention(query * 1e4, key * 1e4, value, scale=1.0, backend="cuda")
    expected = nonlocal_attention(query * 1e4, key * 1e4, value, scale=1.0, backend="reference")
    torch.testing.assert_close(out, expected)
    flat = nonlocal_attention(query, key, value, scale=0.0, backend="cuda")
    torch.testing.assert_close(flat, value.mean(1, keepdim=True).expand_as(flat))


@pytest.mark.parametrize("kind", ["relu", "dot_product"])
def test_float16_neither_overflows_nor_fades(kind):
    query, key, value = _operands(torch.float16)
    # Scores beyond 65504; weights below 2^-14, of values that make up for it.
    for factor, size in ((100.0, 1.0), (1e-2, 1e3)):
        tensors = [query * factor, key * factor, value * size]
        out = nonlocal_attention(*tensors, kind=kind, backend="cuda")
        wide = (t.double() for t in tensors)
        truth = nonlocal_attention(*wide, kind=kind, backend="reference")
        error = (out.double() - truth).abs().max() / truth.abs().max()
        assert error < 2e-3, factor


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", ["relu", "dot_product"])
def test_not_a_number_stays_in_its_row(kind, dtype):
    query, key, value = _operands(dtype)
    expected = nonlocal_attention(query, key, value, kind=kind, backend="cuda")
    for element in (float("nan"), float("inf")):
        query[0, 3, 5] = element
        out = nonlocal_attention(query, key, value, kind=kind, backend="cuda")
        assert not out[0, 3].isfinite().any()
        kept = torch.ones(out.shape[:2], dtype=torch.bool)
        kept[0, 3] = False
        # In other units float16 is rounded otherwise.
        torch.testing.assert_close(out[kept], expected[kept])


def test_without_queries_or_keys():
    query, key, value = _operands(torch.float32)
    for kind in ("relu", "dot_product"):
        none = _results(kind, [query, key[:, :0], value[:, :0]])
        assert not none[0].any() and not none[1].any()
    empty = _results("softmax", [query[:, :0], key, value])
    assert empty[0].shape == (2, 0, 104) and not empty[2].any() and not empty[3].any()
