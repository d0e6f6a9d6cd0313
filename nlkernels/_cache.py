"""What this machine measured and verified, kept in a JSON file between processes.

  {"format": 1, "machines": {key: {"configs": {..}, "timings": {..}, "verdicts": {..}}}}

`key` names device, driver, Triton and torch, and a hash of the package's sources: what was found
with others is not looked at. `configs` holds the fastest configuration of a kernel in a bucket of
problems (`_tune`), `timings` the backends of such a bucket from the fastest on (`_warmup`),
`verdicts` what verification found (reason "" is right, else what was wrong; `_trust`).

Writers merge into the file under a lock and replace it as a whole. A file that cannot be read or
written costs a warning, never an error.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import tempfile
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from nlkernels import _device, _env, _paths

Section = dict[str, dict[str, Any]]

FILE = "measured.json"
FORMAT = 1
MODES = ("off", "cache", "full")
# What an entry of each part has to hold; anything else was written by another program.
PARTS = {
    "configs": {"config", "ms"},
    "timings": {"op", "pass", "dtype", "head", "sizes", "order", "because", "ms", "configs"},
    "verdicts": {"op", "backend", "pass", "dtype", "head", "reason"},
}
# Sections of the file that are kept, those written last.
_KEPT = 24
# Answers in memory: programs with lengths that always differ must not fill it.
_REMEMBERED = 4096

_sections: dict[str, Section] = {}
_by_device: dict[torch.device, Section] = {}
_unsaved: dict[torch.device, Section] = {}
# Answers derived from sections, by whoever derived them; emptied whenever a section changes.
memo: dict[tuple, Any] = {}
_lock = threading.RLock()


def mode() -> str:
    """NLKERNELS_AUTOTUNE, checked."""
    value = _env.read("NLKERNELS_AUTOTUNE")
    if value not in MODES:
        raise ValueError(
            f"NLKERNELS_AUTOTUNE: expected one of {', '.join(MODES)}, got {value!r}; unset it for "
            f"{_env.VARIABLES['NLKERNELS_AUTOTUNE'].default!r}"
        )
    return value


def known(kind: str, index: int | None) -> Section | None:
    """What is in memory about a device; reads nothing, so that torch.compile can trace it."""
    for device, found in _by_device.items():
        if device.type == kind and device.index == index:
            return found
    return None


def section(device: torch.device) -> Section:
    """What is known about a device; reads the file at the first call for it."""
    if mode() == "off":
        return _unsaved.setdefault(device, _empty())
    found = _by_device.get(device)
    if found is None:
        with _lock:
            name = _device.identity(device)
            if name not in _sections:
                _sections[name] = _load(device)
            found = _by_device[device] = _sections[name]
    return found


def update(device: torch.device, part: str, entries: dict[str, Any]) -> None:
    """Add entries to a part of a device's section; None as an entry removes one.

    With NLKERNELS_AUTOTUNE=off, verdicts are kept in memory, and nothing else is.
    """
    with _lock:
        memo.clear()
        if mode() != "off":
            _merge(section(device)[part], entries)
            _store(machine_key(device), part, entries)
        elif part == "verdicts":
            _merge(section(device)[part], entries)


def remember(asked: tuple, answer: Any) -> None:
    """Keep an answer until a section changes."""
    if len(memo) >= _REMEMBERED:
        memo.clear()
    memo[asked] = answer


def forget() -> None:
    """Drop what is in memory; the file is read again when it is needed."""
    with _lock:
        for held in (_sections, _by_device, _unsaved, memo):
            held.clear()
        package_hash.cache_clear()


def machine_key(device: torch.device) -> str:
    """The name of a device's section in the file."""
    return f"{_device.identity(device)}, nlkernels {package_hash()}"


