"""What ``nlk train`` and ``nlk compare`` share: the run folder, one training, its test."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import checkpoint
from .config import Config, to_dict
from .distributed import ALONE, Processes, choose_device, require_one_process
from .evaluate import TestResult
from .freezing import freeze
from .loading import Data
from .log_extras import check_extras
from .session import Session
from .sharding import check_batch
from .stopping import StopSignals
from .variants import build_model


@dataclass(frozen=True)
class Run:
    """One finished training."""

    losses: list[float]
    """Training loss of every step taken, behind the last ones of the part before a break."""
    test: TestResult
    """Test after the last step."""
    train_s: float
    """Wall-clock duration of the training, without the test."""

    @property
    def last_loss(self) -> float:
        """Mean training loss of the last 20 steps."""
        last = self.losses[-checkpoint.LOSSES :]
        return sum(last) / len(last)


def check_run(config: Config, processes: Processes = ALONE) -> torch.device:
    """Look for mistakes that show before clips are read; choose device and threads.

    Raises:
        ValueError: An unknown or absent device, an unknown model or option of it, what cannot be
            frozen in it, a batch that the processes cannot share, or a run folder that is a file or
            cannot be written.
        ImportError: A package is missing for what is logged.
    """
    require_one_process()
    device = choose_device(config.run.device, processes)
    check_batch(config.optim.batch, config.optim.accumulate, processes)
    check_extras(config)
    if config.optim.sync_norms and device.type == "cpu":
        raise ValueError(
            "run: expected a GPU for optim.sync_norms, got the CPU; set optim.sync_norms=false"
        )
    # Raises what building the network would raise, without memory or time for its weights.
    with torch.device("meta"):
        freeze(build_model(config.model, 2, seed=0), config.optim)
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    _check_folder(Path(config.run.out))
    return device


def _check_folder(out: Path) -> None:
    """Raise where the run folder cannot be made, or nothing can be written into it."""
    nearest = next(path for path in (out, *out.absolute().parents) if os.path.lexists(path))
    if not nearest.is_dir():
        where = "" if nearest == out else f" in the way of {out}"
        raise ValueError(
            f"run: expected run.out to name a folder, got the file {nearest}{where}; choose "
            "another name"
        )
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(
            f"run: expected a run.out that can be written, got {out} and no permission to write "
            f"into {nearest}; choose another folder, or change its permissions"
        )


def prepare(config: Config, processes: Processes = ALONE) -> tuple[Path, torch.device]:
    """Create the run folder with ``config.json`` in it, after `check_run`, whose errors it has."""
    device = check_run(config, processes)
    out = Path(config.run.out)
    if processes.first:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(json.dumps(to_dict(config), indent=1) + "\n")
    return out, device


def total_steps(config: Config, clips: int) -> int:
    """Length of the training in steps, from ``optim.steps`` or ``optim.epochs``."""
    if config.optim.steps is not None:
        return config.optim.steps
    return max(1, round(config.optim.epochs * clips / config.optim.batch))


def resumed_content(
    config: Config, path: Path, processes: Processes = ALONE, *, tidy: bool = True
) -> dict[str, Any] | None:
    """The checkpoint that a training continues from, if any; its tensors are on the CPU.

    ``run.resume`` is a file, or ``auto``. Processes that torchrun has started again after a failure
    look for the newest checkpoint of their run by themselves. What an earlier run left in the
    folder is set aside first, so that it is never taken for that.

    Args:
        config: ``run.resume``.
        path: Where this training saves.
        processes: All of them call this.
        tidy: Set an earlier run's checkpoints aside, and remove what killed processes left.

    Returns:
        What ``checkpoint.load`` returns; None starts anew.

    Raises:
        FileNotFoundError: ``run.resume`` is a file that does not exist.
        ValueError: There are checkpoints, and none can be read.
    """
    resume = config.run.resume
    continues = resume == "auto" or processes.restarts > 0
    named = resume not in (None, "auto")
    content = checkpoint.newest(path) if continues else None
    if content is None and named:
        content = checkpoint.load(resume)
    if processes.first and tidy:
        checkpoint.remove_leftovers(path)
        if not continues:
            checkpoint.set_aside(path, but=resume)
    return content


def check_steps(taken: int, steps: int, config: Config) -> None:
    """A finished training is tested again if it was looked for, and refused if it was named."""
    named = config.run.resume not in (None, "auto")
    if taken > steps or (taken == steps and named):
        raise ValueError(
            f"run: expected in run.resume a checkpoint of fewer than {steps} steps, got one of "
            f"{taken}; raise optim.steps"
        )


def train_and_test(
    model: nn.Module,
    data: Data,
    config: Config,
    *,
    name: str,
    seed: int,
    device: torch.device,
    resumed: Mapping[str, Any] | None = None,
    processes: Processes = ALONE,
    stop: StopSignals | None = None,
) -> Run:
    """Train a model, save ``NAME.pt`` and ``NAME.jsonl`` in the run folder, test it.

    Args:
        model: On ``device``; changed in place.
        data: Training and test clips.
        config: Resolved configuration.
        name: Stem of the files; starts the progress lines.
        seed: Seed of data order and dropout.
        device: Where the model is.
        resumed: Contents of the checkpoint to continue from.
        processes: Those that train together.
        stop: Signals that end the training; without it they keep their meaning.

    Raises:
        NonFiniteError: The loss or a gradient is not finite.
        TimeoutError: The loader processes delivered no batch in time.
        ValueError: The checkpoint belongs to another network or to a finished training.
        Stopped: A signal came, and the training was saved.
    """
    steps = total_steps(config, len(data.train))
    session = Session(
        model,
        data,
        config,
        steps=steps,
        name=name,
        seed=seed,
        device=device,
        processes=processes,
        stop=stop,
    )
    if resumed is not None:
        check_steps(resumed["step"], steps, config)
        session.resume(resumed)
    test = session.run()
    print(
        f"{name:<12} test accuracy {test.accuracy:.1%} after {session.train_s:.0f} s "
        f"({data.protocol})",
        flush=True,
    )
    return Run(session.losses, test, session.train_s)
