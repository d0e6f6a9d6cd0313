"""Nothing is compiled for these tests: backends have their own."""

import pytest


@pytest.fixture(autouse=True)
def plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NLKERNELS_BACKEND", "chunked")
