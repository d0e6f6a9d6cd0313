"""Generated clips whose label is a relation between distant places and times.

One object is shown in the left half of the picture at the beginning of the clip, another one in the
right half at its end, and nothing in between; the label says whether they have the same shape.
Shape, colour, size, place and drift of either object are drawn from the same distributions whatever
the label, all shapes have the same area, and the two are never visible together. So no
frame, no object and no statistic of single frames tells the label: what was seen on the left has to
be compared with what is seen on the right, half a clip later. A network that looks at few frames
around each place and then averages over places can only add up what either object says alone.
"""

import json
import math
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

CLASSES = ("different", "same")
SHAPES = ("disk", "cross", "ring", "triangle")

# For a picture of 48 pixels; other sizes scale them. Large, bright objects of these four shapes are
# learned fastest: areas of 110 to 170, colours from 0 on, or a square and an upright plus in place
# of disk and cross took longer than 450 steps of 32 clips or stopped at telling one shape apart.
_AREA = (140.0, 210.0)
_MARGIN_X, _MARGIN_Y = 11.5, 14.5
_COLOUR = (110.0, 255.0)
_BACKGROUND = (15.0, 45.0)
_TEXTURE, _NOISE = 8.0, 4.0

_FPS = 8
# Changed whenever the same seed gives other clips, so that older files are written anew.
_VERSION = 1
_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class SceneObject:
    """One object of a scene.

    Attributes:
        shape: A name of `SHAPES`.
        colour: Red, green and blue, 0 to 255.
        area: In pixels.
        x: Column of the centre, in pixels.
        y: Row of the centre in the first frame that shows it, in pixels.
        drift: Pixels per frame by which it moves down.
    """

    shape: str
    colour: tuple[float, float, float]
    area: float
    x: float
    y: float
    drift: float


@dataclass(frozen=True)
class Scene:
    """What a clip shows, before it is drawn.

    Attributes:
        first: The object on the left, at the beginning.
        second: The object on the right, at the end.
        label: 1 if both have the same shape, else 0; an index into `CLASSES`.
    """

    first: SceneObject
    second: SceneObject
    label: int


def draw_scene(
    generator: np.random.Generator, *, label: int | None = None, size: int = 48
) -> Scene:
    """Draw what a clip shows.

    Args:
        generator: Source of all random numbers.
        label: 1 same shape, 0 different shapes; unset draws it.
        size: Height and width of the picture, in pixels, an even number of at least 16.

    Raises:
        ValueError: Another label or size.
    """
    if size < 16 or size % 2 != 0:
        raise ValueError(
            f"draw_scene: expected an even size of at least 16 pixels, got {size}; use 48"
        )
    if label is None:
        label = int(generator.integers(2))
    if label not in (0, 1):
        raise ValueError(f"draw_scene: expected label 0, 1 or None, got {label!r}; 1 means same")
    first = int(generator.integers(len(SHAPES)))
    # Uniform over the other shapes, so that the second shape alone is uniform under both labels.
    step = 0 if label == 1 else int(generator.integers(1, len(SHAPES)))
    second = (first + step) % len(SHAPES)
    return Scene(
        _draw_object(generator, SHAPES[first], size, left=0.0),
        _draw_object(generator, SHAPES[second], size, left=size / 2),
        label,
    )


def draw_clip(
    generator: np.random.Generator, *, label: int | None = None, frames: int = 8, size: int = 48
) -> tuple[Tensor, int]:
    """Draw a clip of the task.

    Args:
        generator: Source of all random numbers.
        label: 1 same shape, 0 different shapes; unset draws it.
        frames: Length of the clip, at least 4; each object is visible for a quarter of it.
        size: Height and width, in pixels, an even number of at least 16.

    Returns:
        Frames (frames, size, size, 3), uint8 RGB, and the label.

    Raises:
        ValueError: Another label, length or size.

    Example:
        >>> clip, label = draw_clip(np.random.default_rng(0))
        >>> tuple(clip.shape)
        (8, 48, 48, 3)
    """
    _check_frames("draw_clip", frames)
    scene = draw_scene(generator, label=label, size=size)
    clip = np.broadcast_to(_background(generator, size), (frames, size, size, 3)).copy()
    # The first and the last quarter: with 8 frames, two 3x3x3 convolutions in a row (which reach
    # two frames either way) never see both objects from any one frame.
    visible = frames // 4
    for item, start in ((scene.first, 0), (scene.second, frames - visible)):
        for step in range(visible):
            cover = _cover(item, item.y + step * item.drift, size)[:, :, None]
            clip[start + step] += cover * (np.float32(item.colour) - clip[start + step])
    clip += _NOISE * generator.standard_normal(clip.shape, dtype=np.float32)
    return torch.from_numpy(clip.round().clip(0, 255).astype(np.uint8)), scene.label


