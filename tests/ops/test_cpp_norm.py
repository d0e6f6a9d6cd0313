"""Batch norms in C++ and by torch's kernels: numbers, statistics, strides, threads, memory."""

import math
import os
import random

import pytest
import torch

from nlkernels import _ext
from nlkernels._memory import MIB, PeakMemory
from nlkernels.ops._tiles import accumulator_dtype
from nlkernels.ops.norm import chunked, cpp, op
from nlkernels.ops.norm.reference import norm
from tests.helpers import SHORT
from tests.ops import isas
from tests.ops.cpp_attention import dtypes, needs_compiler, threads
from tests.ops.norm import CASES, EPS, Problem, assert_right
from tests.ops.pointwise import LAYOUTS
from tests.ops.test_cpp_pointwise import SIZES, missing

pytestmark = [needs_compiler, pytest.mark.usefixtures("poison")]

# A failure of random problems prints the number of the problem; these begin with problem S.
FIRST = int(os.environ.get("NLKERNELS_TEST_SEED", "0"))
BACKENDS = {"chunked": chunked, "cpp": cpp}

backends = pytest.mark.parametrize("backend", BACKENDS.values(), ids=list(BACKENDS))
cases = pytest.mark.parametrize("case", CASES, ids=str)
maps = pytest.mark.parametrize("maps", [False, True], ids=["rows", "maps"])


@dtypes
@maps
@cases
@backends
def test_statistics_norm_and_gradients(backend, case, maps, dtype):
    assert_right(backend, Problem(case, dtype, maps))


@dtypes
@maps
def test_the_product_is_the_one_without_statistics(maps, dtype):
    problem = Problem((2, 301, 140), dtype, maps)
    z, _ = problem.product(cpp)
    alone = torch.ops.nlkernels.pointwise(
        problem.features, problem.weight, problem.shift, None, maps, "cpp"
    )
    assert torch.equal(z, alone) and z.stride() == alone.stride()


@maps
@pytest.mark.parametrize("mean", [1e3, -1e4])
def test_a_large_mean_swallows_no_variance(mean, maps):
    problem = Problem((2, 1500, 40), torch.float32, maps, mean=mean)
    z, moments = problem.product(cpp)
    variance, exact = torch.var_mean(z.double(), (0, 1), correction=0)
    eps = torch.finfo(torch.float32).eps
    assert (moments[0] - exact).abs().max() <= eps * abs(mean)
    assert (moments[1] / variance - 1).abs().max() <= 8 * eps
    got = problem.results(cpp, z, moments)
    same, truth = problem.judged(z)
    for one, other, right in zip(got, same, truth, strict=True):
        floor = 4 * eps * right.abs().max()
        assert (one - right).abs().max() <= (other - right).abs().max() + floor


@maps
def test_channels_of_one_number_and_of_extreme_ones(maps):
    problem = Problem((2, 200, 6), torch.float32, maps)
    problem.weight[:3] = 0
    problem.shift[:] = torch.tensor([0.0, 0.1, 1e30, 0.0, 0.0, 0.0])
    problem.weight[3:] *= torch.tensor([1e-15, 1e-4, 1e18])[:, None]
    z, moments = problem.product(cpp)
    variance, mean = torch.var_mean(z.double(), (0, 1), correction=0)
    assert torch.equal(moments[1, :3], torch.zeros(3))
    assert torch.equal(moments[0, :3], problem.shift[:3])
    spread = variance[3:].sqrt()
    assert ((moments[0] - mean)[3:] / spread).abs().max() <= 1e-6
    assert (moments[1] / variance - 1)[3:].abs().max() <= 1e-6
    out = cpp.forward(z, moments, problem.gamma, problem.beta, None, EPS)
    assert torch.equal(out[..., :3], problem.beta[:3].expand(2, 200, 3))
    assert out.isfinite().all()


