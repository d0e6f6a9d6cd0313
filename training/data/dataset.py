"""Clips of the videos in a folder, decoded when they are asked for or kept decoded in memory."""

import os
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .reader import VideoReadError, open_video
from .sampling import random_clip, time_split, uniform_clip
from .scan import ScannedVideo, scan_videos

EXTENSIONS = (".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")

# Clips drawn from one video before its damage is an error.
_ATTEMPTS = 3

Transform = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class _Video:
    """A video that can be decoded, and the frames of it that belong to the split."""

    path: str
    label: int
    frames: range


class FolderDataset(Dataset[tuple[Tensor, int]]):
    """Labelled clips of the videos in a folder.

    ``split_by="folder"`` reads ``root/train/CLASS/*`` and ``root/test/CLASS/*``; the classes are
    the folders of ``root/train``. ``split_by="time"`` reads ``root/CLASS/*`` and videos directly in
    ``root``, whose class is their name; the first part of every video trains, the last part tests.
    Files are videos by their extension (`EXTENSIONS`); all others are ignored.

    Every file is tried first, in child processes that survive a hanging decoder; what cannot be
    decoded is left out and listed in `problems`. A training clip is a pure function of (seed,
    epoch, index) and a test clip of its index, for any number of loader processes.

    Args:
        root: Folder of the videos.
        split: ``train`` gives one random clip per video and epoch, ``test`` gives ``test_clips``
            evenly spread ones per video, those of a video next to each other.
        frames: Frames of a clip; a clip longer than its video goes on at the beginning.
        stride: Distance between two frames of a clip, in video frames.
        transform: Frames (T, H, W, 3) uint8 and a generator to network input (3, T, h, w).
        seed: Seed of all random choices.
        preload: Decode every video once, here, and keep the frames in memory (twice as much of it
            while they are collected). Loader processes share that memory.
        test_clips: Clips per test video.
        split_by: How training and test are told apart.
        holdout: Share of each video that tests (``split_by="time"`` only).
        preload_limit_mib: Most memory for preloaded frames, in MiB.
        scan_timeout_s: Longest time for trying one file, in seconds.

    Attributes:
        classes: Names of the classes, sorted; a label is a position in it.
        problems: (path, reason) of every file that was left out.

    Raises:
        FileNotFoundError: No such folder.
        ValueError: No readable video, fewer than two classes, or frames beyond the memory limit.
        ImportError: decord is not installed.

    Example:
        >>> from nlkernels.training.data.transforms import TrainTransform
        >>> def training_clips(root):
        ...     transform = TrainTransform(short_side=(256, 320), size=224)
        ...     return FolderDataset(
        ...         root, split="train", frames=8, stride=8, transform=transform, seed=0
        ...     )
    """

    classes: list[str]
    problems: list[tuple[str, str]]

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        split: Literal["train", "test"],
        frames: int,
        stride: int,
        transform: Transform,
        seed: int,
        preload: bool = False,
        test_clips: int = 1,
        split_by: Literal["folder", "time"] = "folder",
        holdout: float = 0.3,
        preload_limit_mib: float = 1024.0,
        scan_timeout_s: float = 30.0,
    ) -> None:
        _check_arguments(split, split_by, frames, stride, test_clips, holdout)
        self.transform = transform
        self._split, self._frames, self._stride, self._seed = split, frames, stride, seed
        self._clips = test_clips if split == "test" else 1
        self._epoch = 0

        def part(num_frames: int) -> range:
            if split_by == "folder":
                return range(num_frames)
            if num_frames < 2:
                return range(0)
            cut = time_split(num_frames, holdout)
            return range(cut) if split == "train" else range(cut, num_frames)

        files = _find_videos(Path(root), split, split_by)
        scanned = scan_videos(
            [path for path, _ in files],
            timeout_s=scan_timeout_s,
            keep=part if preload else None,
            limit_mib=preload_limit_mib,
        )
        usable, self.problems = [], []
        for video, (_, name) in zip(scanned, files, strict=True):
            if video.reason:
                self.problems.append((video.path, video.reason))
            elif len(part(video.num_frames)) == 0:
                self.problems.append((video.path, "one frame, too few to split by time"))
            else:
                usable.append((video, name))
        present = sorted({name for _, name in usable})
        self.classes = _class_folders(Path(root) / "train") if split_by == "folder" else present
        _check_classes(root, present if split == "train" else self.classes, self.problems)
        labels = {name: label for label, name in enumerate(self.classes)}
        self._videos = [
            _Video(video.path, labels[name], part(video.num_frames)) for video, name in usable
        ]
        self._memory = _Memory([video for video, _ in usable]) if preload else None
        # Shared, so that what loader processes count is seen here.
        self._failures = torch.zeros(len(self._videos), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self._videos) * self._clips

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """The clip (3, T, h, w), float32, and its label.

        Raises:
            IndexError: No such clip.
            VideoReadError: Several clips in a row of this video could not be decoded.
        """
        index = range(len(self))[index]
        number, clip = divmod(index, self._clips)
        video = self._videos[number]
        generator = _generator(self._seed, self._epoch if self._split == "train" else 0, index)
        length = len(video.frames)
        for attempt in range(_ATTEMPTS):
            if self._split == "test" and attempt == 0:
                chosen = uniform_clip(length, self._frames, self._stride, clip, self._clips)
            else:
                chosen = random_clip(length, self._frames, self._stride, generator)
            try:
                decoded = self._read(number, chosen)
            except VideoReadError as error:
                self._failures[number] += 1
                last = error
                continue
            return self.transform(decoded, generator), video.label
        raise VideoReadError(
            video.path, f"{_ATTEMPTS} clips in a row failed, the last one: {last.reason}"
        ) from last

    def set_epoch(self, epoch: int) -> None:
        """Draw other training clips from now on; this process's copy only, as everything here.

        Loader processes that outlive an epoch have their own copies: hand them the epoch with the
        index, or start new ones.

        Args:
            epoch: Number of the epoch, from 0.
        """
        self._epoch = epoch

    @property
    def decode_failures(self) -> list[tuple[str, int]]:
        """(path, clips that failed) of videos that passed the scan, loader processes included."""
        counts = self._failures.tolist()
        return [
            (video.path, count) for video, count in zip(self._videos, counts, strict=True) if count
        ]

    def _read(self, number: int, chosen: list[int]) -> Tensor:
        """Frames (T, H, W, 3) of a video by their place in its part."""
        if self._memory is not None:
            return self._memory.frames(number, chosen)
        video = self._videos[number]
        with closing(open_video(video.path)) as reader:
            return reader.frames([video.frames[place] for place in chosen])


