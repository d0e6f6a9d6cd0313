"""The native module: prebuilt, from the cache, or compiled at its first use.

  prebuilt   nlkernels/_C.<abi>.so, by `NLKERNELS_BUILD=1 pip install`; ignored where the sources
             beside it have changed since
  cached     <cache folder>/ext/<version>/<isa>-<content>-<toolchain>/_C.so
  compiled   into a temporary folder beside that, which is renamed when it is complete

`content` hashes the sources and their flags, Python's ABI and the runtime of OpenMP; `toolchain`
the compiler and pybind11. Without a compiler, a cached module of any toolchain serves. One process
compiles, under a lock of the operating system, which ends with the process however that ends;
others wait and then find the result. A cached file that is damaged is compiled again.

The module uses the runtime of OpenMP that torch has loaded: two of them would fight for the cores.
Nothing is read, written or compiled by importing this file.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import os
import shutil
import sys
import sysconfig
import threading
import time
import warnings
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import nlkernels
from nlkernels import _build, _env, _paths, _store
from nlkernels._build import BuildError, Compiler, Recipe, Sources

# Measured, for the announcement: bindings and common files; a unit for one instruction set.
_SECONDS_COMMON, _SECONDS_UNIT = 13, 9

# nlk::Dtype.
DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}

_lock = threading.RLock()
_forked = False


class ExtensionError(RuntimeError):
    """The native module cannot be had; the message says why and what to do."""


def load() -> ModuleType:
    """The module, compiled if it has to be: the first time takes about half a minute.

    Raises:
        ExtensionError: it cannot be had; with the compiler's output where that refused.
    """
    return CPU.load()


def missing() -> str:
    """Why `load` would fail, as far as can be told without compiling; "" where it should not."""
    return CPU.missing()


def unserved(problem: Any) -> list[str]:
    """Why no C++ kernel can run a problem: its device, its dtype, or the module that is missing."""
    if problem.device != "cpu":
        return ["its kernels run on CPUs only"]
    if problem.dtype not in DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        return [f"its kernels serve {known}, not {problem.dtype_name}"]
    obstacle = missing().removeprefix("nlkernels: ")
    return [obstacle] if obstacle else []


def prepare() -> str:
    """Load the module, compile it if it has to be; says why it cannot be had, and warns once."""
    return CPU.prepare()


def native() -> tuple[ModuleType, int]:
    """The module, and the level of the instruction set that kernels are to use (`nlk::Isa`).

    Raises:
        ExtensionError: as `load`.
    """
    asked = _env.read("NLKERNELS_CPU_ISA")
    module = CPU.load(asked)
    return module, module.isas[asked] if asked else module.best_isa()


def isa() -> int:
    """The level alone."""
    return native()[1]


def loaded_for() -> str | None:
    """What NLKERNELS_CPU_ISA says, where the module is loaded for that; else None."""
    asked = _env.read("NLKERNELS_CPU_ISA")
    return asked if CPU.is_loaded(asked) else None


def isa_name() -> str:
    """Name of the instruction set that kernels are to use; loads nothing."""
    return _env.read("NLKERNELS_CPU_ISA") or _build.host_isa(_build.ISAS)


@functools.cache
def openmp_runtime() -> str:
    """File of GCC's runtime of OpenMP in this process, "" where torch brought none or another."""
    try:
        lines = Path("/proc/self/maps").read_bytes().splitlines()
    except OSError:
        return ""
    files = {os.fsdecode(line[line.find(b"/") :]) for line in lines if b"omp" in line}
    runtimes = [f for f in files if Path(f).name.startswith(("libgomp", "libomp", "libiomp5"))]
    return runtimes[0] if len(runtimes) == 1 and "/libgomp" in runtimes[0] else ""


