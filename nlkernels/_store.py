"""Where compiled modules are kept: a folder for each, made by one process at a time.

<cache folder>/ext/<version>/<key>/   complete, as it was renamed to this name
                     .building-*/     being made, or left by a process that was killed
                     lock             locked by the process that makes one
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import nlkernels
from nlkernels import _paths

MANIFEST = "build.json"
_BUILDING = ".building-"
_REMEDY = "set NLKERNELS_CACHE_DIR to a folder of yours"

# Lock files that are open in this process: a forked child has them open, too.
_held: set[IO[str]] = set()


def homes() -> list[Path]:
    """The folders to look in; the last one is also written."""
    return [cache / "ext" / nlkernels.__version__ for cache in _paths.cache_dirs()]


def is_sound(file: Path) -> bool:
    """Whether a file is there, and is as it was compiled: half a module would end the process.

    Raises:
        OSError, ValueError, KeyError: something is there, but damaged.
    """
    manifest = file.with_name(MANIFEST)
    return manifest.is_file() and json.loads(manifest.read_bytes())["sha256"] == _sha256(file)


def complete(file: Path, facts: dict[str, Any]) -> None:
    """Write down beside a file what it is, so that `is_sound` knows it again."""
    made = {"sha256": _sha256(file), **facts}
    file.with_name(MANIFEST).write_text(json.dumps(made, indent=1) + "\n")


def obstacle() -> str:
    """Why modules cannot be kept and loaded, "" where they can."""
    existing = homes()[-1]
    while not os.path.exists(existing) and existing != existing.parent:
        existing = existing.parent
    if not os.access(existing, os.W_OK | os.X_OK) or not existing.is_dir():
        return f"nlkernels: expected a folder that can be written, got {existing}; {_REMEDY}"
    if os.statvfs(existing).f_flag & os.ST_NOEXEC:
        return (
            f"nlkernels: expected a cache folder whose files may be executed, got {existing} on a "
            f"file system that is mounted noexec; {_REMEDY} on another one"
        )
    return ""


@contextlib.contextmanager
def alone() -> Iterator[Path]:
    """The folder to write, while no other process does; says so when it has to wait.

    Raises:
        OSError: it cannot be written.
    """
    *asked, cache = _paths.cache_dirs()
    home = homes()[-1]
    try:
        cache.mkdir(parents=True, exist_ok=True, mode=0o700 if asked else 0o777)
        home.mkdir(parents=True, exist_ok=True)
        lock = open(home / "lock", "a")  # noqa: SIM115
    except OSError as error:
        raise OSError(
            f"nlkernels: expected a folder that can be written, got {error}; {_REMEDY}"
        ) from None
    if asked:
        say(f"{asked[0]} cannot be written, {cache} is used; {_REMEDY}")
    with lock as file:
        _held.add(file)
        try:
            if _take(file):
                for left in home.glob(f"{_BUILDING}*"):
                    shutil.rmtree(left, ignore_errors=True)
            yield home
        finally:
            _held.discard(file)


def _take(file: IO[str]) -> bool:
    """Lock a file until it is closed; false on file systems without locks: the last one wins."""
    try:
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waits for another process that compiles ({file.name} is locked)")
            fcntl.flock(file, fcntl.LOCK_EX)
    except (ImportError, OSError):
        return False
    return True


@contextlib.contextmanager
def workplace(home: Path, final: Path) -> Iterator[Path]:
    """A temporary folder that gets the name `final` when the block ends without an error."""
    outer = Path(tempfile.mkdtemp(prefix=_BUILDING, dir=home))
    work = outer / "new"
    try:
        work.mkdir()
        yield work
        with contextlib.suppress(FileNotFoundError):
            # A damaged one makes room.
            os.rename(final, outer / "old")
        try:
            os.rename(work, final)
        except OSError:
            # Without locks, another process may have been faster.
            if not final.is_dir():
                raise
    finally:
        shutil.rmtree(outer, ignore_errors=True)


def after_fork() -> None:
    """Let go of the parent's lock, which stays with the parent."""
    for file in _held:
        file.close()
    _held.clear()


def say(message: str) -> None:
    """Tell the user at once what takes time."""
    print(f"nlkernels: {message}", file=sys.stderr, flush=True)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
