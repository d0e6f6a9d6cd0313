"""Checkpoints: plain dictionaries that ``torch.load(weights_only=True)`` accepts, saved atomically.

Contents: ``format`` (int), ``model`` and ``optimiser`` (state dictionaries), ``step`` (steps
taken), ``rng`` (states of torch's CPU and GPU generators), ``config`` (resolved configuration as
a JSON text). A reader sees the old file or the new one, never a part: the data goes to a
temporary file in the same folder, is flushed to the disk, and then takes the name.
"""

import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .config import Config, to_dict

FORMAT = 1


def save(
    path: str | Path,
    *,
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    step: int,
    config: Config,
) -> None:
    """Write a checkpoint, replacing ``path`` only when the new file is complete.

    Args:
        path: Target file; its folder exists.
        model: Parameters and buffers are saved.
        optimiser: Momenta and the like are saved.
        step: Steps taken so far.
        config: Resolved configuration of the run.

    Raises:
        OSError: The disk is full or the folder is not writable; ``path`` keeps its old content.
    """
    content = {
        "format": FORMAT,
        "model": model.state_dict(),
        "optimiser": optimiser.state_dict(),
        "step": step,
        "rng": {
            "cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        },
        "config": json.dumps(to_dict(config)),
    }
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


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


def restore_rng(state: dict[str, Any]) -> None:
    """Set torch's generators to the states of a checkpoint (``load(path)["rng"]``)."""
    torch.set_rng_state(state["cpu"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([one.cpu() for one in state["cuda"]])


def _sync_folder(folder: Path) -> None:
    """Make the rename itself survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
