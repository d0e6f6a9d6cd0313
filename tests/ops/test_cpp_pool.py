"""Max pooling in C++ and plain PyTorch: torch's numbers to the last bit, and the same winners."""

import os
import random

import pytest
import torch
from torch.nn import functional as F

from nlkernels import _ext
from nlkernels._memory import MIB, PeakMemory
from nlkernels.ops.pool import chunked, cpp, op, problem
from nlkernels.ops.region.problem import like as region_like
from tests.helpers import SHORT, assert_not_worse
from tests.ops import isas
from tests.ops.cpp_attention import dtypes, needs_compiler, threads
from tests.ops.test_region import FORMATS, LAYOUTS, moved
from tests.ops.winners import WINNERS

pytestmark = [needs_compiler, pytest.mark.usefixtures("poison")]

# A failure of random problems prints the number of the problem; these begin with problem S.
FIRST = int(os.environ.get("NLKERNELS_TEST_SEED", "0"))
# Winners of 2, 4 and 8 bits; what is left over behind the last window; tails of vectors and bytes;
# windows of one number and of the most.
CASES = [
    ((2, 7, 3, 11, 9), [1, 2, 2]),
    ((1, 33, 4, 28, 28), [1, 2, 2]),
    ((1, 3, 2, 7, 70), [1, 2, 2]),
    ((1, 17, 5, 6, 37), [2, 3, 2]),
    ((2, 9, 7, 11, 5), [3, 5, 2]),
    ((1, 20, 4, 5, 34), [2, 2, 2]),
    ((2, 6, 5, 3, 2), [4, 1, 1]),
    ((1, 40, 2, 3, 19), [1, 1, 2]),
    ((3, 5, 1, 7, 9), [1, 3, 3]),
    ((1, 2, 1, 3, 2), [1, 1, 1]),
    ((1, 3, 16, 16, 1), [16, 16, 1]),
]
BACKENDS = {"chunked": chunked, "cpp": cpp}

backends = pytest.mark.parametrize("backend", list(BACKENDS))
cases = pytest.mark.parametrize(("shape", "window"), CASES, ids=str)
formats = pytest.mark.parametrize("layout", list(FORMATS))


