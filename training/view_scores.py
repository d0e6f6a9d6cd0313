"""What a test averages over the views of a video, and the line that says so.

``nlk test``, ``nlk predict`` and the tests of a training all take the scores of a video from here.
They are the mean over its views (clips x crops) of probabilities or of logits, as the network's
system does:

- logits: Tushar-N/pytorch-resnet3d, TSM, RNL, and kinetics_i3d_pytorch, which sums them;
- probabilities: all others, and our own networks. Networks of video-nonlocal-net and PySlowFast
  take the softmax at every location of the last map first (2 x 2 of them where crops have 256
  pixels, more with ``data.test_crops=full``), then the mean over locations, then over views.

Sums over views, which some systems take, rank classes as means do.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from nlkernels.models.registry import registered

from .config_data import DataConfig, view_side, view_size

Average = Literal["probabilities", "logits"]
AVERAGES: tuple[Average, ...] = ("probabilities", "logits")
# Views (B, C, T, H, W), labels (B,) and numbers of the views (B,).
Views = Iterable[tuple[Tensor, Tensor, Tensor]]

# Systems whose tests average the logits of the views; all others average probabilities.
LOGITS_SYSTEMS = ("tushar", "tsm", "rnl", "hassony2")
# Systems whose softmax is taken at every location of the last map (`probabilities` of the models).
_LOCATION_SYSTEMS = ("caffe2", "slowfast")

_CROPS = {
    "centre": "1 centre crop of {size}",
    "three": "3 crops of {size}",
    "three_random": "3 random crops of {size}",
    "five": "5 crops of {size}",
    "ten": "10 crops of {size}",
    "six_flip": "6 crops of {size}, half of them mirrored",
    "full": "whole frames of short side {side}",
}


@dataclass
class Sum:
    """What has been added up of one video.

    Attributes:
        label: Its class.
        views: How many views.
        scores: (networks, classes), float64, the sum over them.
    """

    label: int
    views: int
    scores: Tensor

    @property
    def means(self) -> Tensor:
        """(networks, classes), float64: the scores of the video."""
        return self.scores / self.views


def average_of(name: str) -> Average:
    """What the system of a registered network averages over views.

    Example:
        >>> average_of("tsm_r50"), average_of("i3d_r50_32x2")
        ('logits', 'probabilities')
    """
    return "logits" if registered(name).system in LOGITS_SYSTEMS else "probabilities"


def protocol(name: str, data: DataConfig, clips: int | None, average: Average) -> str:
    """How an accuracy is measured, in a line that belongs beside it.

    Args:
        name: The network's in the registry.
        data: Options of the test.
        clips: Of every video; None where their numbers differ.
        average: What is averaged over views.

    Example:
        >>> data = DataConfig(test_crops="three", test_size=256)
        >>> protocol("mmaction_i3d_r50_32x2", data, 10, "probabilities")
        '10 clips x 3 crops of 256, probabilities averaged'
    """
    count = "all clips" if clips is None else "1 clip" if clips == 1 else f"{clips} clips"
    crops = _CROPS[data.test_crops].format(size=view_size(data), side=view_side(data))
    at_locations = registered(name).system in _LOCATION_SYSTEMS and average == "probabilities"
    softmax = "softmax at every location, " if at_locations else ""
    of = ""
    if data.kind == "folder" and data.split_by == "time":
        of = f" of the last {data.holdout:.0%} of each video"
        of += f", in {data.parts} parts" if data.parts > 1 else ""
    return f"{count} x {crops}, {softmax}{average} averaged{of}"


def view_scores(model: nn.Module, clips: Tensor, average: Average) -> Tensor:
    """Scores (B, classes), float32, of views (B, C, T, H, W), to be averaged.

    Args:
        model: In evaluation mode.
        clips: On its device.
        average: ``logits`` of ``forward``, or probabilities: the model's own where it has a method
            ``probabilities``, which takes the softmax at every location where its system does.
    """
    if average == "logits":
        return model(clips).float()
    own = getattr(model, "probabilities", None)
    return (model(clips).float().softmax(1) if own is None else own(clips)).float()


def add_views(
    models: Sequence[nn.Module],
    batches: Views,
    *,
    video_of: Callable[[int], int],
    average: Average,
    device: torch.device,
) -> dict[int, Sum]:
    """Scores of every video, summed over its views.

    Args:
        models: Networks in evaluation mode, on ``device``.
        batches: Views of this process's videos.
        video_of: Number of the video that a view is of.
        average: ``probabilities`` or ``logits``.
        device: Where the networks are.

    Returns:
        By number of the video.
    """
    sums: dict[int, Sum] = {}
    with torch.inference_mode():
        for clips, labels, numbers in batches:
            clips = clips.to(device)
            scores = torch.stack([view_scores(model, clips, average) for model in models], 1)
            for number, label, one in zip(
                numbers.tolist(), labels.tolist(), scores.double().cpu(), strict=True
            ):
                video = sums.setdefault(video_of(number), Sum(label, 0, torch.zeros_like(one)))
                video.views += 1
                video.scores += one
    return sums


def merge(parts: Iterable[Mapping[int, Sum]]) -> dict[int, Sum]:
    """What all processes have added up, by number of the video; each belongs to one of them.

    Raises:
        RuntimeError: A video was tested by two processes.
    """
    merged: dict[int, Sum] = {}
    for part in parts:
        twice = merged.keys() & part.keys()
        if twice:
            raise RuntimeError(f"test: expected every video in one process, got {min(twice)} twice")
        merged.update(part)
    return dict(sorted(merged.items()))
