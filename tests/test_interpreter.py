"""What the interpreter computes, as the tests mend it, is what torch computes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import triton
import triton.language as tl

from nlkernels import _launch

pytestmark = [
    pytest.mark.skipif(
        not _launch.interpreting(), reason="on a machine with a GPU kernels are compiled"
    ),
    # Infinities and NaN are among the numbers, and numpy says so.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

COUNT = 1 << 16
HALVES = (torch.float16, torch.bfloat16)
FLOATS = (*HALVES, torch.float32)


@triton.jit
def copy(source, target, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(target + at, tl.load(source + at).to(target.dtype.element_ty))


@triton.jit
def cut(source, target, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    short = tl.load(source + at).to(target.dtype.element_ty, fp_downcast_rounding="rtz")
    tl.store(target + at, short)


@triton.jit
def compute(left, right, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    a, b = tl.load(left + at), tl.load(right + at)
    tl.store(out + at, a + b)
    tl.store(out + SIZE + at, a * b)
    tl.store(out + 2 * SIZE + at, -a)
    tl.store(out + 3 * SIZE + at, tl.where(a < b, a, b))
    tl.store(out + 4 * SIZE + at, tl.maximum(a, b))
    tl.store(out + 5 * SIZE + at, tl.minimum(a, b))


@triton.jit
def multiply(left, right, out, ROWS: tl.constexpr, INNER: tl.constexpr, COLUMNS: tl.constexpr):
    row, inner, column = tl.arange(0, ROWS), tl.arange(0, INNER), tl.arange(0, COLUMNS)
    a = tl.load(left + row[:, None] * INNER + inner[None, :])
    b = tl.load(right + inner[:, None] * COLUMNS + column[None, :])
    at = row[:, None] * COLUMNS + column[None, :]
    tl.store(out + at, tl.dot(a, b, tl.load(out + at)))


@triton.jit
def reduce(source, out, SIZE: tl.constexpr):
    numbers = tl.load(source + tl.arange(0, SIZE))
    tl.store(out, tl.max(numbers, 0).to(tl.float32))
    tl.store(out + 1, tl.sum(numbers, 0).to(tl.float32))


def every(dtype: torch.dtype) -> torch.Tensor:
    """Every number of a 16-bit dtype, NaN and infinities with them; random ones of a longer one."""
    if dtype in HALVES:
        return torch.arange(COUNT).to(torch.int16).view(dtype)
    return torch.randint(-(2**31), 2**31, (COUNT,)).to(torch.int32).view(dtype)


def near(dtype: torch.dtype) -> torch.Tensor:
    """float32 at, halfway between and beside the numbers of a 16-bit dtype, past its largest."""
    exact = torch.arange(COUNT // 2).to(torch.int16).view(dtype).float()
    exact = exact[exact.isfinite()]
    half = (exact[:-1] + exact[1:]) / 2
    past = torch.tensor([65519.996, 65520.0, 65536.0, 3.39e38, 3.4e38, float("inf")])
    found = torch.cat([exact, half, half.nextafter(exact[1:]), half.nextafter(exact[:-1]), past])
    return torch.nn.functional.pad(torch.cat([found, -found]), (0, 4 * COUNT))[: 4 * COUNT]


def assert_same(got: torch.Tensor, truth: torch.Tensor) -> None:
    torch.testing.assert_close(got, truth, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("target", FLOATS, ids=str)
@pytest.mark.parametrize("source", FLOATS, ids=str)
def test_conversions(source, target):
    numbers = every(source)
    got = torch.empty(COUNT, dtype=target)
    copy[(1,)](numbers, got, COUNT)
    assert_same(got, numbers.to(target))


@pytest.mark.parametrize("target", HALVES, ids=str)
def test_rounding_to_nearest_even(target):
    numbers = near(target)
    got = torch.empty(numbers.shape, dtype=target)
    copy[(1,)](numbers, got, numbers.numel())
    assert_same(got, numbers.to(target))


def test_rounding_toward_zero():
    numbers = near(torch.bfloat16)
    got = torch.empty(numbers.shape, dtype=torch.bfloat16)
    cut[(1,)](numbers, got, numbers.numel())
    assert_same(got.float(), (numbers.view(torch.int32) & -65536).view(torch.float32))


def test_integers_become_bfloat16():
    numbers = torch.arange(-COUNT // 2, COUNT // 2, dtype=torch.int32)
    got = torch.empty(COUNT, dtype=torch.bfloat16)
    copy[(1,)](numbers, got, COUNT)
    assert_same(got, numbers.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_arithmetic(dtype):
    left = every(dtype)
    left[left.isnan()] = float("nan")  # a quiet one: C leaves open what fmax makes of others
    right = left[torch.randperm(COUNT)]
    got = torch.empty(6, COUNT, dtype=dtype)
    compute[(1,)](left, right, got, COUNT)
    truth = [
        left + right,
        left * right,
        -left,
        torch.where(left < right, left, right),
        # As on a GPU, the number wins over NaN.
        torch.fmax(left, right),
        torch.fmin(left, right),
    ]
    assert_same(got, torch.stack(truth))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_products_accumulate_in_float32(dtype):
    left, right = torch.randn(16, 64).to(dtype), torch.randn(64, 32).to(dtype)
    left[0, 0], left[1] = 3e4, 1e-3
    start = torch.randn(16, 32)
    got = start.clone()
    multiply[(1,)](left, right, got, 16, 64, 32)
    truth = start.double() + left.double() @ right.double()
    limit = 1e-6 * (left.double().abs() @ right.double().abs() + start.abs())
    assert ((got - truth).abs() <= limit).all()


def test_products_keep_what_is_not_finite():
    left, right = torch.ones(16, 16, dtype=torch.bfloat16), torch.eye(16, dtype=torch.bfloat16)
    left[0, 0], left[1, 1], left[2, 2] = float("nan"), float("inf"), -1e-40
    got = torch.zeros(16, 16)
    multiply[(1,)](left, right, got, 16, 16, 16)
    assert_same(got, left.float() @ right.float())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_reductions(dtype):
    numbers = torch.randn(64).to(dtype)
    got = torch.empty(2)
    reduce[(1,)](numbers, got, 64)
    assert got[0] == numbers.max()
    torch.testing.assert_close(got[1], numbers.float().sum(), rtol=2e-2, atol=2e-2)


def test_a_single_process_interprets_the_functions_of_triton_too():
    """No process before it, as those of pytest-xdist have, has asked for the interpreter."""
    script = "import tests.conftest, triton.language.standard as s; print(type(s.sum).__name__)"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).resolve().parents[1],
        env={n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "InterpretedFunction\n", done.stderr
