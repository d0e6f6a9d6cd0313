"""Where the files of the package lie, the same in a source checkout and in an installed wheel."""

from pathlib import Path

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
