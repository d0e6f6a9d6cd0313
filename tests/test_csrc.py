"""The C++ part: one list of files, tests by ctest, no torch header."""

import json
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from nlkernels import _paths

CSRC = _paths.csrc_dir()
SOURCES = json.loads((CSRC / "sources.json").read_text())


def _run(*command: object) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _compiler() -> str:
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name) is not None:
            return name
    pytest.skip("no C++ compiler")


def test_every_source_is_listed_once():
    listed = [entry["file"] for files in SOURCES["libraries"].values() for entry in files]
    listed += [entry["file"] for entry in SOURCES["tests"].values()]
    on_disk = sorted(path.relative_to(CSRC).as_posix() for path in CSRC.rglob("*.cpp"))
    assert sorted(listed) == on_disk


def test_no_torch_header():
    for path in [*CSRC.rglob("*.cpp"), *CSRC.rglob("*.h")]:
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", path.read_text()), path


@pytest.fixture(scope="module")
def isa_program(tmp_path_factory) -> Path:
    """test_isa built from sources.json by the compiler alone, as a machine without CMake would."""
    compiler = _compiler()
    program = tmp_path_factory.mktemp("isa") / "test_isa"
    test = SOURCES["tests"]["test_isa"]
    files = [entry["file"] for name in test["links"] for entry in SOURCES["libraries"][name]]
    include = [f"-I{CSRC / folder}" for folder in SOURCES["include"]]
    standard = f"-std=c++{SOURCES['cxx_standard']}"
    sources = [CSRC / file for file in [*files, test["file"]]]
    _run(compiler, standard, *SOURCES["flags"], "-Werror", *include, *sources, "-o", program)
    return program


def test_isa_agrees_with_the_kernel(isa_program):
    found = _run(isa_program).split()[-1]
    if platform.machine() != "x86_64":
        assert found == "portable"
        return
    flags = set(re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)[1].split())
    wanted = "portable"
    for level, needed in (
        ("avx2", {"avx2", "fma", "f16c"}),
        ("avx512", {"avx512f", "avx512bw", "avx512dq", "avx512vl"}),
        ("avx512_bf16", {"avx512_bf16"}),
    ):
        if not needed <= flags:
            break
        wanted = level
    assert found == wanted


@pytest.mark.parametrize("sanitize", ["", "address,undefined"], ids=["plain", "sanitized"])
def test_ctest(sanitize, tmp_path):
    for tool in ("cmake", "ctest"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool}")
    root = _paths.checkout_root()
    if root is None:
        pytest.skip("CMakeLists.txt is part of the checkout, not of the installed package")
    compiler = _compiler()
    if sanitize:
        program = tmp_path / "probe"
        probe = [compiler, "-x", "c++", "-", f"-fsanitize={sanitize}", "-o", str(program)]
        done = subprocess.run(probe, input="int main() {}", capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"the compiler has no -fsanitize={sanitize}")
    build = tmp_path / "build"
    _run("cmake", "-S", root, "-B", build, f"-DNLK_SANITIZE={sanitize}")
    _run("cmake", "--build", build)
    printed = _run("ctest", "--test-dir", build, "--output-on-failure")
    assert f"0 tests failed out of {len(SOURCES['tests'])}" in printed
