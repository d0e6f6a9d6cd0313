"""A kernel that hangs or crashes while it is verified is refused, and the program goes on."""

import sys
import time
from types import SimpleNamespace

import pytest
import torch

import nlkernels
from nlkernels import _build_cuda, _cache, _cuda, _isolated, _launch, _select, _trust
from nlkernels._build import Compiler
from tests import fake_backend, fake_isolated
from tests.fake_backend import SMALL

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def operations(tmp_path, monkeypatch):
    """The operations of `fake_isolated`, here and in the children; a cache of its own."""
    monkeypatch.setenv("NLKERNELS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("NLKERNELS_TEST_CHILD", "1")
    fake_backend.forget()
    fake_isolated.register(monkeypatch.setitem, monkeypatch.setattr)
    yield
    fake_backend.forget()
    assert _isolated._child is None, "no process stays behind"


ENDINGS = {
    "never starts": "raise SystemExit('no such library')",
    "hangs": "import time; print('ready', flush=True); input(); time.sleep(600)",
    "killed": "import os; print('ready', flush=True); input(); os.kill(os.getpid(), 9)",
    "exits": "print('ready', flush=True); input(); raise SystemExit(3)",
}


def ends(monkeypatch, ending: str) -> None:
    """Children end in this way, and are given a second."""
    monkeypatch.setattr(_isolated, "COMMAND", (sys.executable, "-c", ENDINGS[ending]))
    monkeypatch.setattr(_isolated, "LIMIT_S", 1.0)


def verdicts() -> dict[tuple[str, str], str]:
    rows = _cache.section(CPU)["verdicts"].values()
    return {(row["op"], row["pass"]): row["reason"] for row in rows}


@pytest.fixture
def started(monkeypatch) -> list[_isolated._Child]:
    """The children that are started from now on."""
    children = []
    monkeypatch.setattr(
        _isolated, "_Child", lambda make=_isolated._Child: children.append(make()) or children[-1]
    )
    return children


def test_right_wrong_and_crashing_kernels(started, tmp_path, monkeypatch):
    """The first child serves until it has to refuse a kernel."""
    # A folder of that name where the program happens to be is not its package.
    (tmp_path / "nlkernels").mkdir()
    (tmp_path / "nlkernels" / "__init__.py").write_text("raise SystemExit('another one')")
    monkeypatch.chdir(tmp_path)

    def verify(op, direction="forward"):
        return _trust.verify(op, "cuda", (16, 16), torch.float32, direction, CPU)

    with _isolated.kept():
        assert [verify("right"), verify("right", "backward")] == ["", ""] and len(started) == 1
        with pytest.warns(RuntimeWarning, match="'cuda' of stretches .* switched off here"):
            assert "out max error" in verify("stretches")
        with pytest.warns(RuntimeWarning, match="'cuda' of aborts .* switched off here"):
            assert verify("aborts").endswith(
                "it ended the process that tried it, signal SIGABRT: said before its end; "
                "nlk verify --op aborts --backend cuda tries it again"
            )
        assert verify("aborts", "backward") == "", "without its own forward"
    assert len(started) == 3 and len(verdicts()) == 5
    operands = [torch.randn(2, n, 16) for n in (9, 7, 7)]
    with pytest.raises(NotImplementedError, match=r"signal SIGABRT.*use backend='auto'"):
        _select.module("aborts", "cuda", "forward", *operands)


def test_a_child_multiplies_as_the_program_does(monkeypatch):
    class Child:
        answer = staticmethod(lambda case: _isolated._answer(case)["reason"])
        end = staticmethod(lambda: None)

    matmul = torch.backends.cuda.matmul
    monkeypatch.setattr(_isolated, "_Child", Child)
    monkeypatch.setattr(_trust, "judge", lambda *case: matmul.fp32_precision)
    before = matmul.fp32_precision
    try:
        for precision in ("tf32", "ieee"):
            matmul.fp32_precision = precision
            case = ("right", "cuda", (16, 16), torch.float32, "forward", CPU)
            assert _isolated.judge(*case) == precision
    finally:
        matmul.fp32_precision = before


@pytest.mark.parametrize(
    ("ending", "part"),
    [
        ("hangs", "it did not come back within 1 s; nlk verify --op right --backend cuda tries"),
        ("killed", "it ended the process that tried it, signal SIGKILL; nlk verify"),
        ("exits", "it ended the process that tried it, exit code 3; nlk verify"),
    ],
)
def test_a_child_that_ends_is_a_refusal(ending, part, monkeypatch, started):
    ends(monkeypatch, ending)
    begun = time.monotonic()
    with pytest.warns(RuntimeWarning, match="the forward of backend 'cuda' of right failed"):
        assert _select.choose("right", SMALL) == "chunked"
    assert time.monotonic() - begun < 20
    assert part in verdicts()["right", "forward"]
    assert _select.choose("right", SMALL) == "chunked" and len(started) == 1, "not tried again"
    assert started[0]._process.poll() is not None
    with _trust.held():
        assert part in _select.explain("right", SMALL, "auto").reasons["cuda"]


def test_a_child_that_cannot_start_is_no_verdict(monkeypatch):
    ends(monkeypatch, "never starts")
    assert _select.choose("right", SMALL) == "chunked" and not verdicts()
    with pytest.raises(_trust.CannotJudge, match="did not start: exit code 1: no such library"):
        _isolated.judge("right", "cuda", (16, 16), torch.float32, "forward", CPU)
    monkeypatch.setattr(_isolated, "COMMAND", ("/no/such/python",))
    with pytest.raises(_trust.CannotJudge, match="no process could be started"):
        _isolated.judge("right", "cuda", (16, 16), torch.float32, "forward", CPU)


def test_an_operation_that_a_new_process_does_not_know_is_no_verdict():
    answer = _isolated._answer({"op": "of another process", "suite": ""})
    assert not answer["judged"] and "does not know of another process" in answer["reason"]


def test_warmup_times_only_what_a_child_found_right(monkeypatch):
    ends(monkeypatch, "hangs")

    class Model(torch.nn.Module):
        def forward(self, x):
            _select.module("right", "chunked", "forward", x, x, x)
            return x

    with pytest.warns(RuntimeWarning, match="did not come back"):
        (entry,) = nlkernels.warmup(Model(), (1, 9, 16), backward=False).entries
    assert "did not come back" in entry.verdicts["cuda forward"]
    assert "chunked" in entry.ms["forward"] and "cuda" not in entry.ms["forward"]


def test_another_compiler_verifies_again(monkeypatch):
    judged = []
    monkeypatch.setattr(_isolated, "judge", lambda *case: judged.append(case) or "")
    for release, count in (("13.0", 1), ("13.0", 1), ("13.1", 2), ("13.0", 2)):
        monkeypatch.setattr(_cuda, "toolkit", lambda device, release=release: release)
        assert _select.choose("right", SMALL) == "cuda" and len(judged) == count


def test_the_compiler_of_a_module_and_of_one_that_is_not_compiled_yet(monkeypatch):
    gpu, loaded = torch.device("cuda", 0), []
    monkeypatch.setattr(_launch, "architecture", lambda device: 90)
    monkeypatch.setattr(_cuda.CUDA, "missing", lambda asked: "")
    monkeypatch.setattr(_cuda.CUDA, "is_loaded", lambda asked: bool(loaded))
    monkeypatch.setattr(_cuda.CUDA, "load", lambda asked: loaded[0])
    monkeypatch.setattr(_build_cuda, "find_nvcc", lambda homes: Compiler(("nvcc",), ""))
    monkeypatch.setattr(_build_cuda, "_release", lambda program: (12, 9))
    assert _cuda.toolkit(gpu) == "12.9"
    loaded.append(SimpleNamespace(runtime_version=lambda: 13010))
    assert _cuda.toolkit(gpu) == "13.1"
    monkeypatch.setattr(_cuda.CUDA, "missing", lambda asked: "no nvcc")
    assert _cuda.toolkit(gpu) == _cuda.toolkit(CPU) == "none"
