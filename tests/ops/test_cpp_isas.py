"""The C++ attention kernels in every instruction set that this machine runs.

Each set is compiled by itself, as nobody has a build of all of them: a minute the first time.
"""

import math

import pytest
import torch

from tests.helpers import SHORT, Case
from tests.ops import isas
from tests.ops.cpp_attention import (
    DTYPES,
    WAYS,
    assert_equal,
    judge,
    made,
    needs_compiler,
    run,
    scale_of,
    threads,
    truth,
)

pytestmark = [needs_compiler, pytest.mark.gate, pytest.mark.usefixtures("poison", "isa")]

# Tails of vectors of every width, of tiles and of panels; two and more parts of the depth.
CASES = [
    Case(16, 1, 1, 1, 64),
    Case(3, 17, 5, 3, 40),
    Case(2, 63, 65, 129, 7),
    Case(1, 127, 31, 40, 257),
    Case(1, 65, 1037, 16, 80),
    Case(1, 300, 49, 513, 33),
    # Rows that would lie whole ways of a cache apart, of operands and of scores; strides that do
    # not grow with the depth.
    Case(1, 200, 196, 2048, 16),
    Case(1, 200, 196, 16, 2048),
    Case(1, 197, 96, 2064, 1024),
    Case(1, 75, 2048, 24, 20),
]


@pytest.fixture(params=isas.ISAS, scope="module")
def isa(request):
    with pytest.MonkeyPatch.context() as context:
        isas.use(request.param, context)
        yield request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=list(SHORT.values()))
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("way", list(WAYS))
def test_not_worse_than_pytorch(way, case, dtype):
    tensors, scale = made(case, dtype), scale_of(way, case.depth)
    judge(run(way, tensors, scale), way, tensors, scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=list(SHORT.values()))
@pytest.mark.parametrize("way", list(WAYS))
def test_layouts_threads_and_workspaces_change_no_bit(way, dtype):
    tensors = made(Case(2, 200, 33, 40, 24), dtype)
    first = run(way, tensors, 0.3)
    for count, workspace_mib in ((1, 0), (3, 0.3)):
        with threads(count):
            assert_equal(run(way, tensors, 0.3, workspace_mib), first)
    assert_equal(run(way, [t.mT.contiguous().mT for t in tensors], 0.3), first)


@pytest.mark.parametrize("dtype", DTYPES, ids=list(SHORT.values()))
@pytest.mark.parametrize("operand", range(4), ids=["query", "key", "value", "grad"])
@pytest.mark.parametrize("way", list(WAYS))
def test_a_bad_number_reaches_exactly_what_depends_on_it(way, operand, dtype):
    tensors = made(Case(2, 45, 39, 17, 21), dtype)
    clean = run(way, tensors, 0.3)
    tensors[operand][1, 36, 9] = math.nan
    dirty, exact = run(way, tensors, 0.3), truth(way, tensors, 0.3)
    for name, value in exact.items():
        assert torch.equal(dirty[name].isnan(), value.isnan()), name
        assert torch.equal(dirty[name][0], clean[name][0]), name