@maps
@dtypes
@backends
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_number_spoils_its_channel_only(backend, value, dtype, maps):
    problem = Problem((2, 150, 20), dtype, maps)
    clean = problem.product(backend)
    problem.shift[4] = value
    z, moments = problem.product(backend)
    others = [channel for channel in range(20) if channel != 4]
    for number in range(2):
        assert torch.equal(moments[number, others], clean[1][number, others])
    bad = float("nan") if math.isnan(value) else value
    assert torch.equal(moments[0, 4], torch.tensor(bad).to(moments)) or moments[0, 4].isnan()
    assert moments[1, 4].isnan()
    got = problem.results(backend, z, moments)
    same, _ = problem.judged(z)
    for one, other in zip(got, same, strict=True):
        assert torch.equal(one.isfinite(), other.isfinite())


@dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
@maps
@backends
def test_strides_do_not_matter_and_nothing_outside_is_read(backend, maps, layout, dtype):
    case = (2, 53, 34)
    plain = Problem(case, dtype, maps)
    given = Problem(case, dtype, maps, layout)
    wanted, got = assert_right(backend, plain), assert_right(backend, given)
    assert all(torch.equal(*pair) for pair in zip(wanted, got, strict=True))


@maps
@backends
def test_expanded_gradient_and_no_base(backend, maps):
    problem = Problem((3, 40, 18), torch.float32, maps)
    problem.grad, problem.base = torch.randn(3, 1, 1).expand(3, 40, 18), torch.zeros(3, 40, 18)
    z, moments, out, *_ = assert_right(backend, problem)
    without = backend.forward(z, moments, problem.gamma, problem.beta, None, EPS)
    assert torch.equal(out, without)


@maps
@backends
def test_gradients_of_one_item_that_lies_otherwise(backend, maps):
    # The trap of torch 2.13: one item's stride tells its batch norm which layout a map has.
    for layout in ("rows", "maps", "items_inside"):
        assert_right(backend, Problem((1, 60, 10), torch.float64, maps, layout))


@maps
@dtypes
@backends
def test_the_two_halves_of_a_backward_are_the_whole(backend, dtype, maps):
    problem = Problem((2, 77, 29), dtype, maps)
    z, moments = problem.product(backend)
    d_z, sums = backend.backward(problem.grad, z, problem.gamma, moments, EPS)
    half = backend.sums(problem.grad, z, moments, EPS)
    eps = torch.finfo(moments.dtype).eps
    torch.testing.assert_close(half, sums, rtol=20 * eps, atol=100 * eps)
    means = sums / (z.shape[0] * z.shape[1])
    other = backend.gradient(problem.grad, z, problem.gamma, moments, means, EPS)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(other, d_z, rtol=4 * eps, atol=20 * eps)
    assert other.stride() == d_z.stride()


@maps
def test_parameters_may_be_wider_than_what_is_normalised(maps):
    problem = Problem((2, 40, 24), torch.bfloat16, maps)
    z, moments = problem.product(cpp)
    gamma, beta = problem.gamma.float(), torch.randn(48)[::2]
    out = cpp.forward(z, moments, gamma, beta, None, EPS)
    assert torch.equal(out, cpp.forward(z, moments, gamma.double(), beta.double(), None, EPS))
    close = {"rtol": 2**-7, "atol": 2**-7}
    torch.testing.assert_close(out.float(), norm(z.float(), gamma, beta, EPS), **close)


@dtypes
@maps
def test_repeats_change_no_bit_and_threads_change_statistics_by_rounding(maps, dtype):
    # So many numbers that several threads are worth their start.
    problem = Problem((3, 901, 140), dtype, maps)
    z, moments = problem.product(cpp)
    first = problem.results(cpp, z, moments)
    eps = torch.finfo(moments.dtype).eps
    for count in (1, 2, 3, 16, 2):
        with threads(count):
            again, other = problem.product(cpp)
            assert torch.equal(again, z) and torch.equal(other, problem.product(cpp)[1])
            results = problem.results(cpp, z, moments)
        torch.testing.assert_close(other, moments, rtol=16 * eps, atol=16 * eps)
        assert all(torch.equal(*pair) for pair in zip(results, first, strict=True)), count


@pytest.mark.gate
@pytest.mark.parametrize("isa", isas.ISAS)
def test_every_instruction_set_of_this_machine(isa, monkeypatch):
    isas.use(isa, monkeypatch)
    for dtype in SHORT:
        for case in CASES:
            for to_maps in (False, True):
                assert_right(cpp, Problem(case, dtype, to_maps))
        for layout in LAYOUTS:
            for to_maps in (False, True):
                assert_right(cpp, Problem((2, 53, 34), dtype, to_maps, layout))


