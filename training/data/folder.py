"""Clips of the videos in a folder, decoded when they are asked for or kept decoded in memory."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from .dataset import ClipDataset, Video
from .openers import FileOpener, MemoryOpener
from .reader import choose_reader
from .samplers import Sampler
from .sampling import time_parts
from .scan import ScannedVideo, scan_videos
from .transforms import Transform

EXTENSIONS = (".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")


class FolderDataset(ClipDataset):
    """Labelled clips of the videos in a folder; see `ClipDataset`.

    ``split_by="folder"`` reads ``root/train/CLASS/*`` and ``root/test/CLASS/*``; the classes are
    the folders of ``root/train``. ``split_by="time"`` reads ``root/CLASS/*`` and videos directly in
    ``root``, whose class is their name; the first part of every video trains, the last part tests.
    With ``parts`` above 1 the last part is cut into as many, each of which is a test video.
    Files are videos by their extension (`EXTENSIONS`); all others are ignored.

    Every file is tried first, in child processes that survive a hanging decoder; what cannot be
    decoded is left out and listed in `problems`.

    Args:
        root: Folder of the videos.
        split: ``train`` gives one random clip per video and epoch, ``test`` the sampler's.
        sampler: Which frames are a clip.
        transform: What is done with them.
        seed: Seed of all random choices.
        classes: Names of all classes, which then need no folders of training videos
            (``split="test"``, ``split_by="folder"`` only).
        preload: Decode every video once, here, and keep the frames in memory (twice as much of it
            while they are collected). Loader processes share that memory.
        split_by: How training and test are told apart.
        holdout: Share of each video that tests (``split_by="time"`` only).
        gap: Share of each video between training and test that does neither (likewise).
        parts: Test videos that the last part of each video makes (likewise).
        preload_limit_mib: Most memory for preloaded frames, in MiB.
        scan_timeout_s: Longest time for trying one file, in seconds.
        reader: ``decord``, ``av`` (PyAV), or ``auto``.
        child_timeout_s: Decode clips in a child process that may take so many seconds; None decodes
            in the process that asks.
        max_failed: Share of the training clips that may fail, from 0 to 1.

    Attributes:
        classes: Names of the classes, sorted; a label is a position in it.
        problems: (path, reason) of every file that was left out.

    Raises:
        FileNotFoundError: No such folder.
        ValueError: No readable video, fewer than two classes, or frames beyond the memory limit.
        ImportError: No decoder is installed.

    Example:
        >>> from nlkernels.training.data.augment import Augmentation
        >>> from nlkernels.training.data.samplers import Caffe2Sampler
        >>> from nlkernels.training.data.transforms import TrainTransform
        >>> def training_clips(root):
        ...     transform = TrainTransform(Augmentation("caffe2", short_side=(256, 320), size=224))
        ...     sampler = Caffe2Sampler(frames=8, stride=8)
        ...     return FolderDataset(
        ...         root, split="train", sampler=sampler, transform=transform, seed=0
        ...     )
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        split: Literal["train", "test"],
        sampler: Sampler,
        transform: Transform,
        seed: int,
        classes: Sequence[str] | None = None,
        preload: bool = False,
        split_by: Literal["folder", "time"] = "folder",
        holdout: float = 0.3,
        gap: float = 0.0,
        parts: int = 1,
        preload_limit_mib: float = 1024.0,
        scan_timeout_s: float = 30.0,
        reader: str = "auto",
        child_timeout_s: float | None = None,
        max_failed: float = 0.05,
    ) -> None:
        _check_arguments(split, split_by)
        if split_by == "time":
            time_parts(2, holdout, gap=gap, parts=parts)

        def parts_of(num_frames: int) -> list[range]:
            if split_by == "folder":
                return [range(num_frames)]
            if num_frames < 2:
                return []
            training, test = time_parts(num_frames, holdout, gap=gap, parts=parts)
            return [training] if split == "train" else test

        def kept(num_frames: int) -> range:
            mine = parts_of(num_frames)
            return range(mine[0].start, mine[-1].stop) if mine else range(0)

        files = _find_videos(Path(root), split, split_by, classes)
        decoder = choose_reader(reader)
        scanned = scan_videos(
            [path for path, _ in files],
            timeout_s=scan_timeout_s,
            keep=kept if preload else None,
            limit_mib=preload_limit_mib,
            reader=decoder,
        )
        usable, problems = [], []
        for video, (_, name) in zip(scanned, files, strict=True):
            if video.reason:
                problems.append((video.path, video.reason))
            elif not parts_of(video.num_frames):
                problems.append((video.path, "one frame, too few to split by time"))
            else:
                usable += [(one, frames, name) for one, frames in _cut(video, parts_of)]
        present = sorted({name for _, _, name in usable})
        if classes is None:
            classes = class_folders(Path(root) / "train") if split_by == "folder" else present
        _check_classes(root, present if split == "train" else classes, problems)
        labels = {name: label for label, name in enumerate(classes)}
        if preload:
            opener = MemoryOpener([video for video, _, _ in usable])
        else:
            opener = FileOpener(decoder, child_timeout_s)
        super().__init__(
            [
                Video(
                    video.path,
                    labels[name],
                    frames,
                    video.fps,
                    part=f"frames {frames.start}-{frames.stop - 1}" if parts > 1 else "",
                )
                for video, frames, name in usable
            ],
            classes,
            training=split == "train",
            sampler=sampler,
            transform=transform,
            opener=opener,
            seed=seed,
            problems=problems,
            max_failed=max_failed,
        )


def _cut(
    video: ScannedVideo, parts_of: Callable[[int], list[range]]
) -> list[tuple[ScannedVideo, range]]:
    """Every part of a video with its pixels, if these were kept."""
    parts = parts_of(video.num_frames)
    if video.pixels is None:
        return [(video, frames) for frames in parts]
    first = parts[0].start
    return [
        (replace(video, pixels=video.pixels[frames.start - first : frames.stop - first]), frames)
        for frames in parts
    ]


def _find_videos(
    root: Path, split: str, split_by: str, classes: Sequence[str] | None
) -> list[tuple[Path, str]]:
    """Video files and their classes, sorted by path."""
    if split_by == "folder":
        of_classes = root / "train" if classes is None else root / split
        for folder in (of_classes, root / split):
            if not folder.is_dir():
                raise FileNotFoundError(
                    f"FolderDataset: expected a folder {folder}, got none; make it with one folder "
                    "per class, or split every video by time"
                )
        expected, given = f"{root / split}/CLASS/", classes
        classes = class_folders(of_classes) if given is None else given
        others = sorted(set(class_folders(root / split)) - set(classes))
        if others:
            raise ValueError(
                f"FolderDataset: expected the classes of "
                f"{of_classes if given is None else 'the network'}, got others in {root / split}: "
                f"{', '.join(others)}; give every class training videos"
            )
        files = [(path, name) for name in classes for path in videos_in(root / split / name)]
    else:
        if not root.is_dir():
            raise FileNotFoundError(
                f"FolderDataset: expected a folder, got {root}; data.root names that of the videos"
            )
        expected = f"{root}/ or {root}/CLASS/"
        files = [(path, path.stem) for path in videos_in(root)]
        files += [(path, name) for name in class_folders(root) for path in videos_in(root / name)]
    if not files:
        raise ValueError(
            f"FolderDataset: expected video files in {expected}, got none with an extension of "
            f"{' '.join(EXTENSIONS)}; check the folder"
        )
    return files


def _check_classes(
    root: str | os.PathLike[str], classes: list[str], problems: list[tuple[str, str]]
) -> None:
    if len(classes) >= 2:
        return
    got = f"only {classes[0]}" if classes else "none"
    if problems:
        path, reason = problems[0]
        got += f" and {len(problems)} unreadable files, the first one {path} ({reason})"
    raise ValueError(
        f"FolderDataset: expected readable videos of at least two classes below {root}, got {got}; "
        "put readable videos of every class into a folder of its own"
    )


def class_folders(folder: Path) -> list[str]:
    """Sorted names of the folders with at least one file that should be a video."""
    return sorted(
        entry.name for entry in folder.iterdir() if entry.is_dir() and len(videos_in(entry)) > 0
    )


def videos_in(folder: Path) -> list[Path]:
    """Files of a folder that should be videos, sorted."""
    if not folder.is_dir():
        return []
    return sorted(
        entry
        for entry in folder.iterdir()
        if entry.suffix.lower() in EXTENSIONS and not entry.name.startswith(".")
    )


def _check_arguments(split: str, split_by: str) -> None:
    for name, value, legal in (
        ("split", split, ("train", "test")),
        ("split_by", split_by, ("folder", "time")),
    ):
        if value not in legal:
            raise ValueError(
                f"FolderDataset: expected {name} {' or '.join(legal)}, got {value!r}; pick one"
            )
