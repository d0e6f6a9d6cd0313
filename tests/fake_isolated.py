"""Operations whose backend "cuda" is verified in a process of its own, on CPU tensors.

Importing this registers them, as the child of `nlkernels._isolated` does: it is their suite, too.
"""

import os
import sys
from types import SimpleNamespace

from nlkernels import _device, _operations
from nlkernels.ops.softmax import chunked
from nlkernels.ops.softmax.suite import *  # noqa: F403
from nlkernels.ops.softmax.suite import Trial
from tests import fake_backend


def large(head):
    return ()


def trials(head):
    return (Trial(1, 20, 24, *head),) * 2


def aborts() -> SimpleNamespace:
    def forward(*arguments):
        print("said before its end", file=sys.stderr, flush=True)
        os.abort()

    return SimpleNamespace(forward=forward, backward=chunked.backward)


def stretches() -> SimpleNamespace:
    def wrong(query, key, value, scale):
        print("noise of a kernel", flush=True)
        return chunked.forward(query, key, value, scale * 1.1)

    return fake_backend.forward_only(wrong)


BACKENDS = {"right": fake_backend.right, "aborts": aborts, "stretches": stretches}


def register(setitem=dict.__setitem__, setattr=setattr, suite=__name__) -> None:
    """Register every operation by the name of what its backend does."""
    for name, backend in BACKENDS.items():
        whole = fake_backend.operation(backend())
        inside = {"chunked": chunked, "cuda": whole.inside["triton"]}
        row = {"dtypes": fake_backend.DTYPES, "order": ("cuda", "chunked"), "because": "in a test"}
        operation = whole._replace(
            backends=("reference", "chunked", "cuda"),
            inside=inside,
            table={"cpu": (row,)},
            suite=suite,
        )
        setitem(_operations.OPERATIONS, name, operation)
    setattr(_device, "MEASURED", ("cpu",))


if os.environ.get("NLKERNELS_TEST_CHILD") == "1":
    register()
