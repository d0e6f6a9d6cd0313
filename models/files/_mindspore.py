"""MindSpore's .ckpt files: a protobuf message with one record for each parameter.

    message Checkpoint { repeated Value value = 1; }
    message Value { required string tag = 1; TensorProto tensor = 2; }
    message TensorProto {
      repeated int64 dims = 1; required string tensor_type = 2; required bytes tensor_content = 3;
    }

A scalar has the dims [0]. A large tensor lies in several neighbouring records of one tag, each with
the dims of the whole. Newer releases may append b"crc_num" and ten bytes. There is no end mark: a
file that was cut between two records reads as one with fewer parameters. Source:
mindspore-ai/mindspore, mindspore/ccsrc/utils/checkpoint.proto and mindspore/train/serialization.py.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from nlkernels.models.files._file import File

DTYPES = {
    "Bool": torch.bool,
    "UInt8": torch.uint8,
    "Uint8": torch.uint8,  # up to release 1.6
    "Int8": torch.int8,
    "Int16": torch.int16,
    "Int32": torch.int32,
    "Int64": torch.int64,
    "Float16": torch.float16,
    "BFloat16": torch.bfloat16,
    "Float32": torch.float32,
    "Float64": torch.float64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items() if name != "Uint8"}
_SUM, _SUM_BYTES = b"crc_num", 17
# The writer of the original cuts its tensors into records of this size.
SLICE_BYTES = 512 * 1024 * 1024
_VARINT, _BYTES = 0, 2


def read(stream: BinaryIO) -> File:
    """All parameters of a file."""
    content = memoryview(stream.read())
    if content[-_SUM_BYTES:][: len(_SUM)] == _SUM:
        content = content[:-_SUM_BYTES]
    pieces: dict[str, tuple[list[int], str, list[memoryview]]] = {}
    for number, value in _fields(content):
        if number != 1 or not isinstance(value, memoryview):
            raise ValueError(f"a field {number} beside the parameters")
        name, dims, kind, part = _record(value)
        pieces.setdefault(name, (dims, kind, []))[2].append(part)
    return File(
        {name: _tensor(name, *piece) for name, piece in pieces.items()}, {}, format="mindspore"
    )


def _record(message: memoryview) -> tuple[str, list[int], str, memoryview]:
    fields = dict(_fields(message))
    if not isinstance(fields.get(1), memoryview) or not isinstance(fields.get(2), memoryview):
        raise ValueError("a record without a name or a tensor")
    dims: list[int] = []
    parts: dict[int, memoryview] = {}
    for number, value in _fields(fields[2]):
        if number == 1:  # one by one, or packed
            dims += [value] if isinstance(value, int) else _varints(value)
        elif isinstance(value, memoryview):
            parts[number] = value
    name = bytes(fields[1]).decode("utf-8")
    if not parts.keys() >= {2, 3}:
        raise ValueError(f"{name} without a type or content")
    return name, dims, bytes(parts[2]).decode("utf-8"), parts[3]


def _tensor(name: str, dims: list[int], kind: str, parts: list[memoryview]) -> torch.Tensor:
    if kind not in DTYPES:
        raise ValueError(f"{name} of the type {kind!r}")
    content = bytearray().join(parts)
    shape = () if dims == [0] else tuple(dims)
    if math.prod(shape) * DTYPES[kind].itemsize != len(content):
        raise ValueError(f"{name}: {len(content)} bytes for {shape} of {kind}")
    if not content:
        return torch.empty(shape, dtype=DTYPES[kind])
    return torch.frombuffer(content, dtype=DTYPES[kind]).view(shape)


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        value, position = _varint(message, position)
        if tag & 7 == _BYTES:
            end = position + value
            if end > len(message):
                raise ValueError(
                    f"a field of {value} bytes, of which {len(message) - position} are left"
                )
            yield tag >> 3, message[position:end]
            position = end
        elif tag & 7 == _VARINT:
            yield tag >> 3, value
        else:
            raise ValueError(f"a field of wire type {tag & 7}, encrypted or of another format")


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(message):
            raise ValueError("an end within a number")
        byte = message[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
    raise ValueError("a number of more than 64 bits")


def _varints(packed: memoryview) -> list[int]:
    values, position = [], 0
    while position < len(packed):
        value, position = _varint(packed, position)
        values.append(value)
    return values


def write(path: Path, state: Mapping[str, Any], slice_bytes: int = SLICE_BYTES) -> None:
    """Parameters in the order given."""
    with path.open("wb") as stream:
        for name, tensor in state.items():
            tensor = tensor.detach().cpu().contiguous()
            content = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
            dims = b"".join(_number(1, size) for size in (tensor.shape or (0,)))
            kind = _text(2, NAMES[tensor.dtype].encode())
            for start in range(0, max(len(content), 1), slice_bytes):
                part = content[start : start + slice_bytes]
                record = _text(1, name.encode()) + _text(2, dims + kind + _text(3, part))
                stream.write(_text(1, record))


def _encoded(value: int) -> bytes:
    groups = [value >> shift & 127 for shift in range(0, max(value.bit_length(), 1), 7)]
    return bytes(group | 128 for group in groups[:-1]) + bytes(groups[-1:])


def _number(field: int, value: int) -> bytes:
    return _encoded(field << 3 | _VARINT) + _encoded(value)


def _text(field: int, content: bytes | memoryview) -> bytes:
    return _encoded(field << 3 | _BYTES) + _encoded(len(content)) + bytes(content)
