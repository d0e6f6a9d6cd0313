"""The loader of native code, with a module that compiles in a second: what it finds and makes."""

import json
import os
import shutil
import sysconfig
import tempfile
import time
import warnings
from pathlib import Path

import pytest

import nlkernels
from nlkernels import _build, _env, _ext, _paths, _store
from nlkernels._ext import Extension, ExtensionError
from tests import toy_extension
from tests.toy_extension import NAME

pytestmark = pytest.mark.skipif(
    all(shutil.which(name) is None for name in ("c++", "g++", "clang++")), reason="no C++ compiler"
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache folder, and none of the user's settings."""
    for name in ("CXX", *_env.VARIABLES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NLKERNELS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(_ext, "_warn", lambda message: warnings.warn(message, stacklevel=2))
    return tmp_path / "cache" / "ext" / nlkernels.__version__


@pytest.fixture
def sources(tmp_path) -> Path:
    return toy_extension.write(tmp_path / "toy sources")  # a path with a space


def _toy(sources: Path) -> Extension:
    """As a new process would see it: nothing is in memory."""
    return Extension(NAME, lambda: sources)


def _built(cache: Path) -> list[Path]:
    return sorted(path for path in cache.iterdir() if path.is_dir())


def _compiler(folder: Path, script: str) -> str:
    """A compiler that does something before, or instead of, compiling."""
    path = folder / "fake compiler"
    path.write_text(f'#!/bin/sh\n{script}\nexec c++ "$@"\n')
    path.chmod(0o755)
    return f"'{path}'"


def test_compiles_once_and_says_so(sources, cache, capfd):
    assert _toy(sources).missing() == ""
    assert not cache.exists()
    module = _toy(sources).load()
    assert module.answer == 42
    assert list(module.isas) == [_build.host_isa(["portable", "avx2", "avx512"])]
    first, second = capfd.readouterr().err.splitlines()
    assert first.startswith("nlkernels: compiles 3 C++ files for ")
    assert "takes about" in first and str(cache) in first
    assert second.startswith("nlkernels: compiled in ")
    start = time.perf_counter()
    assert _toy(sources).load().answer == 42
    assert time.perf_counter() - start < 0.2
    assert capfd.readouterr().err == ""
    assert len(_built(cache)) == 1


def test_leaves_what_editors_read_and_nothing_else(sources, cache):
    module = _toy(sources).load()
    (folder,) = _built(cache)
    assert Path(module.__file__) == folder / f"{NAME}.so"
    entries = json.loads((folder / "compile_commands.json").read_text())
    assert {Path(entry["file"]).name for entry in entries} == {
        *("bindings.cpp", "common.cpp", "unit.cpp")
    }
    assert {entry["directory"] for entry in entries} == {str(folder)}
    assert not list(folder.rglob("*.o"))
    assert {path.name for path in cache.iterdir()} == {folder.name, "lock"}


@pytest.mark.parametrize("changed", ["bindings.cpp", "include/toy.h", "sources.json"])
def test_changed_source_is_compiled(changed, sources, cache):
    _toy(sources).load()
    path = sources / changed
    path.write_text(path.read_text().replace("42", "43").replace("-O0", "-O1") + "\n")
    assert _toy(sources).load().answer == (43 if changed == "bindings.cpp" else 42)
    assert len(_built(cache)) == 2


def test_other_files_change_nothing(sources, cache):
    _toy(sources).load()
    (sources / "README.md").write_text("text")
    (sources / "later.cpp").write_text("not listed yet")
    _toy(sources).load()
    assert len(_built(cache)) == 1


def test_change_during_compilation_waits_for_the_next(sources, tmp_path, monkeypatch, cache):
    path = sources / "bindings.cpp"
    change = f"sed -i s/42/43/ '{path}'"
    monkeypatch.setenv("CXX", _compiler(tmp_path, f'case "$*" in *shared*_toy*) {change};; esac'))
    assert _toy(sources).load().answer == 42
    assert "43" in path.read_text()
    assert _toy(sources).load().answer == 43
    assert len(_built(cache)) == 2


def test_another_compiler_compiles_again(sources, tmp_path, monkeypatch, cache):
    _toy(sources).load()
    script = 'test "$1" = --version && echo "toy compiler 7" && exit'
    monkeypatch.setenv("CXX", _compiler(tmp_path, script))
    _toy(sources).load()
    known = [json.loads((folder / _store.MANIFEST).read_text()) for folder in _built(cache)]
    assert sorted(made["compiler"] == "toy compiler 7" for made in known) == [False, True]


def test_without_a_compiler(sources, monkeypatch, capfd):
    monkeypatch.setenv("CXX", "/no/such/compiler -O1")
    reason = _toy(sources).missing()
    assert "expected a C++ compiler, got CXX='/no/such/compiler -O1'" in reason
    assert "set CXX to" in reason
    with pytest.raises(ExtensionError, match="expected a C"):
        _toy(sources).load()
    monkeypatch.setenv("CXX", "")
    monkeypatch.setenv("PATH", "/nowhere")
    assert "no c++, g++ or clang++ in PATH" in _toy(sources).missing()
    assert capfd.readouterr().err == ""


def test_without_a_compiler_what_is_cached_serves(sources, monkeypatch, cache):
    _toy(sources).load()
    monkeypatch.setenv("PATH", "/nowhere")
    toy = _toy(sources)
    assert toy.missing() == "" and toy.load().answer == 42


def test_program_that_is_no_compiler(sources, monkeypatch):
    monkeypatch.setenv("CXX", "false")
    assert "false, which exits with 1" in _toy(sources).missing().replace("/usr/bin/", "")


def test_failing_compilation_shows_the_compiler_s_words(sources, cache, capfd):
    (sources / "common.cpp").write_text("#error the toy is broken\n")
    toy = _toy(sources)
    with pytest.raises(ExtensionError) as failed:
        toy.load()
    message = str(failed.value)
    assert (
        "#error the toy is broken" in message and "-c" in message and "NLKERNELS_JIT=0" in message
    )
    assert _built(cache) == []
    assert capfd.readouterr().err.count("compiles") == 1
    # Kept: neither compiled nor said again.
    with pytest.raises(ExtensionError, match="the toy is broken"):
        toy.load()
    assert capfd.readouterr().err == ""
    assert toy.missing() == message
    with pytest.warns(UserWarning, match="goes on without its C"):
        assert toy.prepare() == message


def test_other_settings_may_succeed_after_a_failure(sources, monkeypatch):
    toy = _toy(sources)
    monkeypatch.setenv("CXX", "/no/such/compiler")
    assert toy.missing()
    with pytest.raises(ExtensionError):
        toy.load()
    monkeypatch.delenv("CXX")
    assert toy.missing() == ""
    assert toy.load().answer == 42


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "manifest"])
def test_damaged_file_is_compiled_again(damage, sources, cache, capfd):
    _toy(sources).load()
    (folder,) = _built(cache)
    file = folder / f"{NAME}.so"
    content = file.read_bytes()
    file.unlink()  # it is mapped into this process: writing to it would reach there
    if damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        file.write_bytes(content[:-100] + b"\0" * 100)
    elif damage == "manifest":
        file.write_bytes(content)
        (folder / _store.MANIFEST).write_text("{")
    capfd.readouterr()
    assert _toy(sources).load().answer == 42
    said = capfd.readouterr().err
    assert "cannot be used" in said and said.count("compiled in") == 1
    assert _toy(sources).load().answer == 42
    assert capfd.readouterr().err == ""


