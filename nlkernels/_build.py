"""What `csrc/sources.json` says is compiled, and how: for the loader (`_ext`) and for setup.py.

Needs no torch and nothing else of the package. Sources come in three sorts: `common` files and
`bindings`, compiled once, and `units`, compiled once for each instruction set with its flags and
-DNLK_ISA=<its name>. `csrc/README.md` describes the file.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

# A compiler needs less for any of our files.
_BYTES_PER_JOB = 2**30
_SHOWN_LINES = 40
_OBJECTS = "objects"
# What Linux calls the instructions of each set; a machine has a set when it has those before, too.
_KERNEL_FLAGS = {
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "avx512_bf16": {"avx512_bf16"},
}
ISAS = ("portable", *_KERNEL_FLAGS)


class BuildError(RuntimeError):
    """Something is missing for a build, or the compiler refused; the message says what to do."""


@dataclass(frozen=True)
class Sources:
    """The folder of the sources and what its `sources.json` holds of one module.

    Headers in folders named "cuda" belong to the module of CUDA, all others to that of CPUs.
    """

    folder: Path
    listed: dict[str, Any]
    part: str = ""

    @classmethod
    def read(cls, folder: Path, part: str = "") -> Sources:
        """What is listed for CPUs, or for another part: "cuda"."""
        listed = json.loads((folder / "sources.json").read_bytes())
        other = listed.pop("cuda", {})
        if part:
            shared = {key: listed[key] for key in ("cxx_standard", "include")}
            listed = {**shared, **other}
        return cls(folder, listed, part)

    def _names(self) -> list[str]:
        """Everything in the folder that a build may read, but sources.json."""
        found = (path.relative_to(self.folder) for path in self.folder.rglob("*.[ch]*"))
        headers = (path for path in found if path.suffix in (".h", ".cuh"))
        own = [p.as_posix() for p in headers if ("cuda" in p.parts) == (self.part == "cuda")]
        listed = self.listed
        more = (name for part in ("common", "emulation") for name in listed.get(part, ()))
        return sorted([listed["bindings"], *listed["units"], *more, *own])

    @cached_property
    def digest(self) -> str:
        """Hash of what a build may read."""
        listed = {key: value for key, value in self.listed.items() if key != "tests"}
        digest = hashlib.sha256(json.dumps(listed, sort_keys=True).encode())
        for name in self._names():
            digest.update(name.encode() + b"\0" + (self.folder / name).read_bytes() + b"\0")
        return digest.hexdigest()[:16]

    def copy(self, folder: Path) -> Sources:
        """The same in another folder, where nobody changes it."""
        for name in ("sources.json", *self._names()):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.folder / name, folder / name)
        return Sources.read(folder, self.part)

    def isas(self) -> list[str]:
        """Instruction sets of this architecture, lowest first."""
        here = (platform.machine().replace("AMD64", "x86_64"), "any")
        return [name for name, isa in self.listed["isas"].items() if isa["machine"] in here]


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler: the command with its leading arguments, and the version it states."""

    command: tuple[str, ...]
    version: str

    @classmethod
    def find(cls, asked: str = "") -> Compiler:
        """The compiler of the variable CXX (`asked`), else the machine's usual one.

        Raises:
            BuildError: there is none.
        """
        for candidate in [asked] if asked.strip() else ["c++", "g++", "clang++"]:
            command = shlex.split(candidate)
            program = shutil.which(command[0])
            if program is not None:
                return cls((program, *command[1:]), _version((program, *command[1:])))
        got = f"CXX={asked!r}, which is no program" if asked else "no c++, g++ or clang++ in PATH"
        raise BuildError(f"expected a C++ compiler, got {got}; install g++, or set CXX to one")


class Step(NamedTuple):
    """One file to compile."""

    source: Path
    output: str
    command: list[str]


