"""Clips of the videos of a list: files, or folders of images."""

import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .annotations import read_hmdb51_json, read_kinetics_csv
from .dataset import ClipDataset, Video
from .frame_folders import FrameFolder, Naming
from .lists import Listing, Record, read_text_list
from .lmdb_list import read_lmdb
from .openers import FileOpener, ImageOpener, MemoryOpener
from .reader import VideoReadError
from .samplers import Sampler
from .scan import ScannedVideo, check_kept, scan_videos
from .transforms import Transform


@dataclass(frozen=True)
class ListFormat:
    """How lists are written.

    Args:
        name: ``caffe2``, ``lmdb``, ``mmaction``, ``pyslowfast``, ``tsm``, ``rnl``,
            ``kinetics_csv`` or ``hmdb51_json``.
        separator: Between the columns of a text list; unset takes the format's own.
        path_template: Of ``kinetics_csv``.
        class_order: Of ``kinetics_csv``.
        ground_truth: Of ``lmdb``, for test databases.
    """

    name: str
    separator: str | None = None
    path_template: str = ""
    class_order: str = "alphabetical"
    ground_truth: str | None = None

    def read(
        self,
        path: str | os.PathLike[str],
        *,
        training: bool,
        classes: Sequence[str] | None = None,
    ) -> Listing:
        """Read a list.

        Args:
            path: The list.
            training: Of training videos.
            classes: Names of the classes of the training list, for the test list.

        Raises:
            FileNotFoundError: No such list.
            ValueError: Something in it that the format does not have.
            ImportError: The package lmdb is not installed.
        """
        if self.name == "kinetics_csv":
            return read_kinetics_csv(
                path, path_template=self.path_template, order=self.class_order, classes=classes
            )
        if self.name == "hmdb51_json":
            return read_hmdb51_json(path, training=training)
        if self.name == "lmdb":
            return read_lmdb(path, ground_truth=self.ground_truth)
        return read_text_list(path, self.name, separator=self.separator, training=training)


class ListDataset(ClipDataset):
    """Labelled clips of the videos of a list; see `ClipDataset`.

    Args:
        listing: The videos.
        classes: Names of all classes by number.
        root: What the paths of the list begin with; absolute ones are left alone.
        training: Random clips.
        sampler: Which frames are a clip.
        transform: What is done with them.
        seed: Seed of all random choices.
        opener: `FileOpener`, or the `Naming` of the images of folders.
        check: What is tried with every video first: ``none``, whether it ``exists``, or to
            ``decode`` three frames of it; what fails is left out and listed.
        preload: Decode every video once, here, and keep the frames in memory; loader processes
            share it.
        preload_limit_mib: Most memory for preloaded frames, in MiB.
        timeout_s: Longest time for trying one file, in seconds.
        max_failed: Share of the training clips that may fail, from 0 to 1.

    Raises:
        ValueError: No usable video, a label without a class, or frames beyond the memory limit.
    """

    def __init__(
        self,
        listing: Listing,
        classes: Sequence[str],
        *,
        root: str | os.PathLike[str],
        training: bool,
        sampler: Sampler,
        transform: Transform,
        seed: int,
        opener: FileOpener | Naming,
        check: Literal["none", "exists", "decode"] = "exists",
        preload: bool = False,
        preload_limit_mib: float = 1024.0,
        timeout_s: float = 30.0,
        max_failed: float = 0.05,
    ) -> None:
        for record in listing.records:
            if record.label >= len(classes):
                raise ValueError(
                    f"data: expected labels below {len(classes)}, the number of classes, got "
                    f"{record.label} of {record.path}; check data.class_names, and in a test that "
                    "the network is one of these classes"
                )
        root = os.fspath(root)
        limit_mib = preload_limit_mib if preload else None
        if isinstance(opener, Naming):
            count = preload or sampler.by_length
            videos, problems = _folders(listing.records, root, opener, check, count)
            opener = ImageOpener(root, opener)
            if limit_mib is not None:
                videos, kept, broken = _read(videos, opener, limit_mib)
                problems, opener = problems + broken, MemoryOpener(kept)
        elif limit_mib is not None or check == "decode":
            videos, scanned, problems = _scanned(
                listing.records, root, opener.reader, timeout_s, limit_mib
            )
            opener = opener if limit_mib is None else MemoryOpener(scanned)
        else:
            videos, problems = _files(listing.records, root, check)
        super().__init__(
            videos,
            classes,
            training=training,
            sampler=sampler,
            transform=transform,
            opener=opener,
            seed=seed,
            problems=[*listing.problems, *problems],
            max_failed=max_failed,
        )


