"""Checkpoints of Caffe2's video-nonlocal-net: Python 2 pickles of numpy arrays by blob name.

Training saves {"blobs": {name: array}}, the tools for conversion and fine-tuning save the inner
dictionary alone. Beside the weights stand the scalars lr, model_iter and epoch, and <name>_momentum
for every trained blob. Source: facebookresearch/video-nonlocal-net, lib/utils/checkpoints.py.
"""

import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from nlkernels.models.files._arrays import ARRAYS, CONTAINERS, Array, check_unfolded
from nlkernels.models.files._file import File
from nlkernels.models.files._opcodes import load

SCALARS = ("lr", "model_iter", "epoch")
MOMENTUM = "_momentum"
# The solver of the original does not start without a learning rate: that of its recipes.
DEFAULT_LR = 0.01


def read(stream: BinaryIO) -> File:
    """Weights, scalars and momenta of a pickle; any name in it but numpy's arrays is refused."""
    root = load(stream, {**CONTAINERS, **ARRAYS}, strict=True)
    if not isinstance(root, dict):
        raise ValueError(f"a pickled {type(root).__name__}, not a dictionary of arrays")
    nested = isinstance(root.get("blobs"), dict)
    blobs = {**root, **root["blobs"]} if nested else dict(root)
    if nested:
        del blobs["blobs"]
    unfolded = sum(value.nbytes for value in blobs.values() if isinstance(value, Array))
    check_unfolded(unfolded, os.fstat(stream.fileno()).st_size)
    state, momenta, metadata = {}, {}, {}
    for name, value in blobs.items():
        if not isinstance(name, str):
            raise ValueError(f"a blob whose name is {name!r}")
        if isinstance(value, Array) and name in SCALARS:
            value = value.tensor().reshape(-1)
            if value.numel() != 1:
                raise ValueError(f"{value.numel()} values of {name}, which is one number")
            metadata[name] = value.item()
        elif isinstance(value, Array):
            (momenta if name.endswith(MOMENTUM) else state)[name] = value.tensor()
        elif isinstance(value, str | int | float):
            metadata[name] = value
    if not state:
        raise ValueError(f"no array among its entries {', '.join(list(blobs)[:12])}")
    return File(state, metadata, format="caffe2", entry="blobs" if nested else "", extra=momenta)


def write(path: Path, state: Mapping[str, Any], metadata: Mapping[str, Any], nested: bool) -> None:
    """Pickle blobs and the scalars out of `metadata` as Python 2 does with protocol 2."""
    scalars = {"lr": DEFAULT_LR} | {key: metadata[key] for key in SCALARS if key in metadata}
    blobs = {**state, **scalars}
    with path.open("wb") as stream:
        for part in _pickled({"blobs": blobs} if nested else blobs):
            stream.write(part)


def _pickled(value: Any) -> Iterator[bytes]:
    yield b"\x80\x02"
    yield from _value(value)
    yield b"."


def _value(value: Any) -> Iterator[bytes]:
    if isinstance(value, Mapping):
        yield b"}("
        for key, item in value.items():
            yield from _value(key)
            yield from _value(item)
        yield b"u"
    elif isinstance(value, torch.Tensor | np.ndarray):
        yield from _array(value)
    elif isinstance(value, str):
        yield _string(value.encode("latin-1"))
    elif isinstance(value, float):
        yield b"G" + struct.pack(">d", value)
    elif isinstance(value, int):
        yield b"J" + struct.pack("<i", value)
    else:
        raise TypeError(f"expected arrays and numbers, got a {type(value).__name__}")


def _array(value: torch.Tensor | np.ndarray) -> Iterator[bytes]:
    if isinstance(value, torch.Tensor):
        if value.dtype == torch.bfloat16:
            raise TypeError("expected a dtype of numpy, got bfloat16; convert with .float()")
        value = value.detach().cpu().numpy()
    value = np.ascontiguousarray(value)
    kind, order = value.dtype.str[1:], value.dtype.str[:1]
    yield b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    yield b"(K\x01(" + b"".join(b"J" + struct.pack("<i", size) for size in value.shape) + b"t"
    yield b"cnumpy\ndtype\n" + _string(kind.encode()) + b"K\x00K\x01\x87R"
    yield b"(K\x03" + _string(order.encode()) + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    yield b"\x89" + _string(value.tobytes()) + b"tb"


def _string(content: bytes) -> bytes:
    if len(content) < 256:
        return b"U" + bytes([len(content)]) + content
    return b"T" + struct.pack("<i", len(content)) + content
