"""The section ``data`` of a configuration: which clips, and how they are read, cut and coloured.

Names of samplers, augmentations and list formats are those of ``data/``: `samplers.py`,
`augment.py`, `crops.py`, `colours.py` and `lists.py` say what each of them does, to the index.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

SamplerName = Literal[
    "caffe2",
    "mmaction",
    "mmaction_dense",
    "mmaction_segments",
    "mmaction_segments_twice",
    "slowfast",
    "slowfast_offset",
    "pytorchvideo",
    "tsm",
    "tsm_dense",
    "tsm_twice",
    "tushar",
    "tushar_centre",
    "inception",
    "inception_val",
    "mindspore",
]
AugmentName = Literal[
    "none",
    "caffe2",
    "slowfast",
    "slowfast_inverse",
    "pytorchvideo",
    "mmaction_i3d",
    "mmaction_c2d",
    "mmaction_tsm",
    "mmaction_slowonly",
    "tsm",
    "tushar",
    "inception",
    "mindspore",
]
RuleName = Literal["caffe2", "mmaction", "slowfast", "tsm", "inception", "mindspore"]
CropsName = Literal["centre", "three", "three_random", "five", "ten", "six_flip", "full"]
ColoursName = Literal["grey", "imagenet", "unit", "mindspore", "flow_tsm", "flow_inception"]
FormatName = Literal[
    "caffe2", "lmdb", "mmaction", "pyslowfast", "tsm", "rnl", "kinetics_csv", "hmdb51_json"
]


@dataclass(frozen=True)
class DataConfig:
    """Which clips, and how they are read."""

    kind: Literal["synthetic", "folder", "list"] = "synthetic"
    """``synthetic`` writes and reads generated video files, ``folder`` and ``list`` read yours."""
    root: str | None = None
    """Folder of the videos, for lists what their paths begin with; unset puts generated files under
    ``run.out``."""
    train_list: str | None = None
    """List or annotation file of the training videos (``kind: list``)."""
    test_list: str | None = None
    """List or annotation file of the test videos; ``hmdb51_json`` has both in one."""
    list_format: FormatName = "mmaction"
    """How the lists are written."""
    separator: str | None = None
    """What stands between path and label; unset takes the format's own (space, rnl: comma)."""
    path_template: str = "{youtube_id}_{time_start:06d}_{time_end:06d}.mp4"
    """Path of a video below ``root`` (``kinetics_csv``), of columns such as {label} and {split}."""
    class_order: Literal["alphabetical", "first_appearance"] = "alphabetical"
    """How ``kinetics_csv`` numbers its classes; MindSpore's files count by first appearance."""
    class_names: str | None = None
    """File with the names of the classes of a list with numbers; unset calls them 0, 1, ..."""
    ground_truth: str | None = None
    """List ``path label`` of the test videos of an ``lmdb`` whose records hold video numbers."""
    reader: Literal["auto", "decord", "av", "frames", "flow"] = "auto"
    """``auto`` is decord, or PyAV where decord is missing; ``frames`` are folders of images,
    ``flow`` folders of image pairs."""
    template: str = "img_{:05d}.jpg"
    """Names of the images of a folder (``reader: frames`` or ``flow``), as the published ones are
    written: ``{:06d}.jpg``, ``flow_{}_{:05d}.jpg``, ``{:06d}-{}_{:05d}.jpg``."""
    first_frame: int = 1
    """Number of the first image of a folder."""
    frames: int = 8
    """Frames of a clip."""
    stride: int = 1
    """Distance between two frames of a clip, in video frames (slowfast: at 30 frames a second)."""
    sampler: SamplerName = "caffe2"
    """Whose rule chooses the frames of training and test clips."""
    size: int = 48
    """Height and width of a training clip, in pixels."""
    short_side: tuple[int, int] = (56, 64)
    """Range of the short side before cropping, in pixels; tests use the first."""
    augment: AugmentName = "caffe2"
    """Whose rule scales, cuts and mirrors training clips."""
    flip: bool = True
    """Mirror half of the training clips left to right."""
    flip_directions: bool = False
    """Mirror also clips of classes whose names tell left from right."""
    colours: ColoursName = "grey"
    """How levels become network input."""
    channels: Literal["rgb", "bgr"] = "rgb"
    """Order of the colour channels of the network input."""
    colour_jitter: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Largest relative change of brightness, contrast and saturation of training clips."""
    augment_on: Literal["workers", "device"] = "workers"
    """Where frames are scaled, cut and normalised."""
    split_by: Literal["folder", "time"] = "folder"
    """``folder``: root/train and root/test; ``time``: the last part of each video is the test."""
    holdout: float = 0.3
    """Share of each video that is kept for testing (``split_by: time`` only)."""
    gap: float = 0.0
    """Share of each video between training and test that does neither (``split_by: time`` only)."""
    parts: int = 1
    """Test videos that the end of each video is cut into (``split_by: time`` only)."""
    train_files: int = 2000
    """Generated training files (synthetic only)."""
    test_files: int = 500
    """Generated test files (synthetic only)."""
    test_clips: int = 1
    """Clips per test video; their scores are averaged."""
    test_crops: CropsName = "centre"
    """Windows per test clip; ``full`` is the whole frame, for fully convolutional tests."""
    test_size: int | None = None
    """Height and width of a test window, in pixels; unset is ``size``."""
    test_short_side: int | None = None
    """Short side of test frames, in pixels; unset is the first of ``short_side``."""
    crop_rule: RuleName = "caffe2"
    """Whose integer rules scale test frames and place test windows."""
    seed: int = 0
    """Seed of the generated files."""
    workers: int = 0
    """Loader processes; 0 reads in the training process."""
    timeout_s: float = 120.0
    """Longest wait for a batch from the loader processes before it is an error, in seconds."""
    decode: Literal["auto", "inside", "child"] = "auto"
    """``child`` decodes in a process that is replaced when a decoder hangs or crashes, ``inside``
    in the loader process; ``auto`` is ``child`` for lists of video files, else ``inside``."""
    decode_timeout_s: float = 30.0
    """Longest time for one file in a decoding process, in seconds."""
    check: Literal["auto", "none", "exists", "decode"] = "auto"
    """What is tried with every file of a list before the start; ``auto`` is ``exists``. Folders of
    videos are always decoded."""
    max_failed: float = 0.05
    """Share of training clips that may fail to decode before it is an error."""
    preload: bool = False
    """Decode all videos at the start and keep them in memory (at most 1 GiB of each split)."""


MINIMUM = {
    "data.frames": 1,
    "data.stride": 1,
    "data.parts": 1,
    "data.size": 1,
    "data.train_files": 2,
    "data.test_files": 2,
    "data.test_clips": 1,
    "data.test_size": 1,
    "data.test_short_side": 1,
    "data.first_frame": 0,
    "data.workers": 0,
}
POSITIVE = ("data.timeout_s", "data.decode_timeout_s")

# Samplers whose rule says how many clips a test video has.
FIXED_CLIPS = (
    "tsm",
    "tsm_twice",
    "mmaction_segments",
    "mmaction_segments_twice",
    "tushar_centre",
    "inception",
)

_OF_TIME = ("holdout", "gap", "parts")
_NOT_LISTS = ("synthetic", "folder")
_OF_LISTS = (
    "train_list",
    "test_list",
    "list_format",
    "separator",
    "path_template",
    "class_order",
    "class_names",
    "ground_truth",
    "check",
)


# (key that is ignored, key that decides, does the resolved value of that key ignore it?)
IGNORED_WHEN: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    ("data.stride", "data.kind", lambda kind: kind == "synthetic"),
    ("data.split_by", "data.kind", lambda kind: kind != "folder"),
    *((f"data.{name}", "data.kind", lambda kind: kind != "folder") for name in _OF_TIME),
    ("data.train_files", "data.kind", lambda kind: kind != "synthetic"),
    ("data.test_files", "data.kind", lambda kind: kind != "synthetic"),
    ("data.seed", "data.kind", lambda kind: kind != "synthetic"),
    *((f"data.{name}", "data.split_by", lambda by: by == "folder") for name in _OF_TIME),
    ("data.timeout_s", "data.workers", lambda workers: workers == 0),
    *((f"data.{name}", "data.kind", lambda kind: kind in _NOT_LISTS) for name in _OF_LISTS),
    ("data.check", "data.preload", bool),
    *(
        (f"data.{name}", "data.reader", lambda reader: reader not in ("frames", "flow"))
        for name in ("template", "first_frame")
    ),
    ("data.path_template", "data.list_format", lambda name: name != "kinetics_csv"),
    ("data.class_order", "data.list_format", lambda name: name != "kinetics_csv"),
    ("data.ground_truth", "data.list_format", lambda name: name != "lmdb"),
    ("data.stride", "data.sampler", lambda name: name.startswith(("tsm", "mmaction_segments"))),
    ("data.test_clips", "data.sampler", lambda name: name in FIXED_CLIPS),
    ("data.test_size", "data.test_crops", lambda crops: crops == "full"),
    ("data.flip_directions", "data.flip", lambda flip: not flip),
)


def view_side(data: DataConfig) -> int:
    """Short side of test frames, in pixels."""
    return data.short_side[0] if data.test_short_side is None else data.test_short_side


def view_size(data: DataConfig) -> int:
    """Height and width of a test window, in pixels."""
    return data.size if data.test_size is None else data.test_size


def check_training_data(data: DataConfig) -> None:
    """Raise ValueError where training clips are missing that a test alone does not need."""
    if data.kind == "list" and data.train_list is None:
        raise ValueError(
            "config: expected data.train_list to name the list of the training videos, got "
            "nothing; add data.train_list=FILE"
        )


def check_data(data: DataConfig) -> None:
    """Raise ValueError for a combination of values that cannot work; one line each."""
    for fits, expected, got, remedy in _combinations(data):
        if not fits:
            raise ValueError(f"config: expected {expected}, got {got}; {remedy}")


def _combinations(data: DataConfig) -> list[tuple[bool, str, Any, str]]:
    """(does it hold, expected, got, remedy) of everything that has to hold."""
    low, high = data.short_side
    flow = data.reader == "flow"
    images = data.reader in ("frames", "flow")
    listed = data.kind == "list"
    return [
        (
            0 < data.holdout < 1,
            "0 < data.holdout < 1",
            data.holdout,
            "set data.holdout=0.3",
        ),
        (
            0 <= data.gap < 1 - data.holdout,
            "0 <= data.gap < 1 - data.holdout",
            f"{data.gap} with data.holdout={data.holdout}",
            "set data.gap=0.05",
        ),
        (
            data.size <= low <= high,
            "data.size <= data.short_side[0] <= data.short_side[1]",
            f"{data.size}, {low}, {high}",
            "enlarge data.short_side",
        ),
        (
            data.test_crops == "full" or view_size(data) <= view_side(data),
            "a test window (data.test_size, else data.size) of at most the test's short side",
            f"{view_size(data)} and {view_side(data)}",
            "enlarge data.test_short_side",
        ),
        (
            data.kind != "folder" or data.root is not None,
            "data.root to name the folder of the videos",
            "nothing",
            "add data.root=DIR",
        ),
        (
            not listed
            or data.test_list is not None
            or (data.list_format == "hmdb51_json" and data.train_list is not None),
            "data.test_list to name the list of the test videos",
            "nothing",
            "add data.test_list=FILE",
        ),
        (
            not images or listed,
            "data.kind=list with folders of images",
            f"{data.kind} with data.reader={data.reader}",
            "write a list of the folders, or leave data.reader out",
        ),
        (
            not images or not listed or data.list_format != "lmdb",
            "video files in an lmdb",
            f"data.reader={data.reader}",
            "leave data.reader out, or use a text list",
        ),
        (
            flow == data.colours.startswith("flow") or data.colours == "unit",
            "data.colours of a flow with data.reader=flow, and only there",
            f"data.colours={data.colours} with data.reader={data.reader}",
            "set data.colours=unit, flow_tsm or flow_inception for flow",
        ),
        (
            not (flow and (data.channels == "bgr" or any(data.colour_jitter))),
            "no order or jitter of colours for flow, which has none",
            f"data.channels={data.channels}, data.colour_jitter={list(data.colour_jitter)}",
            "leave both out",
        ),
        (
            all(0 <= strength < 1 for strength in data.colour_jitter),
            "0 <= data.colour_jitter < 1",
            list(data.colour_jitter),
            "set for example data.colour_jitter='[0.4, 0.4, 0.4]'",
        ),
        (
            0 <= data.max_failed <= 1,
            "0 <= data.max_failed <= 1",
            data.max_failed,
            "set data.max_failed=0.05",
        ),
        (
            data.test_crops != "six_flip" or data.crop_rule == "caffe2",
            "data.crop_rule=caffe2 with data.test_crops=six_flip, which is its own",
            data.crop_rule,
            "set data.crop_rule=caffe2, or data.test_crops=ten",
        ),
        (
            data.test_crops not in ("five", "ten") or data.crop_rule in ("mmaction", "tsm"),
            f"data.crop_rule=mmaction or tsm with data.test_crops={data.test_crops}",
            data.crop_rule,
            "set data.crop_rule, or data.test_crops=three",
        ),
        (
            data.test_crops != "three"
            or data.crop_rule not in ("mmaction", "mindspore")
            or view_size(data) == view_side(data),
            f"test windows as large as the short side with data.crop_rule={data.crop_rule} and "
            "data.test_crops=three",
            f"{view_size(data)} and {view_side(data)}",
            f"set data.test_short_side={view_size(data)}",
        ),
        (
            data.decode != "child" or not images,
            "video files with data.decode=child",
            f"data.reader={data.reader}",
            "leave data.decode out",
        ),
    ]