class Extension:
    """One native module: its sources, and what of it is in this process.

    Args:
        name: of the module, without the package: "_C".
        folder: gives the folder of its sources; called when that is needed.
    """

    language = "C++"
    seconds_unit = _SECONDS_UNIT

    def __init__(self, name: str, folder: Callable[[], Path]) -> None:
        self.name = name
        self._folder = folder
        # By what was asked for; by file, as a module can be initialised only once.
        self._modules: dict[str, ModuleType] = {}
        self._imported: dict[Path, ModuleType] = {}
        self._failures: dict[tuple, str] = {}
        self._obstacles: dict[tuple, str] = {}

    def load(self, asked: str | None = None) -> ModuleType:
        """See `nlkernels._ext.load`; `asked`: what it shall run on, where that is known."""
        asked = self._asked() if asked is None else asked
        module = self._modules.get(asked)
        if module is not None:
            return module
        with _lock:
            setting = (asked, *self._setting())
            if failure := self._failures.get(setting):
                raise ExtensionError(failure)
            try:
                return self._find(asked) or self._compile(asked)
            except (BuildError, ExtensionError, OSError) as error:
                self._failures[setting] = str(error)
                raise ExtensionError(str(error)) from None

    def missing(self, asked: str | None = None) -> str:
        """See `nlkernels._ext.missing`."""
        asked = self._asked() if asked is None else asked
        if self.is_loaded(asked):
            return ""
        setting = (asked, *self._setting())
        with _lock:
            if setting not in self._obstacles:
                self._obstacles[setting] = self._obstacle(asked)
        return self._failures.get(setting) or self._obstacles[setting]

    def prepare(self) -> str:
        """See `nlkernels._ext.prepare`."""
        try:
            self.load()
        except ExtensionError as error:
            _warn(f"goes on without its {self.language} kernels: {error}")
            return str(error)
        return ""

    def is_loaded(self, asked: str) -> bool:
        """Whether the module is in this process, for what is asked for."""
        return asked in self._modules

    def loaded(self) -> ModuleType | None:
        """The module, where it is in this process."""
        return self._modules.get(self._asked())

    def _obstacle(self, asked: str) -> str:
        try:
            if self._find(asked) is None:
                self._check(self._recipe(asked))
        except (BuildError, ExtensionError, OSError) as error:
            return str(error)
        return ""

    def _find(self, asked: str) -> ModuleType | None:
        """The module, where nothing has to be compiled for it."""
        module = self._prebuilt(asked)
        for folder in [] if module is not None else self._candidates(asked):
            module = module or self._cached(folder)
        return module and self._keep(asked, module)

    def _keep(self, asked: str, module: ModuleType) -> ModuleType:
        if _forked and hasattr(module, "run_serially"):
            module.run_serially()
        self._modules[asked] = module
        return module

    def _prebuilt(self, asked: str) -> ModuleType | None:
        names = [self.name + suffix for suffix in EXTENSION_SUFFIXES]
        paths = (Path(folder, name) for folder in nlkernels.__path__ for name in names)
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            return None
        sources = self._sources()
        isa = self._isa(asked, sources)
        try:
            module = self._import(path)
        except ImportError as error:
            _warn(f"{path} cannot be loaded ({error}) and is ignored; install the package again")
            return None
        if module.sources != sources.digest:
            _warn(f"{path} was compiled of other sources and is ignored; install the package again")
            return None
        # What this machine prefers may be missing in it, what the user asks for may not.
        return module if isa in module.isas or not asked else None

    def _cached(self, folder: Path) -> ModuleType | None:
        file = folder / f"{self.name}.so"
        try:
            if _store.is_sound(file):
                return self._import(file)
            reason = "it is damaged" if folder.is_dir() else ""
        except (OSError, ImportError, ValueError, KeyError) as error:
            reason = f"{type(error).__name__}: {error}"
        if reason:
            _store.say(f"{file} cannot be used: {reason}")
        return None

    def _candidates(self, asked: str) -> list[Path]:
        """Folders of the cache that may hold the module."""
        try:
            recipe = self._recipe(asked)
        except BuildError:
            sources = self._sources()
            pattern = f"{_content(sources, self._isa(asked, sources))}-*"
            return [folder for home in _store.homes() for folder in sorted(home.glob(pattern))]
        return [home / _key(recipe) for home in _store.homes()]

    def _compile(self, asked: str) -> ModuleType:
        recipe = self._recipe(asked)
        self._check(recipe)
        with _store.alone() as home:
            # Another process may have compiled it while this one waited.
            module = self._find(asked)
            if module is not None:
                return module
            final = home / _key(recipe)
            with _store.workplace(home, final) as work:
                self._compile_in(work, recipe, final)
            module = self._cached(final)
        if module is None:
            raise ExtensionError(
                f"nlkernels: expected {final} to load after it was compiled, got the error printed "
                "above; set NLKERNELS_CACHE_DIR to a folder on another file system"
            )
        return self._keep(asked, module)

    def _compile_in(self, work: Path, recipe: Recipe, final: Path) -> None:
        steps, jobs = len(recipe.steps()), _build.jobs()
        units = len(recipe.sources.listed["units"]) * len(recipe.isas)
        seconds = (_SECONDS_COMMON + self.seconds_unit * units) / min(jobs, steps)
        _store.say(
            f"compiles {steps} {self.language} files for {', '.join(recipe.isas)} in {jobs} jobs, "
            f"once; takes about {max(10, round(seconds, -1)):.0f} s; into {final}"
        )
        start = time.perf_counter()
        if recipe.openmp and not _build.links_openmp(recipe.compiler, recipe.openmp, work):
            recipe = dataclasses.replace(recipe, openmp="")
        # A copy: the sources may be edited while they are compiled.
        copy = dataclasses.replace(recipe, sources=recipe.sources.copy(work / "sources"))
        if copy.sources.digest != recipe.sources.digest:
            raise ExtensionError(
                f"nlkernels: expected {recipe.sources.folder} to stay as it is for a moment, got a "
                "change; start again"
            )
        try:
            _build.build(copy, work, f"{self.name}.so", jobs)
        except BuildError as error:
            told = str(error).replace(str(copy.sources.folder), str(recipe.sources.folder))
            raise ExtensionError(f"{told}\nset NLKERNELS_JIT=0 to go on without it") from None
        shutil.rmtree(copy.sources.folder)
        (work / "compile_commands.json").write_text(_build.compile_commands(recipe, final))
        seconds = time.perf_counter() - start
        facts = {
            "compiler": recipe.compiler.version,
            "isas": recipe.isas,
            "openmp": recipe.openmp,
            "seconds": round(seconds, 1),
        }
        _store.complete(work / f"{self.name}.so", facts)
        _store.say(f"compiled in {seconds:.0f} s")

    def _check(self, recipe: Recipe) -> None:
        """Raise where something that every compilation needs is missing."""
        if sys.platform != "linux":
            raise ExtensionError(
                f"nlkernels: expected Linux for native code, got {sys.platform}; other backends "
                "serve every system"
            )
        asked = _env.read("NLKERNELS_JIT")
        if asked != "1":
            never = "NLKERNELS_JIT=0, which forbids to compile it"
            got = never if asked == "0" else f"got NLKERNELS_JIT={asked!r}, neither 0 nor 1"
            raise ExtensionError(
                "nlkernels: expected native code that is installed or cached, got none, and "
                f"{got}; unset it, or install with NLKERNELS_BUILD=1"
            )
        _build.find_ninja()
        _build.python_headers()
        if obstacle := _store.obstacle():
            raise ExtensionError(obstacle)

    def _asked(self) -> str:
        """What the user asks the module to be compiled for, "" for the best."""
        return _env.read("NLKERNELS_CPU_ISA")

    def _setting(self) -> tuple[str, ...]:
        """What the user may change, beside that, so that a failure becomes a success."""
        variables = ("NLKERNELS_JIT", "NLKERNELS_CACHE_DIR")
        return (*map(_env.read, variables), _env.compiler())

    def _sources(self) -> Sources:
        return Sources.read(self._folder())

    def _recipe(self, asked: str) -> Recipe:
        sources = self._sources()
        isa = self._isa(asked, sources)
        return Recipe(sources, (isa,), Compiler.find(_env.compiler()), openmp_runtime())

    def _isa(self, asked: str, sources: Sources) -> str:
        isas = sources.isas()
        host = _build.host_isa(isas)
        usable = isas[: isas.index(host) + 1]
        if asked and asked not in usable:
            raise ExtensionError(
                f"NLKERNELS_CPU_ISA: expected one of {', '.join(usable)} on this machine, got "
                f"{asked!r}; unset it for {host}"
            )
        return asked or host

    def _import(self, path: Path) -> ModuleType:
        if path not in self._imported:
            # pybind11 takes modules of one name for the same, whatever file they come from.
            name = f"nlkernels.{path.parent.name}.{self.name}"
            loader = ExtensionFileLoader(name, str(path))
            spec = importlib.util.spec_from_file_location(name, path, loader=loader)
            module = importlib.util.module_from_spec(spec)
            loader.exec_module(module)
            self._imported[path] = module
        return self._imported[path]


CPU = Extension("_C", _paths.csrc_dir)


def _content(sources: Sources, isa: str) -> str:
    abi = str(sysconfig.get_config_var("SOABI"))
    return f"{isa}-{_hash(sources.digest, abi, Path(openmp_runtime()).name)}"


def _key(recipe: Recipe) -> str:
    try:
        pybind11 = version("pybind11")
    except PackageNotFoundError:
        pybind11 = ""
    toolchain = _hash(*recipe.compiler.command, recipe.compiler.version, pybind11)
    return f"{_content(recipe.sources, recipe.isas[0])}-{toolchain}"


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def _after_fork() -> None:
    global _lock, _forked
    _lock, _forked = threading.RLock(), True
    _store.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@functools.cache
def _warn(message: str) -> None:
    # Cached: once for each message, whatever the filters of the program are.
    warnings.warn(f"nlkernels: {message}", RuntimeWarning, stacklevel=3)
