"""1000 random problems over all operations and the backends that are here.

Sizes, dtypes, layouts, scales, windows and workspaces that nobody thought of. Without a GPU,
kernels of Triton run in its interpreter and those of CUDA in their emulation, on small problems. A
failure prints the problem, its seed and the line that runs it alone.
"""

import os
import random

import pytest

from nlkernels import _cuda
from nlkernels._ext import ExtensionError
from tests.cuda import emulated
from tests.ops import fuzz

FIRST = int(os.environ.get("NLKERNELS_TEST_SEED", "0"))
BACKENDS = ["chunked"] * 3 + ["cpp"] * 5 + ["sdpa", "triton"] + ["cuda"] * 3
OPERATIONS = [*fuzz.TRIALS, *["nonlocal_attention", "block"] * 2]


def drawn(seed: int, device: str) -> fuzz.Drawn:
    """The problem of a seed; plain PyTorch takes the place of a backend that does not serve it."""
    draw = random.Random(seed)
    name, backend = draw.choice(OPERATIONS), draw.choice(BACKENDS)
    if name == "nonlocal_attention":
        return fuzz.of_function(draw, draw.choice(["chunked", "auto"]), device)
    if name == "block":
        return fuzz.of_block(draw, draw.choice(["chunked", "cpp", "auto"]), device)
    found = fuzz.of_operation(draw, name, backend, device)
    return found or fuzz.of_operation(draw, name, "chunked", device)


@pytest.fixture(scope="module")
def emulation():
    """CUDA kernels run on CPU tensors, where there is no GPU and a compiler."""
    if _cuda.CUDA.missing() == "":
        yield
        return
    try:
        emulated.module()
    except ExtensionError:
        yield
        return
    with emulated.emulation():
        yield


@pytest.mark.gate
@pytest.mark.usefixtures("poison", "emulation")
@pytest.mark.parametrize("seed", range(FIRST, FIRST + 1000))
def test_random_problem_is_not_worse_than_pytorch(seed, device):
    problem = drawn(seed, device)
    try:
        problem.check()
    except Exception as error:
        raise AssertionError(
            f"{problem.described}\nrun it alone: NLKERNELS_TEST_SEED={seed} python -m pytest "
            f'"tests/ops/test_fuzz.py::{NAME}[{device}-{seed}]"\n{error}'
        ) from error


NAME = test_random_problem_is_not_worse_than_pytorch.__name__
