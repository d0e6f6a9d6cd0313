"""Fixtures of all tests: devices, seeds and poisoned memory."""

import os

import pytest
import torch

from nlkernels import _launch
from tests import interpreter

# Before any kernel is defined: without a GPU, Triton's kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
if _launch.interpreting():
    interpreter.mend()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        choices=("all", "cpu", "cuda"),
        default="all",
        help="device of the tests that take one; all = the CPU, and a GPU when there is one",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        asked = metafunc.config.getoption("--device")
        present = ["cpu"] + ["cuda"] * torch.cuda.is_available()
        if metafunc.module.__name__.split(".")[-1].startswith("test_triton"):
            present = present[-1:]  # beside a GPU, kernels are compiled, and run nowhere else
        metafunc.parametrize("device", present if asked == "all" else [asked])


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory):
    """Tests neither read nor write what was measured and verified on this machine."""
    with pytest.MonkeyPatch.context() as context:
        context.setenv("NLKERNELS_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random numbers for a test whichever tests run before it."""
    torch.manual_seed(0)


@pytest.fixture
def repeatable():
    """torch's deterministic mode; what cannot be repeated warns."""
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(was)


@pytest.fixture
def poison():
    """Fill memory that torch leaves uninitialised with NaN, so that reading it shows."""
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan().all(), "torch no longer poisons uninitialised memory"
    yield
    torch.use_deterministic_algorithms(was)
