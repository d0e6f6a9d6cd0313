"""From configuration to clips: data sets of training and test, and the order of training clips."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
from torch.utils.data import Sampler

from nlkernels.models.classes import read_names

from .batches import Batches
from .config import Config
from .config_data import DataConfig, view_side, view_size
from .data.augment import Augmentation
from .data.crops import TestCrops
from .data.dataset import ClipDataset
from .data.folder import FolderDataset, class_folders
from .data.frame_folders import Naming
from .data.listed import ListDataset, ListFormat
from .data.lists import Listing, direction_classes, numbered_names
from .data.openers import FileOpener
from .data.reader import choose_reader
from .data.samplers_segments import make_sampler
from .data.synthetic import write_synthetic
from .data.transforms import TestTransform, TrainTransform, Transform
from .view_scores import Average, average_of, protocol


@dataclass(frozen=True)
class Data:
    """Training and test clips of a run."""

    train: ClipDataset
    """Random clips of the training videos."""
    test: ClipDataset
    """Fixed clips of the test videos; ``test.video_of`` says which video a clip is of."""
    average: Average
    """What the network's system averages over the views of a test video."""
    protocol: str
    """How test videos are scored; belongs to every accuracy."""

    @property
    def classes(self) -> list[str]:
        """Names of the classes; labels are positions in it."""
        return self.train.classes

    @property
    def problems(self) -> list[dict[str, str]]:
        """Path and reason of every video that could not be used, or not always."""
        return problems_of(self.train, self.test)


def problems_of(*splits: ClipDataset) -> list[dict[str, str]]:
    """Path and reason of every video of data sets that could not be used, or not always."""
    reasons: dict[str, str] = {}
    for split in splits:
        reasons |= dict(split.problems)
    for split in splits:
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
    data, root = config.data, _root(config)
    if data.kind == "list":
        train, test = _listed(data, seed, config.model.num_classes)
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
    name = config.model.name
    average = average_of(name)
    return Data(train, test, average, protocol(name, data, test.clips_per_video, average))


def load_test(config: Config, *, classes: Sequence[str] | None, num_classes: int) -> ClipDataset:
    """The test clips alone, without training videos and, but for names of classes, their list.

    Args:
        config: Sections ``data`` and ``run``.
        classes: Names of the classes of the network to be tested; None where nothing tells them.
        num_classes: How many it tells apart.

    Raises:
        FileNotFoundError: No such folder or list.
        ValueError: No readable video, or names of classes that neither the configuration, the
            network nor the training list tells.
        ImportError: No decoder (or PyAV, for generated files) is installed.
    """
    data, root = config.data, _root(config)
    if data.kind == "list":
        return _listed_test(data, config.run.seed, classes, num_classes)
    names = None
    if data.split_by == "folder" and not (root / "train").is_dir():
        names = class_folders(root / "test") if classes is None else classes
    return _folder(data, root, config.run.seed, "test", names)


def _root(config: Config) -> Path:
    """Folder of the videos, with the generated ones in it."""
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
    return root


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
    data: DataConfig,
    root: Path,
    seed: int,
    split: Literal["train", "test"],
    classes: Sequence[str] | None = None,
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
        classes=classes,
        preload=data.preload,
        split_by="folder" if synthetic else data.split_by,
        holdout=data.holdout,
        gap=data.gap,
        parts=data.parts,
        reader=data.reader,
        child_timeout_s=data.decode_timeout_s if data.decode == "child" else None,
        max_failed=data.max_failed,
    )
    # The folders name the classes, and the names say which must not be mirrored.
    clips.transform = _transform(data, split, clips.classes)
    return clips


def _listed(
    data: DataConfig, seed: int, num_classes: int | None
) -> tuple[ClipDataset, ClipDataset]:
    layout = _layout(data)
    train = layout.read(data.train_list, training=True)
    test = layout.read(_test_list(data), training=False, classes=train.classes)
    if data.class_names is not None:
        classes = read_names(data.class_names)
    else:
        classes = numbered_names([train, test]) if train.classes is None else train.classes
        if train.classes is None and num_classes is not None and num_classes > len(classes):
            # Part of a data set: its last classes may have no video.
            classes = [str(number) for number in range(num_classes)]
    if len(classes) < 2:
        raise ValueError(
            f"data: expected at least two classes in {data.train_list}, got {len(classes)}; "
            "check data.list_format"
        )
    return (
        _list_dataset(data, seed, "train", train, classes),
        _list_dataset(data, seed, "test", test, classes),
    )


def _listed_test(
    data: DataConfig, seed: int, classes: Sequence[str] | None, num_classes: int
) -> ClipDataset:
    layout = _layout(data)
    if data.class_names is not None:
        classes = read_names(data.class_names)
    elif data.list_format == "kinetics_csv" and _is_file(data.train_list):
        # Its names are numbered by the training file; all other formats carry numbers or names.
        classes = layout.read(data.train_list, training=True).classes
    test = layout.read(_test_list(data), training=False, classes=classes)
    if data.list_format == "kinetics_csv" and classes is None:
        _check_own_names(data, test, num_classes)
    if test.classes is not None:
        classes = test.classes
    elif classes is None:
        classes = [str(number) for number in range(num_classes)]
    return _list_dataset(data, seed, "test", test, classes)


def _check_own_names(data: DataConfig, test: Listing, num_classes: int) -> None:
    """Raise ValueError unless a test list numbers its classes as the training list does."""
    if data.class_order == "alphabetical" and len(test.classes) == num_classes:
        return
    raise ValueError(
        f"data: expected the names of {num_classes} classes in their order, got a test list with "
        f"{len(test.classes)} and no training list; set data.class_names=FILE or data.train_list"
    )


def _is_file(path: str | None) -> bool:
    return path is not None and Path(path).is_file()


def _layout(data: DataConfig) -> ListFormat:
    return ListFormat(
        data.list_format,
        separator=data.separator,
        path_template=data.path_template,
        class_order=data.class_order,
        ground_truth=data.ground_truth,
    )


def _test_list(data: DataConfig) -> str | None:
    return data.train_list if data.test_list is None else data.test_list


def _list_dataset(
    data: DataConfig,
    seed: int,
    split: Literal["train", "test"],
    listing: Listing,
    classes: Sequence[str],
) -> ClipDataset:
    if data.reader in ("frames", "flow"):
        opener = Naming(data.template, flow=data.reader == "flow", first=data.first_frame)
    else:
        inside = data.decode == "inside"
        opener = FileOpener(choose_reader(data.reader), None if inside else data.decode_timeout_s)
    return ListDataset(
        listing,
        classes,
        root="" if data.root is None else data.root,
        training=split == "train",
        sampler=make_sampler(
            data.sampler, frames=data.frames, stride=data.stride, clips=data.test_clips
        ),
        transform=_transform(data, split, classes),
        seed=seed,
        opener=opener,
        check="exists" if data.check == "auto" else data.check,
        preload=data.preload,
        timeout_s=data.decode_timeout_s,
        max_failed=data.max_failed,
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
