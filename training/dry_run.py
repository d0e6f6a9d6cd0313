"""``nlk train --dry-run``: what a training needs and how long it takes, before it is started.

Everything is built as the training builds it, and its first two steps are taken on its first clips,
with the same losses; then one batch goes through the test. Only the terminal receives anything:
generated clips go to a temporary folder, and an earlier run's files stay as they are.
"""

import dataclasses
import tempfile
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch

from nlkernels._memory import PeakMemory

from . import report as reports
from .config import Config
from .data.synthetic import holds_synthetic
from .distributed import Processes, joined
from .dry_run_data import check_data
from .engine import StepRecord
from .evaluate import evaluate
from .forecast import (
    Drawn,
    batch_mib,
    disk,
    draw,
    fit,
    free_mib,
    gradients_mib,
    held_mib,
    plan,
    together_ms,
)
from .loading import Data, load_data
from .log import duration
from .measure import needed_mib
from .runs import check_run, check_steps, resumed_content, total_steps
from .session import Session
from .train import build
from .updates import Stopwatch

# Steps that are taken; the first one warms up, the last one is timed.
STEPS = 2


@dataclass
class Findings:
    """What a dry run has found."""

    problems: list[str] = field(default_factory=list)
    """What would break the training, or does not fit."""
    losses: list[float] = field(default_factory=list)
    """Training losses of the steps taken."""
    step_ms: float | None = None
    """Expected time of a step, waiting for clips included."""
    train_s: float | None = None
    """Expected duration of the training and its tests."""
    memory_mib: float | None = None
    """Expected peak: what is held, and what the larger of step and test takes."""
    disk_mib: float | None = None
    """Space of checkpoints and log."""
    finished: bool = False
    """All steps of the run that would be continued have been taken; nothing else was tried."""


def dry_run(config: Config) -> Findings:
    """Try a training out, alone or as one of the processes of torchrun, and print what it takes.

    Args:
        config: From ``config_file.load_config``.

    Returns:
        What was found; the training can start where ``problems`` is empty.

    Raises:
        ValueError: Bad value, unknown model, no usable videos.
        FileNotFoundError: No such folder, list or weights.
        NonFiniteError: The loss or a gradient is not finite.
    """
    with joined(config.run.device) as processes, tempfile.TemporaryDirectory() as scratch:
        # The first one's, for all of them.
        folder = Path(processes.gather(scratch)[0])
        found = _dry_run(_elsewhere(config, folder), processes)
        processes.means(0.0)
    for problem in found.problems:
        print(f"problem: {problem}")
    print(f"dry run: {_conclusion(found)}", flush=True)
    return found


def _conclusion(found: Findings) -> str:
    if found.problems:
        return "not yet"
    if found.finished:
        return "the training is finished, it would only be tested; raise optim.steps to go on"
    return "the training can start"


def _elsewhere(config: Config, folder: Path) -> Config:
    """Generated clips go to another folder, unless they are there already."""
    data = config.data
    if data.kind != "synthetic":
        return config
    root = Path(config.run.out, "data") if data.root is None else Path(data.root)
    files = {"train": data.train_files, "test": data.test_files, "seed": data.seed}
    if holds_synthetic(root, **files, frames=data.frames, size=data.size):
        return config
    data = dataclasses.replace(data, root=str(folder / "clips"))
    return dataclasses.replace(config, data=data)


def _dry_run(config: Config, processes: Processes) -> Findings:
    found = Findings()
    device = check_run(config, processes)
    resumed = resumed_content(config, Path(config.run.out, "model.pt"), processes, tidy=False)
    with processes.first_alone():
        data = load_data(config, seed=config.run.seed)
    print("\n".join(reports.data_lines(data)), flush=True)
    if processes.first:
        checked = check_data(data, max_failed=config.data.max_failed)
        print("\n".join(checked.lines), flush=True)
        found.problems += checked.problems
    model, _ = build(config, len(data.classes), device, fresh=resumed is None)
    steps = total_steps(config, len(data.train))
    session = Session(
        model,
        data,
        config,
        steps=steps,
        name="dry run",
        seed=config.run.seed,
        device=device,
        processes=processes,
    )
    if resumed is not None:
        check_steps(resumed["step"], steps, config)
        session.resume(resumed)
        print(f"resumed at step {session.step} of {steps}")
        found.finished = session.step == steps
    if found.finished:
        return found
    try:
        _rehearse(found, session, data, config, processes, steps)
    except RuntimeError as error:
        # Other processes wait for this one: only an end of it ends them.
        if not _out_of_memory(error) or processes.count > 1:
            raise
        found.problems.append(
            f"memory: expected steps of {config.optim.batch} clips in "
            f"{config.optim.accumulate * processes.count} parts to fit, got: "
            f"{str(error).splitlines()[0]}; raise optim.accumulate or lower optim.batch"
        )
    return found


