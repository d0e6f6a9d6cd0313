"""Reading and writing checkpoints by content, not by file name."""

import contextlib
import errno
import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nlkernels._spec import check_choice
from nlkernels.models.files import _caffe2, _mindspore, _safetensors, _torch
from nlkernels.models.files._arrays import to_tensor
from nlkernels.models.files._file import File
from nlkernels.models.files._opcodes import Refused

FORMATS = ("safetensors", "torch", "caffe2", "mindspore")


def read(path: str | Path, *, entry: str | None = None) -> File:
    """Read the weights of a checkpoint of any system; nothing in the file is executed.

    The content decides the format: pickles of Caffe2 (by Python 2 or 3), files of torch.save (zip
    archives and those of before torch 1.6), safetensors, MindSpore's .ckpt. In torch's files,
    weights are looked for at the top and in state_dict, model_state, model_state_dict, model, then
    in all other entries; "module." in front of every key is dropped.

    Args:
        path: a file.
        entry: which weights of a torch file that holds several, out of `File.others`.

    Returns:
        Tensors by key, and what stood beside them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is of no known format, damaged or cut off, holds no weights, or asks
            for more than data: a pickle of Caffe2 may name nothing but numpy's arrays.

    Memory:
        The weights twice while they are read.

    Example:
        >>> import pathlib, tempfile, torch
        >>> from nlkernels.models import files
        >>> path = pathlib.Path(tempfile.mkdtemp(), "model.pyth")
        >>> torch.save({"model_state": {"module.fc.bias": torch.zeros(2)}, "epoch": 3}, path)
        >>> found = files.read(path)
        >>> found.state, found.metadata, found.entry
        ({'fc.bias': tensor([0., 0.])}, {'epoch': 3}, 'model_state')
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"read: expected a checkpoint, got {str(path)!r}, which is no file; check the path"
        )
    try:
        return _read(path, entry)
    except Refused as error:
        raise ValueError(
            f"read: expected {path} to hold data alone, got {error}; nothing was executed: get the "
            "file from its publisher, or save the weights alone"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, EOFError) as error:
        raise _damaged(path, error) from error
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OverflowError) as error:
        raise _damaged(path, error) from error
    except OSError as error:
        if error.errno != errno.EINVAL:  # a position in a file that its damage made up
            raise
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ValueError:
    reason = f"the key {error}" if isinstance(error, KeyError) else str(error)
    return ValueError(
        f"read: expected the weights of a model in {path}, got {reason or type(error).__name__}; "
        "is the file complete, and a checkpoint?"
    )


def _read(path: Path, entry: str | None) -> File:
    with path.open("rb") as stream:
        start = stream.read(512)
        stream.seek(0)
        if _torch.recognised(start):
            return _torch.read_archive(path, entry)
        if entry is not None and not _torch.recognised_legacy(start):
            raise ValueError(f"one set of weights, and not {entry!r}")
        if _safetensors.recognised(start[:9]):
            return _safetensors.read(stream)
        if start[:1] == b"\x80":
            legacy = _torch.recognised_legacy(start)
            return _torch.read_legacy(stream, entry) if legacy else _caffe2.read(stream)
        if start[:1] == b"\n":
            return _mindspore.read(stream)
    if start[257:262] == b"ustar":
        raise ValueError("an archive of torch 0.1; save it again with a newer torch")
    raise ValueError(f"a file of {path.stat().st_size} bytes that starts with {start[:12]!r}")


def write(
    path: str | Path,
    state: Mapping[str, torch.Tensor | np.ndarray],
    metadata: Mapping[str, Any] | None = None,
    *,
    format: str = "safetensors",
    entry: str = "",
) -> None:
    """Write weights as one file, which appears complete or not at all.

    Args:
        path: the file; one that is there is replaced at the end.
        state: tensors or arrays by key.
        metadata: numbers and texts to keep beside them. safetensors takes all of them as texts,
            caffe2 lr, model_iter and epoch (lr is 0.01 if absent: the original needs one), torch
            all if `entry` is given, mindspore none.
        format: "safetensors", "torch" (a zip archive), "caffe2" (a pickle of Python 2) or
            "mindspore".
        entry: key to put the weights under: "blobs" for caffe2, "state_dict", "model_state" and
            such for torch; none when left out.

    Raises:
        ValueError: unknown format; an entry that the format does not have.
        TypeError: a value that is no tensor or array, or of a dtype that the format does not have.
        OSError: the file cannot be written; what was there stays.

    Example:
        >>> import pathlib, tempfile, torch
        >>> from nlkernels.models import files
        >>> path = pathlib.Path(tempfile.mkdtemp(), "model.safetensors")
        >>> files.write(path, {"fc.bias": torch.zeros(2)}, {"licence": "Apache-2.0"})
        >>> files.read(path).metadata
        {'licence': 'Apache-2.0'}
    """
    check_choice("write", "format", format, FORMATS)
    if entry and (format not in ("torch", "caffe2") or (format == "caffe2" and entry != "blobs")):
        raise ValueError(f"write: expected no entry in {format}, got {entry!r}; leave it out")
    tensors = {key: _tensor(key, value, format) for key, value in state.items()}
    metadata = dict(metadata or {})
    with _replacing(Path(path)) as temporary:
        if format == "safetensors":
            texts = {key: str(value) for key, value in metadata.items()}
            _safetensors.write(temporary, tensors, texts)
        elif format == "caffe2":
            _caffe2.write(temporary, tensors, metadata, nested=bool(entry))
        elif format == "mindspore":
            _mindspore.write(temporary, tensors)
        else:
            torch.save({**metadata, entry: tensors} if entry else tensors, temporary)


_HELD = {
    "safetensors": _safetensors.NAMES.keys(),
    "mindspore": _mindspore.NAMES.keys(),
    "caffe2": _safetensors.NAMES.keys() - {torch.bfloat16},
}


def _tensor(key: str, value: Any, format: str) -> torch.Tensor:
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "fiub":
        value = to_tensor(np.asarray(value))
    held = _HELD.get(format)
    if not isinstance(value, torch.Tensor) or (held is not None and value.dtype not in held):
        got = getattr(value, "dtype", type(value).__name__)
        raise TypeError(
            f"write: expected {key} to be a tensor of a dtype that {format} has, got {got}; "
            "convert it with .float(), or leave it out"
        )
    return value.detach().cpu().clone(memory_format=torch.contiguous_format)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` that takes its name when all is written, and else goes away."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
