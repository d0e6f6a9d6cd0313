"""Random problems of the C++ kernels, in every instruction set that this machine runs.

NLKERNELS_TEST_SEED=S starts at problem S; a failure prints the problem and its seed.
"""

import dataclasses
import os
import random

import pytest
import torch

from nlkernels import _ext
from nlkernels.ops.gate import suite as gate_suite
from tests import concat
from tests.helpers import SHORT, Case, assert_not_worse
from tests.ops import cpp_attention, staged, test_concat, test_gate, test_region
from tests.ops.cpp_attention import WAYS, needs_compiler
from tests.ops.isas import ISAS

pytestmark = [needs_compiler, pytest.mark.gate, pytest.mark.usefixtures("poison")]

FIRST = int(os.environ.get("NLKERNELS_TEST_SEED", "0"))
SIZES = [1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 48, 64, 65, 100, 127, 196, 260]


def fuzz_attention(draw: random.Random, dtype: torch.dtype, seed: int) -> tuple:
    """Description, results, those of the definition in the same dtype, and those in float64."""
    way, layout = draw.choice(list(WAYS)), draw.choice(["dense", *staged.LAYOUTS])
    sizes = SIZES if dtype != torch.float16 else SIZES[:13]
    depth, value_depth = (draw.choice([*SIZES, draw.randrange(1, 600)]) for _ in range(2))
    positions = [draw.choice([*sizes, draw.randrange(1, 5 * sizes[-1])]) for _ in range(2)]
    case = Case(draw.choice([1, 2, 3, 40]), *positions, depth, value_depth)
    if case.batch == 40:
        case = Case(40, positions[0] % 40 + 1, positions[1] % 40 + 1, depth % 70 + 1, value_depth)
    # Enough numbers that the errors of PyTorch's own are not small by luck.
    numbers = min(case.queries, case.keys) * min(case.depth, case.value_depth)
    case = dataclasses.replace(case, batch=max(case.batch, -(-256 // numbers)))
    scale = draw.choice([cpp_attention.scale_of(way, depth), 0.0, 0.3, -0.5])
    workspace_mib, count = draw.choice([None, 0, 0.01, 0.3, 1e6]), draw.choice([1, 2, 2, 3])
    tensors = cpp_attention.made(case, dtype, seed)
    moved = tensors if layout == "dense" else [staged.LAYOUTS[layout](t) for t in tensors]
    with cpp_attention.threads(count):
        got = cpp_attention.run(way, moved, scale, workspace_mib)
    described = f"{way} {case} {layout} scale={scale:.3g} {workspace_mib=} threads={count}"
    same = cpp_attention.naive(way, tensors, scale)
    return described, got, same, cpp_attention.truth(way, tensors, scale)


def fuzz_region(draw: random.Random, dtype: torch.dtype, seed: int) -> tuple:
    """As `fuzz_attention`. Beside the definition in float32, rounded, as in test_region."""
    kernel = tuple(draw.choice([1, 3, 3, 5, 7, 7, 9]) for _ in range(3))
    kernel = draw.choice([(3, 7, 7), (3, 3, 3), kernel])
    frames, height, width = (draw.randrange(1, most) for most in (7, 31, 34))
    shape = (draw.choice([1, 2, 3]), draw.choice([5, 8, 16, 17, 33, 70]), frames, height, width)
    how = draw.choice([*test_region.FORMATS, *test_region.LAYOUTS])
    x, weight, grad = normal(seed, shape, (shape[1], *kernel), shape)
    tensors = [t.to(dtype) for t in (x, weight, grad)]
    if how in test_region.FORMATS:
        memory_format = test_region.FORMATS[how]
        given = [tensors[0].contiguous(memory_format=memory_format), *tensors[1:]]
    else:
        given = [test_region.moved(tensors[0], how), *tensors[1:]]
    count = draw.choice([1, 2, 2, 3])
    wide = torch.promote_types(dtype, torch.float32)
    same = test_region.results(test_region.run("reference"), *(t.to(wide) for t in tensors))
    exact = test_region.results(test_region.run("reference"), *(t.double() for t in tensors))
    with cpp_attention.threads(count):
        got = test_region.results(test_region.run("cpp"), *given)
    same = {name: value.to(dtype) for name, value in same.items()}
    return f"{shape} {kernel} {how} threads={count}", got, same, exact


def fuzz_gate(draw: random.Random, dtype: torch.dtype, seed: int) -> tuple:
    """As `fuzz_attention`."""
    frames, height, width = (draw.randrange(1, most) for most in (7, 31, 34))
    channels = draw.choice([24, 33, 64, 130, 520, draw.randrange(24, 600)])
    shape = (draw.choice([2, 3, 5]), channels, frames, height, width)
    how = draw.choice([*gate_suite.LAYOUTS, *test_gate.PLACES])
    mean, deviation, count = (
        draw.choice([0, 0, 4]),
        draw.choice([0.3, 1, 3]),
        draw.choice([1, 2, 3]),
    )
    x, weight, grad = normal(seed, shape, (channels,), shape[:2])
    tensors = [t.to(dtype) for t in (x + mean, weight * deviation * channels**-0.5, grad)]
    place = gate_suite.laid_out if how in gate_suite.LAYOUTS else test_gate.moved
    given = [place(tensors[0], how), *tensors[1:]]
    same = test_gate.results(test_gate.run("reference"), *tensors)
    exact = test_gate.results(test_gate.run("reference"), *(t.double() for t in tensors))
    with cpp_attention.threads(count):
        got = test_gate.results(test_gate.run("cpp"), *given)
    return f"{shape} {how} {mean=} {deviation=} threads={count}", got, same, exact


def fuzz_concat(draw: random.Random, dtype: torch.dtype, seed: int) -> tuple:
    """As `fuzz_attention`."""
    queries, keys = (draw.choice([*SIZES, draw.randrange(1, 1300)]) for _ in range(2))
    batch, depth = draw.choice([1, 2, 3]), draw.choice([*SIZES, draw.randrange(1, 600)])
    # Enough numbers that the errors of PyTorch's own are not small by luck.
    batch = max(batch, -(-256 // (min(queries, keys) * min(depth, 8))))
    shift, step = draw.choice([0, 0, 3, -3]), draw.choice([0, 0, 0.5, 4])
    how, count = draw.choice(["dense", "transposed", "sliced"]), draw.choice([1, 2, 3])
    drawn = normal(
        seed, (batch, queries), (batch, keys), (batch, keys, depth), (batch, queries, depth)
    )
    drawn[0] += shift
    if step:
        drawn[:2] = [(t / step).round() * step for t in drawn[:2]]
    tensors = [t.to(dtype) for t in drawn]
    given = tensors if how == "dense" else [test_concat.moved(t, how) for t in tensors]
    with cpp_attention.threads(count):
        got = concat.results(concat.run("cpp"), *given)
    sizes = (batch, queries, keys, depth)
    exact = concat.naive(*(t.double() for t in tensors))
    return f"{sizes} {how} {shift=} {step=} threads={count}", got, concat.naive(*tensors), exact


def normal(seed: int, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    """Normal numbers in float64."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


# Operation -> (draw, dtype, seed) -> what fuzz_attention returns.
OPERATIONS = {
    "attention": fuzz_attention,
    "region": fuzz_region,
    "gate": fuzz_gate,
    "concat": fuzz_concat,
}


@pytest.fixture(scope="module")
def isas():
    found = []
    with pytest.MonkeyPatch.context() as context:
        for isa in ISAS:
            context.setenv("NLKERNELS_CPU_ISA", isa)
            found += [isa] * (not _ext.missing())
    return found


@pytest.mark.parametrize("seed", range(FIRST, FIRST + 1000))
def test_random_problem_is_not_worse_than_pytorch(seed, isas, monkeypatch):
    draw = random.Random(seed)
    isa = draw.choice(isas)
    # Half of the problems are of attention, which has four orders of products.
    operation = draw.choice(["attention"] * 3 + list(OPERATIONS))
    dtype = draw.choice(list(SHORT))
    monkeypatch.setenv("NLKERNELS_CPU_ISA", isa)
    described, got, same, exact = OPERATIONS[operation](draw, dtype, seed)
    for name, value in exact.items():
        assert_not_worse(
            f"NLKERNELS_TEST_SEED={seed}: {name} of {operation} {SHORT[dtype]} {isa} {described}",
            got[name],
            same[name],
            value,
            2 if name == "out" else 3,
        )