def write_synthetic(
    root: str | os.PathLike[str],
    *,
    train: int,
    test: int,
    seed: int,
    frames: int = 8,
    size: int = 48,
) -> None:
    """Write clips of the task as ``root/{train,test}/{same,different}/NNNNN.mp4``.

    Both classes are equally frequent, and no clip depends on how many there are. A folder that
    already holds exactly these clips is left alone; one with other generated clips is written anew.

    Args:
        root: Folder to write; it must be missing, empty, or written by this function.
        train: Number of training files.
        test: Number of test files.
        seed: Seed of all clips; training and test clips never share a seed.
        frames: Length of a clip.
        size: Height and width, in pixels.

    Raises:
        ValueError: A count below 2, an impossible size, or a folder with other files in it.
        ImportError: PyAV is not installed.
    """
    for name, number in (("train", train), ("test", test)):
        if number < 2:
            raise ValueError(
                f"write_synthetic: expected {name} of at least 2 files, one per class, "
                f"got {number}; raise it"
            )
    _check_frames("write_synthetic", frames)
    draw_scene(np.random.default_rng(0), size=size)
    root = Path(root)
    if holds_synthetic(root, train=train, test=test, seed=seed, frames=frames, size=size):
        return
    encode = _encoder()
    _clear(root)
    manifest = root / _MANIFEST
    # Written first as well: an interrupted folder is recognised as ours.
    manifest.write_text(json.dumps({"complete": False}))
    for split in ("train", "test"):
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)

    def write(split: str, number: int) -> None:
        generator = np.random.default_rng([seed, ("train", "test").index(split), number])
        clip, label = draw_clip(generator, label=number % 2, frames=frames, size=size)
        encode(root / split / CLASSES[label] / f"{number:05d}.mp4", clip.numpy())

    jobs = [("train", number) for number in range(train)]
    jobs += [("test", number) for number in range(test)]
    # Threads serve: drawing and encoding mostly run outside the interpreter's lock.
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        for _ in pool.map(write, *zip(*jobs, strict=True)):
            pass
    unfinished = manifest.with_suffix(".tmp")
    wanted = _manifest(train, test, seed, frames, size)
    unfinished.write_text(json.dumps(wanted, indent=1) + "\n")
    unfinished.replace(manifest)


def holds_synthetic(
    root: str | os.PathLike[str], *, train: int, test: int, seed: int, frames: int, size: int
) -> bool:
    """Whether a folder holds exactly the clips that `write_synthetic` would write."""
    root = Path(root)
    if _read_manifest(root) != _manifest(train, test, seed, frames, size):
        return False
    return all(
        sum(1 for _ in (root / split).glob("*/*.mp4")) == count
        for split, count in (("train", train), ("test", test))
    )


def _draw_object(
    generator: np.random.Generator, shape: str, size: int, *, left: float
) -> SceneObject:
    scale = size / 48
    margin_x, margin_y = _MARGIN_X * scale, _MARGIN_Y * scale
    red, green, blue = generator.uniform(*_COLOUR, 3).tolist()
    return SceneObject(
        shape=shape,
        colour=(red, green, blue),
        area=generator.uniform(*_AREA) * scale * scale,
        x=left + generator.uniform(margin_x, size / 2 - margin_x),
        y=generator.uniform(margin_y, size - margin_y),
        drift=generator.uniform(-1, 1) * scale,
    )


