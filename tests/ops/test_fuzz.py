"""Random problems: sizes, dtypes, layouts, scales and workspaces that nobody thought of."""

import os
import random

import pytest

from nlkernels import nonlocal_attention
from tests.helpers import SERVED, SHORT, Case, assert_not_worse, operands, results

FIRST = int(os.environ.get("NLKERNELS_TEST_SEED", "0"))
SIZES = [1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 65, 100, 127, 196, 260]


def problem(seed):
    """Everything about a random call, from one number."""
    draw = random.Random(seed)
    kind, backend = draw.choice(SERVED)
    depth = draw.choice(SIZES)
    case = Case(
        batch=draw.choice([1, 1, 2, 3, 9]),
        queries=draw.choice([*SIZES, 500]),
        keys=draw.choice([*SIZES, 500]),
        depth=depth,
        value_depth=draw.choice([depth, depth, draw.choice(SIZES)]),
    )
    options = {
        "kind": kind,
        "scale": draw.choice([None, None, 0.0, 0.3, -0.5]),
        "workspace_mib": draw.choice([None, 0, 0.01, 0.3]),
    }
    return case, draw.choice(list(SHORT)), backend, options, draw.choice(["rows", "channels"])


@pytest.mark.gate
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("seed", range(FIRST, FIRST + 400))
def test_random_problem_is_not_worse_than_pytorch(seed, device):
    case, dtype, backend, options, layout = problem(seed)
    tensors = operands(case, dtype, device, seed=seed)
    if layout == "channels":
        tensors = [t.mT.contiguous().mT for t in tensors]
    reference = {**options, "backend": "reference"}
    truth = results(lambda *t: nonlocal_attention(*t, **reference), [t.double() for t in tensors])
    same = results(lambda *t: nonlocal_attention(*t, **reference), tensors)
    got = results(lambda *t: nonlocal_attention(*t, **options, backend=backend), tensors)
    for name in truth:
        described = f"{name} of {case} {SHORT[dtype]} {backend} {options} {layout}"
        factor = 2 if name == "out" else 3
        assert_not_worse(described, got[name], same[name], truth[name], factor)