@dataclass(frozen=True)
class Recipe:
    """All that decides about the bytes of a module.

    Attributes:
        openmp: what the linker is given for OpenMP: the file of GCC's runtime, or "-lgomp"; with ""
            the module starts threads of its own.
    """

    sources: Sources
    isas: tuple[str, ...]
    compiler: Compiler
    openmp: str

    def steps(self) -> list[Step]:
        """How each file is compiled, the slowest first."""
        return [*self.units(), *self._common()]

    def units(self) -> list[Step]:
        """How the units are compiled, each for every instruction set."""
        listed = self.sources.listed
        return [
            self._step(file, f"{isa}/", [*listed["isas"][isa]["flags"], f"-DNLK_ISA={isa}"])
            for file in listed["units"]
            for isa in self.isas
        ]

    def _common(self) -> list[Step]:
        threads = ["-fopenmp"] if self.openmp else ["-DNLK_STD_THREADS", "-pthread"]
        flags = [*threads, *(f"-DNLK_WITH_{isa.upper()}" for isa in self.isas)]
        bindings = [
            f'-DNLK_SOURCES="{self.sources.digest}"',
            *self.sources.listed.get("bindings_flags", ()),
            *(f"-isystem{folder}" for folder in python_headers()),
        ]
        files = [self._step(file, "", flags) for file in self.sources.listed["common"]]
        return [self._step(self.sources.listed["bindings"], "", [*flags, *bindings]), *files]

    def _step(self, file: str, folder: str, flags: list[str]) -> Step:
        listed = self.sources.listed
        output = f"{_OBJECTS}/{folder}{re.sub(r'[^a-z0-9]+', '_', file)}.o"
        source = self.sources.folder / file
        command = [
            *self.compiler.command,
            f"-std=c++{listed['cxx_standard']}",
            "-fPIC",
            *listed["flags"],
            *(f"-I{self.sources.folder / folder}" for folder in listed["include"]),
            *flags,
            *("-c", str(source), "-o", output),
        ]
        return Step(source, output, command)

    def link(self, module: str) -> list[str]:
        """The command that makes the module of the compiled files."""
        objects = [step.output for step in self.steps()]
        threads = [self.openmp] if self.openmp else ["-pthread"]
        return [*self.compiler.command, "-shared", *objects, "-o", module, *threads]


def build(recipe: Recipe, folder: Path, module: str, jobs: int) -> None:
    """Compile a recipe in a folder, which afterwards holds the file `module`.

    Raises:
        BuildError: with the end of what the compiler printed.
    """
    (folder / "build.ninja").write_text(_ninja_file(recipe, module))
    printed = folder / "output.txt"
    if _run([find_ninja(), "--quiet", "-C", str(folder), "-j", str(jobs)], printed) != 0:
        shown = "\n".join(printed.read_text(errors="replace").splitlines()[-_SHOWN_LINES:])
        compiler = f"{shlex.join(recipe.compiler.command)} ({recipe.compiler.version})"
        shown = shown or "no word (is the disk full?)"
        raise BuildError(f"expected {compiler} to compile {recipe.sources.folder}, got:\n{shown}")
    if not (folder / module).is_file():
        command = shlex.join(recipe.compiler.command)
        raise BuildError(
            f"expected {command} to write {module}, got nothing; set CXX to a compiler"
        )
    shutil.rmtree(folder / _OBJECTS, ignore_errors=True)


def compile_commands(recipe: Recipe, folder: Path) -> str:
    """What editors read to know how each file is compiled, in JSON."""
    entries = [
        {"directory": str(folder), "file": str(s.source), "command": shlex.join(s.command)}
        for s in recipe.steps()
    ]
    return json.dumps(entries, indent=1) + "\n"


def _ninja_file(recipe: Recipe, module: str) -> str:
    lines = ["rule run", "  command = $cmd", "  description = $out"]
    for step in recipe.steps():
        lines += [f"build {_escaped(step.output)}: run {_escaped(str(step.source))}"]
        lines += [f"  cmd = {shlex.join(step.command).replace('$', '$$')}"]
    objects = " ".join(_escaped(step.output) for step in recipe.steps())
    lines += [f"build {module}: run {objects}"]
    lines += [f"  cmd = {shlex.join(recipe.link(module)).replace('$', '$$')}"]
    return "\n".join([*lines, ""])


def _escaped(path: str) -> str:
    return re.sub(r"([$ :])", r"$\1", path)


