"""From configuration to batches: data sets, the order of training clips, loaders with time-outs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from .config import Config
from .data.dataset import FolderDataset
from .data.reader import VideoReadError
from .data.synthetic import write_synthetic
from .data.transforms import TestTransform, TrainTransform


@dataclass(frozen=True)
class Data:
    """Training and test clips of a run."""

    train: FolderDataset
    """Random clips of the training videos."""
    test: FolderDataset
    """Fixed clips of the test videos."""
    protocol: str
    """How test clips are taken; belongs to every accuracy."""

    @property
    def classes(self) -> list[str]:
        """Names of the classes; labels are positions in it."""
        return self.train.classes

    @property
    def problems(self) -> list[dict[str, str]]:
        """Path and reason of every video that could not be used, or not always."""
        reasons = dict(self.train.problems) | dict(self.test.problems)
        for split in (self.train, self.test):
            for path, count in split.decode_failures:
                reasons[path] = f"{count} clips could not be decoded, others were taken"
        return [{"path": str(path), "reason": reason} for path, reason in reasons.items()]


def load_data(config: Config, *, seed: int) -> Data:
    """Generate the files if they are to be generated, then try every file of both splits.

    Args:
        config: Sections ``data``, ``model`` and ``run``.
        seed: Seed of the random clips of training.

    Raises:
        FileNotFoundError: No such folder.
        ValueError: No readable video, fewer than two classes, or not ``model.num_classes``.
        ImportError: decord (or PyAV, for generated files) is missing.
    """
    data = config.data
    root = Path(config.run.out, "data") if data.root is None else Path(data.root)
    if data.kind == "synthetic":
        write_synthetic(
            root,
            train=data.train_files,
            test=data.test_files,
            seed=data.seed,
            frames=data.frames,
            size=data.size,
        )
    train = _split(config, root, seed, "train")
    test = _split(config, root, seed, "test")
    if train.classes != test.classes:
        missing = sorted(set(train.classes) ^ set(test.classes))
        raise ValueError(
            f"data: expected the same classes for training and test in {root}, got "
            f"{', '.join(missing)} in one of them only; add videos of them to the other"
        )
    wanted = config.model.num_classes
    if wanted is not None and wanted != len(train.classes):
        raise ValueError(
            f"data: expected model.num_classes={wanted} classes in {root}, got "
            f"{len(train.classes)} ({', '.join(train.classes)}); leave model.num_classes unset"
        )
    clips = "1 clip" if data.test_clips == 1 else f"{data.test_clips} clips"
    return Data(
        train,
        test,
        f"{clips} of {data.frames} frames per video, centre crop {data.size} x {data.size}",
    )


def _split(config: Config, root: Path, seed: int, split: Literal["train", "test"]) -> FolderDataset:
    data = config.data
    synthetic = data.kind == "synthetic"
    if split == "train":
        transform = TrainTransform(data.short_side, data.size, data.flip)
    else:
        transform = TestTransform(data.short_side[0], data.size)
    return FolderDataset(
        root,
        split=split,
        frames=data.frames,
        stride=1 if synthetic else data.stride,
        transform=transform,
        seed=seed,
        preload=data.preload,
        test_clips=data.test_clips,
        split_by="folder" if synthetic else data.split_by,
        holdout=data.holdout,
    )


class StepSampler(Sampler[list[tuple[int, int]]]):
    """Clips of every training step, as (epoch, clip number) pairs.

    A pure function of seed and step: independent of the number of loader processes, and a resumed
    run continues the order of the interrupted one. Passes over the clips follow each other without
    a gap, so a batch may span two of them (or more, where videos are fewer than the batch).

    Args:
        clips: Number of training clips.
        batch: Clips per step.
        steps: Length of the whole training.
        start: Steps that were already taken.
        seed: Seed of the order.
    """

    def __init__(self, clips: int, *, batch: int, steps: int, start: int, seed: int) -> None:
        self._clips, self._batch, self._seed = clips, batch, seed
        self._range = range(start, steps)

    def __len__(self) -> int:
        return len(self._range)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, []
        for step in self._range:
            batch = []
            for position in range(step * self._batch, (step + 1) * self._batch):
                if position // self._clips != epoch:
                    epoch = position // self._clips
                    order = self._order(epoch)
                batch.append((epoch, order[position % self._clips]))
            yield batch

    def _order(self, epoch: int) -> list[int]:
        return np.random.default_rng([self._seed, epoch]).permutation(self._clips).tolist()


class _Numbered(Dataset[tuple[Tensor, int, int]]):
    """A data set's clips with their numbers, each drawn as in the epoch that the sampler names."""

    def __init__(self, clips: FolderDataset) -> None:
        self._clips = clips

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, int]:
        epoch, number = key
        self._clips.set_epoch(epoch)
        clip, label = self._clips[number]
        return clip, label, number


class Batches:
    """Clips (B, 3, T, H, W), labels (B,) and clip numbers (B,), a batch per item of an order.

    What goes wrong in a loader process arrives as an error of ours: TimeoutError for one that
    hangs, VideoReadError for a video that fails again and again.

    Args:
        clips: Data set.
        order: (epoch, clip number) pairs of every batch.
        config: Section ``data``.
    """

    def __init__(
        self,
        clips: FolderDataset,
        order: Sequence[list[tuple[int, int]]] | StepSampler,
        config: Config,
    ) -> None:
        workers = config.data.workers
        self._loader = DataLoader(
            _Numbered(clips),
            batch_sampler=order,
            num_workers=workers,
            # A hanging decoder is an error, not a hanging run.
            timeout=config.data.timeout_s if workers > 0 else 0,
            # Its own: a loader that starts draws a seed, and dropout must not notice a resumed run.
            generator=torch.Generator(),
            pin_memory=config.run.device != "cpu" and torch.cuda.is_available(),
        )

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        try:
            yield from self._loader
        except VideoReadError as error:
            if error.reason:
                raise
            # From a loader process comes the text of its traceback, which ends with the message.
            # Its traceback here goes: it would keep the loader alive, and its processes waiting.
            message = str(error).splitlines()[-1].partition("Error: ")[2]
            raise VideoReadError(message) from error.with_traceback(None)
        except RuntimeError as error:
            # DataLoader has no class of its own for a process that hangs.
            if "timed out" not in str(error):
                raise
            raise TimeoutError(
                f"data: expected a batch in time, got: {error}; a video may hang its decoder, "
                "or raise data.timeout_s"
            ) from error


def training_batches(
    clips: FolderDataset, config: Config, *, seed: int, steps: int, start: int = 0
) -> Batches:
    """Batches of step ``start`` onwards."""
    order = StepSampler(len(clips), batch=config.optim.batch, steps=steps, start=start, seed=seed)
    return Batches(clips, order, config)


def test_batches(clips: FolderDataset, config: Config) -> Batches:
    """All clips once, in order, in batches as in training."""
    numbers = [(0, number) for number in range(len(clips))]
    size = config.optim.batch
    order = [numbers[start : start + size] for start in range(0, len(numbers), size)]
    return Batches(clips, order, config)
