"""`NLKERNELS_BUILD=1 pip install`: the wheel holds the module, for all instruction sets."""

import json
import shutil
import sysconfig
import zipfile
from pathlib import Path

import pytest

import nlkernels
from nlkernels import _build
from tests import test_packaging, toy_extension
from tests.test_packaging import Environment

pytestmark = [
    pytest.mark.gate,
    test_packaging.pytestmark,
    pytest.mark.skipif(
        all(shutil.which(name) is None for name in ("c++", "g++", "clang++")),
        reason="no C++ compiler",
    ),
]
FILE = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
BUILD = {"NLKERNELS_BUILD": "1", "NLKERNELS_CUDA_ARCHS": "none"}

# Prints what a program without compilers gets; torch comes before the package, or after it.
PROBE = """
import json, sys
from pathlib import Path
if sys.argv[1] == "module first":
    import importlib.machinery, importlib.util, nlkernels
    path = str(next(Path(nlkernels.__file__).parent.glob("_C*.so")))
    loader = importlib.machinery.ExtensionFileLoader("_C", path)
    loader.create_module(importlib.util.spec_from_file_location("_C", path, loader=loader))
import torch
from nlkernels import _ext
torch.randn(400, 400) @ torch.randn(400, 400)
reason, module = _ext.missing(), _ext.load()
mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
print(json.dumps({
    "missing": reason,
    "file": module.__file__,
    "isas": list(module.isas),
    "runtimes": [p for p in mapped if Path(p).name.startswith(("libgomp", "libomp", "libiomp"))],
}))
"""


def _probe(environment: Environment, folder: Path, order: str = "torch first") -> dict:
    cache = folder / "cache"
    variables = {"NLKERNELS_CACHE_DIR": str(cache), "NLKERNELS_JIT": "0", "PATH": "/nowhere"}
    done = environment.run("python", "-c", PROBE, order, cwd=folder, **variables)
    assert done.returncode == 0, done.stderr
    assert not cache.exists()
    seen = json.loads(done.stdout)
    assert seen["missing"] == ""
    assert len(seen["runtimes"]) <= 1
    return seen


@pytest.fixture(scope="module")
def toy_source(tmp_path_factory) -> Path:
    """A copy of the checkout with native code that compiles in a second."""
    copy = tmp_path_factory.mktemp("toy_source") / "nlkernels"
    folders = ("nlkernels", "models", "training", "benchmarks")
    kept = (*folders, "setup.py", "pyproject.toml", "README.md", "LICENSE")
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    copy.mkdir()
    for name in kept:
        path = test_packaging.ROOT / name
        if path.is_dir():
            shutil.copytree(path, copy / name, ignore=ignored)
        else:
            shutil.copy(path, copy)
    toy_extension.write(copy / "csrc", module="_C")
    return copy


def _check_wheel(source: Path, folder: Path) -> Environment:
    """Builds a wheel, installs it, and asks it what it holds."""
    wheel = test_packaging._build("wheel", source, folder, **BUILD)
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name.startswith(f"nlkernels-{nlkernels.__version__}-cp")
    assert wheel.name.endswith(f"-{platform}.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert f"nlkernels/{FILE}" in archive.namelist()
    environment = test_packaging._make_environment(folder / "venv")
    test_packaging._pip_install(environment, str(wheel))
    seen = _probe(environment, folder)
    assert seen["file"] == str(environment.site_packages / "nlkernels" / FILE)
    assert seen["isas"] == _build.Sources.read(source / "csrc").isas()
    return environment


def test_wheel_with_native_code(toy_source, tmp_path):
    environment = _check_wheel(toy_source, tmp_path)
    # Whichever comes first brings libgomp.so.1, and the other takes it.
    assert _probe(environment, tmp_path, "module first")["runtimes"]


def test_editable_with_native_code(toy_source, tmp_path):
    checkout = tmp_path / "checkout"
    shutil.copytree(toy_source, checkout, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    environment = test_packaging._make_environment(tmp_path / "venv")
    test_packaging._pip_install(environment, "--editable", str(checkout), **BUILD)
    assert _probe(environment, tmp_path)["file"] == str(checkout / "nlkernels" / FILE)
    toy_extension.write(checkout / "csrc", answer="43", module="_C")
    code = "from nlkernels import _ext; print(_ext.load().answer)"
    done = environment.run("python", "-c", code, cwd=tmp_path, NLKERNELS_CACHE_DIR=str(tmp_path))
    assert done.stdout == "43\n" and "compiled of other sources" in done.stderr


def test_requirements_of_the_build(toy_source):
    call = "get_requires_for_build_wheel()"
    assert test_packaging._hook(call, toy_source) == "[]"
    assert test_packaging._hook(call, toy_source, **BUILD) == "['ninja', 'pybind11']"


def test_wheel_with_all_native_code(tmp_path):
    source = tmp_path / "nlkernels"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "*.so", "runs", "build")
    shutil.copytree(test_packaging.ROOT, source, ignore=ignored)
    environment = _check_wheel(source, tmp_path)
    done = environment.run("nlk", "info", cwd=tmp_path)
    assert f"installed: {environment.site_packages / 'nlkernels' / FILE}" in done.stdout
