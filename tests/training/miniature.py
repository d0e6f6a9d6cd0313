"""Miniature data sets of two classes, in the list formats and layouts of the published ones."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from nlkernels.training.config import Config
from nlkernels.training.config_data import DataConfig, view_side, view_size
from nlkernels.training.data.frame_folders import Naming

FRAMES, HEIGHT, WIDTH = 20, 40, 56
VIDEOS = {"train": 4, "test": 2}


class Clip(NamedTuple):
    """A video of the data set."""

    split: str
    """``train`` or ``test``."""
    number: int
    """From 0, among all."""
    label: int
    """0 or 1."""

    @property
    def name(self) -> str:
        """As Kinetics' files are named, or a number as Something-Something's."""
        return f"video{self.number}_000001_000011"

    def frames(self) -> np.ndarray:
        """(T, H, W, 3), uint8: noise on a level of its class, another one in every frame."""
        generator = np.random.default_rng(self.number)
        noise = generator.integers(0, 60, (FRAMES, HEIGHT, WIDTH, 3))
        levels = 40 + 80 * self.label + 3 * np.arange(FRAMES)
        return (noise + levels[:, None, None, None]).astype(np.uint8)


def clips() -> Iterator[Clip]:
    """All videos."""
    number = 0
    for split, count in VIDEOS.items():
        for place in range(count):
            yield Clip(split, number, place % 2)
            number += 1


def write_videos(root: Path) -> None:
    """``root/SPLIT/NAME.mp4``."""
    av = pytest.importorskip("av", reason="needs PyAV: pip install 'nlkernels[video]'")
    for clip in clips():
        path = root / clip.split / f"{clip.name}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=30, options={"preset": "ultrafast"})
            stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
            for picture in clip.frames():
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())


def write_images(root: Path, naming: Naming) -> None:
    """A folder of images, or two of flow, for each video."""
    image = pytest.importorskip("PIL.Image", reason="needs Pillow: pip install 'nlkernels[train]'")
    for clip in clips():
        for number, picture in enumerate(clip.frames()):
            for axis, path in enumerate(naming.paths(root, clip.name, number)):
                path.parent.mkdir(parents=True, exist_ok=True)
                image.fromarray(picture[..., axis] if naming.flow else picture).save(path)


def write_lists(folder: Path, videos: Path, data: DataConfig) -> dict[str, str]:
    """Lists of the videos in the format of ``data``.

    Returns:
        ``root``, ``train_list`` and, but for ``hmdb51_json``, ``test_list``.
    """
    if data.list_format == "hmdb51_json":
        database = {
            clip.name: {
                "subset": "training" if clip.split == "train" else "testing",
                "annotations": {"label": ("clap", "wave")[clip.label]},
            }
            for clip in clips()
        }
        content = {"labels": ["", "clap", "wave"], "database": database}
        (folder / "split1.json").write_text(json.dumps(content))
        return {"root": str(videos), "train_list": str(folder / "split1.json")}
    lines = {
        "caffe2": lambda clip: f"{videos / clip.split / clip.name}.mp4 {clip.label}",
        "pyslowfast": lambda clip: f"{videos / clip.split / clip.name}.mp4 {clip.label}",
        "mmaction": lambda clip: f"{clip.split}/{clip.name}.mp4 {clip.label}",
        "tsm": lambda clip: f"{clip.name} {FRAMES} {clip.label}",
        "rnl": lambda clip: f"{clip.name},{FRAMES},{clip.label}",
        "kinetics_csv": lambda clip: (
            f"{('wave', 'clap')[clip.label]},{clip.name.partition('_')[0]},1,11,{clip.split},0"
        ),
    }
    found = {"root": str(videos)}
    for split in VIDEOS:
        text = [lines[data.list_format](clip) for clip in clips() if clip.split == split]
        if data.list_format == "kinetics_csv":
            text.insert(0, "label,youtube_id,time_start,time_end,split,is_cc")
        path = folder / f"{split}.txt"
        path.write_text("\n".join(text) + "\n")
        found[f"{split}_list"] = str(path)
    return found


def in_small(config: Config, folder: Path) -> list[str]:
    """Overrides: an eighth of the width, at most 16 frames of 32 pixels, a miniature data set."""
    data, optim = config.data, config.optim
    videos = folder / "videos"
    if data.reader in ("frames", "flow"):
        write_images(videos, Naming(data.template, flow=data.reader == "flow"))
    else:
        write_videos(videos)
    lists = write_lists(folder, videos, data)
    # Frames keep their size beside the windows, where they are larger.
    sides = [max(32, side * 32 // 224) for side in data.short_side]
    whole = view_side(data) == view_size(data)
    overrides = [
        "model.width=0.125",
        "model.num_classes=null",
        *(f"data.{key}={value}" for key, value in lists.items()),
        f"data.frames={min(16, data.frames)}",
        "data.size=32",
        "data.test_size=32",
        f"data.short_side={sides}",
        f"data.test_short_side={32 if whole else max(32, view_side(data) * 32 // 224)}",
        "data.workers=0",
        "optim.steps=2",
        "optim.epochs=null",
        f"optim.batch={2 * optim.accumulate}",
        "optim.sync_norms=false",
        "run.device=cpu",
        "run.threads=1",
        "run.unit=step",
        "run.checkpoint_every=1",
        "run.keep=2",
    ]
    if optim.precise_norms:
        overrides.append("optim.precise_norms=2")
    if config.run.test_every:
        overrides.append("run.test_every=1")
    return overrides
