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
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from .reader import VideoReadError, one_line

if TYPE_CHECKING:
    from torch import Tensor

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
        if self.flow and self._places == 1:
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

    def count(self, root: Path, name: str) -> int:
        """Frames of a video: what its file ``n_frames`` says, else how many images there are.

        Raises:
            VideoReadError: No such folder, or a file ``n_frames`` without a number.
        """
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


class FrameFolder:
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

    def frames(self, indices: Sequence[int]) -> "Tensor":
        """Read frames.

        Args:
            indices: Frame numbers from 0, any order, repeats allowed; every frame is read once.

        Returns:
            (len(indices), H, W, 3), uint8, RGB; or (len(indices), H, W, 2), uint8, of flow.

        Raises:
            ValueError: No index at all.
            VideoReadError: A frame does not exist or is no image, or sizes differ.
        """
        import torch

        return torch.from_numpy(self.frames_array(indices))

    def frames_array(self, indices: Sequence[int]) -> np.ndarray:
        """`frames` as a NumPy array, without importing torch."""
        if len(indices) == 0:
            raise ValueError("frames: expected at least one index, got none; ask for a frame")
        low, high = min(indices), max(indices)
        if low < 0 or high >= self._length:
            raise VideoReadError(
                self._path, f"has {self._length} frames, frames {low} to {high} were asked for"
            )
        pictures = {number: self._read(self._paths(number)) for number in sorted(set(indices))}
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
                    pictures.append(np.asarray(image.convert("RGB" if len(paths) == 1 else "L")))
            except FileNotFoundError as error:
                raise VideoReadError(self._path, f"no such image: {path.name}") from error
            except Exception as error:  # Pillow's errors of damaged images have many classes
                raise VideoReadError(self._path, f"{path.name}: {one_line(error)}") from error
        if len(pictures) == 1:
            return pictures[0]
        if pictures[0].shape != pictures[1].shape:
            raise VideoReadError(self._path, f"{paths[0].name} and {paths[1].name} differ in size")
        return np.stack(pictures, axis=2)


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
