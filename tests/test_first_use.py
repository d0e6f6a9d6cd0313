"""The first use of a kernel verifies it, whatever the program around the call is doing."""

import subprocess
import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import nlkernels
from nlkernels import _cache, _launch, _operations, _paths, _select, _trust, nonlocal_attention
from nlkernels.ops.softmax import chunked, suite
from tests import fake_backend
from tests.fake_backend import SMALL

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own, and few problems to verify with."""
    monkeypatch.setenv("NLKERNELS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(suite, "large", lambda head: ())
    monkeypatch.setattr(suite, "trials", lambda head: (suite.Trial(1, 20, 24, *head),) * 2)
    fake_backend.forget()
    yield tmp_path / "cache"
    fake_backend.forget()


@pytest.fixture
def softmax(monkeypatch):
    """Softmax attention with a backend "triton" that is right and never was verified."""
    fake_backend.install(fake_backend.right, monkeypatch.setitem, monkeypatch.setattr)
    fake = _operations.OPERATIONS["fake"]._replace(suite=suite)
    monkeypatch.setitem(_operations.OPERATIONS, "softmax", fake)
    return fake.inside["triton"]


def train(query: torch.Tensor) -> torch.Tensor:
    return nonlocal_attention(query, query * 2, query + 1)


def verdicts() -> dict[str, str]:
    """Pass -> what is wrong, of all that was verified."""
    return {row["pass"]: row["reason"] for row in _cache.section(CPU)["verdicts"].values()}


RIGHT = {"forward": "", "backward": ""}


@pytest.mark.parametrize("reentrant", [False, True])
def test_within_a_checkpoint(softmax, reentrant):
    query = torch.randn(2, 9, 16, requires_grad=True)
    checkpoint(train, query, use_reentrant=reentrant).sum().backward()
    assert verdicts() == RIGHT


def test_hooks_of_saved_tensors_see_those_of_the_program_alone(softmax):
    counts = []
    for _ in range(2):
        packed = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, packed=packed: (packed.append(None), t)[1], lambda t: t
        ):
            train(torch.randn(2, 9, 16, requires_grad=True)).sum().backward()
        counts.append(len(packed))
    assert verdicts() == RIGHT and counts[0] == counts[1]


def test_with_another_default_device(softmax):
    with torch.device("meta"):
        assert _select.choose("softmax", SMALL, direction="training") == "triton"


def test_where_the_new_switch_of_float32_precision_was_set(softmax):
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for value, label in (("tf32", "float32 tf32"), ("ieee", "float32 tf32x3")):
            torch.backends.cuda.matmul.fp32_precision = value
            train(torch.randn(2, 9, 16))
            assert label in {row["dtype"] for row in _cache.section(CPU)["verdicts"].values()}
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("no memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
        OSError(28, "No space left on device"),
        subprocess.CalledProcessError(1, "gcc"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_is_missing_on_the_machine_is_no_verdict(error, softmax, monkeypatch):
    def fails(*arguments):
        raise error

    monkeypatch.setattr(softmax, "forward", fails)
    judge, judged = _trust.judge, []
    monkeypatch.setattr(_trust, "judge", lambda *a: (judged.append(None), judge(*a))[1])
    for _ in range(2):
        assert _select.choose("softmax", SMALL) == "chunked"
    assert not verdicts() and len(judged) == 1, "asked once in a process"


def test_a_backend_that_cannot_be_imported_is_no_error(softmax, monkeypatch):
    broken = {"chunked": chunked, "triton": "nlkernels.no_such_module"}
    operation = _operations.OPERATIONS["softmax"]._replace(inside=broken)
    monkeypatch.setitem(_operations.OPERATIONS, "softmax", operation)
    assert train(torch.randn(2, 9, 16)).shape == (2, 9, 16)
    assert not verdicts()


def test_memory_that_runs_out_while_results_are_compared_is_no_verdict(softmax, monkeypatch):
    def fails(*arguments):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(_trust._rule, "excess", fails)
    assert _select.choose("softmax", SMALL) == "chunked" and not verdicts()


def test_threads_that_wait_for_each_other_go_on(softmax, monkeypatch):
    """Autograd's thread may need the verdict that waits for autograd."""
    monkeypatch.setattr(_trust, "_PATIENCE_S", 0.05)
    chosen = []

    def run() -> None:
        chosen.append(_select.choose("softmax", SMALL))
        options = {"device": "cpu", "dtypes": [torch.float32], "depths": [(16, 16)]}
        chosen.extend(check.verdict for check in nlkernels.verify("softmax", **options).checks)

    with _trust._lock:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join(timeout=60)
    assert chosen == ["chunked", "not checked", "not checked"]
    assert _select.choose("softmax", SMALL) == "triton", "asked again later"


def test_devices_of_a_machine_are_judged_each(monkeypatch):
    monkeypatch.setattr(_launch, "installed", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(_launch, "_capability", lambda index: (90, 75)[index])
    problem = SMALL._replace(device="cuda")
    reasons = [
        _operations.OPERATIONS["softmax"].supports("triton", problem._replace(index=index))
        for index in (None, 0, 1)
    ]
    assert reasons == [[], [], ["its kernels need compute capability 8.0, this GPU has 7.5"]]


def test_a_machine_without_any_folder_to_write_to(tmp_path, monkeypatch):
    def nowhere():
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(_paths.tempfile, "gettempdir", nowhere)
    (tmp_path / "file").touch()
    monkeypatch.setenv("NLKERNELS_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert _paths.cache_dirs() == [tmp_path / "file" / "cache"]


def test_a_home_of_somebody_else(tmp_path, monkeypatch):
    def refuses(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(_paths.Path, "exists", refuses)
    assert _paths.cache_dirs() == [tmp_path / "cache"]
