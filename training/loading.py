"""From configuration to batches: data sets, the order of training clips, loaders with time-outs."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from nlkernels.models.classes import read_names

from .config import Config
from .config_data import DataConfig, view_side, view_size
from .data.augment import Augmentation
from .data.crops import TestCrops
from .data.dataset import ClipDataset, DecodeRateError
from .data.folder import FolderDataset
from .data.frame_folders import Naming
from .data.listed import ListDataset, ListFormat
from .data.lists import Listing, direction_classes, numbered_names
from .data.openers import FileOpener
from .data.reader import VideoReadError, choose_reader
from .data.samplers_segments import make_sampler
from .data.synthetic import write_synthetic
from .data.transforms import TestTransform, TrainTransform, Transform

_CROPS = {
    "centre": "centre crop {size} x {size}",
    "three": "3 crops {size} x {size} along the longer side",
    "three_random": "3 random crops {size} x {size}",
    "five": "5 crops {size} x {size}",
    "ten": "10 crops {size} x {size}, half of them mirrored",
    "six_flip": "6 crops {size} x {size}, half of them mirrored",
    "full": "whole frames of short side {side}",
}


@dataclass(frozen=True)
class Data:
    """Training and test clips of a run."""

    train: ClipDataset
    """Random clips of the training videos."""
    test: ClipDataset
    """Fixed clips of the test videos; ``test.video_of`` says which video a clip is of."""
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
    """Generate the files if they are to be generated, or read the lists; try files as configured.

    Args:
        config: Sections ``data``, ``model`` and ``run``.
        seed: Seed of the random clips of training.

    Raises:
        FileNotFoundError: No such folder or list.
        ValueError: No readable video, fewer than two classes, or not ``model.num_classes``.
        ImportError: No decoder (or PyAV, for generated files) is installed.
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
    if data.kind == "list":
        train, test = _listed(data, seed)
    else:
        train = _folder(data, root, seed, "train")
        test = _folder(data, root, seed, "test")
    if train.classes != test.classes:
        missing = sorted(set(train.classes) ^ set(test.classes))
        raise ValueError(
            f"data: expected the same classes for training and test in {root}, got "
            f"{', '.join(missing)} in one of them only; add videos of them to the other"
        )
    wanted = config.model.num_classes
    if wanted is not None and wanted != len(train.classes):
        names = ", ".join(train.classes[:10]) + (", ..." if len(train.classes) > 10 else "")
        raise ValueError(
            f"data: expected model.num_classes={wanted} classes in {root}, got "
            f"{len(train.classes)} ({names}); leave model.num_classes unset"
        )
    return Data(train, test, _protocol(data, test))


def _protocol(data: DataConfig, test: ClipDataset) -> str:
    views = test.views_per_video
    if views is None:
        clips = "all clips"
    else:
        count = views // test.transform.crops
        clips = "1 clip" if count == 1 else f"{count} clips"
    crops = _CROPS[data.test_crops].format(size=view_size(data), side=view_side(data))
    rules = "" if data.sampler == data.crop_rule == "caffe2" else f" ({data.sampler})"
    return f"{clips} of {data.frames} frames per video, {crops}{rules}"


def _transform(
    data: DataConfig, split: Literal["train", "test"], classes: Sequence[str]
) -> Transform:
    if split == "test":
        windows = TestCrops(data.test_crops, data.crop_rule, view_side(data), view_size(data))
        return TestTransform(windows, data.colours, data.channels)
    return TrainTransform(
        Augmentation(data.augment, data.short_side, data.size),
        flip=data.flip,
        unflipped=frozenset() if data.flip_directions else direction_classes(classes),
        colours=data.colours,
        channels=data.channels,
        jitter=data.colour_jitter,
    )


def _folder(
    data: DataConfig, root: Path, seed: int, split: Literal["train", "test"]
) -> ClipDataset:
    synthetic = data.kind == "synthetic"
    clips = FolderDataset(
        root,
        split=split,
        sampler=make_sampler(
            data.sampler,
            frames=data.frames,
            stride=1 if synthetic else data.stride,
            clips=data.test_clips,
        ),
        transform=_transform(data, split, ()),
        seed=seed,
        preload=data.preload,
        split_by="folder" if synthetic else data.split_by,
        holdout=data.holdout,
        reader=data.reader,
        child_timeout_s=data.decode_timeout_s if data.decode == "child" else None,
        max_failed=data.max_failed,
    )
    # The folders name the classes, and the names say which must not be mirrored.
    clips.transform = _transform(data, split, clips.classes)
    return clips


def _listed(data: DataConfig, seed: int) -> tuple[ClipDataset, ClipDataset]:
    layout = ListFormat(
        data.list_format,
        separator=data.separator,
        path_template=data.path_template,
        class_order=data.class_order,
        ground_truth=data.ground_truth,
    )
    train = layout.read(data.train_list, training=True)
    test = layout.read(
        data.train_list if data.test_list is None else data.test_list,
        training=False,
        classes=train.classes,
    )
    if data.class_names is not None:
        classes = read_names(data.class_names)
    else:
        classes = numbered_names([train, test]) if train.classes is None else train.classes
    if len(classes) < 2:
        raise ValueError(
            f"data: expected at least two classes in {data.train_list}, got {len(classes)}; "
            "check data.list_format"
        )
    if data.reader in ("frames", "flow"):
        opener = Naming(data.template, flow=data.reader == "flow", first=data.first_frame)
    else:
        inside = data.decode == "inside"
        opener = FileOpener(choose_reader(data.reader), None if inside else data.decode_timeout_s)

    def split(name: Literal["train", "test"], listing: Listing) -> ClipDataset:
        return ListDataset(
            listing,
            classes,
            root="" if data.root is None else data.root,
            training=name == "train",
            sampler=make_sampler(
                data.sampler, frames=data.frames, stride=data.stride, clips=data.test_clips
            ),
            transform=_transform(data, name, classes),
            seed=seed,
            opener=opener,
            check="exists" if data.check == "auto" else data.check,
            timeout_s=data.decode_timeout_s,
            max_failed=data.max_failed,
        )

    return split("train", train), split("test", test)


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


