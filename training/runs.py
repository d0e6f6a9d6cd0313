"""What ``nlk train`` and ``nlk compare`` share: the run folder, one training, its test."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import checkpoint
from .config import Config, to_dict
from .engine import StepRecord, make_optimiser, train
from .evaluate import TestResult, evaluate
from .loading import Data, test_batches, training_batches
from .log import RunLog
from .variants import check_model


@dataclass(frozen=True)
class Run:
    """One finished training."""

    losses: list[float]
    """Training loss of every step taken."""
    test: TestResult
    """Test after the last step."""
    train_s: float
    """Wall-clock duration of the training, without the test."""

    @property
    def last_loss(self) -> float:
        """Mean training loss of the last 20 steps."""
        last = self.losses[-20:]
        return sum(last) / len(last)


def prepare(config: Config) -> tuple[Path, torch.device]:
    """Create the run folder with ``config.json`` in it; choose device and threads.

    Raises:
        ValueError: An unknown or absent device, an unknown model or option of it, or a run folder
            that is a file.
    """
    device = _device(config.run.device)
    check_model(config.model)
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    out = Path(config.run.out)
    if out.exists() and not out.is_dir():
        raise ValueError(
            f"run: expected run.out to name a folder, got the file {out}; choose another name"
        )
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(to_dict(config), indent=1) + "\n")
    return out, device


def total_steps(config: Config, clips: int) -> int:
    """Length of the training in steps, from ``optim.steps`` or ``optim.epochs``."""
    if config.optim.steps is not None:
        return config.optim.steps
    return max(1, round(config.optim.epochs * clips / config.optim.batch))


def train_and_test(
    model: nn.Module,
    data: Data,
    config: Config,
    *,
    name: str,
    seed: int,
    device: torch.device,
    resumed: Mapping[str, Any] | None = None,
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

    Raises:
        NonFiniteError: The loss or a gradient is not finite.
        TimeoutError: The loader processes delivered no batch in time.
        ValueError: The checkpoint belongs to another network or to a finished training.
    """
    out = Path(config.run.out)
    steps = total_steps(config, len(data.train))
    optimiser = make_optimiser(model, config.optim)
    torch.manual_seed(seed)
    start = 0
    if resumed is not None:
        start = _resume(resumed, model, optimiser, steps)
    losses: list[float] = []
    path = out / f"{name}.pt"

    def save(step: int) -> None:
        checkpoint.save(path, model=model, optimiser=optimiser, step=step, config=config)

    every = config.run.log_every
    with RunLog(out / f"{name}.jsonl", steps=steps, name=name, every=every, start=start) as log:
        log.event("start", seed=seed, start=start, steps=steps)

        def on_step(record: StepRecord) -> None:
            log.step(record)
            losses.append(record.loss)
            often = config.run.checkpoint_every
            if often is not None and record.step % often == 0 and record.step < steps:
                save(record.step)

        batches = training_batches(data.train, config, seed=seed, steps=steps, start=start)
        begun = time.perf_counter()
        train(
            model,
            batches,
            optimiser,
            config.optim,
            steps=steps,
            start=start,
            device=device,
            on_step=on_step,
        )
        train_s = time.perf_counter() - begun
        save(steps)
        test = evaluate(
            model,
            test_batches(data.test, config),
            clips_per_video=config.data.test_clips,
            device=device,
        )
        log.event("test", accuracy=test.accuracy, loss=test.loss, protocol=data.protocol)
    print(f"{name:<12} test accuracy {test.accuracy:.1%} after {train_s:.0f} s", flush=True)
    return Run(losses, test, train_s)


def _resume(
    content: Mapping[str, Any], model: nn.Module, optimiser: torch.optim.Optimizer, steps: int
) -> int:
    """Restore everything; returns the steps that were taken."""
    if content["step"] >= steps:
        raise ValueError(
            f"run: expected in run.resume a checkpoint of fewer than {steps} steps, got one of "
            f"{content['step']}; raise optim.steps"
        )
    try:
        model.load_state_dict(content["model"])
        optimiser.load_state_dict(content["optimiser"])
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            "run: expected in run.resume a checkpoint of this network, got another "
            f"({str(error).splitlines()[0]}); use the model and optim sections of its config"
        ) from error
    checkpoint.restore_rng(content["rng"])
    return content["step"]


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(
            f"run: expected run.device to be auto, cpu or cuda:N, got {name!r}; use auto"
        ) from error
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    if device.type not in ("cpu", "cuda") or (
        device.type == "cuda" and (device.index or 0) >= count
    ):
        raise ValueError(
            f"run: expected run.device among cpu and {count} CUDA devices, got {name!r}; use auto"
        )
    return device