def links_openmp(compiler: Compiler, openmp: str, folder: Path) -> bool:
    """Whether a compiler's parallel regions run in the runtime of GCC; Clang's need their own."""
    probe = folder / "openmp"
    probe.mkdir()
    source, compiled = str(probe / "probe.cpp"), str(probe / "probe.o")
    Path(source).write_text('int main() {\n#pragma omp parallel\n  { asm volatile(""); }\n}\n')
    compiling = [*compiler.command, "-fopenmp", "-fPIC", "-c", source, "-o", compiled]
    linking = [*compiler.command, "-shared", "-Wl,--no-undefined", compiled, openmp]
    linking += ["-o", str(probe / "probe.so")]
    works = all(_run(command, probe / "output.txt") == 0 for command in (compiling, linking))
    shutil.rmtree(probe)
    return works


def _run(command: list[str], printed: Path) -> int:
    """Exit status of a command whose output goes to a file.

    Without pipes and by posix_spawn, for which subprocess needs close_fds=False: a process that
    another thread forks meanwhile would keep a pipe open, wait for our lock, and we for its end.
    """
    with open(printed, "w") as file:
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            close_fds=False,
        ).returncode


def host_isa(isas: Sequence[str]) -> str:
    """The highest of some instruction sets that this machine runs."""
    found, flags = "portable", _kernel_flags()
    for name, needed in _KERNEL_FLAGS.items():
        if name not in isas or not needed <= flags:
            break
        found = name
    return found


def runs(isa: str, isas: Sequence[str]) -> bool:
    """Whether this machine runs one of some instruction sets, which are in ascending order."""
    return list(isas).index(isa) <= list(isas).index(host_isa(isas))


@cache
def _kernel_flags() -> frozenset[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    line = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    return frozenset(line[1].split() if line else ())


def find_ninja() -> str:
    """The ninja of the Python package, else one in PATH.

    Raises:
        BuildError: there is none.
    """
    try:
        import ninja

        beside = Path(ninja.BIN_DIR, "ninja")
        if beside.is_file():
            return str(beside)
    except (ImportError, AttributeError):
        pass
    found = shutil.which("ninja")
    if found is None:
        raise BuildError("expected ninja, got none; pip install ninja")
    return found


def python_headers() -> list[str]:
    """Folders of Python's and pybind11's headers.

    Raises:
        BuildError: one of the two is not installed.
    """
    python = sysconfig.get_paths()["include"]
    if not Path(python, "Python.h").is_file():
        raise BuildError(f"expected Python.h in {python}, got none; install python3-dev")
    try:
        import pybind11
    except ImportError:
        raise BuildError("expected pybind11, got none; pip install pybind11") from None
    return [python, pybind11.get_include()]


def jobs() -> int:
    """How many compilers may run at once: one on each core, as far as memory reaches."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(cores or 1, _free_bytes() // _BYTES_PER_JOB))


def _free_bytes() -> int:
    """Memory that is free to this process, by the kernel and by its group's limit."""
    found = []
    try:
        text = Path("/proc/meminfo").read_text()
        found.append(int(re.search(r"MemAvailable:\s*(\d+)", text)[1]) * 1024)
        group = Path("/sys/fs/cgroup")
        limit, used = ((group / f"memory.{name}").read_text() for name in ("max", "current"))
        found.append(int(limit) - int(used))
    except (OSError, ValueError, TypeError):
        # Not Linux, or no limit.
        pass
    return min(found, default=4 * _BYTES_PER_JOB)


@cache
def _version(command: tuple[str, ...]) -> str:
    return (printed((*command, "--version")).splitlines() or ["unknown version"])[0]


def printed(command: tuple[str, ...]) -> str:
    """What a compiler says of itself.

    Raises:
        BuildError: it does not run, or fails.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(
            f"expected a compiler, got {error} of {shlex.join(command)}; set CXX to a compiler"
        ) from None
    if done.returncode != 0:
        raise BuildError(
            f"expected a C++ compiler, got {shlex.join(command[:-1])}, which exits with "
            f"{done.returncode}; set CXX to a compiler"
        )
    return done.stdout
