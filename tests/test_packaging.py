"""Every form of installation gives the same package, and nothing but `nlkernels` is installed.

Forms: wheel, wheel made from the sdist, editable (lenient and strict), and no installation at all.
Each is tried in a virtual environment of its own that sees this environment's dependencies.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest

import nlkernels

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]
# Folder in the checkout -> folder in an installation.
MAPPED = {
    "nlkernels": "nlkernels",
    **{folder: name.replace(".", "/") for name, folder in SETUPTOOLS["package-dir"].items()},
}


def _missing_tools() -> str:
    # Asked of the metadata: importing setuptools would replace the distutils of this process.
    for name, oldest in (("pip", 22), ("setuptools", 77)):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            return f"{name} is not installed"
        if int(version.split(".")[0]) < oldest:
            return f"{name} {version} is older than {oldest}"
    return ""


pytestmark = pytest.mark.skipif(bool(_missing_tools()), reason=_missing_tools())

# Prints what a program sees that imports the project from the current folder.
PROBE = """
import importlib.util, json, sys
import nlkernels, nlkernels.models, nlkernels.training, nlkernels.training.data
from nlkernels import _paths
leaked = [n for n in ("models", "training", "csrc", "tests", "benchmarks", "setup")
          if importlib.util.find_spec(n) is not None]