def operands(shape, window, dtype, layout="ncdhw", seed=0, bad=False):
    """Random x of few digits, many of which are equal, some NaN, and a gradient of its maxima."""
    pooled = [*shape[:2], *(n // k for n, k in zip(shape[2:], window, strict=True))]
    generator = torch.Generator().manual_seed(seed)
    x, grad = (torch.randn(size, generator=generator) for size in (shape, pooled))
    x = (x * 2).round()
    if bad:
        chosen = torch.rand(shape, generator=generator)
        x[chosen < 0.1] = float("nan")
        x[chosen > 0.95] = -float("inf")
    return [t.to(dtype).contiguous(memory_format=FORMATS[layout]) for t in (x, grad)]


def same(got, wanted):
    """Whether all numbers have the same bits, but for which NaN it is."""
    numbers = [t.nan_to_num(nan=0.5, posinf=3e4, neginf=-3e4) for t in (got, wanted)]
    return (
        torch.equal(got.isnan(), wanted.isnan())
        and torch.equal(*numbers)
        and torch.equal(*(t.signbit() for t in numbers))
    )


def torchs(x, grad, window):
    """torch's own result and gradient.

    Of NCDHW: in channels_last_3d, torch 2.13 sends gradients of 16-bit windows of -inf to frame 0.
    """
    x = x.detach().contiguous().requires_grad_()
    out = F.max_pool3d(x, window)
    return out.detach(), torch.autograd.grad(out, x, grad)[0]


def assert_torchs(x, grad, window, backend="cpp"):
    """Results, gradients and winners of a backend are torch's; returns the winners."""
    module = BACKENDS[backend]
    out, winners = module.forward(x, window)
    expected, of_torch = torchs(x, grad, window)
    assert same(out, expected)
    like = problem.like(x, window)
    assert (out.shape, out.stride()) == (like.shape, like.stride())
    assert torch.equal(winners, chunked.forward(x, window)[1])
    d_x = op.spread(grad, winners, region_like(x).zero_(), window, backend)
    assert same(d_x + 0, of_torch + 0)  # -0 that is added to 0
    return winners


@dtypes
@formats
@cases
@backends
def test_results_gradients_and_winners_are_torchs(backend, shape, window, layout, dtype):
    assert_torchs(*operands(shape, window, dtype, layout), window, backend)
    assert_torchs(*operands(shape, window, dtype, layout, bad=True), window, backend)


@dtypes
@formats
@backends
def test_the_first_of_equals_wins_and_a_later_nan_replaces(backend, layout, dtype):
    numbers = torch.tensor([numbers for numbers, _ in WINNERS]).view(1, -1, 1, 2, 2)
    x = torch.cat([numbers] * 5, 4).to(dtype).contiguous(memory_format=FORMATS[layout])
    module = BACKENDS[backend]
    out, winners = module.forward(x, [1, 2, 2])
    found = problem.unpacked(winners, 9 if layout != "ncdhw" else 5, layout != "ncdhw", [1, 2, 2])
    for place in range(5):
        assert found[0, :, 0, 0, place].tolist() == [winner for _, winner in WINNERS]
    assert same(out, F.max_pool3d(x, [1, 2, 2]))
    d_x = module.backward(torch.ones_like(out), winners, torch.zeros_like(x), [1, 2, 2])
    places = d_x[0, :, 0, :, 2:4].flatten(1).argmax(1)
    assert places.tolist() == [place for _, place in WINNERS]


@dtypes
@formats
@cases
def test_gradients_are_added_to_what_is_there(shape, window, layout, dtype):
    x, grad = operands(shape, window, dtype, layout)
    _, winners = cpp.forward(x, window)
    start = torch.randn_like(x)
    got = cpp.backward(grad, winners, start.clone(), window)
    assert torch.equal(got, chunked.backward(grad, winners, start.clone(), window))
    left = torch.ones_like(x, dtype=torch.bool)
    left[:, :, *(slice(n * k) for n, k in zip(grad.shape[2:], window, strict=True))] = False
    assert torch.equal(got[left], start[left])


@dtypes
@pytest.mark.parametrize("window", [[1, 2, 2], [2, 3, 2], [1, 1, 1]], ids=str)
@pytest.mark.parametrize("how", LAYOUTS)
@backends
def test_strides_do_not_matter_and_nothing_outside_is_read(backend, how, window, dtype):
    x, grad = operands((2, 21, 4, 7, 9), window, dtype)
    module = BACKENDS[backend]
    assert_torchs(moved(x, how), moved(grad, how), window, backend)
    winners = module.forward(moved(x, how), window)[1]
    start = moved(torch.ones_like(x), how)
    d_x = module.backward(moved(grad, how), winners, start, window)
    assert torch.equal(d_x, torchs(x, grad, window)[1] + 1)
    if start._base is not None and how != "transposed":
        count = start._base.numel() - start.numel()
        assert start._base.isnan().sum() == count, "something was written around the gradient"


@dtypes
@formats
def test_every_second_number_and_unaligned_ones(layout, dtype):
    window = [1, 2, 2]
    x, grad = operands((2, 17, 2, 5, 38), window, dtype, layout)
    apart = torch.stack((x, torch.full_like(x, float("nan"))), -1)[..., 0]
    off = torch.cat((x.new_full((1,), float("nan")), x.flatten()))[1:].view(x.shape)
    for each in (apart, off):
        assert_torchs(each, grad, window)
        spread = grad.new_zeros(()).add(3).expand(grad.shape)
        assert_torchs(each, spread, window)
    assert_torchs(x[:1, :1].expand(2, 17, -1, -1, -1), grad, window)


@formats
@backends
def test_gradients_may_lie_in_another_way_than_x(layout, backend):
    window = [2, 2, 2]
    x, grad = operands((2, 6, 4, 5, 4), window, torch.float32, layout)
    other = FORMATS["channels_last" if layout == "ncdhw" else "ncdhw"]
    assert_torchs(x, grad.contiguous(memory_format=other), window, backend)


@dtypes
@formats
def test_operation_is_not_worse_than_pytorch(layout, dtype):
    window = [1, 2, 2]
    x, grad = (t + torch.randn(t.shape) for t in operands((2, 5, 3, 9, 7), window, torch.float32))
    x, grad = (t.to(dtype).contiguous(memory_format=FORMATS[layout]) for t in (x, grad))
    plain, truth = torchs(x, grad, window), torchs(x.double(), grad.double(), window)
    leaf = x.detach().requires_grad_()
    out = op.pool(leaf, window, "cpp")
    got = out.detach(), torch.autograd.grad(out, leaf, grad)[0]
    for name, factor, *each in zip(("out", "d_x"), (2, 3), got, plain, truth, strict=True):
        assert_not_worse(name, *each, factor)
    assert got[1].stride() == x.stride()


@formats
@backends
def test_gradcheck_and_gradgradcheck(backend, layout):
    x = torch.randperm(2 * 4 * 5).double().view(1, 2, 1, 4, 5)
    x = x.contiguous(memory_format=FORMATS[layout]).requires_grad_()

    def pool(x):
        return op.pool(x, [1, 2, 2], backend)

    assert torch.autograd.gradcheck(pool, (x,), nondet_tol=0)
    assert torch.autograd.gradgradcheck(pool, (x,), nondet_tol=0)


@dtypes
@formats
def test_repeats_and_threads_change_no_bit(layout, dtype):
    window = [1, 2, 2]
    x, grad = operands((3, 65, 4, 30, 31), window, dtype, layout, bad=True)

    def run():
        out, winners = cpp.forward(x, window)
        return (
            out.nan_to_num(),
            winners,
            cpp.backward(grad, winners, region_like(x).zero_(), window),
        )

    first = run()
    for count in (1, 2, 3, 16, 2):
        with threads(count):
            assert all(torch.equal(*pair) for pair in zip(run(), first, strict=True)), count


@pytest.mark.parametrize("shape", [(0, 3, 2, 4, 4), (2, 3, 2, 1, 4), (2, 3, 0, 4, 4)], ids=str)
@formats
@backends
def test_nothing_to_pool_gives_empty_results(backend, layout, shape):
    window, module = [1, 2, 2], BACKENDS[backend]
    x, grad = operands(shape, window, torch.float32, layout)
    out, winners = module.forward(x, window)
    assert out.shape == grad.shape and winners.numel() == 0
    assert torch.equal(module.backward(grad, winners, x.clone(), window), x)


@pytest.mark.gate
@pytest.mark.parametrize("isa", isas.ISAS)
def test_every_instruction_set_of_this_machine(isa, monkeypatch):
    isas.use(isa, monkeypatch)
    for dtype in SHORT:
        for shape, window in CASES:
            for layout in FORMATS:
                assert_torchs(*operands(shape, window, dtype, layout, bad=True), window)
            x, grad = operands(shape, window, dtype)
            assert_torchs(moved(x, "transposed"), grad, window)


def drawn_problem(draw, seed):
    """What a random problem is, x, its gradient and the window."""
    window = [draw.choice([1, 1, 2, 2, 3, 4, 5]) for _ in range(3)]
    pooled = [draw.choice([1, 2, 3]), draw.choice([1, 2, 5, 7]), draw.choice([1, 2, 7, 17, 33])]
    sizes = [n * k + draw.randrange(k) for n, k in zip(pooled, window, strict=True)]
    shape = (draw.choice([1, 2, 3]), draw.choice([1, 2, 5, 16, 17, 40]), *sizes)
    dtype, how = draw.choice(list(SHORT)), draw.choice([*FORMATS, *LAYOUTS])
    layout = how if how in FORMATS else "ncdhw"
    x, grad = operands(shape, window, dtype, layout, seed, bad=draw.random() < 0.5)
    if how in LAYOUTS:
        x, grad = moved(x, how), draw.choice([grad, moved(grad, how)])
    return f"{shape} {window=} {SHORT[dtype]} {how}", x, grad, window


@pytest.mark.gate
def test_random_problems(monkeypatch):
    for seed in range(FIRST, FIRST + 200):
        draw = random.Random(seed)
        described, *given = drawn_problem(draw, seed)
        isa, count = draw.choice(isas.ISAS), draw.choice([1, 2, 3])
        monkeypatch.setenv("NLKERNELS_CPU_ISA", isa)
        if _ext.missing():
            continue
        with threads(count):
            try:
                assert_torchs(*given)
            except AssertionError as error:
                problem_of = f"{seed=} {isa} {count=} {described}"
                raise AssertionError(f"{problem_of}: {error}") from error


@formats
@pytest.mark.parametrize("window", [[1, 2, 2], [2, 3, 2], [3, 5, 2]], ids=str)
def test_memory_is_what_is_documented(window, layout):
    x, grad = operands((2, 64, 6, 15, 14), window, torch.bfloat16, layout)
    with PeakMemory() as forward:
        out, winners = cpp.forward(x, window)
    assert forward.live_mib * MIB == out.nbytes + winners.nbytes
    rows = out.numel() // (out.shape[1] if layout == "channels_last" else out.shape[4])
    assert winners.nbytes <= out.numel() * problem.bits(window) / 8 + rows
    d_x = region_like(x).zero_()
    with PeakMemory() as backward:
        cpp.backward(grad, winners, d_x, window)
    assert backward.live_mib == 0


@formats
@backends
def test_opcheck(backend, layout):
    operators = torch.ops.nlkernels
    x, _ = operands((2, 5, 4, 6, 5), [1, 2, 2], torch.float32, layout)
    for given, window in ((x, [1, 2, 2]), (moved(x, "window"), [2, 3, 2])):
        grad = torch.randn(problem.pooled_sizes(x, window))
        torch.library.opcheck(operators.pool_forward.default, (given, window, backend))
        winners = operators.pool_forward(given, window, backend)[1]
        arguments = (grad, winners, given, window, backend)
        torch.library.opcheck(operators.pool_backward.default, arguments)


def test_what_is_not_served_is_said(monkeypatch):
    x = torch.zeros(1, 1, 1, 17, 17)
    for backend in BACKENDS:
        with pytest.raises(NotImplementedError, match="windows of up to 256"):
            op.pool(x, [1, 17, 17], backend)
    assert op.pool(x, [1, 17, 17], "reference").shape == (1, 1, 1, 1, 1)
    monkeypatch.setattr(_ext, "missing", lambda: "there is no compiler; install g++")
    with pytest.raises(NotImplementedError, match="there is no compiler; install g"):
        op.pool(x, [1, 2, 2], "cpp")
