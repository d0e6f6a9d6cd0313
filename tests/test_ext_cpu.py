"""The compiled module itself: its threads, Ctrl-C, forks, and one runtime of OpenMP."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from nlkernels import _build, _env, _ext, _paths

pytestmark = pytest.mark.skipif(
    all(shutil.which(name) is None for name in ("c++", "g++", "clang++")), reason="no C++ compiler"
)
ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 60


@pytest.fixture(scope="module")
def module():
    return _ext.load()


def _python(code: str, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_was_compiled(module):
    names = _build.Sources.read(_paths.csrc_dir()).isas()
    best = _build.host_isa(names)
    assert module.detected_isa() == best
    if not _env.read("NLKERNELS_CPU_ISA"):
        assert module.best_isa() == module.isas[best] == _ext.isa()
    assert module.sources == _build.Sources.read(_paths.csrc_dir()).digest
    assert _ext.missing() == "" and _ext.load() is module


@pytest.mark.skipif(_ext.openmp_runtime() == "", reason="torch's runtime is not GCC's")
def test_one_openmp_runtime(module):
    # Some work of torch's and of ours: whatever is loaded late is there.
    torch.randn(400, 400) @ torch.randn(400, 400)
    assert module.threads == "OpenMP"
    assert {0, 1} >= set(module._wait(2, 20, 1))
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    runtimes = {p for p in mapped if Path(p).name.startswith(("libgomp", "libomp", "libiomp"))}
    assert runtimes == {_ext.openmp_runtime()}


def test_every_task_runs_on_one_of_the_threads(module):
    for threads in (1, 2, 3):
        ran_on = module._wait(threads, 30, 1)
        assert set(ran_on) <= set(range(threads))
        assert len(set(ran_on)) == threads
    assert module._wait(2, 0, 1) == []


def test_other_python_threads_run_meanwhile(module):
    counted, done = 0, threading.Event()

    def wait() -> None:
        module._wait(1, 10, 30)
        done.set()

    thread = threading.Thread(target=wait)
    thread.start()
    while not done.is_set():
        counted += 1
        time.sleep(0.001)
    thread.join()
    assert counted > 20


_INTERRUPTED = """
import time
from nlkernels import _ext
module = _ext.load()
print("ready", flush=True)
start = time.perf_counter()
try:
    module._wait(2, 3000, 10)
except KeyboardInterrupt:
    print(f"interrupted after {time.perf_counter() - start:.1f} s, then {module._wait(2, 3, 1)}")
"""


def test_ctrl_c(module):
    process = subprocess.Popen(
        [sys.executable, "-c", _INTERRUPTED], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.5)
    start = time.perf_counter()
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=LIMIT_S)
    assert time.perf_counter() - start < 2  # 15 s without
    assert "interrupted after" in printed and "-1" not in printed


_FORKED = """
import multiprocessing, sys
import torch
from nlkernels import _ext
before = sys.argv[1:] == ["before"]

def child(queue):
    queue.put(set(_ext.load()._wait(2, 20, 1)))

if before:
    assert set(_ext.load()._wait(2, 20, 1)) == {0, 1}
torch.randn(400, 400) @ torch.randn(400, 400)
context = multiprocessing.get_context("fork")
queue = context.SimpleQueue()
process = context.Process(target=child, args=(queue,))
process.start()
print(queue.get(), set(_ext.load()._wait(2, 20, 1)))
"""


@pytest.mark.parametrize("loaded", ["before", "after"])
def test_forked_child_works_on_one_thread(loaded, module):
    code = _FORKED.replace("sys.argv[1:]", repr([loaded]))
    assert _python(code).strip() == "{0} {0, 1}"
