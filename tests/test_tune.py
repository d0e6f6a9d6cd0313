"""Which configuration runs: shipped, or what was measured and the cache kept."""

import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from nlkernels import _cache, _device, _launch, _paths, _tune
from nlkernels._launch import Config
from nlkernels._spec import Problem
from tests.fake_backend import FAST, HUGE, SLOW, OutOfResources, forget, kernel

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
PROBLEM = Problem(2, 100, 50, 24, 16, torch.bfloat16, "cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own, and no memory of other tests."""
    monkeypatch.setenv("NLKERNELS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("NLKERNELS_AUTOTUNE", raising=False)
    forget()
    yield tmp_path / "cache"
    forget()


def run_best(candidates=(SLOW, HUGE, FAST), problem=PROBLEM) -> Config:
    """The configuration that run_best ends with."""
    ran = []
    _tune.run_best("kernel", problem, CPU, candidates, kernel(ran))
    return ran[-1]


def tuned() -> Config:
    with _tune.tuning() as found:
        chosen = run_best()
    _tune.keep(CPU, found)
    return chosen


def test_the_first_candidate_runs_unless_another_was_measured(cache):
    assert run_best() == SLOW
    assert not cache.exists(), "nothing is written without need"
    assert tuned() == FAST and run_best() == FAST
    _cache.forget()
    assert run_best() == FAST, "read from the file"
    assert run_best(candidates=(SLOW, HUGE)) == SLOW, "only what is legal for these operands"
    with _tune.forced({"kernel": SLOW}):
        assert run_best() == SLOW
    for number, config in enumerate((SLOW, FAST, FAST)):
        with _tune.numbered(number) as counts:
            assert run_best(candidates=(SLOW, FAST)) == config
        assert counts == {"kernel": 2}


def test_a_default_stays_where_nothing_is_clearly_faster(monkeypatch):
    times = iter([1.0, 0.99])
    monkeypatch.setattr(_device, "median_ms", lambda run, device: next(times))
    with _tune.tuning() as found:
        _tune.run_best("kernel", PROBLEM, CPU, (SLOW, FAST), lambda config: None)
    assert [t.config for t in found.values()] == [SLOW]


def test_a_kernel_of_many_launches_is_timed_once():
    ran = []
    with _tune.tuning():
        for _ in range(2):
            _tune.run_best("kernel", PROBLEM, CPU, (SLOW, FAST), kernel(ran))
            count = len(ran)
    assert count == len(ran) and ran[-1] == FAST and ran.count(SLOW) < count / 2


def test_what_does_not_fit_is_left_out_and_an_error_only_if_nothing_fits():
    assert run_best(candidates=(HUGE, FAST)) == FAST
    ran = []
    _tune.run_best("kernel", PROBLEM, CPU, (HUGE, FAST), kernel(ran))
    assert ran == [FAST], "remembered"
    for context in (_tune.tuning(), _tune.forced({})):
        with context, pytest.raises(OutOfResources, match="shared memory"):
            run_best(candidates=(HUGE,))
    with pytest.raises(ZeroDivisionError):
        _tune.run_best("kernel", PROBLEM, CPU, (SLOW, FAST), lambda config: 1 / 0)


def test_nothing_is_timed_while_capturing(monkeypatch):
    monkeypatch.setattr(_launch, "capturing", lambda device: True)
    ran = []
    with _tune.tuning() as found:
        _tune.run_best("kernel", PROBLEM, CPU, (SLOW, FAST), kernel(ran))
    assert ran == [SLOW] and not found


def test_buckets_are_powers_of_two_and_steps_of_16_channels():
    def bucket(**sizes):
        return _tune.bucket("kernel", PROBLEM._replace(**sizes), CPU)

    assert bucket() == bucket(queries=65, keys=64, depth=17, value_depth=1, index=1)
    others = [
        bucket(queries=64),
        bucket(keys=65),
        bucket(batch=3),
        bucket(depth=33),
        bucket(dtype=torch.float16),
        _tune.bucket("other", PROBLEM, CPU),
        _tune.bucket("kernel", (*PROBLEM, True), CPU),
    ]
    assert len({bucket(), *others}) == 1 + len(others)
    with _launch.pretend(architecture=80):
        assert bucket().startswith("sm_80 ")


def test_overhead_of_a_call_is_small():
    def per_call(function) -> float:
        best = float("inf")
        for _ in range(5):
            start = time.perf_counter()
            for _ in range(2000):
                function()
            best = min(best, time.perf_counter() - start)
        return best / 2000

    candidates = (FAST, SLOW)
    alone = per_call(lambda: None)
    run = per_call(lambda: _tune.run_best("kernel", PROBLEM, CPU, candidates, lambda config: None))
    # 3 us on an idle core.
    assert run - alone < 12e-6


@pytest.mark.parametrize("mode", ["off", "cache", "full"])
def test_autotune_values(mode, cache, monkeypatch):
    assert tuned() == FAST
    monkeypatch.setenv("NLKERNELS_AUTOTUNE", mode)
    assert run_best() == (SLOW if mode == "off" else FAST)
    monkeypatch.setenv("NLKERNELS_AUTOTUNE", "often")
    with pytest.raises(ValueError, match="NLKERNELS_AUTOTUNE: expected one of off, cache, full"):
        run_best()


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"format": 99, "machines": {}}',
        '{"format": 1, "machines": {"KEY": {"configs": {"a": 3}}}}',
        '{"format": 1, "machines": {"KEY": {"verdicts": {"a": {"reason": ""}}}}}',
        "\x00\xff",
    ],
)
def test_a_damaged_cache_is_ignored_and_rewritten(content, cache):
    cache.mkdir()
    path = cache / _cache.FILE
    path.write_text(content.replace("KEY", _cache.machine_key(CPU)))
    with pytest.warns(RuntimeWarning, match="ignored"):
        assert run_best() == SLOW
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuned() == FAST, "warned once"
    assert json.loads(path.read_text())["format"] == _cache.FORMAT
    assert sorted(p.name for p in cache.iterdir()) == [path.name, f"{path.name}.lock"]