class _Memory:
    """All frames of all videos in one flat uint8 tensor.

    One tensor, because every one that goes to a loader process by another way than forking costs a
    file descriptor.
    """

    def __init__(self, videos: list[ScannedVideo]) -> None:
        self._shapes = [video.pixels.shape for video in videos]
        ends = np.cumsum([video.pixels.size for video in videos])
        self._starts = [0, *ends.tolist()]
        self._pixels = torch.empty(self._starts[-1], dtype=torch.uint8)
        for number, video in enumerate(videos):
            self._video(number).copy_(torch.from_numpy(video.pixels))

    def frames(self, number: int, chosen: list[int]) -> Tensor:
        return self._video(number)[torch.tensor(chosen)]

    def _video(self, number: int) -> Tensor:
        start, end = self._starts[number : number + 2]
        return self._pixels[start:end].view(self._shapes[number])


def _generator(seed: int, epoch: int, index: int) -> torch.Generator:
    # torch keeps 32 bits of a seed, so the three numbers are mixed into as many first.
    mixed = np.random.SeedSequence([seed, epoch, index]).generate_state(1)[0]
    return torch.Generator().manual_seed(int(mixed))


def _find_videos(root: Path, split: str, split_by: str) -> list[tuple[Path, str]]:
    """Video files and their classes, sorted by path."""
    if split_by == "folder":
        for folder in (root / "train", root / split):
            if not folder.is_dir():
                raise FileNotFoundError(
                    f"FolderDataset: expected a folder {folder}, got none; make it with one folder "
                    "per class, or split every video by time"
                )
        classes, expected = _class_folders(root / "train"), f"{root / split}/CLASS/"
        others = sorted(set(_class_folders(root / split)) - set(classes))
        if others:
            raise ValueError(
                f"FolderDataset: expected the classes of {root / 'train'}, got others in "
                f"{root / split}: {', '.join(others)}; give every class training videos"
            )
        files = [(path, name) for name in classes for path in _videos_in(root / split / name)]
    else:
        if not root.is_dir():
            raise FileNotFoundError(
                f"FolderDataset: expected a folder, got {root}; name the folder of the videos"
            )
        expected = f"{root}/ or {root}/CLASS/"
        files = [(path, path.stem) for path in _videos_in(root)]
        files += [(path, name) for name in _class_folders(root) for path in _videos_in(root / name)]
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


def _class_folders(folder: Path) -> list[str]:
    """Sorted names of the folders with at least one file that should be a video."""
    return sorted(
        entry.name for entry in folder.iterdir() if entry.is_dir() and len(_videos_in(entry)) > 0
    )


def _videos_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(
        entry
        for entry in folder.iterdir()
        if entry.suffix.lower() in EXTENSIONS and not entry.name.startswith(".")
    )


def _check_arguments(
    split: str, split_by: str, frames: int, stride: int, test_clips: int, holdout: float
) -> None:
    for name, value, legal in (
        ("split", split, ("train", "test")),
        ("split_by", split_by, ("folder", "time")),
    ):
        if value not in legal:
            raise ValueError(
                f"FolderDataset: expected {name} {' or '.join(legal)}, got {value!r}; pick one"
            )
    for name, value in (("frames", frames), ("stride", stride), ("test_clips", test_clips)):
        if value < 1:
            raise ValueError(f"FolderDataset: expected {name} of at least 1, got {value}; raise it")
    if split_by == "time":
        time_split(2, holdout)
