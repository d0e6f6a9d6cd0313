"""From a folder of videos to lists, folders of images, and flow."""

import os
import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nlkernels.models.classes import alphabetical

from .child import ChildReader
from .flow import FlowMethod, flow_images, grey, tv_l1
from .folder import class_folders, videos_in
from .frame_folders import TEMPLATES, Naming
from .reader import VideoReader, VideoReadError, choose_reader
from .resizing import RULES, resize
from .scan import scan_videos

# Frames decoded at a time: a minute of large video does not fit into memory.
_CHUNK = 64
_QUALITY = 95


@dataclass(frozen=True)
class Prepared:
    """What `prepare` has made.

    Attributes:
        out: Folder of everything.
        classes: Names of the classes by number.
        train: Number of training videos.
        test: Number of test videos.
        problems: (path, reason) of files that were left out.
        lists: Files that were written, by name.
    """

    out: Path
    classes: list[str]
    train: int
    test: int
    problems: list[tuple[str, str]]
    lists: list[Path]


@dataclass(frozen=True)
class _Item:
    """A video: its split, its class, its path below the folder, and how long it is."""

    split: str
    label: int
    path: str
    num_frames: int

    @property
    def stem(self) -> str:
        return os.path.splitext(self.path)[0]


def prepare(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    test_share: float = 0.2,
    frames: bool = False,
    flow: bool = False,
    template: str = TEMPLATES["kinetics"],
    flow_template: str = TEMPLATES["flow"],
    short_side: int | None = None,
    reader: str = "auto",
    timeout_s: float = 60.0,
    method: FlowMethod | None = None,
) -> Prepared:
    """Make lists of the videos of a folder; extract frames and flow if asked to.

    The folder holds ``train/CLASS/*`` and ``test/CLASS/*`` (or ``val``), or ``CLASS/*``; then the
    last share of each class by name is for testing. Every video is tried first, and what cannot be
    decoded is left out of the lists. Written into ``out``:

    - ``classes.txt``: a class on each line, in the order of the numbers;
    - ``train.txt``, ``test.txt``: ``path label`` below ``folder`` (formats mmaction, caffe2);
    - ``train.csv``, ``test.csv``: the same with commas (format pyslowfast, separator ``,``);
    - with ``frames``: ``frames/PATH/img_00001.jpg``, ..., ``train_frames.txt``, ``test_frames.txt``
      with ``path frames label`` below ``frames`` (formats mmaction, tsm);
    - with ``flow``: ``flow/PATH/flow_x_00001.jpg``, ..., and lists alike below ``flow``;
    - ``problems.txt``: path and reason of what was left out.

    An interrupted extraction goes on where it stopped: finished videos are not made again.

    Args:
        folder: Folder of the videos.
        out: Folder to write.
        test_share: Share of each class that tests, where the folder does not say.
        frames: Extract frames.
        flow: Extract TV-L1 flow, of every pair of frames; OpenCV is needed, and much time.
        template: Names of the images.
        flow_template: Names of the flow's images: ``frame{:06d}.jpg`` makes HMDB51's folders u and
            v.
        short_side: Short side of extracted images, in pixels; unset keeps their size.
        reader: ``decord``, ``av`` (PyAV), or ``auto``.
        timeout_s: Longest time for decoding a piece of a video, in seconds.
        method: Flow method; unset is OpenCV's Dual TV-L1.

    Returns:
        What was made.

    Raises:
        FileNotFoundError: No such folder.
        ValueError: No readable videos, fewer than two classes, an impossible share, or lists for
            paths with blanks.
        ImportError: A decoder, Pillow or OpenCV is not installed.
    """
    folder, out = Path(folder), Path(out)
    if not 0 < test_share < 1:
        raise ValueError(
            f"prepare: expected 0 < test_share < 1, got {test_share}; 0.2 tests a fifth"
        )
    if short_side is not None and short_side < 1:
        raise ValueError(f"prepare: expected short_side >= 1, got {short_side}; use 256")
    if flow and method is None:
        method = tv_l1()
    names = Naming(template), Naming(flow_template, flow=True)
    decoder = choose_reader(reader)
    found, classes = _find(folder, test_share)
    scanned = scan_videos(
        [folder / path for _, _, path in found], timeout_s=timeout_s, reader=decoder
    )
    problems = [(video.path, video.reason) for video in scanned if video.reason]
    items = [
        _Item(split, label, path, video.num_frames)
        for (split, label, path), video in zip(found, scanned, strict=True)
        if not video.reason
    ]
    out.mkdir(parents=True, exist_ok=True)
    kinds: list[tuple[str, list[_Item]]] = []
    for kind, wanted, naming in (("frames", frames, names[0]), ("flow", flow, names[1])):
        if wanted:
            extracted = []
            for item in items:
                try:
                    with closing(
                        ChildReader.open(folder / item.path, reader=decoder, timeout_s=timeout_s)
                    ) as video:
                        pictures = _pictures(video, short_side)
                        if kind == "flow":
                            pictures = flow_images((grey(one[None])[0] for one in pictures), method)
                        count = _extract(pictures, out / kind, item.stem, naming)
                    extracted.append(_Item(item.split, item.label, item.stem, count))
                except VideoReadError as error:
                    problems.append((str(folder / item.path), f"{kind}: {error.reason}"))
            kinds.append((kind, extracted))
    ChildReader.stop_children()
    lists = _write_lists(out, items, kinds, classes, problems)
    splits = [item.split for item in items]
    return Prepared(out, classes, splits.count("train"), splits.count("test"), problems, lists)


