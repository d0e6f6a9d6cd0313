"""The Hopper kernels for CPU tensors: `csrc/test/cuda/hopper/machine.h` runs them.

The very sources of the kernels and of their dispatch, compiled by the C++ compiler against a model
of the machine. Kept in build/hopper, by the hash of what it is made of.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nlkernels import _cuda, _paths
from nlkernels.ops import _cuda_attention

_FLAGS = ("-std=c++17", "-O2", "-fPIC", "-Wno-unknown-pragmas")
_FILES = ("test/cuda/hopper/emulate.cpp", "test/cuda/hopper/machine.cpp")
_READ = ("cuda/hopper", "test/cuda/hopper", "include/nlk/cuda")


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernels; the calling test is skipped where there is no compiler."""
    compiler = os.environ.get("CXX", "g++").split()
    if shutil.which(compiler[0]) is None:
        pytest.skip("no C++ compiler")
    root, csrc = _paths.checkout_root(), _paths.csrc_dir()
    if root is None:
        pytest.skip("the tests' model of the machine is part of the checkout")
    digest = hashlib.sha256(repr((compiler, _FLAGS)).encode())
    for path in sorted(path for folder in _READ for path in (csrc / folder).rglob("*.*")):
        digest.update(path.name.encode() + path.read_bytes())
    kept = root / "build" / "hopper" / f"{digest.hexdigest()[:16]}.so"
    if not kept.exists():
        _compile(compiler, csrc, kept)
    return ctypes.CDLL(str(kept))


def _compile(compiler: list[str], csrc: Path, kept: Path) -> None:
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as work:
        objects = [f"{work}/{Path(file).stem}.o" for file in _FILES]
        include = [f"-I{csrc}", f"-I{csrc / 'include'}"]
        for file, made in zip(_FILES, objects, strict=True):
            command = [*compiler, *_FLAGS, *include, "-c", str(csrc / file), "-o", made]
            subprocess.run(command, check=True)
        subprocess.run([*compiler, "-shared", *objects, "-o", f"{work}/all.so"], check=True)
        os.replace(f"{work}/all.so", kept)


def _array(kind: type, numbers) -> ctypes.Array:
    numbers = list(numbers)
    return (kind * len(numbers))(*numbers)


def _operands(operands) -> tuple[ctypes.Array, ctypes.Array]:
    addresses = _array(ctypes.c_void_p, (address for address, *_ in operands))
    strides = (stride for _, *strides in operands for stride in strides)
    return addresses, _array(ctypes.c_longlong, strides)


def _delta(grad: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return (grad.float() * out.float()).sum(2)


class Model:
    """Stands in for the module of CUDA kernels, with the signature of its bindings."""

    def __init__(self, seed: int, blocks: int) -> None:
        self.seed, self.blocks, self.plans = seed, blocks, []

    def hopper_forward_shared(self, plan: tuple, depth: int) -> int:
        return library().emulate_shared(_array(ctypes.c_int, plan), ctypes.c_longlong(depth))

    def hopper_forward(
        self, where, plan, dtype, blocks, factors, sizes, query, key, value, out, stats
    ) -> None:
        self.plans.append(plan)
        error = library().emulate_forward(
            _array(ctypes.c_int, map(int, plan)),
            dtype,
            self.blocks,
            _array(ctypes.c_float, factors),
            _array(ctypes.c_longlong, sizes),
            *_operands((query, key, value)),
            ctypes.c_void_p(out),
            ctypes.c_void_p(stats),
            self.seed,
        )
        self._check(error)

    def hopper_d_scores_shared(self, plan: tuple) -> int:
        return library().emulate_d_scores_shared(_array(ctypes.c_int, plan))

    def hopper_d_scores(
        self, where, plan, dtype, blocks, factors, sizes, operands, given, workspace
    ) -> None:
        self.plans.append(plan)
        error = library().emulate_d_scores(
            _array(ctypes.c_int, map(int, plan)),
            dtype,
            self.blocks,
            _array(ctypes.c_float, factors),
            _array(ctypes.c_longlong, sizes),
            *_operands(operands),
            _array(ctypes.c_void_p, given),
            _array(ctypes.c_void_p, workspace),
            self.seed,
        )
        self._check(error)

    def _check(self, error: int) -> None:
        if error:
            raise RuntimeError(f"the emulated kernel failed with {error}")


@contextlib.contextmanager
def emulation(seed: int = 0, blocks: int = 2) -> Iterator[Model]:
    """Within the context CPU tensors are those of a Hopper GPU of `blocks` multiprocessors.

    Args:
        seed: draws in which order threads run, and when copies and products happen.
        blocks: at most so many blocks run, each taking its share of the tiles.
    """
    model = Model(seed, blocks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_cuda, "_emulation", model)
        patch.setattr(_cuda, "architecture", lambda tensor: 90)
        # A portable kernel, which another emulation runs: tests/cuda/test_attention.py.
        patch.setattr(_cuda_attention, "delta", _delta)
        yield model
