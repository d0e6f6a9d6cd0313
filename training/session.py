"""One training: what it consists of, and what happens between two steps.

Behind a step come, where they are due: precise norms, the checkpoint, the test. Every checkpoint is
saved in front of the test of its step, so a resumed training repeats that test and goes on as if it
had never been interrupted.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint
from .averages import moving_average, set_precise_norms
from .batches import Batches
from .config import Config
from .distributed import ALONE, Processes, parallel
from .engine import StepRecord, train
from .evaluate import TestResult, evaluate
from .freezing import freeze
from .loading import Data, StepSampler
from .log import RunLog
from .log_extras import open_extras
from .optimisers import make_optimiser
from .schedules import Schedule
from .sharding import ShardedSampler, test_order, warn_of_another_order
from .stopping import Stopped, StopSignals
from .updates import Updater


class Session:
    """A model in training, with everything that a checkpoint holds.

    Args:
        model: On ``device``; changed in place.
        data: Training and test clips.
        config: Resolved configuration.
        steps: Length of the training.
        name: Stem of the files; starts the progress lines.
        seed: Seed of data order and dropout.
        device: Where the model is.
        processes: Those that train together.
        stop: Signals that end the training.

    Attributes:
        updater: Holds the model, without and with its other processes, and the optimiser.
        average: Moving average of the model, if there is one.
        step: Steps taken.
        losses: Training losses of the steps taken here, behind the last ones of a resumed part.
        train_s: Wall-clock duration of the training here, with what it saves and tests on its way.

    Raises:
        ValueError: Options of ``optim`` that this network cannot have.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        config: Config,
        *,
        steps: int,
        name: str,
        seed: int,
        device: torch.device,
        processes: Processes = ALONE,
        stop: StopSignals | None = None,
    ) -> None:
        optim = config.optim
        freeze(model, optim)
        if optim.sync_norms:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        optimiser = make_optimiser(model, optim)
        self._data, self._config, self._steps, self._seed = data, config, steps, seed
        self._name, self._device, self._processes = name, device, processes
        self._out = Path(config.run.out)
        self._path = self._out / f"{name}.pt"
        self._stop = StopSignals() if stop is None else stop
        self._schedule = Schedule(optim, steps=steps, clips=len(data.train))
        self.updater = Updater(
            parallel(model, device, processes), optimiser, optim, device, processes
        )
        self.average = None if optim.ema is None else moving_average(model, optim.ema)
        self._log: RunLog | None = None
        self.step = 0
        self.losses: list[float] = []
        self.train_s = 0.0
        # What checkpoints say of the schedule: it has not been told the test of its last step.
        self._told: tuple[int, dict[str, Any]] = -1, {}
        torch.manual_seed(processes.seed(seed))

    def resume(self, content: Mapping[str, Any]) -> None:
        """Continue from a checkpoint: everything is as it was when it was saved.

        Options of the optimiser are the configuration's, should they have changed.

        Args:
            content: What ``checkpoint.load`` returned.

        Raises:
            ValueError: It belongs to another network, or to another optimiser.
        """
        updater = self.updater
        options = [
            {key: value for key, value in group.items() if key != "params"}
            for group in updater.optimiser.param_groups
        ]
        try:
            updater.model.load_state_dict(content["model"])
            updater.optimiser.load_state_dict(content["optimiser"])
            if self.average is not None and content["average"] is not None:
                self.average.load_state_dict(content["average"])
            elif self.average is not None:
                self.average.module.load_state_dict(content["model"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise ValueError(
                "run: expected in run.resume a checkpoint of this network, got another "
                f"({str(error).splitlines()[0]}); use the model and optim sections of its config"
            ) from error
        for group, own in zip(updater.optimiser.param_groups, options, strict=True):
            group.update(own)
        self.step = content["step"]
        self.losses = list(content["losses"])
        if content["schedule"] is not None:
            self._schedule.load_state_dict(content["schedule"])
        if content["updates"] is not None:
            updater.load_state_dict(content["updates"])
        warn_of_another_order(content["position"], self._position())
        # Of processes that are new there is no state: they draw from their seeds.
        if self._processes.rank < len(content["rng"]):
            checkpoint.restore_rng(content["rng"][self._processes.rank])

    def run(self) -> TestResult:
        """Train to the end, save, test.

        Returns:
            The test behind the last step.

        Raises:
            NonFiniteError: The loss or a gradient is not finite.
            Stopped: A signal came; the checkpoint is that of the last step taken.
        """
        try:
            with self._opened_log():
                return self._run()
        except BaseException as error:
            # What breaks while a signal is being obeyed, such as a loader that got it too, changes
            # nothing; with several processes the others may have gone on.
            alone = self._processes.count == 1 and isinstance(error, Exception)
            if not isinstance(error, Stopped) and not (self._stop.asked and alone):
                raise
            self._save()
            raise Stopped(f"step {self.step} of {self._steps}") from error

    def rehearse(
        self,
        batches: Sequence[tuple[Tensor, Tensor, Tensor]],
        on_step: Callable[[StepRecord], None],
    ) -> None:
        """Take the next steps of the training on these batches; nothing is saved or tested.

        Args:
            batches: Of this process, one for each step; `training_batches` gives them.
            on_step: Called after every step with its record.

        Raises:
            NonFiniteError: The loss or a gradient is not finite.
        """
        train(
            self.updater,
            batches,
            self._schedule,
            steps=self.step + len(batches),
            start=self.step,
            on_step=lambda record, stop: on_step(record),
            processes=self._processes,
        )

    def training_batches(self, count: int) -> Batches:
        """Batches of this process for the next steps."""
        return self._batches(steps=self.step + count, start=self.step, seed=self._seed)

    def test_batches(self) -> tuple[Batches, int]:
        """Batches of this process for a test, and how many they are."""
        order = test_order(self._data.test, self._config, self._processes)
        return Batches(self._data.test, order, self._config), len(order)

    def _run(self) -> TestResult:
        self._event("start", seed=self._seed, start=self.step, steps=self._steps)
        begun = time.perf_counter()
        if 0 < self.step < self._steps and self._due(self._config.run.test_every):
            self._settle_norms()
            self._test_on_the_way()
        train(
            self.updater,
            self._batches(steps=self._steps, start=self.step, seed=self._seed),
            self._schedule,
            steps=self._steps,
            start=self.step,
            on_step=self._behind,
            stop=self._stop,
            processes=self._processes,
        )
        self.train_s = time.perf_counter() - begun
        self._settle_norms()
        self._save()
        return self._test()

    def _behind(self, record: StepRecord, stop: bool) -> None:
        """What comes behind a step."""
        run = self._config.run
        self.step = record.step
        self.losses.append(record.loss)
        if self.average is not None:
            self.average.update_parameters(self.updater.model)
        if self._log is not None:
            self._log.step(record)
        if stop:
            raise Stopped
        if record.step == self._steps:
            return
        saves, tests = self._due(run.checkpoint_every), self._due(run.test_every)
        if saves or tests:
            self._settle_norms()
        if saves:
            self._save()
        if tests:
            self._test_on_the_way()

    def _due(self, every: int | None) -> bool:
        """Whether something that happens every so often comes behind the last step."""
        batch, clips = self._config.optim.batch, len(self._data.train)
        return due(self.step, every, self._config.run.unit, batch=batch, clips=clips)

    def _save(self) -> None:
        rng = self._processes.gather(checkpoint.rng_state())
        if not self._processes.first:
            return
        average, (told_at, schedule) = self.average, self._told
        if told_at != self.step:
            schedule = self._schedule.state_dict()
        checkpoint.save(
            self._path,
            model=self.updater.model,
            optimiser=self.updater.optimiser,
            step=self.step,
            config=self._config,
            more={
                "average": None if average is None else average.state_dict(),
                "position": self._position(),
                "schedule": schedule,
                "updates": self.updater.state_dict(),
                "rng": rng,
                "losses": self.losses[-checkpoint.LOSSES :],
            },
            keep=self._config.run.keep,
        )

    def _test_on_the_way(self) -> None:
        test = self._test()
        self._told = self.step, self._schedule.state_dict()
        self._schedule.tested(test.loss)
        if self._log is not None:
            self._log.say(
                f"{self._name:<12} test accuracy {test.accuracy:.1%} behind step {self.step} "
                f"({self._data.protocol})"
            )

    def _test(self) -> TestResult:
        """Test the model, or the average of its weights if there is one."""
        model, data = self.tested_model, self._data
        self._processes.share(model)
        test = evaluate(
            model,
            self._interruptible(self.test_batches()[0]),
            video_of=data.test.video_of,
            average=data.average,
            device=self._device,
            processes=self._processes,
        )
        self._event(
            "test",
            step=self.step,
            accuracy=test.accuracy,
            loss=test.loss,
            protocol=data.protocol,
        )
        return test

    def _settle_norms(self) -> None:
        """Precise statistics of the batch norms that are tested and saved."""
        optim = self._config.optim
        if optim.precise_norms == 0:
            return
        models = [self.updater.model]
        if self.average is not None:
            models.append(self.average.module)
        for model in models:
            # Other clips than those of the next steps, always the same ones.
            batches = self._batches(steps=optim.precise_norms, start=0, seed=self._seed + 1)
            set_precise_norms(
                model,
                self._interruptible(batches),
                optim,
                device=self._device,
                processes=self._processes,
            )

    def _batches(self, *, steps: int, start: int, seed: int) -> Batches:
        order = StepSampler(
            len(self._data.train),
            batch=self._config.optim.batch,
            steps=steps,
            start=start,
            seed=seed,
        )
        return Batches(self._data.train, ShardedSampler(order, self._processes), self._config)

    def _interruptible(self, batches: Batches) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Batches between which a signal to any process ends the run in all of them.

        One process on its own does not wait for the next batch either.
        """
        iterator, alone = iter(batches), self._processes.count == 1
        # Those with fewer batches than others listen as often.
        for number in range(max(self._processes.gather(len(batches)))):
            (asked,) = self._processes.means(self._stop.asked)
            if asked > 0:
                raise Stopped
            if number < len(batches):
                with self._stop.waiting(at_once=alone):
                    batch = next(iterator)
                yield batch

    @property
    def tested_model(self) -> nn.Module:
        """The model, or the average of its weights if there is one."""
        return self.updater.model if self.average is None else self.average.module

    def _position(self) -> dict[str, int]:
        """The position in the data behind the last step."""
        clips, batch = len(self._data.train), self._config.optim.batch
        epoch, clip = divmod(self.step * batch, clips)
        return {"epoch": epoch, "clip": clip, "clips": clips, "batch": batch, "seed": self._seed}

    @contextmanager
    def _opened_log(self) -> Iterator[None]:
        """The log of the first process; the others have none."""
        if not self._processes.first:
            yield
            return
        self._log = RunLog(
            self._out / f"{self._name}.jsonl",
            steps=self._steps,
            name=self._name,
            every=self._config.run.log_every,
            start=self.step,
            extras=open_extras(self._config, self._out, self._name),
        )
        with self._log:
            yield

    def _event(self, event: str, **values: Any) -> None:
        if self._log is not None:
            self._log.event(event, **values)


def due(step: int, every: int | None, unit: str, *, batch: int, clips: int) -> bool:
    """Whether something that happens every so often comes behind a step.

    Args:
        step: Number of the step, from 1.
        every: Distance of two times; None is never.
        unit: Of ``every``: ``step`` or ``epoch``.
        batch: Clips per step.
        clips: Clips of a pass.
    """
    if every is None:
        return False
    if unit == "step":
        return step % every == 0
    # A pass ends within this step or with it.
    return step * batch // (every * clips) > (step - 1) * batch // (every * clips)