class _Numbered(Dataset[tuple[Any, ...]]):
    """Batches of a data set's clips and their numbers, drawn as in the epochs that a sampler names.

    Args:
        clips: Data set.
        decoded: Give lists of frames and views in place of network input.
    """

    def __init__(self, clips: ClipDataset, *, decoded: bool) -> None:
        self._clips, self._decoded = clips, decoded

    def __getitems__(self, keys: list[tuple[int, int]]) -> tuple[Any, ...]:
        batch, frames, views, labels = None, [], [], []
        for place, (epoch, number) in enumerate(keys):
            self._clips.set_epoch(epoch)
            video, view, label = self._clips.decoded(number)
            labels.append(label)
            if self._decoded:
                frames.append(video)
                views.append(view)
                continue
            if batch is None:
                # Clips are rendered into it: putting them together afterwards copies them again.
                batch = torch.empty(len(keys), *view.shape(video))
                if get_worker_info() is not None:
                    batch.share_memory_()
            self._clips.transform.render(video, view, out=batch[place])
        numbers = torch.tensor([number for _, number in keys])
        if self._decoded:
            return frames, views, torch.tensor(labels), numbers
        return batch, torch.tensor(labels), numbers


def _as_it_is(batch: tuple[Any, ...]) -> tuple[Any, ...]:
    return batch


class Batches:
    """Clips (B, C, T, H, W), labels (B,) and clip numbers (B,), a batch per item of an order.

    With ``data.augment_on: device`` clips are on ``run.device``, else on the CPU.

    What goes wrong in a loader process arrives as an error of ours: TimeoutError for one that
    hangs, VideoReadError for a video that fails again and again, DecodeRateError for too many.

    Args:
        clips: Data set.
        order: (epoch, clip number) pairs of every batch.
        config: Sections ``data`` and ``run``.
    """

    def __init__(
        self,
        clips: ClipDataset,
        order: Sequence[list[tuple[int, int]]] | Sampler[list[tuple[int, int]]],
        config: Config,
    ) -> None:
        workers = config.data.workers
        self._render: Callable[..., Tensor] | None = None
        if config.data.augment_on == "device":
            self._render = clips.transform.render
        self._device = torch.device(
            ("cuda" if torch.cuda.is_available() else "cpu")
            if config.run.device == "auto"
            else config.run.device
        )
        self._loader = DataLoader(
            _Numbered(clips, decoded=self._render is not None),
            batch_sampler=order,
            num_workers=workers,
            collate_fn=_as_it_is,
            # A hanging decoder is an error, not a hanging run.
            timeout=config.data.timeout_s if workers > 0 else 0,
            # Its own: a loader that starts draws a seed, and dropout must not notice a resumed run.
            generator=torch.Generator(),
            pin_memory=config.run.device != "cpu" and torch.cuda.is_available(),
        )

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        try:
            for batch in self._loader:
                yield self._rendered(*batch) if self._render else tuple(batch)
        except (VideoReadError, DecodeRateError) as error:
            text = str(error)
            if "Traceback (most recent call last)" not in text:
                raise
            # From a loader process comes the text of its traceback, which ends with the message.
            # Its traceback here goes: it would keep the loader alive, and its processes waiting.
            message = text.strip().splitlines()[-1].partition("Error: ")[2]
            raise type(error)(message) from error.with_traceback(None)
        except RuntimeError as error:
            # DataLoader has no class of its own for a process that hangs.
            if "timed out" not in str(error):
                raise
            raise TimeoutError(
                f"data: expected a batch in time, got: {error}; a video may hang its decoder, "
                "set data.decode=child or raise data.timeout_s"
            ) from error

    def _rendered(
        self, frames: list[Tensor], views: list[Any], labels: Tensor, numbers: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        clips = [
            self._render(one.to(self._device, non_blocking=True), view)
            for one, view in zip(frames, views, strict=True)
        ]
        return torch.stack(clips), labels, numbers


def training_batches(
    clips: ClipDataset, config: Config, *, seed: int, steps: int, start: int = 0
) -> Batches:
    """Batches of step ``start`` onwards."""
    order = StepSampler(len(clips), batch=config.optim.batch, steps=steps, start=start, seed=seed)
    return Batches(clips, order, config)


def test_batches(clips: ClipDataset, config: Config) -> Batches:
    """All clips once, in order, in batches as in training; whole frames of one video at a time."""
    numbers = [(0, number) for number in range(len(clips))]
    if config.data.test_crops == "full":
        # Frames of different videos have different sizes.
        cuts = [n for n in range(1, len(clips)) if clips.video_of(n) != clips.video_of(n - 1)]
        edges = [0, *cuts, len(clips)]
        order = [numbers[start:end] for start, end in pairwise(edges)]
    else:
        size = config.optim.batch
        order = [numbers[start : start + size] for start in range(0, len(numbers), size)]
    return Batches(clips, order, config)
