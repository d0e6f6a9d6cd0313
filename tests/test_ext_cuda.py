"""The module of CUDA kernels: what it is compiled for, and what it says where it cannot be had."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nlkernels import _build, _build_cuda, _cuda, _env, _ext, _launch, _paths
from nlkernels._build import BuildError
from nlkernels._ext import ExtensionError
from nlkernels._spec import Problem

LISTED = ["sm_75", "sm_80", "sm_89", "sm_90a", "sm_120"]


@pytest.fixture(autouse=True)
def settings(tmp_path, monkeypatch):
    """An empty cache folder, and none of the user's settings."""
    for name in ("CXX", "CUDA_HOME", "CUDA_PATH", *_env.VARIABLES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NLKERNELS_CACHE_DIR", str(tmp_path / "cache"))


def _toolkit(folder: Path, release: str) -> str:
    """A CUDA toolkit whose nvcc does no more than state its release."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f'#!/bin/sh\necho "Cuda compilation tools, release {release}, V{release}.88"\n')
    nvcc.chmod(nvcc.stat().st_mode | stat.S_IXUSR)
    return str(folder)


def _module() -> _cuda._Cuda:
    return _cuda._Cuda("_C_cuda", _paths.csrc_dir)


@pytest.mark.parametrize(
    ("gpu", "serving"),
    [
        ("75", "sm_75"),
        ("80", "sm_80"),
        ("86", "sm_80"),
        ("89", "sm_89"),
        ("90", "sm_90a"),
        ("100", None),
        ("120", "sm_120"),
        ("121", "sm_120"),
        ("70", None),
    ],
)
def test_architecture_that_serves_a_gpu(gpu, serving):
    assert _build_cuda.serving(gpu, LISTED) == serving


def test_architectures_by_name():
    assert _build_cuda.asked("all", LISTED) == tuple(LISTED)
    assert _build_cuda.asked("none", LISTED) == ()
    assert _build_cuda.asked("sm_90a, sm_75", LISTED) == ("sm_75", "sm_90a")
    with pytest.raises(BuildError, match=r"expected all, none or some of sm_75, .*got 'sm_90'"):
        _build_cuda.asked("sm_90", LISTED)


def test_without_nvcc(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nothing"))
    reason = _module().missing("90")
    assert "expected nvcc of CUDA 12.8 or later, got CUDA_HOME=" in reason
    assert "install the CUDA toolkit, or set CUDA_HOME" in reason
    with pytest.raises(ExtensionError, match="expected nvcc"):
        _module().load("90")


def test_an_old_toolkit(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", _toolkit(tmp_path / "cuda", "11.8"))
    assert "got 11.8 in" in _module().missing("90")


def test_a_driver_older_than_the_toolkit(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", _toolkit(tmp_path / "cuda", "13.0"))
    monkeypatch.setattr(_build_cuda, "driver", lambda: (12, 8))
    reason = _module().missing("90")
    assert "expected a driver for CUDA 13" in reason and "got one for CUDA 12.8" in reason
    assert "update the driver, or set CUDA_HOME to a toolkit of CUDA 12" in reason
    for served in ((13, 1), (14, 0), (0, 0)):
        monkeypatch.setattr(_build_cuda, "driver", lambda served=served: served)
        assert _module().missing("90") == ""


def test_a_module_of_a_newer_cuda_than_the_drivers_is_not_used(tmp_path, monkeypatch):
    """It would load, and fail at every launch."""
    found = SimpleNamespace(runtime_version=lambda: 13000)
    monkeypatch.setattr(_ext.Extension, "_import", lambda self, path: found)
    monkeypatch.setattr(_build_cuda, "driver", lambda: (12, 8))
    with pytest.raises(ImportError, match=r"of CUDA 13, the driver serves CUDA 12\.8"):
        _module()._import(tmp_path)
    for served in ((13, 0), (14, 1), (0, 0)):
        monkeypatch.setattr(_build_cuda, "driver", lambda served=served: served)
        assert _module()._import(tmp_path) is found


def test_gpus_that_no_kernel_is_written_for():
    assert "got sm_70; other backends serve it" in _module().missing("70")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu():
    assert "expected an NVIDIA GPU to compile for, got no device" in _module().missing()
    problem = Problem(1, 8, 8, 16, 16, torch.float16, "cuda")
    assert _cuda.unserved(problem) == ["there is no usable GPU"]
    on_cpu = problem._replace(device="cpu")
    assert _cuda.unserved(on_cpu) == ["its kernels run on NVIDIA GPUs, not on cpu"]
    assert "not float64" in _cuda.unserved(on_cpu._replace(dtype=torch.float64))[0]


def test_bfloat16_needs_an_ampere(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_cuda.CUDA, "missing", lambda asked: "")
    problem = Problem(1, 8, 8, 16, 16, torch.bfloat16, "cuda")
    for architecture, served in ((75, False), (80, True)):
        with _launch.pretend(architecture=architecture):
            assert (_cuda.unserved(problem) == []) == served
            assert _cuda.unserved(problem._replace(dtype=torch.float16)) == []


def test_units_are_compiled_for_the_architectures_that_they_are_for(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", _toolkit(tmp_path / "cuda", "13.0"))
    sources = _build.Sources.read(_paths.csrc_dir(), _build_cuda.PART)
    for architecture in ("sm_80", "sm_90a"):
        recipe = _build_cuda.recipe(sources, (architecture,), _env.cuda_homes(), "")
        files = {str(step.source) for step in recipe.units()}
        assert any("/hopper/" in file for file in files) == (architecture == "sm_90a")
        generated = f"-gencode=arch={architecture.replace('sm_', 'compute_')},code={architecture}"
        assert all(generated in step.command for step in recipe.units())


def test_headers_belong_to_one_module():
    cpu = set(_build.Sources.read(_paths.csrc_dir())._names())
    cuda = set(_build.Sources.read(_paths.csrc_dir(), _build_cuda.PART)._names())
    assert not cpu & cuda
    assert "include/nlk/cuda/launch.h" in cuda and "include/nlk/number.h" in cpu


@pytest.mark.gate
def test_compiles_and_loads_without_a_gpu(tmp_path):
    """In a process of its own, for an architecture that is named."""
    try:
        _build_cuda.find_nvcc([])
    except BuildError as error:
        pytest.skip(str(error))
    assert shutil.which("ninja") or _build.find_ninja()
    code = (
        "from nlkernels import _cuda; m = _cuda.CUDA.load(); "
        "print(m.isas, m.device_count() >= 0, m.runtime_version() >= 12080)"
    )
    environment = os.environ | {"NLKERNELS_CUDA_ARCHS": "sm_75"}
    command = [sys.executable, "-c", code]
    for compiles in (True, False):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout == "{'sm_75': 75} True True\n"
        assert ("compiled in" in done.stderr) == compiles
