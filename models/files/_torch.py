"""Files of torch.save, zip archives and those of before torch 1.6, read without executing anything.

The pickle inside says which tensor lies where; the names in it become tensors only through the
table below, and objects of other classes (configurations of mmcv, omegaconf, argparse, optimisers)
become inert. The storages are bytes, read when their tensor is wanted.
"""

import math
import os
import pickletools
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from nlkernels.models.files._arrays import ARRAYS, CONTAINERS, Array, check_unfolded
from nlkernels.models.files._file import File
from nlkernels.models.files._opcodes import Inert, Name, load

# The first pickle of the older format.
MAGIC = 0x1950A86A20F9469CFC6C
_DTYPES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "Untyped": torch.uint8,
}
# Entries under which programs save the weights, the usual ones first.
ENTRIES = ("state_dict", "model_state", "model_state_dict", "model", "net", "network")
PREFIX = "module."


@dataclass
class Storage:
    """Numbers of one dtype in the file: `content()` reads them."""

    dtype: torch.dtype
    count: int
    content: Callable[[], bytes]
    start: int = 0  # where a storage of the older format begins within another


@dataclass(frozen=True)
class Strided:
    """A tensor: where its numbers are in a storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def tensor(self) -> torch.Tensor:
        """The tensor in memory of its own.

        Raises:
            ValueError: it reaches beyond its storage.
        """
        content = self.storage.content()
        sizes = (*self.shape, *self.strides, self.offset)
        if len(self.shape) != len(self.strides) or not all(
            isinstance(n, int) and n >= 0 for n in sizes
        ):
            raise ValueError(f"a tensor of {self.shape} with strides {self.strides}")
        if math.prod(self.shape) == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        offset = self.offset + self.storage.start
        steps = zip(self.shape, self.strides, strict=True)
        last = offset + sum((size - 1) * stride for size, stride in steps)
        if (last + 1) * self.dtype.itemsize > len(content):
            raise ValueError(f"a tensor that ends at number {last} of {len(content)} bytes")
        count = len(content) // self.dtype.itemsize
        flat = torch.frombuffer(bytearray(content), dtype=self.dtype, count=count)
        return flat.as_strided(self.shape, self.strides, offset).clone(
            memory_format=torch.contiguous_format
        )


def recognised(start: bytes) -> bool:
    return start.startswith(b"PK\x03\x04")


def recognised_legacy(start: bytes) -> bool:
    """Whether a file starts with the magic number of the older format."""
    if start[:1] != b"\x80":
        return False
    opcodes = pickletools.genops(start[2:])
    return next(op[1] for op in opcodes if op[0].name != "FRAME") == MAGIC


def read_archive(path: Path, entry: str | None) -> File:
    """The weights of a zip archive."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        pickles = [name for name in names if name.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            raise ValueError(f"an archive of {', '.join(names[:3])}, without one data.pkl")
        folder = pickles[0].removesuffix("data.pkl")
        if f"{folder}constants.pkl" in names:
            raise ValueError("a TorchScript program; save the state_dict() of its model instead")
        if _text(archive, folder + "byteorder", names) not in ("", "little"):
            raise ValueError("numbers in big-endian byte order; save it on the other machine")

        def outside(reference: Any) -> Storage:
            dtype, key, count = _reference(reference)
            name = f"{folder}data/{key}"
            size = count * dtype.itemsize
            if archive.getinfo(name).file_size != size:
                got = archive.getinfo(name).file_size
                raise ValueError(f"{got} bytes in {name}, not {size}")
            return Storage(dtype, count, lambda: archive.read(name))

        for record in archive.infolist():
            if record.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{record.filename}, compressed, which torch.save never does")
        with archive.open(pickles[0]) as stream:
            root = load(stream, MAKERS, strict=False, persistent=outside)
        return _file(root, entry, path.stat().st_size)


def _text(archive: zipfile.ZipFile, name: str, names: Sequence[str]) -> str:
    return archive.read(name).decode("ascii") if name in names else ""


def read_legacy(stream: BinaryIO, entry: str | None) -> File:
    """The weights of a file of before torch 1.6: pickles, then the storages one after the other."""
    load(stream, {}, strict=True)  # the magic number
    load(stream, {}, strict=True)  # the version of the protocol
    system = load(stream, {}, strict=True)
    if not system.get("little_endian", True):
        raise ValueError("numbers in big-endian byte order; save it on the other machine")
    contents: dict[str, bytes] = {}
    storages: dict[str, Storage] = {}

    def outside(reference: Any) -> Storage | Name:
        if reference[0] == "module":  # the source code of a pickled class
            return reference[1]
        *storage, view = reference
        dtype, key, count = _reference(storage)
        if key not in storages:
            storages[key] = Storage(dtype, count, lambda: contents[key])
        if view is None:
            return storages[key]
        return Storage(dtype, view[2], lambda: contents[key], start=view[1])

    root = load(stream, MAKERS, strict=False, persistent=outside)
    for key in load(stream, {}, strict=True):
        count = int.from_bytes(_exactly(stream, 8), "little")
        if key not in storages or count != storages[key].count:
            raise ValueError(f"a storage {key} of {count} numbers that no tensor has")
        contents[key] = _exactly(stream, count * storages[key].dtype.itemsize)
    if contents.keys() != storages.keys():
        raise ValueError(f"{len(contents)} storages for {len(storages)}")
    return _file(root, entry, stream.tell())