@pytest.mark.gate
def test_random_problems(monkeypatch):
    served = [isa for isa in isas.ISAS if not missing(isa, monkeypatch)]
    for seed in range(FIRST, FIRST + 200):
        draw = random.Random(seed)
        dtype, isa, count = draw.choice(list(SHORT)), draw.choice(served), draw.choice([1, 2, 3])
        sizes = draw.choice([1, 2, 3]), draw.choice(SIZES), draw.choice(SIZES)
        # Enough numbers of each channel that the errors of PyTorch's own are not small by luck.
        batch = max(sizes[0], -(-256 // sizes[1]))
        to_maps, layout = draw.random() < 0.5, draw.choice(LAYOUTS)
        isas.use(isa, monkeypatch)
        case = (batch, *sizes[1:])
        with threads(count):
            try:
                assert_right(cpp, Problem(case, dtype, to_maps, layout, seed=seed))
            except AssertionError as error:
                described = f"{seed=} {isa} {SHORT[dtype]} {case=} {count=} {to_maps=} {layout}"
                raise AssertionError(f"{described}: {error}") from error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=SHORT.get)
@maps
def test_memory_is_what_is_documented(maps, dtype):
    problem = Problem((2, 1568, 256), dtype, maps)
    wide, count, channels = accumulator_dtype(dtype).itemsize, torch.get_num_threads(), 256
    with PeakMemory() as alone:
        torch.ops.nlkernels.pointwise(
            problem.features, problem.weight, problem.shift, None, maps, "cpp"
        )
    with PeakMemory() as product:
        z, moments = problem.product(cpp)
    blocks = 2 * (-(-1568 // (128 if maps else 96)) + count)
    extra = 16 * channels * blocks + 2 * wide * channels + 128
    assert product.live_mib * MIB <= alone.live_mib * MIB + extra
    small = wide * channels * (2 + 2) + 128 * (2 + count)
    with PeakMemory() as forward:
        out = problem.results(cpp, z, moments)[0]
    parts = 0 if maps else 16 * channels * 64 + 2 * wide * channels * count
    assert forward.live_mib * MIB <= 3 * out.nbytes + 6 * wide * channels + small + parts


@maps
@pytest.mark.parametrize("case", [(0, 4, 6), (2, 0, 6)], ids=str)
def test_nothing_gives_empty_results(case, maps):
    problem = Problem(case, torch.float32, maps)
    z, moments = problem.product(cpp)
    assert z.shape == case and moments.isnan().all()
    out, d_z, d_gamma, d_beta = problem.results(cpp, z, moments)
    assert out.shape == d_z.shape == case and not d_gamma.any() and not d_beta.any()


def test_dispatch_says_why():
    problem = op.NormProblem(2, 49, 64, torch.float32, "cpu")
    assert op.supports("cpp", problem) == [] == op.supports("chunked", problem)
    assert op.supports("reference", problem) == ["norm has no backend 'reference'"]
    asked = (torch.zeros(1, 4, 2), torch.zeros(2, 2), *torch.ones(2, 2), None, EPS)
    with pytest.raises(NotImplementedError, match="norm has no backend 'reference'"):
        torch.ops.nlkernels.norm_forward(*asked, "reference")
    assert _ext.missing() == ""


@maps
@pytest.mark.parametrize("backend", list(BACKENDS))
def test_operators_are_what_torch_expects(backend, maps):
    problem = Problem((2, 20, 9), torch.float32, maps)
    operators = torch.ops.nlkernels
    given = problem.features, problem.weight, problem.shift, maps, backend
    z, moments = operators.norm_product(*given)
    gamma, beta, base, grad = problem.gamma, problem.beta, problem.base, problem.grad
    for operator, arguments in (
        (operators.norm_product, given),
        (operators.norm_forward, (z, moments, gamma, beta, base, EPS, backend)),
        (operators.norm_sums, (grad, z, moments, EPS, backend)),
        (operators.norm_gradient, (grad, z, gamma, moments, moments, EPS, backend)),
        (operators.norm_backward, (grad, z, gamma, moments, EPS, backend)),
    ):
        torch.library.opcheck(operator.default, arguments)
