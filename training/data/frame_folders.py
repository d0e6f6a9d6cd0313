"""Videos that are folders of images: RGB frames, or flow as pairs of grey images.

They are read as video files are (`reader.VideoReader`): open, length, frames by number, close.
File names follow the templates of TSM, RNL, mmaction2 and inception-I3D-NON-LOCAL.
"""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any, Self

import numpy as np

from .reader import ArrayReader, VideoReadError, one_line, wanted_frames

# Template of the images by data set, as the published programs extract them.
TEMPLATES = {
    "kinetics": "img_{:05d}.jpg",
    "something-v1": "{:05d}.jpg",
    "something-v2": "{:06d}.jpg",
    "jester": "{:05d}.jpg",
    "flow": "flow_{}_{:05d}.jpg",
    "flow-mmaction": "{}_{:05d}.jpg",
    "flow-something-v1": "{:06d}-{}_{:05d}.jpg",
    "flow-hmdb51": "frame{:06d}.jpg",
}
# Differences between colours of an image that is grey.
_GREY_LEVELS = 2


@dataclass(frozen=True)
class Naming:
    """Where the images of a video are.

    Args:
        template: Name of an image. RGB has one place, for the number. Flow has a place for x or y
            and one for the number; or three, for the number of the video, x or y, and the number
            (Something-Something V1); or one, where the images lie in folders u and v beside each
            other (HMDB51).
        flow: Pairs of grey images.
        first: Number of the first image.

    Raises:
        ValueError: Another number of places.

    Example:
        >>> str(Naming("img_{:05d}.jpg").paths(Path("root"), "making_tea/a", 0)[0])
        'root/making_tea/a/img_00001.jpg'
        >>> [str(path) for path in Naming("frame{:06d}.jpg", flow=True).paths(Path("r"), "a", 9)]
        ['r/u/a/frame000010.jpg', 'r/v/a/frame000010.jpg']
    """

    template: str
    flow: bool = False
    first: int = 1

    def __post_init__(self) -> None:
        legal = (1, 2, 3) if self.flow else (1,)
        try:
            places = sum(name is not None for _, name, _, _ in Formatter().parse(self.template))
        except ValueError:
            places = 0
        if places not in legal:
            raise ValueError(
                f"frame folders: expected a template with {' or '.join(map(str, legal))} places in "
                f"braces, got {self.template!r}; write for example "
                f"{TEMPLATES['flow' if self.flow else 'kinetics']}"
            )
        object.__setattr__(self, "_places", places)

    def folders(self, root: Path, name: str) -> list[Path]:
        """Folders of a video, one or two."""
        if self.in_two_folders:
            return [root / axis / name for axis in ("u", "v")]
        if self._places == 3:
            return [root / f"{_number(name):06d}"]
        return [root / name]

    def paths(self, root: Path, name: str, number: int) -> list[Path]:
        """Image files of frame ``number``, from 0: one, or two for flow."""
        image = number + self.first
        folders = self.folders(root, name)
        if not self.flow:
            return [folders[0] / self.template.format(image)]
        if self._places == 1:
            return [folder / self.template.format(image) for folder in folders]
        if self._places == 2:
            return [folders[0] / self.template.format(axis, image) for axis in "xy"]
        video = _number(name)
        return [folders[0] / self.template.format(video, axis, image) for axis in "xy"]

    def frames_of(self, listed: int) -> int:
        """Frames of a video by its list: those of Something-Something V1's flow count images."""
        return listed // 2 if self._places == 3 else listed

    def check_folders(self, root: Path, name: str) -> None:
        """Raise VideoReadError unless the folders of a video exist."""
        for folder in self.folders(root, name):
            if folder.is_dir():
                continue
            reason = "no such folder"
            if self.in_two_folders and (root / name).is_dir():
                reason += (
                    f", but {root / name}: flow is read from grey images in folders u and v, or "
                    "from pairs x and y with a template such as flow_{}_{:05d}.jpg, and not from "
                    "the colours of one image"
                )
            raise VideoReadError(folder, reason)

    def count(self, root: Path, name: str) -> int:
        """Frames of a video: what its file ``n_frames`` says, else how many images there are.

        Raises:
            VideoReadError: No such folder, or a file ``n_frames`` without a number.
        """
        self.check_folders(root, name)
        folder = self.folders(root, name)[0]
        try:
            said = folder / "n_frames"
            if said.is_file():
                return int(float(said.read_text()))
            files = set(os.listdir(folder))
        except (OSError, ValueError) as error:
            raise VideoReadError(folder, one_line(error)) from error
        shape = self._pattern()
        return sum(1 for file in files if shape.fullmatch(file))

    @property
    def in_two_folders(self) -> bool:
        """Whether flow lies in folders u and v beside each other."""
        return self.flow and self._places == 1

    def _pattern(self) -> re.Pattern[str]:
        """Names of the images of the first axis."""
        places = iter(
            {
                1: [r"\d+"],
                2: ["x", r"\d+"],
                3: [r"\d+", "x", r"\d+"],
            }[self._places]
        )
        pattern = ""
        for text, name, _, _ in Formatter().parse(self.template):
            pattern += re.escape(text)
            if name is not None:
                pattern += next(places)
        return re.compile(pattern)