def _find(folder: Path, test_share: float) -> tuple[list[tuple[str, int, str]], list[str]]:
    """(split, label, path below the folder) of every video, and the names of the classes."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f"prepare: expected a folder of videos, got {folder}; check the path"
        )
    test = next((name for name in ("test", "val") if (folder / name).is_dir()), None)
    if (folder / "train").is_dir() and test is not None:
        parts = {"train": folder / "train", "test": folder / test}
        classes = alphabetical(class_folders(parts["train"]))
        others = sorted(set(class_folders(parts["test"])) - set(classes))
        if others:
            raise ValueError(
                f"prepare: expected the classes of {parts['train']}, got others in "
                f"{parts['test']}: {', '.join(others)}; give every class training videos"
            )
    else:
        parts, classes = {"": folder}, alphabetical(class_folders(folder))
    if len(classes) < 2:
        raise ValueError(
            f"prepare: expected videos of at least two classes in {folder}/CLASS/, got "
            f"{', '.join(classes) or 'none'}; put the videos of each class into a folder"
        )
    found = []
    for split, part in parts.items():
        for label, name in enumerate(classes):
            files = videos_in(part / name)
            # One video of a class is for training; of several, at least one is for testing.
            tests = min(max(round(len(files) * test_share), 1), len(files) - 1)
            for place, file in enumerate(files):
                own = "test" if place >= len(files) - tests else "train"
                found.append((split or own, label, file.relative_to(folder).as_posix()))
    blank = [path for _, _, path in found if any(letter.isspace() for letter in path)]
    if blank:
        raise ValueError(
            f"prepare: expected paths without blanks, which separate the columns of lists, got "
            f"{blank[0]!r}; rename {len(blank)} files or folders"
        )
    return found, classes


def _pictures(video: VideoReader, short_side: int | None) -> Iterator[np.ndarray]:
    """All frames (H, W, 3) of a video, in order."""
    for start in range(0, len(video), _CHUNK):
        frames = video.frames(range(start, min(start + _CHUNK, len(video))))
        if short_side is not None:
            height, width = RULES["tsm"].size(*frames.shape[1:3], short_side)
            frames = resize(frames, height, width, RULES["tsm"])
        yield from frames.numpy()


def _extract(pictures: Iterator[np.ndarray], root: Path, name: str, naming: Naming) -> int:
    """Write the images of a video; its folders appear when they are complete."""
    folders = naming.folders(root, name)
    if all(folder.is_dir() for folder in folders):
        return naming.count(root, name)
    unfinished = root / ".unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    from PIL import Image

    count = 0
    for number, picture in enumerate(pictures):
        paths = naming.paths(unfinished, name, number)
        # (H, W, 3) is one image, (2, H, W) are two.
        for path, image in zip(paths, picture if len(paths) > 1 else [picture], strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path, quality=_QUALITY)
        count += 1
    for made, folder in zip(naming.folders(unfinished, name), folders, strict=True):
        # A flow of one frame has no images.
        made.mkdir(parents=True, exist_ok=True)
        if len(folders) > 1:
            (made / "n_frames").write_text(f"{count}\n")
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        made.replace(folder)
    shutil.rmtree(unfinished, ignore_errors=True)
    return count


def _write_lists(
    out: Path,
    items: list[_Item],
    kinds: list[tuple[str, list[_Item]]],
    classes: list[str],
    problems: list[tuple[str, str]],
) -> list[Path]:
    """Write everything that is a text."""
    texts = {"classes.txt": classes, "problems.txt": [f"{path}\t{why}" for path, why in problems]}
    for split in ("train", "test"):
        own = [item for item in items if item.split == split]
        if not own:
            raise ValueError(
                f"prepare: expected readable {split} videos, got none and {len(problems)} that "
                f"cannot be read{f', the first one {problems[0]}' if problems else ''}; add some"
            )
        texts[f"{split}.txt"] = [f"{item.path} {item.label}" for item in own]
        texts[f"{split}.csv"] = [f"{item.path},{item.label}" for item in own]
        for kind, extracted in kinds:
            texts[f"{split}_{kind}.txt"] = [
                f"{item.path} {item.num_frames} {item.label}"
                for item in extracted
                if item.split == split
            ]
    for name, lines in texts.items():
        (out / name).write_text("".join(f"{line}\n" for line in lines))
    return [out / name for name in texts]
