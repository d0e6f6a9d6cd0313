"""The portable CUDA kernels as a module for CPU tensors: `csrc/test/cuda/emulation.h` runs them.

The very sources of the kernels and of their bindings, compiled by the C++ compiler. Kept in the
cache as every module is.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from nlkernels import _build, _build_cuda, _cuda, _env, _ext, _paths
from nlkernels._build import Compiler, Recipe, Sources, Step

# Units of csrc/sources.json that are written for the emulation, too.
UNITS = (
    "cuda/attention_float32.cu",
    "cuda/attention_bfloat16.cu",
    "cuda/attention_float16.cu",
    "cuda/region.cu",
    "cuda/concat.cu",
    "cuda/gate.cu",
)
_FLAGS = ("-O2", "-fvisibility=hidden", "-DNLK_CUDA_EMULATION", "-Wno-unknown-pragmas")


@dataclass(frozen=True)
class _Recipe(Recipe):
    def units(self) -> list[Step]:
        return [self._step(file, "", ["-x", "c++"]) for file in UNITS]

    def _common(self) -> list[Step]:
        listed = self.sources.listed
        headers = (f"-isystem{folder}" for folder in _build.python_headers())
        defined = f'-DNLK_SOURCES="{self.sources.digest}"'
        bindings = self._step(listed["bindings"], "", ["-O1", defined, *headers])
        return [bindings, *(self._step(file, "", []) for file in listed["emulation"])]

    def _step(self, file: str, folder: str, flags: list[str]) -> Step:
        listed = {**self.sources.listed, "flags": _FLAGS}
        sources = replace(self.sources, listed=listed)
        return Recipe(sources, self.isas, self.compiler, "")._step(file, folder, flags)

    def link(self, module: str) -> list[str]:
        objects = [step.output for step in self.steps()]
        return [*self.compiler.command, "-shared", *objects, "-o", module]


class _Emulation(_ext.Extension):
    language = "emulated CUDA"

    def _asked(self) -> str:
        return "emulation"

    def _isa(self, asked: str, sources: Sources) -> str:
        return asked

    def _sources(self) -> Sources:
        return Sources.read(self._folder(), _build_cuda.PART)

    def _recipe(self, asked: str) -> Recipe:
        return _Recipe(self._sources(), (asked,), Compiler.find(_env.compiler()), "")


@functools.cache
def module() -> ModuleType:
    """The module, compiled at the first use: about half a minute."""
    before = sys.getdlopenflags()
    # Entries of units that are not emulated stay undefined, and nobody calls them.
    sys.setdlopenflags(os.RTLD_LAZY)
    try:
        return _Emulation("_C_cuda", _paths.csrc_dir).load()
    finally:
        sys.setdlopenflags(before)


@contextlib.contextmanager
def emulation(order: int = 0) -> Iterator[Any]:
    """Within the context CUDA kernels run on CPU tensors.

    Args:
        order: in which order the threads of a block take turns: 0 up, 1 down, else a seed.
    """
    before, _cuda._emulation = _cuda._emulation, module()
    order_before = os.environ.get("NLK_EMULATION_ORDER")
    os.environ["NLK_EMULATION_ORDER"] = str(order)
    try:
        yield _cuda._emulation
    finally:
        _cuda._emulation = before
        if order_before is None:
            del os.environ["NLK_EMULATION_ORDER"]
        else:
            os.environ["NLK_EMULATION_ORDER"] = order_before