def _rehearse(
    found: Findings,
    session: Session,
    data: Data,
    config: Config,
    processes: Processes,
    steps: int,
) -> None:
    device, workers = session.updater.device, config.data.workers
    own = plan(config, taken=session.step, steps=steps, clips=len(data.train))
    drawn = draw(session.training_batches(max(STEPS, 2 * workers)), workers=workers, keep=STEPS)
    print(_drawn_line("training", drawn, workers), flush=True)
    # All of them go on, or none.
    fits = processes.means(float(_fits(found, session, drawn, config, processes)))
    if fits != [1.0]:
        return

    records: list[StepRecord] = []
    session.rehearse(drawn.first, records.append)
    found.losses = [record.loss for record in records]
    for record in records:
        print(
            f"step {record.step}: loss {record.loss:.4f} of {config.optim.batch} clips, learning "
            f"rate {record.lr:.4g}"
        )
    last = records[-1]
    device_ms = last.data_ms + last.forward_ms + last.backward_ms + last.optimiser_ms
    found.step_ms = together_ms(drawn.each_ms, device_ms, workers)
    slower = " (clips come slower than they are used)" if drawn.each_ms > device_ms else ""
    print(
        f"a step takes {_ms(found.step_ms)}: data {_ms(drawn.each_ms)}, forward "
        f"{_ms(last.forward_ms)}, backward {_ms(last.backward_ms)}, optimiser "
        f"{_ms(last.optimiser_ms)}{slower if workers else ''}",
        flush=True,
    )
    step_mib = _step_mib(session, drawn)
    held = held_mib(session)

    test_s, test_mib = _test(session, data, config, processes)
    passes = own.settles * config.optim.precise_norms * (1 if session.average is None else 2)
    norms_s = 1e-3 * passes * together_ms(drawn.each_ms, last.forward_ms, workers)
    steps_s = 1e-3 * own.steps * found.step_ms
    found.train_s = steps_s + own.tests * test_s + norms_s
    parts = [f"{own.steps:,} steps {_span(steps_s)}"]
    parts.append(f"{_times(own.tests, 'test')} {_span(own.tests * test_s)}")
    if passes:
        parts.append(f"precise norms {_span(norms_s)}")
    print(f"whole training: {_span(found.train_s)} ({', '.join(parts)})")

    found.memory_mib = held + max(step_mib, test_mib)
    print(
        f"memory: {found.memory_mib:,.0f} MiB at the peak: {held:,.0f} weights, optimiser and "
        f"averages, {step_mib:,.0f} a step, {test_mib:,.0f} a test{_of_memory(device, held)}"
    )
    _check_disk(found, session, config, own)


