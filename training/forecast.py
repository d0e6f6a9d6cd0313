"""What a training will take, from a few of its steps: hours, memory, disk space."""

import copy
import dataclasses
import os
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from nlkernels._memory import MIB, PeakMemory

from .config import Config
from .freezing import train_mode
from .measure import needed_mib
from .memory import BatchFit, largest_batch, state_mib
from .optimisers import make_optimiser
from .session import Session, due
from .updates import Stopwatch, Updater

Batch = tuple[Tensor, Tensor, Tensor]

# Longest time for which batches are drawn to see how fast they come.
DRAWING_S = 60.0
# Bytes of a step in the log, and at most of a checkpoint beside its tensors.
_LOG_BYTES, _CHECKPOINT_BYTES = 400, 2**20

# What torch's norms, blocks and gates say of a single number to take statistics of.
_ALONE = ("more than 1 value per channel", "more than one item", "more than one position")


@dataclass(frozen=True)
class Drawn:
    """Batches that a loader gave."""

    first: list[Batch]
    """The first ones."""
    count: int
    """How many were drawn."""
    each_ms: float
    """Time of one, with all loader processes at work."""


def draw(batches: Iterable[Batch], *, workers: int, keep: int, limit_s: float = DRAWING_S) -> Drawn:
    """Draw batches until every loader process has made two, or for some time.

    Each process makes whole batches: the first ones arrive together, after the time that one takes.

    Args:
        batches: A loader.
        workers: Its processes.
        keep: Batches that are wanted.
        limit_s: No further batch is drawn after so many seconds.
    """
    begun, first, count = time.perf_counter(), [], 0
    elapsed_s = 0.0
    for batch in batches:
        count, elapsed_s = count + 1, time.perf_counter() - begun
        if len(first) < keep:
            first.append(batch)
        if len(first) == keep and (count >= 2 * workers or elapsed_s > limit_s):
            break
    return Drawn(first, count, 1e3 * elapsed_s / count)


def together_ms(loader_ms: float, device_ms: float, workers: int) -> float:
    """Time of a step: loader processes work beside the device, without any it waits."""
    return max(loader_ms, device_ms) if workers > 0 else loader_ms + device_ms


@dataclass(frozen=True)
class Plan:
    """How often what happens in the rest of a training."""

    steps: int
    """Steps to take."""
    tests: int
    """Tests, with that at the end."""
    settles: int
    """How often precise norms are computed, if they are."""
    saves: int
    """Checkpoints written, with that at the end."""


def plan(config: Config, *, taken: int, steps: int, clips: int) -> Plan:
    """Count what comes behind the steps of a training.

    Args:
        config: Sections ``run`` and ``optim``.
        taken: Steps that were already taken.
        steps: Length of the whole training.
        clips: Clips of a pass.

    Example:
        >>> from nlkernels.training.config_file import load_config
        >>> config = load_config("smoke", ["run.test_every=2", "run.checkpoint_every=3"])
        >>> plan(config, taken=0, steps=10, clips=16)
        Plan(steps=10, tests=5, settles=7, saves=4)
    """
    run, tests, settles, saves = config.run, 1, 1, 1
    for step in range(taken + 1, steps):
        saved, tested = (
            due(step, every, run.unit, batch=config.optim.batch, clips=clips)
            for every in (run.checkpoint_every, run.test_every)
        )
        tests, saves, settles = tests + tested, saves + saved, settles + (tested or saved)
    return Plan(steps - taken, tests, settles, saves)


def held_mib(session: Session) -> float:
    """MiB of weights, buffers, optimiser state and moving average."""
    average = 0.0 if session.average is None else state_mib(session.average)
    return state_mib(session.updater.model, session.updater.optimiser) + average


def gradients_mib(model: nn.Module) -> float:
    """MiB of the gradients that a test finds in memory."""
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return sum(grad.numel() * grad.element_size() for grad in grads) / MIB