def _exactly(stream: BinaryIO, size: int) -> bytes:
    left = os.fstat(stream.fileno()).st_size - stream.tell()
    if left < size:
        raise ValueError(f"an end {size - left} bytes before that of its numbers")
    return stream.read(size)


def _reference(reference: Any) -> tuple[torch.dtype, str, int]:
    """A storage's dtype, key and count of numbers."""
    kind, storage, key, _, count = reference
    name = storage.name.removesuffix("Storage") if isinstance(storage, Name) else ""
    if kind != "storage" or name not in _DTYPES or not isinstance(count, int) or count < 0:
        raise ValueError(f"a reference to {kind} of {storage}")
    return _DTYPES[name], str(key), count


def _strided(
    storage: Storage, offset: int, shape: Sequence[int], strides: Sequence[int], *_: Any
) -> Strided:
    return Strided(storage, offset, tuple(shape), tuple(strides), storage.dtype)


def _untyped(
    storage: Storage,
    offset: int,
    shape: Any,
    strides: Any,
    grad: Any,
    hooks: Any,
    dtype: Name,
    *_: Any,
) -> Strided | Inert:
    found = getattr(torch, dtype.name, None) if dtype.module == "torch" else None
    if not isinstance(found, torch.dtype):
        raise ValueError(f"a tensor of {dtype}")
    return Strided(storage, offset, tuple(shape), tuple(strides), found)


def _wrapped(function: Name, kind: Any, arguments: Sequence[Any], *_: Any) -> Any:
    return MAKERS[function](*arguments) if function in MAKERS else Inert(str(function), arguments)


MAKERS: dict[Name, Callable[..., Any]] = {
    **CONTAINERS,
    **ARRAYS,
    Name("torch._utils", "_rebuild_tensor"): _strided,
    Name("torch._utils", "_rebuild_tensor_v2"): _strided,
    Name("torch._utils", "_rebuild_tensor_v3"): _untyped,
    Name("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    Name("torch._utils", "_rebuild_parameter_with_state"): lambda data, *_: data,
    Name("torch._tensor", "_rebuild_from_type_v2"): _wrapped,
    Name("torch", "Size"): lambda sizes=(): tuple(sizes),
}


def _file(root: Any, entry: str | None, size: int) -> File:
    """The weights of what was saved, and what stands beside them."""
    if isinstance(root, Inert):
        raise ValueError(f"a pickled {root.name}; save its state_dict() instead")
    if not isinstance(root, dict):
        raise ValueError(f"a {type(root).__name__}, not a dictionary of weights")
    found = dict(_states(root))
    if not found:
        raise ValueError(f"no weights among its entries {', '.join(map(str, list(root)[:12]))}")
    if entry is None:
        entry = next(name for name in ("", *ENTRIES, *found) if name in found)
    if entry not in found:
        raise ValueError(f"weights in {', '.join(map(repr, found))}, none in {entry!r}")
    check_unfolded(sum(value.nbytes for value in found[entry].values()), size)
    state = {key: value.tensor() for key, value in found[entry].items()}
    while all(key.startswith(PREFIX) for key in state):
        state = {key.removeprefix(PREFIX): tensor for key, tensor in state.items()}
    others = tuple(name for name in found if name != entry)
    return File(state, dict(_metadata(root)), "torch", entry, others)


def _states(root: Mapping[Any, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """All state dicts in a dictionary, the nested ones by path."""
    tensors = {key: value for key, value in root.items() if isinstance(value, Strided | Array)}
    if tensors and all(isinstance(key, str) for key in tensors):
        yield path, tensors
    for key, value in root.items():
        if isinstance(value, dict) and isinstance(key, str) and path.count(".") < 1:
            yield from _states(value, f"{path}.{key}".removeprefix("."))


def _metadata(root: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Numbers and texts beside the weights, those of one level of dictionaries among them."""
    for key, value in root.items():
        if isinstance(value, str | int | float):
            yield f"{prefix}{key}", value
        elif isinstance(value, dict) and not prefix and key not in ENTRIES:
            yield from _metadata(value, f"{key}.")