def _background(generator: np.random.Generator, size: int) -> np.ndarray:
    """One dark colour with soft spots, (size, size, 3)."""
    spots = torch.from_numpy(generator.uniform(-0.5, 0.5, (1, 3, 6, 6)).astype(np.float32))
    smooth = torch.nn.functional.interpolate(spots, (size, size), mode="bilinear")[0]
    colour = generator.uniform(*_BACKGROUND, 3).astype(np.float32)
    return colour + _TEXTURE * smooth.permute(1, 2, 0).numpy()


def _cover(item: SceneObject, y: float, size: int) -> np.ndarray:
    """Share of each pixel that the object covers, (size, size)."""
    side = math.sqrt(item.area)
    pixels = np.arange(size, dtype=np.float32) + np.float32(0.5)
    right, down = (pixels - item.x)[None, :] / side, (pixels - y)[:, None] / side
    return np.clip(_DEPTH[item.shape](right, down) * side + 0.5, 0, 1).astype(np.float32)


# Distance inwards from the outline of each shape of area 1, in units of the square root of the area
# (at corners slightly more); `u` points right, `v` down.
def _disk(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return math.sqrt(1 / math.pi) - np.hypot(u, v)


def _cross(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    # Two diagonal bars, three times as long as wide: five squares of this side.
    half = math.sqrt(1 / 5) / 2
    along, across = np.abs(u + v) / math.sqrt(2), np.abs(u - v) / math.sqrt(2)
    return np.maximum(
        np.minimum(half - across, 3 * half - along), np.minimum(half - along, 3 * half - across)
    )


def _ring(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    # Area 2 pi * radius * width with width = radius / 2.
    radius = math.sqrt(1 / math.pi)
    return radius / 4 - np.abs(np.hypot(u, v) - radius)


def _triangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    # Equal sides, one of them below; the centre is a third of the height above it.
    height = math.sqrt(math.sqrt(3))
    slope = (v + height * 2 / 3) / 2 - np.abs(u) * (math.sqrt(3) / 2)
    return np.minimum(height / 3 - v, slope)


_DEPTH: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "disk": _disk,
    "cross": _cross,
    "ring": _ring,
    "triangle": _triangle,
}


def _encoder() -> Callable[[Path, np.ndarray], None]:
    """Function that writes (T, H, W, 3) uint8 frames as a video file."""
    try:
        import av
    except ImportError as error:
        raise ImportError(
            f"write_synthetic: expected the package av (PyAV), got {error}; "
            "install it with: pip install 'nlkernels[video]'"
        ) from error
    codec, options = "libx264", {"preset": "ultrafast", "crf": "12"}
    if codec not in av.codecs_available:
        codec, options = "mpeg4", {"qmin": "2", "qmax": "2"}

    def encode(path: Path, clip: np.ndarray) -> None:
        with av.open(str(path), "w") as container:
            stream: Any = container.add_stream(codec, rate=_FPS, options=options)
            stream.height, stream.width = clip.shape[1:3]
            stream.pix_fmt = "yuv420p"
            stream.thread_count = 1
            for picture in clip:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())

    return encode


def _check_frames(where: str, frames: int) -> None:
    if frames < 4:
        raise ValueError(
            f"{where}: expected at least 4 frames, got {frames}; the objects need a gap in time"
        )


def _manifest(train: int, test: int, seed: int, frames: int, size: int) -> dict[str, Any]:
    """Contents of the manifest of a complete folder."""
    settings = {"train": train, "test": test, "seed": seed, "frames": frames, "size": size}
    return {"complete": True, "version": _VERSION, **settings}


def _clear(root: Path) -> None:
    """Make `root` an empty folder, unless it holds anything that is not ours."""
    if root.is_dir() and any(root.iterdir()) and _read_manifest(root) is None:
        raise ValueError(
            f"write_synthetic: expected a new or empty folder, got {root} with other files in it; "
            "choose another folder for the generated clips"
        )
    root.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        shutil.rmtree(root / split, ignore_errors=True)


def _read_manifest(root: Path) -> dict[str, Any] | None:
    """What the manifest says; None if there is none of ours."""
    try:
        manifest = json.loads((root / _MANIFEST).read_text())
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and "complete" in manifest else None
