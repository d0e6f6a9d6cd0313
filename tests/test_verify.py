"""A wrong kernel is caught, switches itself off, says so, and stays off; a right one runs."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import nlkernels
from nlkernels import (
    _cache,
    _device,
    _launch,
    _operations,
    _select,
    _trust,
    cli,
    nonlocal_attention,
)
from nlkernels.ops.softmax import suite
from tests import fake_backend
from tests.fake_backend import SMALL

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own."""
    monkeypatch.setenv("NLKERNELS_CACHE_DIR", str(tmp_path / "cache"))
    fake_backend.forget()
    yield tmp_path / "cache"
    fake_backend.forget()


@pytest.fixture
def install(monkeypatch):
    """Register a fake operation with a backend of the test's choice."""

    def register(backend):
        fake_backend.install(backend, monkeypatch.setitem, monkeypatch.setattr)

    return register


def judged(monkeypatch) -> list[str]:
    """Names of the passes that are verified from now on."""
    passes, judge = [], _trust.judge
    monkeypatch.setattr(_trust, "judge", lambda *a: (passes.append(a[4]), judge(*a))[1])
    return passes


WRONG = {
    "forgets_a_key_tile": ("forward", "out max error", "M=1031"),
    "d_key_without_scale": ("backward", "d_key max error", "same-dtype PyTorch"),
    "ignores_the_sign_of_scale": ("forward", "out max error", "scale<0"),
    "wrong_where_keys_fill_their_tiles": ("forward", "out max error", "M=256"),
    "wrong_for_channel_first": ("forward", "out max error", "channel-first"),
    "drops_the_last_channel": ("forward", "out max error", "D=13"),
    "keeps_wrong_statistics": ("backward", "d_query", "same-dtype PyTorch"),
    "wrong_in_another_configuration": ("forward", "out", "configuration 1"),
    "not_repeatable": ("forward", "out differs between two runs", "float32"),
    "raises": ("forward", "RuntimeError: misaligned address", "float32"),
    "leaves_a_row_unwritten": ("forward", "out max error nan", "float32"),
}


@pytest.mark.parametrize(("name", "expected"), WRONG.items(), ids=WRONG)
def test_a_wrong_kernel_switches_itself_off(name, expected, install, monkeypatch):
    install(getattr(fake_backend, name))
    direction, *parts = expected
    with pytest.warns(RuntimeWarning, match="switched off here") as caught:
        assert _select.choose("fake", SMALL, direction=direction) == "chunked"
    assert len(caught) == 1
    passes = judged(monkeypatch)
    assert _select.choose("fake", SMALL, direction=direction) == "chunked" and not passes
    reason = _select.explain("fake", SMALL, "auto").reasons["triton"]
    assert f"failed verification on {_device.name(torch.device('cpu'))}" in reason
    assert all(part in reason for part in parts)
    tensors = [torch.randn(2, n, 16) for n in (9, 7, 7)]
    with pytest.raises(NotImplementedError, match=r"failed verification.*use backend='auto'"):
        _select.module("fake", "triton", direction, *tensors)
    other = "backward" if direction == "forward" else "forward"
    assert _select.choose("fake", SMALL, direction=other) == "triton"
    assert _select.choose("fake", SMALL, direction="training") == "chunked"


def test_a_right_kernel_is_taken_after_one_verification(install, monkeypatch):
    install(fake_backend.right)
    passes = judged(monkeypatch)
    assert "unverified on this GPU: nlk verify --backend triton" in _standing("chunked")
    for _ in range(2):
        assert _select.choose("fake", SMALL, direction="training") == "triton"
    assert passes == ["forward", "backward"]
    assert _select.choose("fake", SMALL._replace(depth=3, keys=900)) == "triton"
    assert len(passes) == 2, "one verdict for all channels up to 16"
    _select.choose("fake", SMALL._replace(depth=17))
    _select.choose("fake", SMALL._replace(dtype=torch.bfloat16))
    assert len(passes) == 4, "another head size, another dtype"
    assert "shipped defaults" in _standing("triton")


