"""Fixtures of all tests: devices, seeds and poisoned memory."""

import pytest
import torch


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
        metafunc.parametrize("device", present if asked == "all" else [asked])


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