def test_results_of_other_sources_and_devices_are_not_looked_at(cache, monkeypatch):
    assert tuned() == FAST
    for owner, name in ((_cache, "package_hash"), (_device, "identity")):
        with monkeypatch.context() as context:
            context.setattr(owner, name, lambda *_: "another")
            _cache._by_device.clear()
            _cache._sections.clear()
            _cache.memo.clear()
            assert run_best() == SLOW
            assert tuned() == FAST
    assert len(json.loads((cache / _cache.FILE).read_text())["machines"]) == 3


def test_package_hash_follows_the_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(_paths, "PACKAGE", tmp_path)
    seen = set()
    (tmp_path / "csrc" / "cuda").mkdir(parents=True)
    for file in ("a.py", "csrc/cuda/a.cu", "csrc/sources.json"):
        for content in ("a = 1", "a = 2"):
            (tmp_path / file).write_text(content)
            _cache.forget()
            seen.add(_cache.package_hash())
    assert len(seen) == 6


def test_hash_of_an_operation_follows_what_the_operations_share(tmp_path, monkeypatch):
    monkeypatch.setattr(_paths, "PACKAGE", tmp_path)
    seen = set()
    for folder in ("one", "two"):
        (tmp_path / "ops" / folder).mkdir(parents=True)
    for changed in ("ops/one/a.py", "ops/shared.py", "ops/two/a.py"):
        (tmp_path / changed).write_text("a = 1")
        _cache.forget()
        seen.add(_cache.package_hash("ops/one"))
    assert len(seen) == 2


def test_an_unwritable_folder_is_replaced_with_one_warning(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("NLKERNELS_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(_paths.tempfile, "gettempdir", lambda: str(tmp_path))
    with pytest.warns(RuntimeWarning, match="set NLKERNELS_CACHE_DIR") as caught:
        assert [tuned(), tuned()] == [FAST, FAST]
    assert len(caught) == 1
    _cache.forget()
    assert run_best() == FAST
    (folder,) = tmp_path.glob("nlkernels-*")
    assert folder.stat().st_mode & 0o077 == 0


def test_without_any_folder_results_stay_in_memory(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("NLKERNELS_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(_paths.tempfile, "gettempdir", lambda: str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning, match="lost at exit"):
        assert tuned() == FAST
    assert run_best() == FAST


def test_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    assert _paths.cache_dirs() == [tmp_path / "cache"]
    monkeypatch.delenv("NLKERNELS_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert _paths.cache_dirs() == [tmp_path / "xdg" / "nlkernels"]
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _paths.cache_dirs() == [tmp_path / ".cache" / "nlkernels"]


def test_two_processes_write_at_once(cache):
    command = [sys.executable, "-m", "tests.fake_backend", "write"]
    environment = {**os.environ, "NLKERNELS_CACHE_DIR": str(cache)}
    writers = [subprocess.Popen([*command, name, "30"], cwd=ROOT, env=environment) for name in "ab"]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0]
    assert len(_cache.section(CPU)["configs"]) == 60


def test_without_a_home_the_temporary_folder_is_used(tmp_path, monkeypatch):
    monkeypatch.delenv("NLKERNELS_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(_paths.os.path, "expanduser", lambda path: path)
    assert _paths.cache_dirs()[-1].parent == Path(_paths.tempfile.gettempdir())
