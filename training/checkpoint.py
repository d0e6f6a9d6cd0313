"""Checkpoints: plain dictionaries that ``torch.load(weights_only=True)`` accepts, saved atomically.

Contents:

- ``format`` (int);
- ``model``, ``optimiser`` and ``average`` (state dictionaries; no moving average is None);
- ``step``: steps taken, the position in the schedule;
- ``position``: the position in the data: ``epoch``, ``clip`` (of the pass), and what it counts:
  ``clips`` of a pass, ``batch``, ``seed`` of the order;
- ``schedule`` and ``updates``: what a schedule by tests remembers; scale of float16 losses, skips;
- ``rng``: states of torch's CPU and GPU generators, of every process;
- ``losses``: training losses of the last steps;
- ``config``: resolved configuration as a JSON text.

A reader sees the old file or the new one, never a part: the data goes to a temporary file in the
same folder, is flushed to the disk, and then takes the name.
"""

import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

from .config import Config, to_dict

FORMAT = 2

# Training losses that a checkpoint holds, enough for the mean that reports state.
LOSSES = 20


def save(
    path: str | Path,
    *,
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    step: int,
    config: Config,
    more: Mapping[str, Any] | None = None,
    keep: int = 1,
) -> None:
    """Write a checkpoint, replacing ``path`` only when the new file is complete.

    Args:
        path: Target file; its folder exists.
        model: Parameters and buffers are saved.
        optimiser: Momenta and the like are saved.
        step: Steps taken so far.
        config: Resolved configuration of the run.
        more: The other contents; absent ones are empty, and ``rng`` is that of this process.
        keep: From 2 on, the last ``keep`` checkpoints are also there as ``NAME-STEP.pt``.

    Raises:
        OSError: The disk is full or the folder is not writable; ``path`` keeps its old content.
    """
    content = {
        "format": FORMAT,
        "model": model.state_dict(),
        "optimiser": optimiser.state_dict(),
        "step": step,
        "average": None,
        "position": None,
        "schedule": None,
        "updates": None,
        "rng": [rng_state()],
        "losses": [],
        **({} if more is None else more),
        "config": json.dumps(to_dict(config)),
    }
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            _write(content, file)
            file.flush()
            os.fsync(file.fileno())
        if keep > 1:
            _link(temporary, path.with_stem(f"{path.stem}-{step:08}"))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)
    if keep > 1:
        for old in list(_numbered(path).values())[keep:]:
            old.unlink(missing_ok=True)


def load(path: str | Path, *, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint; nothing in the file is executed.

    Args:
        path: A file that ``save`` wrote.
        device: Where the tensors go.

    Returns:
        The dictionary described at the top of this module, ``config`` decoded to nested values.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file is no checkpoint, is damaged, or is of an unknown format.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"checkpoint: expected a file, got {str(path)!r} which does not exist; check the path"
        )
    try:
        with warnings.catch_warnings():
            # torch warns about foreign pickles before it refuses them; the error below says it.
            warnings.simplefilter("ignore", UserWarning)
            content = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        # torch raises half a dozen classes for a damaged or foreign file.
        raise ValueError(
            f"checkpoint: expected a checkpoint in {path}, got a file that torch refuses "
            f"({type(error).__name__}); give a file that nlk train saved"
        ) from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise ValueError(
            f"checkpoint: expected format {FORMAT} in {path}, got {found}; "
            "give a file that this version of nlk train saved"
        )
    return content | {"config": json.loads(content["config"])}


def newest(path: str | Path) -> dict[str, Any] | None:
    """The checkpoint with most steps among ``path`` and the older ones beside it.

    Files that are damaged are passed over with a warning: any older one is better than none.

    Args:
        path: The file that ``save`` writes.

    Returns:
        What ``load`` returns; None if there is no checkpoint.

    Raises:
        ValueError: There are files, and none of them can be read.
    """
    path = Path(path)
    found, problem = None, None
    for step, candidate in ((None, path), *_numbered(path).items()):
        if found is not None and step <= found["step"]:
            break
        if not candidate.is_file():
            continue
        try:
            found = load(candidate)
        except ValueError as error:
            problem = error
            warnings.warn(f"{error}; an older one is looked for", UserWarning, stacklevel=2)
    if found is None and problem is not None:
        raise problem
    return found


def set_aside(path: str | Path, *, but: str | Path | None = None) -> None:
    """Give an earlier run's checkpoints other names, ``before-NAME...``.

    A run that is restarted by itself must never continue from them.

    Args:
        path: The file that ``save`` writes.
        but: The one that the run starts from, which stays.
    """
    path = Path(path)
    for old in (path, *_numbered(path).values()):
        if old.is_file() and (but is None or not old.samefile(but)):
            os.replace(old, old.with_name(f"before-{old.name}"))


def remove_leftovers(path: str | Path) -> None:
    """Delete the unfinished files that killed processes left beside ``path``."""
    path = Path(path)
    for leftover in path.parent.glob(f".{path.stem}*.tmp"):
        leftover.unlink(missing_ok=True)


def rng_state() -> dict[str, Any]:
    """States of this process's generators, as ``restore_rng`` takes them."""
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": gpus}


def restore_rng(state: Mapping[str, Any]) -> None:
    """Set torch's generators to the states of a process (one of ``load(path)["rng"]``)."""
    torch.set_rng_state(state["cpu"].cpu())
    # On another number of GPUs there is no state to continue from.
    if len(state["cuda"]) == torch.cuda.device_count():
        for index, one in enumerate(state["cuda"]):
            torch.cuda.set_rng_state(one.cpu(), index)


def _write(content: dict[str, Any], file: BinaryIO) -> None:
    try:
        torch.save(content, file)
    except RuntimeError as error:
        # torch finds at the end of its archive that something is missing, and hides the reason.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _numbered(path: Path) -> dict[int, Path]:
    """The checkpoints ``NAME-STEP.pt`` beside ``NAME.pt`` by their steps, most first."""
    pattern = re.compile(rf"{re.escape(path.stem)}-(\d{{8,}}){re.escape(path.suffix)}")
    matches = (pattern.fullmatch(other.name) for other in path.parent.glob(f"*{path.suffix}"))
    steps = {int(match[1]): path.with_name(match[0]) for match in matches if match}
    return dict(sorted(steps.items(), reverse=True))


def _link(source: Path, target: Path) -> None:
    """A second name for a complete file, which may exist already."""
    temporary = target.with_name(f"{source.name}.{target.stem}.tmp")
    try:
        try:
            os.link(source, temporary)
        except OSError:
            # A file system without hard links.
            shutil.copyfile(source, temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make the rename itself survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
