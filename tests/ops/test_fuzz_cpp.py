"""Random problems of the C++ kernels, in every instruction set that this machine runs.

NLKERNELS_TEST_SEED=S starts at problem S; a failure prints the problem and its seed.
"""

import dataclasses
import os
import random

import pytest
import torch

from nlkernels import _ext
from tests.helpers import SHORT, Case, assert_not_worse
from tests.ops import cpp_attention, staged
from tests.ops.cpp_attention import ISAS, WAYS, needs_compiler

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


# Operation -> (draw, dtype, seed) -> what fuzz_attention returns.
OPERATIONS = {"attention": fuzz_attention}


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
    isa, operation = draw.choice(isas), draw.choice(list(OPERATIONS))
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
