"""CUDA kernels: the module that holds them, where they can run, and what a call is given.

The module `_C_cuda` is found or compiled as that of CPUs (`_ext`), by nvcc, for the architecture of
the GPU that asks. It brings CUDA's runtime, so only the driver has to be there. Kernels take
addresses, sizes, int64 strides and a stream; nothing here is imported before it is asked for.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from nlkernels import _build_cuda, _env, _launch, _paths
from nlkernels._build import Sources
from nlkernels._ext import DTYPES, Extension, ExtensionError

# Compiles in the place of a GPU: the kernels' own code, run by CPU threads, for tests.
_emulation: ModuleType | None = None


class _Cuda(Extension):
    """The module of CUDA kernels; what it is asked for is an architecture, "90" or "sm_90a"."""

    language = "CUDA"
    seconds_unit = 20

    def _asked(self) -> str:
        if chosen := _env.read("NLKERNELS_CUDA_ARCHS"):
            return next(iter(_build_cuda.asked(chosen, self.architectures())[::-1]), "")
        if torch.version.hip is not None or not torch.cuda.is_available():
            return ""
        return str(_launch.architecture(torch.device("cuda")))

    def _setting(self) -> tuple[str, ...]:
        return (*super()._setting(), *_env.cuda_homes())

    def _sources(self) -> Sources:
        return Sources.read(self._folder(), _build_cuda.PART)

    def architectures(self) -> list[str]:
        """What the kernels can be compiled for: "sm_75" and so on."""
        return list(self._sources().listed["architectures"])

    def _isa(self, asked: str, sources: Sources) -> str:
        listed = list(sources.listed["architectures"])
        if not asked:
            raise ExtensionError(
                "nlkernels: expected an NVIDIA GPU to compile for, got no device; name one in "
                "NLKERNELS_CUDA_ARCHS, other backends serve this machine"
            )
        if asked in listed:
            return asked
        found = _build_cuda.serving(asked, listed)
        if found is None:
            raise ExtensionError(
                f"nlkernels: expected a GPU for which the CUDA kernels are written "
                f"({', '.join(listed)}), got sm_{asked}; other backends serve it"
            )
        return found

    def _recipe(self, asked: str) -> _build_cuda.CudaRecipe:
        sources = self._sources()
        isas = (self._isa(asked, sources),)
        return _build_cuda.recipe(sources, isas, _env.cuda_homes(), _env.compiler())

    def _import(self, path: Path) -> ModuleType:
        module = super()._import(path)
        made, served = module.runtime_version() // 1000, _build_cuda.driver()
        if 0 < served[0] < made:
            raise ImportError(
                f"it is of CUDA {made}, the driver serves CUDA {served[0]}.{served[1]}"
            )
        return module

    def _check(self, recipe: Any) -> None:
        super()._check(recipe)
        if obstacle := _build_cuda.driver_obstacle(recipe.compiler):
            raise ExtensionError(f"nlkernels: {obstacle}")


CUDA = _Cuda("_C_cuda", _paths.csrc_dir)


def emulating() -> bool:
    """Whether kernels run in the emulation, on CPU tensors."""
    return _emulation is not None


def unserved(problem: Any) -> list[str]:
    """Why no CUDA kernel can run a problem: device, dtype, or the module that is missing.

    `problem` has `device` (its type), `index`, `dtype` and `dtype_name`.
    """
    if problem.dtype == torch.float64 or problem.dtype not in DTYPES:
        return [f"its kernels take float16, bfloat16 and float32, not {problem.dtype_name}"]
    if problem.device == "cpu" and emulating():
        return []
    if problem.device != "cuda":
        return [f"its kernels run on NVIDIA GPUs, not on {problem.device}"]
    if torch.version.hip is not None:
        return ["its kernels are written for NVIDIA GPUs"]
    return _on_gpu(problem)


def _on_gpu(problem: Any) -> list[str]:
    if not torch.cuda.is_available():
        return ["there is no usable GPU"]
    architecture = _launch.architecture(torch.device("cuda", problem.index))
    if architecture < 80 and problem.dtype == torch.bfloat16:
        return ["this GPU multiplies no bfloat16, which needs compute capability 8.0"]
    obstacle = CUDA.missing(str(architecture)).removeprefix("nlkernels: ")
    return [obstacle] if obstacle else []


def module(tensor: torch.Tensor) -> ModuleType:
    """The module for the device of a tensor, compiled if it has to be: at first, a minute or two.

    Raises:
        ExtensionError: it cannot be had; the message says why and what to do.
    """
    if _emulation is not None and tensor.device.type == "cpu":
        return _emulation
    return CUDA.load(str(_launch.architecture(tensor.device)))


def architecture(tensor: torch.Tensor) -> int:
    """Compute capability of a tensor's device as one number: 90 for sm_90.

    The emulation has neither copy engine nor warp groups: it is an sm_80.
    """
    return 80 if tensor.device.type == "cpu" else _launch.architecture(tensor.device)


def toolkit(device: torch.device) -> str:
    """The CUDA that compiled the kernels of a device, or would: "13.0"; "none" without either."""
    if device.type != "cuda":
        return "none"
    asked = str(_launch.architecture(device))
    if CUDA.missing(asked):
        return "none"
    if CUDA.is_loaded(asked):
        made = CUDA.load(asked).runtime_version()
        return f"{made // 1000}.{made % 1000 // 10}"
    return _build_cuda.toolkit(_env.cuda_homes())


def stream(tensor: torch.Tensor) -> tuple[int, int]:
    """What every kernel is given first: number of the device, and handle of its current stream."""
    if tensor.device.type == "cpu":
        return 0, 0
    device = tensor.device
    index = torch.cuda.current_device() if device.index is None else device.index
    return index, torch.cuda.current_stream(index).cuda_stream


def operand(tensor: torch.Tensor) -> tuple[int, ...]:
    """Address, and strides in elements."""
    return tensor.data_ptr(), *tensor.stride()