def _fits(
    found: Findings, session: Session, drawn: Drawn, config: Config, processes: Processes
) -> bool:
    """Whether a step will fit into memory: a process that takes too much is killed without a word.

    Parts of one or two clips are simply tried.
    """
    device = session.updater.device
    clips = len(drawn.first[0][1])
    part = clips // config.optim.accumulate
    free = free_mib(device)
    if part <= 2 or free is None:
        return True
    if device.type == "cpu":
        free /= processes.count
    fitting = fit(session, drawn.first[0], config, free=free)
    if fitting.batch is None or part <= fitting.batch:
        return True
    found.memory_mib = fitting.fixed_mib + part * fitting.clip_mib
    parts = [n for n in range(1, clips + 1) if clips % n == 0 and clips // n <= fitting.batch]
    few = " and ".join(map(str, fitting.peaks_mib))
    remedy = f"set optim.accumulate={parts[0]}" if parts else "take smaller clips"
    found.problems.append(
        f"memory: expected steps of {part} clips to fit into the {free:,.0f} MiB that are free, "
        f"got about {found.memory_mib:,.0f} MiB, reckoned from {few} clips; {remedy}"
    )
    return False


def _step_mib(session: Session, drawn: Drawn) -> float:
    """Peak of a step above what is held."""
    updater, batch = session.updater, drawn.first[-1]
    updater.optimiser.zero_grad(set_to_none=True)
    with PeakMemory(updater.device) as peak:
        updater.step(*batch[:2], Stopwatch(updater.device), where="the last step", numbers=batch[2])
    return needed_mib(peak) + batch_mib(batch, updater.device)


def _test(
    session: Session, data: Data, config: Config, processes: Processes
) -> tuple[float, float]:
    """Seconds of a whole test, and its peak above what is held."""
    device, workers = session.updater.device, config.data.workers
    batches, count = session.test_batches()
    if count == 0:
        return 0.0, 0.0  # more processes than test videos
    drawn = draw(islice(batches, max(1, 2 * workers)), workers=workers, keep=1)
    model = session.tested_model

    def tested() -> None:
        evaluate(
            model, drawn.first, video_of=data.test.video_of, average=data.average, device=device
        )

    # The first time, one-off choices and compilation are made.
    with PeakMemory(device) as peak:
        tested()
    watch = Stopwatch(device)
    tested()
    forward_ms = watch.lap_ms()
    test_s = 1e-3 * count * together_ms(drawn.each_ms, forward_ms, workers)
    views = len(drawn.first[0][1])
    print(
        f"a test takes {_span(test_s)}: {len(data.test):,} views ({data.protocol}); {views} of "
        f"them: data {_ms(drawn.each_ms)}, forward {_ms(forward_ms)}",
        flush=True,
    )
    # The last step's gradients are still there.
    beside = batch_mib(drawn.first[0], device) + gradients_mib(session.updater.model)
    return test_s, needed_mib(peak) + beside


def _check_disk(found: Findings, session: Session, config: Config, own) -> None:
    space = disk(config, session, own)
    found.disk_mib = space.needed_mib
    print(
        f"disk: {space.needed_mib:,.0f} MiB in {config.run.out}: "
        f"{_times(space.count, 'checkpoint')} of {space.checkpoint_mib:,.0f}, log "
        f"{space.log_mib:,.1f}; {space.free_mib:,.0f} MiB free"
    )
    if space.needed_mib > space.free_mib:
        found.problems.append(
            f"disk: expected {space.needed_mib:,.0f} MiB for {config.run.out}, got "
            f"{space.free_mib:,.0f} MiB free; choose another run.out, or lower run.keep"
        )
    if not space.writable:
        found.problems.append(
            f"disk: expected a folder that can be written, got {config.run.out}; choose another "
            "run.out"
        )


def _drawn_line(what: str, drawn: Drawn, workers: int) -> str:
    by = "in the training process" if workers == 0 else f"by {workers} loader processes"
    clips, labels, _ = drawn.first[0]
    shape = " x ".join(map(str, clips.shape[2:]))
    rate = 1e3 * len(labels) / drawn.each_ms
    return (
        f"{what} batches: {drawn.count} of {len(labels)} clips of {shape} (frames x height x "
        f"width), {rate:.1f} clips/s {by}"
    )


def _of_memory(device: torch.device, held: float) -> str:
    free = free_mib(device)
    return "" if free is None else f"; {free + held:,.0f} MiB free for it"


def _out_of_memory(error: RuntimeError) -> bool:
    # The CPU's allocator has no class of its own.
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _ms(value: float) -> str:
    return f"{value:,.0f} ms" if value >= 10 else f"{value:.1f} ms"


def _span(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 3600:,.1f} h" if seconds >= 3600 else f"{duration(seconds)} min"


def _times(count: int, name: str) -> str:
    return f"1 {name}" if count == 1 else f"{count:,} {name}s"