def batch_mib(batch: Batch, device: torch.device) -> float:
    """MiB of a batch's clips, if they are on the device in front of the step."""
    clips = batch[0]
    return clips.numel() * clips.element_size() / MIB if clips.device.type == device.type else 0.0


def free_mib(device: torch.device) -> float | None:
    """Free memory of a GPU, or of this machine or container; None where that is unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (free + cached) / MIB
    found = []
    try:
        found.append(_number("/proc/meminfo", "MemAvailable:") / 1024)
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            used = int(Path("/sys/fs/cgroup/memory.current").read_text())
            # Files that were read count as used, and go when memory is needed.
            used -= _number("/sys/fs/cgroup/memory.stat", "inactive_file")
            found.append((int(limit) - used) / MIB)
    except (OSError, ValueError):
        pass  # not Linux, or no container
    return min(found, default=None)


def _number(path: str, name: str) -> int:
    """The number behind a name in a file of the kernel's."""
    for line in Path(path).read_text().splitlines():
        if line.split()[:1] == [name]:
            return int(line.split()[1])
    raise ValueError(f"no {name} in {path}")


@dataclass(frozen=True)
class Disk:
    """Space that a run folder takes."""

    checkpoint_mib: float
    """A checkpoint."""
    count: int
    """Checkpoints at the same time, with the one that is being written."""
    log_mib: float
    """The log at the end."""
    free_mib: float
    """Free where the run folder is or will be."""
    writable: bool
    """Whether the run may write there."""

    @property
    def needed_mib(self) -> float:
        """All together."""
        return self.count * self.checkpoint_mib + self.log_mib


def disk(config: Config, session: Session, own: Plan) -> Disk:
    """What checkpoints and log will take, and what is free."""
    folder = Path(config.run.out).absolute()
    while not folder.exists():
        folder = folder.parent
    # The new one is complete before an old one goes; several that are kept are one more.
    kept = config.run.keep if config.run.checkpoint_every is not None else 1
    return Disk(
        checkpoint_mib=held_mib(session) + _CHECKPOINT_BYTES / MIB,
        count=min(own.saves, kept + 1),
        log_mib=own.steps * _LOG_BYTES / MIB,
        free_mib=shutil.disk_usage(folder).free / MIB,
        writable=os.access(folder, os.W_OK),
    )


def fit(session: Session, batch: Batch, config: Config, *, free: float) -> BatchFit:
    """Which part of a step fits into free memory, from steps of a copy with few clips.

    Nothing of the session changes, random numbers included.

    Args:
        session: Its model is copied.
        batch: Of three clips or more.
        config: Section ``optim``.
        free: MiB that are free.
    """
    try:
        peaks = _peaks(session, batch, config, (1, 2))
    except ValueError as error:
        # Norms that train have no statistics of one clip whose last map is one place.
        if not any(words in str(error) for words in _ALONE):
            raise
        peaks = _peaks(session, batch, config, (2, 3))
    held = held_mib(session)
    return largest_batch(peaks, state_mib=held, gib=(free + held) / 1024)


def _peaks(
    session: Session, batch: Batch, config: Config, counts: tuple[int, ...]
) -> dict[int, float]:
    """MiB of steps of so many of a batch's clips, each by the same copy."""
    device = session.updater.device
    optim = dataclasses.replace(config.optim, accumulate=1)
    peaks = {}
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        model = copy.deepcopy(session.updater.model)
        train_mode(model, optim)
        updater = Updater(model, make_optimiser(model, optim), optim, device)
        for count in counts:
            clips, labels, numbers = (part[:count] for part in batch)
            with PeakMemory(device) as peak:
                updater.step(
                    clips, labels, Stopwatch(device), where="a step of a copy", numbers=numbers
                )
            updater.optimiser.zero_grad(set_to_none=True)
            own = (clips, labels, numbers)
            peaks[count] = needed_mib(peak) + batch_mib(own, device)
    return peaks
