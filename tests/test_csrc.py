"""The C++ part: one list of files, tests by ctest with sanitizers, no torch header."""

import json
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from nlkernels import _build, _paths

CSRC = _paths.csrc_dir()
SOURCES = json.loads((CSRC / "sources.json").read_text())
# A machine under load compiles for minutes.
LIMIT_S = 1800


def _run(*command: object) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _compiler() -> str:
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name) is not None:
            return name
    pytest.skip("no C++ compiler")


def _root() -> Path:
    for tool in ("cmake", "ctest"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool}")
    _compiler()
    root = _paths.checkout_root()
    if root is None:
        pytest.skip("CMakeLists.txt is part of the checkout, not of the installed package")
    return root


def test_every_source_is_listed_once():
    cuda = SOURCES["cuda"]
    listed = [SOURCES["bindings"], *SOURCES["common"], *SOURCES["units"]]
    listed += [cuda["bindings"], *cuda["units"], *cuda["emulation"], *cuda["hopper_emulation"]]
    for test in SOURCES["tests"].values():
        own = [*test["files"], *test.get("units", ())]
        listed += [file for file in own if file.startswith("test/")]
    found = [*CSRC.rglob("*.cpp"), *CSRC.rglob("*.cu")]
    assert sorted(listed) == sorted(path.relative_to(CSRC).as_posix() for path in found)


def test_no_torch_header():
    sources = (
        path for pattern in ("*.cpp", "*.h", "*.cu", "*.cuh") for path in CSRC.rglob(pattern)
    )
    for path in sources:
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", path.read_text()), path


def test_instruction_sets_are_those_of_the_header():
    levels = re.findall(r"k\w+ = (\d)", (CSRC / "include/nlk/isa.h").read_text())
    names = re.findall(r'return "(\w+)";', (CSRC / "cpu/isa.cpp").read_text())
    assert list(SOURCES["isas"]) == names[: len(levels)]
    if platform.machine() == "x86_64":
        assert _build.Sources.read(CSRC).isas() == list(SOURCES["isas"])
    assert SOURCES["isas"]["portable"]["machine"] == "any"


@pytest.fixture(scope="module")
def isa_program(tmp_path_factory) -> Path:
    """test_isa built from sources.json by the compiler alone, as a machine without CMake would."""
    program = tmp_path_factory.mktemp("isa") / "test_isa"
    include = [f"-I{CSRC / folder}" for folder in SOURCES["include"]]
    standard = f"-std=c++{SOURCES['cxx_standard']}"
    sources = [CSRC / file for file in SOURCES["tests"]["test_isa"]["files"]]
    _run(_compiler(), standard, *SOURCES["flags"], "-Werror", *include, *sources, "-o", program)
    return program


def test_isa_agrees_with_the_kernel(isa_program):
    found = _run(isa_program).split()[-1]
    assert found == _build.host_isa(list(SOURCES["isas"]))


def _has_sanitizer(name: str, folder: Path) -> bool:
    probe = [_compiler(), "-x", "c++", "-", f"-fsanitize={name}", "-o", str(folder / "probe")]
    done = subprocess.run(probe, input="int main() {}", capture_output=True, text=True)
    return done.returncode == 0


def _run_ctest(build: Path, sanitize: str = "", isas: str = "") -> None:
    """Build the C++ tests without a warning, for some instruction sets or all; none may fail."""
    root = _root()
    _run("cmake", "-S", root, "-B", build, f"-DNLK_SANITIZE={sanitize}", f"-DNLK_ISAS={isas}")
    printed = _run("cmake", "--build", build, "--target", "tests", "--parallel", _build.jobs())
    assert "warning:" not in printed
    printed = _run("ctest", "--test-dir", build, "--output-on-failure")
    assert f"0 tests failed out of {len(SOURCES['tests'])}" in printed


@pytest.mark.gate
def test_ctest(tmp_path):
    _run_ctest(tmp_path)
    if shutil.which("nm") is None:
        pytest.skip("no nm to read the objects' symbols; the C++ tests passed")
    for isa in _build.Sources.read(CSRC).isas():
        _has_no_shared_code(isa, tmp_path / f"CMakeFiles/nlk_cpu_{isa}.dir")


def _has_no_shared_code(isa: str, folder: Path) -> None:
    """Every unit of an instruction set defines names of that set's namespace only.

    Of a function that several units hold the linker keeps one copy: one with AVX-512, say, for the
    baseline code, too, and an older machine dies of it.
    """
    compiled = sorted(folder.rglob("*.o"))
    assert len(compiled) == len(SOURCES["units"])
    for unit in compiled:
        lines = _run("nm", "--defined-only", "--extern-only", unit).splitlines()
        names = [line.split()[-1] for line in lines if line]
        assert names
        strangers = [name for name in names if not name.startswith(f"_ZN3nlk{len(isa)}{isa}")]
        assert strangers == []


@pytest.mark.gate
# Threads are shared out alike in all instruction sets.
@pytest.mark.parametrize(("sanitize", "isas"), [("address,undefined", ""), ("thread", "portable")])
def test_ctest_with_sanitizers(sanitize, isas, tmp_path):
    if not _has_sanitizer(sanitize, tmp_path):
        pytest.skip(f"the compiler has no -fsanitize={sanitize}")
    _run_ctest(tmp_path / "build", sanitize, isas)
