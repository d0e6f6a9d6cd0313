"""Pickled numpy arrays, rebuilt from their bytes by hand; numpy's own unpickling is never used."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from nlkernels.models.files._opcodes import Name, Refused

_NUMBERS = re.compile(r"[fiu][1248]|b1|\?|bool|float(16|32|64)|u?int(8|16|32|64)")


class Dtype:
    """A pickled dtype: of numbers, nothing else."""

    def __init__(self, code: str, align: bool = False, copy: bool = False) -> None:
        if not isinstance(code, str) or _NUMBERS.fullmatch(code) is None or code == "f1":
            raise Refused(f"an array of {code!r}, no numbers")
        self.dtype = np.dtype(code)

    def build(self, state: Sequence[Any]) -> None:
        order, *structure = state[1:5]
        if order not in ("<", ">", "=", "|") or structure != [None, None, None]:
            raise Refused("an array of structures, no numbers")
        self.dtype = self.dtype.newbyteorder(order)


# How many times the bytes of its file weights may take; shared ones are counted each time.
MOST_UNFOLDED = 16


class Array:
    """A pickled array: what it is made of is there once its state was read.

    Attributes:
        nbytes: bytes of its numbers, which take no memory of their own before `tensor`.
    """

    def __init__(self, *arguments: Any) -> None:
        self.parts: tuple[Any, ...] | None = None
        self.nbytes = 0

    def build(self, state: Sequence[Any]) -> None:
        shape, dtype, fortran, content = state[-4:]
        self.fill(shape, dtype, content, "F" if fortran else "C")

    def fill(self, shape: Sequence[int], dtype: Dtype, content: str | bytes, order: str) -> None:
        """Take over what the array is made of."""
        _check(shape, dtype, content)
        self.parts, self.nbytes = (shape, dtype, content, order), len(content)

    def tensor(self) -> torch.Tensor:
        """The values in the machine's byte order and in memory of their own."""
        if self.parts is None:
            raise ValueError("an array without content")
        return to_tensor(_array(*self.parts))


def check_unfolded(unfolded: int, size: int) -> None:
    """Refuse what unfolds into far more than its file: expanded or repeated numbers.

    Args:
        unfolded: bytes of all tensors.
        size: bytes of the file.

    Raises:
        ValueError: more than `MOST_UNFOLDED` times the file, and 64 MiB.
    """
    if unfolded > MOST_UNFOLDED * size + 2**26:
        raise ValueError(f"{unfolded} bytes of tensors in a file of {size}")


def to_tensor(array: np.ndarray) -> torch.Tensor:
    """A copy of an array of numbers; torch has no arrays of another byte order."""
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))


def _check(shape: Sequence[int], dtype: Dtype, content: str | bytes | bytearray) -> None:
    """Raise unless these are the bytes of such an array; Python 2's strings are bytes."""
    if not isinstance(dtype, Dtype) or not isinstance(content, str | bytes | bytearray):
        raise Refused("an array of objects, no numbers")
    if not all(isinstance(size, int) and size >= 0 for size in shape):
        raise ValueError(f"an array of shape {shape}")
    if math.prod(shape) * dtype.dtype.itemsize != len(content):
        raise ValueError(f"{len(content)} bytes for an array of {tuple(shape)} {dtype.dtype}")


def _array(
    shape: Sequence[int], dtype: Dtype, content: str | bytes | bytearray, order: str
) -> np.ndarray:
    if isinstance(content, str):
        content = content.encode("latin-1")
    return np.frombuffer(content, dtype.dtype).reshape(shape, order=order)


def _scalar(dtype: Dtype, content: str | bytes) -> float | int | bool:
    _check((), dtype, content)
    return _array((), dtype, content, "C").item()


def _from_buffer(content: bytes, dtype: Dtype, shape: Sequence[int], order: str) -> Array:
    array = Array()
    array.fill(shape, dtype, content, "F" if order == "F" else "C")
    return array


def _bytes(text: str, encoding: str) -> str:
    """How Python 3 writes bytes for Python 2: left as text, which repeated calls share."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise Refused(f"bytes in the encoding {encoding!r}")
    return text


def _dictionary(items: Any = ()) -> dict[Any, Any]:
    return dict(items) if isinstance(items, list | dict | tuple) else {}


# numpy.core is numpy._core since numpy 2.
CONTAINERS: dict[Name, Callable[..., Any]] = {
    Name("collections", "OrderedDict"): _dictionary,
    Name("collections", "defaultdict"): lambda *arguments: {},
    Name("_codecs", "encode"): _bytes,
    **{Name(home, "set"): lambda values=(): list(values) for home in ("builtins", "__builtin__")},
}
ARRAYS: dict[Name, Callable[..., Any]] = {
    Name("numpy", "dtype"): Dtype,
    Name("numpy", "ndarray"): Array,
    **{
        Name(f"numpy.{core}.multiarray", name): maker
        for core in ("core", "_core")
        for name, maker in (("_reconstruct", Array), ("scalar", _scalar))
    },
    **{Name(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")},
}
