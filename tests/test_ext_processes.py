"""Several processes that load native code: at once, after one was killed, after a fork."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import nlkernels
from nlkernels import _env
from tests import toy_extension

pytestmark = pytest.mark.skipif(
    all(shutil.which(name) is None for name in ("c++", "g++", "clang++")), reason="no C++ compiler"
)
ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 60


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache folder, and none of the user's settings."""
    for name in ("CXX", *_env.VARIABLES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NLKERNELS_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ext" / nlkernels.__version__


@pytest.fixture
def sources(tmp_path) -> Path:
    return toy_extension.write(tmp_path / "sources")


def _start(sources: Path, **variables: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.toy_extension", str(sources)],
        cwd=ROOT,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _ended(process: subprocess.Popen) -> tuple[dict, str]:
    out, said = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, said
    return json.loads(out), said


def _slow_compiler(folder: Path, seconds: int) -> str:
    path = folder / "slow"
    path.write_text(f'#!/bin/sh\ncase "$*" in *unit.cpp*) sleep {seconds};; esac\nexec c++ "$@"\n')
    path.chmod(0o755)
    return str(path)


def _until(holds) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_one_compiles_and_the_others_wait(sources, tmp_path):
    compiler = _slow_compiler(tmp_path, 2)
    ended = [_ended(p) for p in [_start(sources, CXX=compiler) for _ in range(3)]]
    assert [seen["answer"] for seen, _ in ended] == [42, 42, 42]
    assert sorted(said.count("compiled in") for _, said in ended) == [0, 0, 1]
    waited = [said for _, said in ended if "waits for another process" in said]
    assert 1 <= len(waited) <= 2


def test_killed_compilation_hinders_nobody(sources, tmp_path, cache):
    killed = _start(sources, CXX=_slow_compiler(tmp_path, 30))
    try:
        _until(lambda: list(cache.glob(".building-*/new/build.ninja")))
        os.kill(killed.pid, signal.SIGKILL)
        killed.wait(LIMIT_S)
        seen, said = _ended(_start(sources))
        assert seen["answer"] == 42
        assert "waits" not in said
        assert not list(cache.glob(".building-*"))
    finally:
        # What it has started goes on without it.
        os.killpg(killed.pid, signal.SIGKILL)
        killed.communicate()


def test_interrupted_compilation_leaves_nothing(sources, tmp_path, cache):
    process = _start(sources, CXX=_slow_compiler(tmp_path, 30))
    _until(lambda: list(cache.glob(".building-*/new/build.ninja")))
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal's Ctrl-C does
    _, said = process.communicate(timeout=LIMIT_S)
    assert process.returncode != 0 and "KeyboardInterrupt" in said
    assert not list(cache.glob(".building-*"))


_FORKED = """
import os, sys
from pathlib import Path
from nlkernels._ext import Extension
toy = Extension("_toy", lambda: Path(sys.argv[1]))
if sys.argv[2] == "before":
    toy.load()
child = os.fork()
if child == 0:
    os._exit(toy.load().answer)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), toy.load().answer)
"""


@pytest.mark.parametrize("parent_loads", ["before", "after"])
def test_forked_child_loads(parent_loads, sources):
    done = subprocess.run(
        [sys.executable, "-c", _FORKED, str(sources), parent_loads],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.stdout == "42 42\n", done.stderr
    assert done.stderr.count("compiled in") == 1


_FORKED_WHILE_COMPILING = """
import os, sys, threading, time
from pathlib import Path
from nlkernels import _store
from nlkernels._ext import Extension
toy = Extension("_toy", lambda: Path(sys.argv[1]))
thread = threading.Thread(target=toy.load)
thread.start()
while not list(_store.homes()[-1].glob(".building-*/new/build.ninja")):
    time.sleep(0.01)
child = os.fork()
if child == 0:
    os._exit(Extension("_toy", lambda: Path(sys.argv[1])).load().answer)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
thread.join()
print(toy.load().answer)
"""


def test_child_forked_while_compiling_waits_for_the_parent(sources, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", _FORKED_WHILE_COMPILING, str(sources)],
        cwd=ROOT,
        env={**os.environ, "CXX": _slow_compiler(tmp_path, 1)},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.stdout == "42\n42\n", done.stderr
    assert done.stderr.count("compiled in") == 1
