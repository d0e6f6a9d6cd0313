"""Trained networks by their files: checkpoints of ``nlk train``, weights of ``nlk convert``.

Both say which network they are of, so nobody has to repeat that: ``nlk test`` and ``nlk predict``
take the network from the file.
"""

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nlkernels.models import files
from nlkernels.models.weights import NAME, open_weights
from nlkernels.models.zoo import describe

from . import checkpoint, view_scores
from .config import Config
from .config_data import DataConfig
from .config_file import from_dict
from .variants import build_model
from .view_scores import Average

# What a checkpoint's section data says about clips, wherever the videos are.
_CLIP_KEYS = (
    "frames",
    "stride",
    "sampler",
    "size",
    "short_side",
    "colours",
    "channels",
    "test_clips",
    "test_crops",
    "test_size",
    "test_short_side",
    "crop_rule",
)
# And what it says about images, where its videos are folders of them.
_IMAGE_KEYS = ("template", "first_frame")
# (sampler, crop rule, colours) of the systems' tests.
_INCEPTION = ("inception", "inception", "unit")
_TSM = ("tsm_dense", "tsm", "imagenet")
_CLIPS: dict[str | None, tuple[str, str, str]] = {
    None: ("caffe2", "caffe2", "grey"),
    "caffe2": ("caffe2", "caffe2", "grey"),
    "tushar": ("tushar", "tsm", "grey"),
    "slowfast": ("slowfast", "slowfast", "grey"),
    "pytorchvideo": ("pytorchvideo", "slowfast", "grey"),
    "mmaction": ("mmaction", "mmaction", "imagenet"),
    "tsm": _TSM,
    "rnl": _TSM,
    "inception_nl": _INCEPTION,
    "hassony2": _INCEPTION,
    "piergiaj": _INCEPTION,
    "mindspore": ("mindspore", "mindspore", "mindspore"),
}


@dataclass(frozen=True)
class Trained:
    """A trained network.

    Attributes:
        path: Its file.
        model: In evaluation mode, float32.
        name: Its name in the registry.
        classes: Names of its classes; None where nothing tells them.
        data: Clips that it was trained for, as keys of the section ``data``.
    """

    path: Path
    model: nn.Module
    name: str
    classes: list[str] | None
    data: dict[str, Any]

    @property
    def num_classes(self) -> int:
        """Number of its classes."""
        return self.model.fc.out_features

    @property
    def channels(self) -> int:
        """Channels of a frame: 3, or 2 for flow."""
        return next(one for one in self.model.parameters() if one.dim() == 5).shape[1]

    @property
    def average(self) -> Average:
        """What its system averages over views."""
        return view_scores.average_of(self.name)

    def protocol(self, data: DataConfig, clips: int | None, average: Average) -> str:
        """How an accuracy of it is measured: `view_scores.protocol` of its name."""
        return view_scores.protocol(self.name, data, clips, average)


def load_trained(path: str | Path, device: torch.device | str = "cpu") -> Trained:
    """Read a network with its weights; nothing in the file is executed.

    Of a training with a moving average of the weights that average is taken, which was tested too.

    Args:
        path: A checkpoint of ``nlk train``, or safetensors of ``nlk convert`` or `save_weights`.
        device: Where the network goes.

    Raises:
        FileNotFoundError: No such file.
        ValueError: A file of another origin, damaged, or with weights that do not fit the network
            that it names.

    Example:
        >>> import tempfile
        >>> from nlkernels.models import create_model
        >>> from nlkernels.models.weights import save_weights
        >>> path = Path(tempfile.mkdtemp(), "model.safetensors")
        >>> options = {"num_classes": 3, "width": 0.25}
        >>> save_weights(path, create_model("c2d_tiny", **options), "c2d_tiny", options)
        >>> trained = load_trained(path)
        >>> trained.num_classes, trained.protocol(DataConfig(size=56), 10, trained.average)
        (3, '10 clips x 1 centre crop of 56, probabilities averaged')
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"weights: expected a file, got {str(path)!r} which does not exist; check the path"
        )
    # torch's files are zip archives.
    trained = _from_training(path) if zipfile.is_zipfile(path) else _from_weights(path)
    trained.model.float().eval().to(device)
    return trained


def read_sections(*, origins: Mapping[str, str] | None = None, **sections: Any) -> Config:
    """A checked configuration of which only some sections matter, which nothing is trained with."""
    return from_dict({**sections, "optim": {"steps": 1}}, origins=origins)


def _from_training(path: Path) -> Trained:
    try:
        content = checkpoint.load(path)
    except ValueError as error:
        raise ValueError(f"{error}, or convert another system's with nlk convert") from error
    state = content["model"]
    if content["average"] is not None:
        average = content["average"].items()
        state = {key.removeprefix("module."): one for key, one in average if key != "n_averaged"}
    config = read_sections(model=content["config"]["model"]).model
    with torch.random.fork_rng(devices=[]):  # what is drawn is replaced
        model = build_model(config, len(state["fc.bias"]), seed=0)
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"weights: expected the weights of {config.name} in {path}, got others "
            f"({str(error).splitlines()[-1].strip()}); give a file that nlk train saved"
        ) from error
    keys = _CLIP_KEYS
    if content["config"]["data"]["reader"] in ("frames", "flow"):
        keys += _IMAGE_KEYS
    data = {key: content["config"]["data"][key] for key in keys}
    if content["config"]["data"]["kind"] == "synthetic":
        data["stride"] = 1  # as generated clips are read
    return Trained(path, model, config.name, _reported(path, content["config"], model), data)


def _reported(path: Path, config: Mapping[str, Any], model: nn.Module) -> list[str] | None:
    """Names of the classes in the report that the same training left beside its checkpoint."""
    try:
        report = json.loads(path.with_name("report.json").read_text())
        names = report["data"]["classes"]
        own = report["config"]["data"] == json.loads(json.dumps(config["data"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return names if own and len(names) == model.fc.out_features else None


def _from_weights(path: Path) -> Trained:
    file = files.read(path)
    model = open_weights("weights", path, file)
    name = file.metadata[NAME]
    text = file.metadata.get("classes")
    classes = None if text is None else json.loads(text)
    return Trained(path, model, name, classes, _published_clips(name))


def _published_clips(name: str) -> dict[str, Any]:
    """Clips of a registered network, ten of a video and each in one window."""
    record = describe(name)
    sampler, rule, colours = _CLIPS[record.system]
    if record.system == "mmaction" and record.family == "tsm":
        sampler = "mmaction_segments"
    if name == "inception_nl_flow":
        colours = "flow_inception"
    size = record.input.test_size
    return {
        "frames": record.input.frames,
        "stride": record.input.stride or 1,
        "sampler": sampler,
        "size": size,
        "short_side": [size, size],
        "colours": colours,
        "test_clips": 10,
        "crop_rule": rule,
    }