@functools.cache
def package_hash(folder: str = ".") -> str:
    """Hash of sources: a changed kernel is verified and measured again.

    Python's in a folder, and what lies beside it: the folders of the operations share kernels. Of
    the whole package also CUDA's, and the flags they are compiled with.
    """
    digest, inside = hashlib.sha256(), _paths.PACKAGE / folder
    whole = inside == _paths.PACKAGE
    beside = _cuda_sources() if whole else inside.parent.glob("*.py")
    for path in sorted([*inside.rglob("*.py"), *beside]):
        digest.update(path.relative_to(_paths.PACKAGE.parent).as_posix().encode() + b"\0")
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _cuda_sources() -> list[Path]:
    folders = (_paths.PACKAGE / "csrc", _paths.PACKAGE.parent / "csrc")
    found = (path for folder in folders for path in folder.rglob("cuda/**/*"))
    sources = [path for path in found if path.suffix in (".h", ".cuh", ".cu")]
    return sources + [path for folder in folders for path in folder.glob("sources.json")]


def _empty() -> Section:
    return {part: {} for part in PARTS}


def _merge(target: dict[str, Any], entries: dict[str, Any]) -> None:
    for name, entry in entries.items():
        if entry is None:
            target.pop(name, None)
        else:
            target[name] = entry


def _load(device: torch.device) -> Section:
    loaded = _empty()
    for folder in _paths.cache_dirs():
        machine = _read(folder / FILE).get(machine_key(device), {})
        for part in PARTS:
            loaded[part].update(machine.get(part, {}))
    return loaded


def _read(path: Path) -> dict[str, Section]:
    """Sections of a file; none where it is missing or not one of ours."""
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        _warn(f"{path} cannot be read ({type(error).__name__}: {error}) and is ignored")
        return {}
    machines = content.get("machines") if isinstance(content, dict) else None
    if not isinstance(machines, dict) or content.get("format") != FORMAT:
        _warn(f"{path} is no file of format {FORMAT} and is ignored")
        return {}
    sound = {key: machine for key, machine in machines.items() if _is_sound(machine)}
    if len(sound) < len(machines):
        _warn(f"{path} has damaged entries, which are ignored")
    return sound


def _is_sound(machine: object) -> bool:
    return isinstance(machine, dict) and all(
        isinstance(machine.get(part, {}), dict)
        and all(
            isinstance(entry, dict) and entry.keys() == names
            for entry in machine.get(part, {}).values()
        )
        for part, names in PARTS.items()
    )


def _store(key: str, part: str, entries: dict[str, Any]) -> None:
    *asked, folder = _paths.cache_dirs()
    try:
        _write(folder, key, part, entries, private=bool(asked))
    except OSError as error:
        _warn(f"what was measured cannot be stored in {folder} ({error}); it is lost at exit")
        return
    if asked:
        _warn(
            f"{asked[0]} cannot be written, {folder} is used; set NLKERNELS_CACHE_DIR to a folder "
            "of yours"
        )


def _write(folder: Path, key: str, part: str, entries: dict[str, Any], private: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700 if private else 0o777)
    with _locked(folder / f"{FILE}.lock"):
        machines = _read(folder / FILE)
        machine = machines.pop(key, {})
        _merge(machine.setdefault(part, {}), entries)
        machines[key] = machine
        machines = dict(list(machines.items())[-_KEPT:])
        text = json.dumps({"format": FORMAT, "machines": machines}, indent=1)
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=f"{FILE}.")
        try:
            with os.fdopen(handle, "w") as file:
                file.write(text + "\n")
            os.replace(temporary, folder / FILE)
        except BaseException:
            os.unlink(temporary)
            raise


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One writer at a time; on file systems without locks, the last one wins."""
    with open(path, "a") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        except (ImportError, OSError):
            pass
        yield


@functools.cache
def _warn(message: str) -> None:
    # Cached: once for each message, whatever the filters of the program are.
    warnings.warn(f"nlkernels: {message}", RuntimeWarning, stacklevel=2)