_Problems = list[tuple[str, str]]


def _files(records: Sequence[Record], root: str, check: str) -> tuple[list[Video], _Problems]:
    videos, problems = [], []
    for record in records:
        path = os.path.join(root, record.path)
        if check == "exists" and not os.path.isfile(path):
            problems.append((path, "no such file"))
        else:
            # Lengths in lists are not trusted: what the file says decides, when it is opened.
            videos.append(Video(path, record.label))
    return videos, problems


def _scanned(
    records: Sequence[Record], root: str, reader: str, timeout_s: float, limit_mib: float | None
) -> tuple[list[Video], list[ScannedVideo], _Problems]:
    """Videos that can be decoded, with all of their frames if there is memory for some."""
    scanned = scan_videos(
        [os.path.join(root, record.path) for record in records],
        timeout_s=timeout_s,
        reader=reader,
        **({} if limit_mib is None else {"keep": range, "limit_mib": limit_mib}),
    )
    usable = [pair for pair in zip(records, scanned, strict=True) if not pair[1].reason]
    videos = [
        Video(found.path, record.label, range(found.num_frames), found.fps)
        for record, found in usable
    ]
    problems = [(found.path, found.reason) for found in scanned if found.reason]
    return videos, [found for _, found in usable], problems


def _read(
    videos: Sequence[Video], opener: ImageOpener, limit_mib: float
) -> tuple[list[Video], list[ScannedVideo], _Problems]:
    """Folders of images with all of their frames."""
    usable, kept, problems, kept_bytes = [], [], [], 0
    for number, video in enumerate(videos):
        try:
            with closing(opener(number, video)) as folder:
                pixels = folder.frames_array(video.frames)
        except VideoReadError as error:
            problems.append((video.path, error.reason))
            continue
        kept_bytes += pixels.nbytes
        check_kept(f"the first {len(kept) + 1} videos", kept_bytes, limit_mib)
        usable.append(video)
        kept.append(ScannedVideo(video.path, len(video.frames), pixels=pixels, fps=video.fps))
    return usable, kept, problems


def _folders(
    records: Sequence[Record], root: str, naming: Naming, check: str, count: bool
) -> tuple[list[Video], _Problems]:
    videos, problems = [], []
    for record in records:
        path = os.path.join(root, record.path)
        try:
            length = None if record.num_frames is None else naming.frames_of(record.num_frames)
            if check != "none":
                _check_folder(root, record, naming, length, decode=check == "decode")
            if length is None and count:
                length = naming.count(Path(root), record.path)
        except VideoReadError as error:
            problems.append((path, error.reason))
            continue
        frames = None if length is None else range(record.offset, record.offset + length)
        videos.append(Video(path, record.label, frames))
    return videos, problems


def _check_folder(
    root: str, record: Record, naming: Naming, length: int | None, *, decode: bool
) -> None:
    naming.check_folders(Path(root), record.path)
    if not decode:
        return
    end = None if length is None else record.offset + length
    with closing(FrameFolder.open(root, record.path, naming, num_frames=end)) as video:
        last = len(video) - 1
        video.frames_array(sorted({record.offset, (record.offset + last) // 2, last}))
