"""Every environment variable of the project: name, default, meaning. No other file reads one.

Values are read when they are needed, never at import, so a running program may change them; a
function that torch.compile has traced keeps those of the time it was traced.
"""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Variable:
    """An environment variable: its value when unset or empty, and one sentence about it."""

    default: str
    doc: str


VARIABLES: dict[str, Variable] = {
    "NLKERNELS_BACKEND": Variable(
        default="auto",
        doc="backend of every operation whose call or block names none itself",
    ),
    "NLKERNELS_CACHE_DIR": Variable(
        default="~/.cache/nlkernels",
        doc="what was compiled, verified, measured here; in $XDG_CACHE_HOME where that is set",
    ),
    "NLKERNELS_AUTOTUNE": Variable(
        default="cache",
        doc="off: shipped choices; cache: also what warmup measured; full: measure at first use",
    ),
    "NLKERNELS_CPU_ISA": Variable(
        default="",
        doc="instruction set of the C++ kernels: portable, avx2, ...; empty: the best of this CPU",
    ),
    "NLKERNELS_JIT": Variable(
        default="1",
        doc="1: native code that is not installed is compiled at its first use; 0: never",
    ),
    "NLKERNELS_BUILD": Variable(
        default="0",
        doc="1: pip install compiles native code for all instruction sets (setup.py reads it)",
    ),
    "NLKERNELS_CUDA_ARCHS": Variable(
        default="",
        doc="architectures of CUDA kernels: sm_80,sm_90a, all, none; empty: of this GPU, on demand",
    ),
}


# Variables of other programs that change what happens here: name -> meaning.
OTHERS: dict[str, str] = {
    "CXX": "C++ compiler of all builds",
    "CUDA_HOME": "folder of the CUDA toolkit whose nvcc compiles; CUDA_PATH is asked next",
    "CUDA_VISIBLE_DEVICES": "GPUs that torch sees",
    "OMP_NUM_THREADS": "threads that torch starts with on CPUs",
    "TRITON_CACHE_DIR": "where Triton keeps compiled kernels, instead of ~/.triton/cache",
    "TRITON_INTERPRET": "1: Triton kernels run in its interpreter, on CPU tensors, for tests",
    "XDG_CACHE_HOME": "folder of caches, instead of ~/.cache",
}


def read(name: str) -> str:
    """Returns the value of a declared variable, or its default when it is unset or empty.

    Raises:
        KeyError: `name` is not declared in `VARIABLES`.
    """
    default = VARIABLES[name].default
    value = os.environ.get(name, "")
    return value if value else default


def cache_home() -> str:
    """Returns the folder for caches of all programs, as the XDG specification finds it."""
    return os.environ.get("XDG_CACHE_HOME") or "~/.cache"


def triton_cache() -> str:
    """Returns the folder in which Triton keeps compiled kernels."""
    return os.environ.get("TRITON_CACHE_DIR") or "~/.triton/cache"


def compiler() -> str:
    """Returns the C++ compiler that the user named for all builds, "" without one."""
    return os.environ.get("CXX", "")


def cuda_homes() -> list[str]:
    """Returns the folders of CUDA toolkits that the user named, best first."""
    return [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