class FrameFolder(ArrayReader):
    """One video that is a folder of images; make one with `FrameFolder.open`.

    Args:
        path: The folder, for messages.
        num_frames: Frames of the video.
        paths: Image files of a frame, by its number from 0.
    """

    def __init__(self, path: str, num_frames: int, paths: Callable[[int], list[Path]]) -> None:
        self._path, self._length, self._paths = path, num_frames, paths

    @classmethod
    def open(
        cls,
        root: str | os.PathLike[str],
        name: str,
        naming: Naming,
        *,
        num_frames: int | None = None,
    ) -> Self:
        """A video below a folder.

        Args:
            root: Folder of all videos.
            name: Folder of this one, below it.
            naming: Names of the images.
            num_frames: Frames of the video; unset counts its images.

        Raises:
            VideoReadError: The folder is missing, or has no images.
            ImportError: Pillow is not installed.
        """
        _pillow()
        root = Path(root)
        path = str(naming.folders(root, name)[0])
        if num_frames is None:
            num_frames = naming.count(root, name)
        if num_frames < 1:
            raise VideoReadError(path, f"no images named like {naming.template} in it")
        return cls(path, num_frames, lambda number: naming.paths(root, name, number))

    def __len__(self) -> int:
        return self._length

    @property
    def fps(self) -> float:
        """Frames per second: 30, as folders do not say."""
        return 30.0

    def frames_array(self, indices: Sequence[int]) -> np.ndarray:
        """`frames` as a NumPy array, without importing torch."""
        wanted = wanted_frames(self._path, self._length, indices)
        pictures = {number: self._read(self._paths(number)) for number in wanted}
        shapes = {picture.shape for picture in pictures.values()}
        if len(shapes) > 1:
            raise VideoReadError(self._path, f"images of several sizes: {sorted(shapes)}")
        return np.stack([pictures[number] for number in indices])

    def close(self) -> None:
        """Nothing is kept open."""

    def _read(self, paths: list[Path]) -> np.ndarray:
        """(H, W, 3) of one image, (H, W, 2) of a pair."""
        pictures = []
        for path in paths:
            try:
                with _pillow().open(path) as image:
                    if len(paths) == 1:
                        pictures.append(np.asarray(image.convert("RGB")))
                    else:
                        pictures.append(self._grey(path, image))
            except VideoReadError:
                raise
            except FileNotFoundError as error:
                raise VideoReadError(self._path, f"no such image: {path.name}") from error
            except Exception as error:  # Pillow's errors of damaged images have many classes
                raise VideoReadError(self._path, f"{path.name}: {one_line(error)}") from error
        if len(pictures) == 1:
            return pictures[0]
        if pictures[0].shape != pictures[1].shape:
            raise VideoReadError(self._path, f"{paths[0].name} and {paths[1].name} differ in size")
        return np.stack(pictures, axis=2)

    def _grey(self, path: Path, image: Any) -> np.ndarray:
        """(H, W) of an image of flow, which may be stored with three equal colours."""
        if len(image.getbands()) >= 3:
            colours = np.asarray(image.convert("RGB")).astype(np.int16)
            if np.ptp(colours, axis=2).max() > _GREY_LEVELS:
                raise VideoReadError(
                    self._path, f"{path.name} is a colour image, flow is read from grey ones"
                )
        return np.asarray(image.convert("L"))


def locate(folder: Path, naming: Naming) -> tuple[Path, str]:
    """Root and name of one video by the folder of its images.

    Args:
        folder: Of flow that lies in folders u and v, either of the two.
        naming: Names of the images.

    Raises:
        ValueError: Such flow in a folder that lies in neither.

    Example:
        >>> locate(Path("data/u/run_1"), Naming("frame{:06d}.jpg", flow=True))
        (PosixPath('data'), 'run_1')
    """
    if not naming.in_two_folders:
        return folder.parent, folder.name
    if folder.parent.name not in ("u", "v"):
        raise ValueError(
            f"frame folders: expected a folder of images in u or v ({naming.template}), got "
            f"{folder}; name ROOT/u/VIDEO, whose other half is ROOT/v/VIDEO"
        )
    return folder.parent.parent, folder.name


def guess_template(folder: Path, *, flow: bool) -> str:
    """The first template of `TEMPLATES` after which images of a folder are named.

    Args:
        folder: Of one video.
        flow: Pairs of grey images.

    Raises:
        ValueError: There is none.
    """
    for name, template in TEMPLATES.items():
        if name.startswith("flow") != flow:
            continue
        naming = Naming(template, flow=flow)
        try:
            first = naming.paths(*locate(folder, naming), 0)
        except (ValueError, VideoReadError):
            continue  # folders of this template have other names
        if all(path.is_file() for path in first):
            return template
    files = sorted(os.listdir(folder))
    raise ValueError(
        f"frame folders: expected {'flow' if flow else 'RGB'} images in {folder}, got "
        f"{', '.join(files[:3]) or 'no file'}; set data.template, for example "
        f"data.template='{TEMPLATES['flow' if flow else 'kinetics']}'"
    )


def _number(name: str) -> int:
    try:
        return int(name)
    except ValueError as error:
        raise VideoReadError(name, "expected the number of a video") from error


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            f"frame folders: expected the package Pillow, got {error}; "
            "install it with: pip install 'nlkernels[train]'"
        ) from error
    return Image