def _standing(chosen: str) -> str:
    """What explain says of the backend triton without verifying it."""
    with _trust.held():
        explanation = _select.explain("fake", SMALL, "auto")
    assert explanation.backend == chosen
    return explanation.reasons["triton"]


def test_precision_of_float32_has_verdicts_of_its_own(install, monkeypatch):
    install(fake_backend.right)
    passes = judged(monkeypatch)
    _select.choose("fake", SMALL)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        _select.choose("fake", SMALL)
    finally:
        torch.set_float32_matmul_precision(before)
    assert len(passes) == 2


def test_nothing_is_verified_while_capturing_or_tracing(install, monkeypatch):
    install(fake_backend.right)
    passes = judged(monkeypatch)
    with monkeypatch.context() as context:
        context.setattr(_launch, "capturing", lambda device: True)
        assert _select.choose("fake", SMALL) == "chunked"
        for refused in (
            lambda: nlkernels.verify("softmax", device="cpu"),
            lambda: nlkernels.warmup(torch.nn.Identity(), (1,)),
        ):
            with pytest.raises(RuntimeError, match="traced or captured"):
                refused()

    def run(query):
        return query * len(_select.choose("fake", SMALL._replace(queries=query.shape[1])))

    _cache.forget()
    compiled = torch.compile(run, fullgraph=True, backend="eager", dynamic=True)
    for queries in (9, 33):
        assert compiled(torch.ones(1, queries))[0, 0] == len("chunked")
    assert not passes and not _cache._by_device
    assert _select.choose("fake", SMALL) == "triton"
    torch.compiler.reset()
    assert compiled(torch.ones(1, 9))[0, 0] == len("triton"), "a verdict in memory is used"


def test_the_callers_modes_do_not_reach_verification(install):
    install(fake_backend.right)
    state = torch.get_rng_state()
    with (
        torch.inference_mode(),
        torch.autocast("cpu", torch.bfloat16),
        FlopCounterMode(display=False) as flops,
    ):
        assert _select.choose("fake", SMALL, direction="training") == "triton"
    assert flops.get_total_flops() == 0
    assert torch.equal(torch.get_rng_state(), state)


def test_want_of_memory_is_no_verdict(install, monkeypatch):
    def fails(*arguments):
        raise torch.OutOfMemoryError("no memory")

    install(fake_backend.right)
    monkeypatch.setattr(_operations.OPERATIONS["fake"].inside["triton"], "forward", fails)
    passes = judged(monkeypatch)
    for _ in range(2):
        assert _select.choose("fake", SMALL) == "chunked"
    assert len(passes) == 1, "asked once in a process"
    assert not _cache.section(torch.device("cpu"))["verdicts"]


def test_a_committed_result_is_trusted(install, monkeypatch):
    install(fake_backend.right)
    entry = {
        "architecture": "sm_90",
        "compiler": f"triton {_device.triton_version()}",
        "sources": _cache.package_hash(),
        "op": "fake",
        "backend": "triton",
        "pass": "forward",
        "dtype": _device.label(torch.float32),
        "head": [16, 16],
    }
    assert _trust._shipped() == [], "no GPU has verified anything yet"
    monkeypatch.setattr(_trust, "_shipped", lambda: [entry])
    passes = judged(monkeypatch)
    assert _select.choose("fake", SMALL) == "triton" and not passes
    _select.choose("fake", SMALL, direction="backward")
    assert passes == ["backward"]
    folders = [_trust.folder(op) for op in ("softmax", "region_aggregate")]
    assert folders == ["ops/softmax", "ops/region"]
    assert len({_cache.package_hash(folder) for folder in (*folders, ".")}) == 3