def test_module_that_never_loads_is_compiled_once(sources, capfd):
    (sources / "common.cpp").write_text("// defines nothing\n")
    with pytest.raises(ExtensionError, match="to load after it was compiled"):
        _toy(sources).load()
    said = capfd.readouterr().err
    assert said.count("compiled in") == 1 and "threads_of_openmp" in said


def test_other_systems(sources, monkeypatch):
    monkeypatch.setattr(_ext.sys, "platform", "darwin")
    assert "expected Linux for native code, got darwin" in _toy(sources).missing()


def test_no_compilation_when_told_so(sources, monkeypatch, cache):
    monkeypatch.setenv("NLKERNELS_JIT", "0")
    assert _toy(sources).missing() == (
        "nlkernels: expected native code that is installed or cached, got none, and "
        "NLKERNELS_JIT=0, which forbids to compile it; unset it, or install with NLKERNELS_BUILD=1"
    )
    with pytest.raises(ExtensionError, match="NLKERNELS_JIT=0"):
        _toy(sources).load()
    monkeypatch.setenv("NLKERNELS_JIT", "perhaps")
    assert "got NLKERNELS_JIT='perhaps'" in _toy(sources).missing()
    monkeypatch.delenv("NLKERNELS_JIT")
    _toy(sources).load()
    monkeypatch.setenv("NLKERNELS_JIT", "0")
    assert _toy(sources).missing() == "" and _toy(sources).load().answer == 42


