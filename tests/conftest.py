"""Fixtures of all tests: devices, seeds and poisoned memory."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

# Before Triton is imported: without a GPU, its kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from nlkernels import _launch
from nlkernels.modules import choice
from tests import interpreter

# Native code, compiled once for all runs of the tests in this checkout; `make clean` removes it.
COMPILED = Path(__file__).resolve().parents[1] / "build" / "ext"

# Blocks of tests are small, and run what large inputs run, unless a test asks for `as_measured`.
MEASURED, choice.TABLE = choice.TABLE, {}

if _launch.interpreting():
    interpreter.mend()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        choices=("all", "cpu", "cuda"),
        default="all",
        help="device of the tests that take one; all = the CPU, and a GPU when there is one",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Before any test is collected: its own cache; its share of the processors.

    Tests neither read nor write what was measured and verified on this machine. The cache's folder
    `ext` leads to what was compiled before.
    """
    cache = Path(tempfile.mkdtemp(prefix="nlkernels-tests-"))
    config.add_cleanup(lambda: shutil.rmtree(cache, ignore_errors=True))
    if _can_be_made(COMPILED):
        (cache / "ext").symlink_to(COMPILED, target_is_directory=True)
    os.environ["NLKERNELS_CACHE_DIR"] = str(cache)
    if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
        count = max(1, torch.get_num_threads() // workers)
        torch.set_num_threads(count)
        os.environ.setdefault("OMP_NUM_THREADS", str(count))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        asked = metafunc.config.getoption("--device")
        present = ["cpu"] + ["cuda"] * torch.cuda.is_available()
        if metafunc.module.__name__.split(".")[-1].startswith("test_triton"):
            present = present[-1:]  # beside a GPU, kernels are compiled, and run nowhere else
        metafunc.parametrize("device", present if asked == "all" else [asked])


@pytest.fixture
def as_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small inputs go layer after layer, as they do where no tests run."""
    monkeypatch.setattr(choice, "TABLE", MEASURED)


def _can_be_made(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


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