def test_a_verdict_outlives_the_process_but_not_the_sources(install, cache):
    install(fake_backend.forgets_a_key_tile)
    with pytest.warns(RuntimeWarning):
        _select.choose("fake", SMALL)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.fake_backend", "choose", "right"],
        cwd=ROOT,
        env={**os.environ, "NLKERNELS_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("chunked ['failed verification") and second == "[]"


def test_autotune_off_keeps_verdicts_in_memory_only(install, cache, monkeypatch):
    install(fake_backend.raises)
    monkeypatch.setenv("NLKERNELS_AUTOTUNE", "off")
    with pytest.warns(RuntimeWarning):
        _select.choose("fake", SMALL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _select.choose("fake", SMALL) == "chunked"
    assert not cache.exists()


def test_auto_never_takes_triton_on_a_cpu():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for direction in ("forward", "backward", "training"):
            problem = SMALL._replace(dtype=dtype)
            chosen = _select.choose("softmax", problem, None, direction)
            assert chosen in ("cpp", "sdpa", "chunked")


def test_tritons_kernels_pass_and_one_that_leaves_out_a_key_is_caught(monkeypatch):
    triton = pytest.importorskip("nlkernels.ops.softmax.triton")
    if not _launch.interpreting():
        pytest.skip("kernels are compiled here, not interpreted")
    trial = suite.Trial(1, 20, 24, 16, 16)
    monkeypatch.setattr(suite, "trials", lambda head: (trial,))
    case = ("softmax", "triton", (16, 16), torch.float32)
    for direction in ("forward", "backward"):
        assert _trust.verify(*case, direction, torch.device("cpu")) == ""
    forward = triton.forward
    monkeypatch.setattr(
        triton, "forward", lambda q, k, v, *options: forward(q, k[:, :-1], v[:, :-1], *options)
    )
    with pytest.warns(RuntimeWarning, match="the forward of backend 'triton' of softmax"):
        wrong = _trust.verify(*case, "forward", torch.device("cpu"), again=True)
    assert "out max error" in wrong
    query = torch.randn(1, 9, 16)
    with pytest.raises(NotImplementedError, match="failed verification"):
        nonlocal_attention(query, query, query, backend="triton")


class TestCommand:
    """`nlk verify`, with the fake operation."""

    def run(self, capsys, *arguments):
        code = cli.main(["verify", "--device", "cpu", *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    def test_right(self, install, capsys):
        install(fake_backend.right)
        code, out, _ = self.run(capsys, "--op", "fake", "--depth", "16", "--dtype", "float32")
        assert code == 0 and out.count("\nok ") == 2

    def test_wrong_once_and_mended(self, install, capsys):
        install(fake_backend.d_key_without_scale)
        arguments = ("--op", "fake", "--depth", "16", "--value-depth", "30", "--json")
        code, out, err = self.run(capsys, *arguments)
        verdicts = {(c["direction"], c["verdict"], *c["head"]) for c in json.loads(out)["checks"]}
        assert code == 1 and "switched off" in err
        assert verdicts == {("forward", "ok", 16, 32), ("backward", "failed", 16, 32)}
        install(fake_backend.right)
        assert self.run(capsys, *arguments)[0] == 0, "it verifies again, whatever the cache says"

    def test_nothing_to_check(self, install, capsys, monkeypatch):
        install(fake_backend.right)
        served = _operations.OPERATIONS["fake"]._replace(supports=lambda *_: ["it is Sunday"])
        monkeypatch.setitem(_operations.OPERATIONS, "fake", served)
        code, out, err = self.run(capsys, "--op", "fake")
        assert code == 2 and "it is Sunday" in out and "nothing could be checked" in err

    @pytest.mark.parametrize(
        ("arguments", "part"),
        [
            (["--op", "softmx"], "did you mean 'softmax'"),
            (["--device", "cuda:99"], "expected a device of this machine, got cuda:99"),
            (["--device", "gpu"], "expected a device of this machine, got gpu"),
            (["--value-depth", "8"], "add --depth"),
            (["--depth", "0", "--op", "softmax"], "expected 2 positive sizes"),
            (["--depth", "8", "--op", "region"], "for example (3, 7, 7, 0)"),
            (["--dtype", "float7"], "expected --dtype"),
        ],
    )
    def test_wrong_use(self, arguments, part, capsys):
        code, _, err = self.run(capsys, *arguments)
        assert code == 2 and part in err and len(err.splitlines()) == 1


def test_importing_the_module_leaves_the_function():
    import nlkernels.verify

    assert callable(nlkernels.verify)
    with pytest.raises(ValueError, match="expected op"):
        nlkernels.verify("softmx")
