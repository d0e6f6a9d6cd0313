"""The safetensors format: the length of a header, the header in JSON, and the tensors' bytes.

The header maps names to {"dtype", "shape", "data_offsets"} and "__metadata__" to strings by string.
The tensors fill the rest of the file without gaps. Source: the format's description in
huggingface/safetensors.
"""

import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from nlkernels.models.files._file import File

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# The limit of the original.
LARGEST_HEADER = 100_000_000
_METADATA = "__metadata__"


def recognised(start: bytes) -> bool:
    """Whether a file that starts with these 9 bytes is of the format."""
    return (
        len(start) == 9 and struct.unpack("<Q", start[:8])[0] <= LARGEST_HEADER and start[8] == 123
    )


def read(stream: BinaryIO) -> File:
    """All tensors of a file; every offset is checked before any memory is taken."""
    length = os.fstat(stream.fileno()).st_size
    (size,) = struct.unpack("<Q", stream.read(8))
    if 8 + size > length:
        raise ValueError(f"a header of {size} bytes in a file of {length}")
    header = json.loads(stream.read(size).decode("utf-8"))
    metadata = header.pop(_METADATA, {})
    _check(header, length - 8 - size)
    state = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        content = bytearray(entry["data_offsets"][1] - entry["data_offsets"][0])
        stream.readinto(content)
        dtype = DTYPES[entry["dtype"]]
        tensor = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
        state[name] = tensor.view(entry["shape"])
    return File(state, dict(metadata), format="safetensors")


def _check(header: Mapping[str, Any], length: int) -> None:
    """Raise unless the tensors lie side by side and fill the file."""
    position = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, end = entry["data_offsets"]
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{name} of the dtype {entry['dtype']}")
        if not all(isinstance(n, int) and n >= 0 for n in entry["shape"]):
            raise ValueError(f"{name} of the shape {entry['shape']}")
        bytes_ = math.prod(entry["shape"]) * DTYPES[entry["dtype"]].itemsize
        if start != position or end != start + bytes_:
            raise ValueError(f"{name} at bytes {start} to {end}, where {position} is free")
        position = end
    if position != length:
        raise ValueError(f"{length} bytes of tensors, of which the header describes {position}")


def write(path: Path, state: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Tensors and metadata as one file, the widest numbers first and then by name."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    position = 0
    for name in names:
        tensor = tensors[name]
        end = position + tensor.numel() * tensor.itemsize
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)  # the tensors behind it are then aligned
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            stream.write(tensors[name].reshape(-1).view(torch.uint8).numpy())