print(json.dumps({
    "path": [str(p) for p in nlkernels.__path__],
    "models": nlkernels.models.__file__,
    "csrc": str(_paths.csrc_dir()),
    "checkout": None if _paths.checkout_root() is None else str(_paths.checkout_root()),
    "public": all(callable(getattr(nlkernels, name)) for name in nlkernels.__all__),
    "leaked": leaked,
}))
"""


# A machine under load compiles for minutes.
LIMIT_S = 900


@dataclass(frozen=True)
class Environment:
    """A virtual environment with the dependencies of the running one, without its project."""

    folder: Path

    @property
    def site_packages(self) -> Path:
        return next(self.folder.glob("lib*/python*/site-packages"))

    def run(self, *command: str, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
        variables = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        return subprocess.run(
            [str(self.folder / "bin" / command[0]), *command[1:]],
            cwd=cwd,
            env={**variables, **more},
            capture_output=True,
            text=True,
            timeout=120,
        )

    def probe(self, cwd: Path) -> dict:
        done = self.run("python", "-c", PROBE, cwd=cwd)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


def _make_environment(folder: Path) -> Environment:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    environment = Environment(folder)
    # A plain path line brings torch and numpy in; the .pth files of that folder are not followed,
    # so an editable nlkernels of the running environment stays out.
    shared = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (environment.site_packages / "shared.pth").write_text("\n".join(sorted(shared)) + "\n")
    return environment


def _pip_install(environment: Environment, *arguments: str, **variables: str) -> None:
    command = [sys.executable, "-m", "pip", "--python", str(environment.folder / "bin" / "python")]
    command += ["install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    done = subprocess.run(
        [*command, *arguments],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def _hook(call: str, source: Path, **variables: str) -> str:
    """What a build hook returns, as `python -m build` calls it, without an environment."""
    code = f"from setuptools import build_meta; print(build_meta.{call})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=source,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def _build(kind: str, source: Path, out: Path, **variables: str) -> Path:
    return out / _hook(f"build_{kind}({str(out)!r})", source, **variables)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the checkout, so that building leaves nothing behind in it."""
    copy = tmp_path_factory.mktemp("source") / "nlkernels"
    ignore = shutil.ignore_patterns(
        ".*", "__pycache__", "*.egg-info", "*.so", "runs", "build", "dist", "results"
    )
    shutil.copytree(ROOT, copy, ignore=ignore)
    return copy


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    return _build("wheel", source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(source, tmp_path_factory) -> Path:
    return _build("sdist", source, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Environment:
    environment = _make_environment(tmp_path_factory.mktemp("installed") / "venv")
    _pip_install(environment, str(wheel))
    return environment


def _package_folders() -> set[str]:
    """Names of all packages, from the folders of the checkout that hold Python files."""
    found = {"nlkernels.csrc"}
    for folder, target in MAPPED.items():
        for path in (ROOT / folder).rglob("*.py"):
            inside = path.parent.relative_to(ROOT / folder)
            found.add(".".join([*target.split("/"), *inside.parts]))
    return found


def _files_of_checkout() -> set[str]:
    """Installed names of all files the packages need; Markdown is for readers of the checkout."""
    found = set()
    for folder, target in MAPPED.items():
        for path in (ROOT / folder).rglob("*"):
            # Results, and what runs on GPU machines, are those of the checkout.
            kept = path.suffix == ".py" or folder != "benchmarks"
            if path.is_file() and kept and path.suffix not in {".pyc", ".md", ".so"}:
                found.add(f"{target}/{path.relative_to(ROOT / folder).as_posix()}")
    return found


def test_package_list_equals_folders():
    assert set(SETUPTOOLS["packages"]) == _package_folders()


def test_wheel_has_one_top_level_name(wheel):
    with zipfile.ZipFile(wheel) as archive:
        top = {name.split("/")[0] for name in archive.namelist()}
    assert top == {"nlkernels", f"nlkernels-{nlkernels.__version__}.dist-info"}
    assert wheel.name == f"nlkernels-{nlkernels.__version__}-py3-none-any.whl"


def test_wheel_has_every_file(wheel):
    with zipfile.ZipFile(wheel) as archive:
        packed = {n for n in archive.namelist() if n.startswith("nlkernels/")}
    assert {n for n in packed if not n.endswith(".md")} == _files_of_checkout()
    assert "nlkernels/csrc/sources.json" in packed
    assert any(n.startswith("nlkernels/training/configs/") and n.endswith(".yaml") for n in packed)


def test_wheel_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        folder = f"nlkernels-{nlkernels.__version__}.dist-info"
        text = archive.read(f"{folder}/METADATA").decode()
        assert "Apache License" in archive.read(f"{folder}/licenses/LICENSE").decode()
        assert "nlk = nlkernels.cli:main" in archive.read(f"{folder}/entry_points.txt").decode()
    lines = text.splitlines()
    assert f"Version: {nlkernels.__version__}" in lines
    assert "License-Expression: Apache-2.0" in lines
    core = {line for line in lines if line.startswith("Requires-Dist:") and "extra ==" not in line}
    assert core == {f"Requires-Dist: {n}" for n in ("torch>=2.11", "numpy", "ninja", "pybind11")}


def test_sdist_builds_the_same_wheel(wheel, sdist, tmp_path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    rebuilt = _build("wheel", unpacked, tmp_path)
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(rebuilt) as second:
        # RECORD lists every other file with its hash.
        record = f"nlkernels-{nlkernels.__version__}.dist-info/RECORD"
        assert sorted(first.read(record).splitlines()) == sorted(second.read(record).splitlines())


def test_sdist_holds_what_developers_need(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        "CMakeLists.txt",
        "Makefile",
        "CHANGELOG.md",
        "LICENSE",
        "README.md",
        "csrc/README.md",
    }
    assert wanted | {"tests/test_packaging.py", "csrc/test/test_isa.cpp"} <= names


def test_wheel_imports_elsewhere(installed, tmp_path):
    seen = installed.probe(cwd=tmp_path)
    home = installed.site_packages / "nlkernels"
    assert seen["path"] == [str(home)]
    assert seen["models"] == str(home / "models" / "__init__.py")
    assert seen["csrc"] == str(home / "csrc")
    assert seen["checkout"] is None
    assert seen["public"]
    assert seen["leaked"] == []


def test_wheel_installs_the_command(installed, tmp_path):
    done = installed.run("nlk", "info", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert str(installed.site_packages / "nlkernels" / "csrc") in done.stdout


@pytest.mark.gate
def test_wheel_measures(installed, tmp_path):
    """Benchmarks are in the wheel, and need neither pytest nor a checkout."""
    sizes = ("--shape", "1,64,32,8,8", "--rounds", "1", "--providers", "naive,chunked")
    done = installed.run(
        "nlk", "bench", "softmax", *sizes, "--json", "run.json", cwd=tmp_path, NLKERNELS_JIT="0"
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "run.json").read_text())
    assert found["complete"]
    assert found["environment"]["git_hash"] is None
    code = "import sys, nlkernels.benchmarks.bench_command; print('pytest' in sys.modules)"
    assert installed.run("python", "-c", code, cwd=tmp_path).stdout.split() == ["False"]


def test_wheel_adds_only_its_own_names(installed):
    names = {path.name for path in installed.site_packages.iterdir()}
    own = {"nlkernels", f"nlkernels-{nlkernels.__version__}.dist-info"}
    assert names - {"shared.pth", "__pycache__"} == own


def test_wheel_and_current_folder_is_the_checkout(installed, source):
    seen = installed.probe(cwd=source)
    assert seen["path"] == [str(source / "nlkernels"), str(source)]
    assert seen["models"] == str(source / "models" / "__init__.py")
    assert seen["public"]


@pytest.mark.parametrize("mode", ["lenient", "strict"])
def test_editable(mode, source, tmp_path):
    environment = _make_environment(tmp_path / "venv")
    checkout = tmp_path / "checkout"
    shutil.copytree(source, checkout)
    _pip_install(environment, f"--config-settings=editable_mode={mode}", "--editable", checkout)
    seen = environment.probe(cwd=tmp_path)
    assert seen["public"]
    assert seen["leaked"] == []
    assert Path(seen["models"]).resolve() == checkout / "models" / "__init__.py"
    assert Path(seen["csrc"]).resolve().is_relative_to(checkout)


def test_uninstalled(source, tmp_path):
    environment = _make_environment(tmp_path / "venv")
    seen = environment.probe(cwd=source)
    assert seen["public"]
    assert seen["checkout"] == str(source)
    assert seen["models"] == str(source / "models" / "__init__.py")
    elsewhere = environment.run("python", "-c", "import nlkernels", cwd=tmp_path)
    assert "ModuleNotFoundError" in elsewhere.stderr


@pytest.mark.parametrize("name", ["models", "training"])
def test_top_level_import_is_refused(name, source):
    code = f"import {name}"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last == f"ImportError: import this package as 'nlkernels.{name}', not as {name!r}"
