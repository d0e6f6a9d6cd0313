"""Where the files of the package lie, the same in a source checkout and in an installed wheel."""

import os
import tempfile
from pathlib import Path

from nlkernels import _env

PACKAGE = Path(__file__).resolve().parent


def csrc_dir() -> Path:
    """Returns the folder of the native sources.

    Raises:
        FileNotFoundError: neither `nlkernels/csrc` nor its sibling `csrc` holds `sources.json`.
    """
    candidates = (PACKAGE / "csrc", PACKAGE.parent / "csrc")
    for folder in candidates:
        if (folder / "sources.json").is_file():
            return folder
    raise FileNotFoundError(
        f"nlkernels: expected sources.json in one of {', '.join(map(str, candidates))}, "
        "got neither; reinstall the package"
    )


def checkout_root() -> Path | None:
    """Returns the root of the checkout this package runs from, None for an installed copy."""
    root = PACKAGE.parent
    is_checkout = (root / "csrc" / "sources.json").is_file() and (root / "models").is_dir()
    return root if is_checkout else None


def cache_dirs() -> list[Path]:
    """Returns the folders that hold what this machine measured: all are read, the last is written.

    One folder, `NLKERNELS_CACHE_DIR`; where that cannot be written, also a temporary one.
    """
    asked = _env.read("NLKERNELS_CACHE_DIR")
    if asked == _env.VARIABLES["NLKERNELS_CACHE_DIR"].default:
        asked = os.path.join(_env.cache_home(), "nlkernels")
    folder = Path(os.path.expanduser(asked))
    # Without a home, "~" stays what it is.
    if folder.parts[:1] != ("~",) and _writable(folder):
        return [folder]
    try:
        temporary = tempfile.gettempdir()
    except FileNotFoundError:
        # Nothing can be written on this machine.
        return [folder]
    user = os.getuid() if hasattr(os, "getuid") else 0
    fallback = Path(temporary, f"nlkernels-{user}")
    # Anybody may have made it in a folder that all can write.
    owned = not os.path.lexists(fallback) or os.lstat(fallback).st_uid == user
    return [folder, fallback] if owned and not fallback.is_symlink() else [folder]


def _writable(folder: Path) -> bool:
    """Whether a folder can be written, or made."""
    existing = folder.absolute()
    # In a folder that cannot be searched, Path.exists raises.
    while not os.path.exists(existing) and existing != existing.parent:
        existing = existing.parent
    return os.path.isdir(existing) and os.access(existing, os.W_OK | os.X_OK)
