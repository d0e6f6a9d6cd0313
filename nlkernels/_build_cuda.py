"""What the "cuda" part of `csrc/sources.json` says is compiled by nvcc, and for which GPUs.

Needs no torch, as `_build`. Every unit is compiled once, for all architectures that are asked for;
one that lists architectures is left out where none of them is.
"""

from __future__ import annotations

import ctypes
import re
import shlex
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from nlkernels import _build
from nlkernels._build import BuildError, Compiler, Recipe, Step

PART = "cuda"
# The oldest toolkit that knows every architecture in the list.
_OLDEST = (12, 8)


def find_nvcc(homes: list[str], cxx: str = "") -> Compiler:
    """nvcc of a folder that the user named, of PATH, or of the usual folder.

    Args:
        homes: folders of toolkits, as CUDA_HOME names them.
        cxx: the host compiler that the user named, "" for nvcc's own choice.

    Raises:
        BuildError: there is none, or it is too old.
    """
    beside = [str(Path(home, "bin", "nvcc")) for home in homes]
    candidates = beside[:1] or ["nvcc", "/usr/local/cuda/bin/nvcc"]
    program = next((found for name in candidates if (found := shutil.which(name))), None)
    if program is None:
        got = f"CUDA_HOME={homes[0]}, which has none" if homes else "none in PATH"
        raise BuildError(
            f"expected nvcc of CUDA {_text(_OLDEST)} or later, got {got}; install the CUDA "
            "toolkit, or set CUDA_HOME to its folder; other backends need none"
        )
    release = _release(program)
    if release < _OLDEST:
        raise BuildError(
            f"expected nvcc of CUDA {_text(_OLDEST)} or later, got {_text(release)} in {program}; "
            "install a newer CUDA toolkit, or set CUDA_HOME to one"
        )
    host = ("-ccbin", shlex.split(cxx)[0]) if cxx.strip() else ()
    version = f"nvcc {_text(release)}"
    return Compiler((program, *host), f"{version}, {_host(cxx)}")


def toolkit(homes: list[str]) -> str:
    """Release of the toolkit whose nvcc is found: "13.0".

    Raises:
        BuildError: as `find_nvcc`.
    """
    return _text(_release(find_nvcc(homes).command[0]))


def _host(cxx: str) -> str:
    """The version of the host compiler, which decides about the bytes of the module too."""
    return Compiler.find(cxx).version


@cache
def _release(program: str) -> tuple[int, int]:
    words = _build.printed((program, "--version"))
    found = re.search(r"release (\d+)\.(\d+)", words)
    if found is None:
        raise BuildError(f"expected {program} to state its release, got {words[-200:]!r}")
    return int(found[1]), int(found[2])


@cache
def driver() -> tuple[int, int]:
    """The newest CUDA that the driver of this machine serves; (0, 0) without a driver."""
    version = ctypes.c_int()
    try:
        library = ctypes.CDLL("libcuda.so.1")
        failed = library.cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return 0, 0
    return (0, 0) if failed else (version.value // 1000, version.value % 1000 // 10)


def driver_obstacle(compiler: Compiler) -> str:
    """Why the driver could not run what a compiler makes, "" where it can or there is none."""
    release = _release(compiler.command[0])
    if driver() == (0, 0) or driver()[0] >= release[0]:
        return ""
    return (
        f"expected a driver for CUDA {release[0]}, as {compiler.command[0]} compiles for, got one "
        f"for CUDA {_text(driver())}; update the driver, or set CUDA_HOME to a toolkit of CUDA "
        f"{driver()[0]}"
    )


def serving(architecture: str, listed: list[str]) -> str | None:
    """The listed architecture whose code runs best on a GPU: "90" is served by "sm_90a".

    Code runs on later GPUs of its major version; that of an "a" on no other.
    """
    major, minor = divmod(int(architecture), 10)
    best: tuple[int, str] | None = None
    for name in listed:
        own, exact = int(re.sub(r"\D", "", name)), name.endswith("a")
        fits = own == 10 * major + minor if exact else own // 10 == major and own % 10 <= minor
        if fits and (best is None or own > best[0]):
            best = own, name
    return best and best[1]


@dataclass(frozen=True)
class CudaRecipe(Recipe):
    """As `Recipe`, of nvcc; `isas` are architectures, `openmp` is not used."""

    def units(self) -> list[Step]:
        """How the units are compiled, each for all architectures that it is meant for."""
        listed, steps = self.sources.listed["units"], []
        for file, only in listed.items():
            targets = [isa for isa in self.isas if not only or isa in only]
            if targets:
                steps.append(self._step(file, "", [_generated(isa) for isa in targets]))
        return steps

    def _common(self) -> list[Step]:
        flags = [
            *(f"-DNLK_WITH_{isa.upper()}" for isa in self.isas),
            f'-DNLK_SOURCES="{self.sources.digest}"',
            *self.sources.listed.get("bindings_flags", ()),
            *(f"-isystem={folder}" for folder in _build.python_headers()),
        ]
        return [self._step(self.sources.listed["bindings"], "", flags)]

    def _step(self, file: str, folder: str, flags: list[str]) -> Step:
        step = super()._step(file, folder, flags)
        return step._replace(command=[c for c in step.command if c != "-fPIC"])

    def link(self, module: str) -> list[str]:
        """The command that makes the module, which brings CUDA's runtime with it."""
        objects = [step.output for step in self.steps()]
        return [*self.compiler.command, "-shared", "-cudart", "static", *objects, "-o", module]


def recipe(sources: Any, architectures: tuple[str, ...], homes: list[str], cxx: str) -> CudaRecipe:
    """How the module is compiled for some architectures.

    Raises:
        BuildError: no nvcc, or one that is too old.
    """
    return CudaRecipe(sources, architectures, find_nvcc(homes, cxx), "")


def asked(text: str, listed: list[str]) -> tuple[str, ...]:
    """The architectures that NLKERNELS_CUDA_ARCHS names, in the order of the list.

    Raises:
        BuildError: one that is not listed.
    """
    words = {"all": listed, "none": []}
    names = (
        words[text] if text in words else [word.strip() for word in text.split(",") if word.strip()]
    )
    if unknown := [name for name in names if name not in listed]:
        raise BuildError(
            f"NLKERNELS_CUDA_ARCHS: expected all, none or some of {', '.join(listed)} with commas "
            f"between them, got {unknown[0]!r}"
        )
    return tuple(name for name in listed if name in names)


def _generated(isa: str) -> str:
    return f"-gencode=arch={isa.replace('sm_', 'compute_')},code={isa}"


def _text(release: tuple[int, int]) -> str:
    return ".".join(map(str, release))