def test_folder_that_cannot_be_written(sources, tmp_path, monkeypatch, capfd):
    """Another one serves, and what lies in the first is still found."""
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("NLKERNELS_CACHE_DIR", str(blocked / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    module = _toy(sources).load()
    assert Path(module.__file__).is_relative_to(tmp_path / "temporary")
    assert "cannot be written" in capfd.readouterr().err
    monkeypatch.setattr(_paths, "cache_dirs", lambda: [tmp_path / "cache", blocked / "none"])
    assert "expected a folder that can be written" in _toy(sources).missing()
    with pytest.raises(ExtensionError, match="set NLKERNELS_CACHE_DIR"):
        _toy(sources).load()
    _store_in(tmp_path / "cache", Path(module.__file__).parent)
    assert _toy(sources).missing() == "" and _toy(sources).load().answer == 42


def _store_in(cache: Path, folder: Path) -> None:
    shutil.copytree(folder, cache / "ext" / nlkernels.__version__ / folder.name)


def test_folder_without_the_right_to_execute(sources, monkeypatch):
    real = os.statvfs
    monkeypatch.setattr(
        os, "statvfs", lambda path: _WithoutExecution(real(path).f_flag | os.ST_NOEXEC)
    )
    assert "mounted noexec; set NLKERNELS_CACHE_DIR" in _toy(sources).missing()
    with pytest.raises(ExtensionError, match="mounted noexec"):
        _toy(sources).load()


class _WithoutExecution:
    def __init__(self, flags: int) -> None:
        self.f_flag = flags


def test_instruction_set_by_name(sources, monkeypatch, cache):
    toy = _toy(sources)
    widths = {}
    for name in ("portable", "avx2"):
        if not _build.runs(name, ["portable", "avx2", "avx512"]):
            continue
        monkeypatch.setenv("NLKERNELS_CPU_ISA", name)
        widths.update(toy.load().isas)
    assert widths.items() <= {"portable": 16, "avx2": 32}.items()
    assert len(_built(cache)) == len(widths)


@pytest.mark.parametrize("asked", ["sse9", "avx512"])
def test_instruction_set_that_does_not_run_here(asked, sources, monkeypatch):
    monkeypatch.setattr(_build, "host_isa", lambda isas: "portable")
    monkeypatch.setenv("NLKERNELS_CPU_ISA", asked)
    expected = f"expected one of portable on this machine, got '{asked}'; unset it for portable"
    assert expected in _toy(sources).missing()
    with pytest.raises(ExtensionError, match="NLKERNELS_CPU_ISA"):
        _toy(sources).load()


def test_threads_without_openmp(sources, tmp_path, monkeypatch):
    if _ext.openmp_runtime():
        assert _toy(sources).load().threads_of_openmp > 0
    monkeypatch.setenv("CXX", _compiler(tmp_path, 'case "$*" in *-fopenmp*) exit 1;; esac'))
    assert _toy(sources).load().threads_of_openmp == 0
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(_ext, "openmp_runtime", lambda: "")
    assert _toy(sources).load().threads_of_openmp == 0


def _install(sources: Path, folder: Path, monkeypatch) -> Path:
    """What `NLKERNELS_BUILD=1 pip install` does, into a folder of the package."""
    folder.mkdir()
    recipe = _build.Recipe(
        _build.Sources.read(sources), ("portable",), _build.Compiler.find(), "-lgomp"
    )
    _build.build(recipe, folder, f"{NAME}{sysconfig.get_config_var('EXT_SUFFIX')}", 2)
    monkeypatch.setattr(nlkernels, "__path__", [*nlkernels.__path__, str(folder)])
    return folder


def test_installed_module_is_used_first(sources, tmp_path, monkeypatch, cache):
    folder = _install(sources, tmp_path / "package", monkeypatch)
    monkeypatch.setenv("NLKERNELS_JIT", "0")
    monkeypatch.setenv("PATH", "/nowhere")
    toy = _toy(sources)
    assert toy.missing() == "" and Path(toy.load().__file__).parent == folder
    assert not cache.exists()


def test_installed_module_that_cannot_be_loaded_is_ignored(sources, tmp_path, monkeypatch):
    folder = _install(sources, tmp_path / "package", monkeypatch)
    next(folder.glob("*.so")).write_text("no module")
    with pytest.warns(UserWarning, match="cannot be loaded"):
        assert _toy(sources).load().answer == 42


def test_installed_module_of_other_sources_is_ignored(sources, tmp_path, monkeypatch, cache):
    _install(sources, tmp_path / "package", monkeypatch)
    toy_extension.write(sources, answer="43")
    with pytest.warns(UserWarning, match="compiled of other sources"):
        assert _toy(sources).load().answer == 43
    assert len(_built(cache)) == 1


def test_jobs_need_memory(monkeypatch):
    for free, most in ((0, 1), (2**31, 2), (2**40, os.cpu_count())):
        monkeypatch.setattr(_build, "_free_bytes", lambda free=free: free)
        assert 1 <= _build.jobs() <= most
    monkeypatch.undo()
    assert _build._free_bytes() > 2**20


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        ("", "portable"),
        ("avx2 fma", "portable"),
        ("avx2 fma f16c avx512f avx512bw avx512dq avx512_bf16", "avx2"),
        ("avx2 fma f16c avx512f avx512bw avx512dq avx512vl", "avx512"),
        ("avx2 fma f16c avx512f avx512bw avx512dq avx512vl avx512_bf16", "avx512_bf16"),
    ],
    ids=["none", "no f16c", "no vl", "no bf16", "all"],
)
def test_instruction_set_of_a_machine(flags, found, monkeypatch):
    monkeypatch.setattr(_build, "_kernel_flags", lambda: frozenset(flags.split()))
    names = ["portable", "avx2", "avx512", "avx512_bf16"]
    assert _build.host_isa(names) == found
    assert [name for name in names if _build.runs(name, names)] == names[: names.index(found) + 1]
    assert _build.host_isa(["portable"]) == "portable"
