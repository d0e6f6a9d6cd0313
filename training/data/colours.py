"""Levels of 0 to 255 to network input: the normalisation of each system, order and jitter."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Normalisation:
    """``(level - mean) / std`` of every channel; one number serves all channels.

    Attributes:
        mean: In levels of 0 to 255.
        std: In levels of 0 to 255.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, planes: Tensor) -> Tensor:
        """(C, T, H, W), or a batch (B, C, T, H, W), float32, changed in place."""
        return planes.sub_(_column(self.mean, planes)).div_(_column(self.std, planes))


NORMALISATIONS = {
    # video-nonlocal-net and Tushar-N; PySlowFast and pytorchvideo write it as (x/255 - 0.45)/0.225.
    "grey": Normalisation((114.75,), (57.375,)),
    # mmaction2; TSM and RNL write it in levels of 0 to 1.
    "imagenet": Normalisation((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    # [-1, 1]: Inception-I3D, RGB and flow.
    "unit": Normalisation((127.5,), (127.5,)),
    # MindSpore's last 0.255 is a slip for 0.225 that its weights were trained with.
    "mindspore": Normalisation((123.675, 116.28, 103.53), (58.395, 57.12, 65.025)),
    # TSM's flow: mean 0.5, standard deviation the mean of ImageNet's.
    "flow_tsm": Normalisation((127.5,), (255 * (0.229 + 0.224 + 0.225) / 3,)),
    # inception-I3D-NON-LOCAL subtracts the mean colour of its RGB data from flow as well, before
    # scaling to [-1, 1], unless it is told --no_mean_norm.
    "flow_inception": Normalisation((127.5 + (114.7748 + 107.7354 + 99.4750) / 3,), (127.5,)),
}


def to_planes(video: Tensor, channels: str = "rgb", out: Tensor | None = None) -> Tensor:
    """Frames to levels as networks take them.

    Args:
        video: (T, H, W, C), uint8 or float32, colours as red, green, blue.
        channels: ``rgb``, or ``bgr`` to turn them round.
        out: Where to write, (C, T, H, W), float32; unset is new memory.

    Returns:
        (C, T, H, W), float32, a copy; contiguous in new memory.
    """
    planes = video.permute(3, 0, 1, 2)
    if channels == "bgr":
        planes = planes.flip(0)
    if out is not None:
        return out.copy_(planes)
    return planes.to(torch.float32, memory_format=torch.contiguous_format, copy=True)


@dataclass(frozen=True)
class Jitter:
    """Drawn changes of brightness, contrast and saturation, in the order in which they happen.

    As PySlowFast's color_jitter: mixtures with black, with the mean grey of each frame, and with
    its grey picture.

    Attributes:
        steps: (what, weight of the picture itself) pairs; a weight of 1 changes nothing.
    """

    steps: tuple[tuple[str, float], ...]

    def __call__(self, video: Tensor) -> Tensor:
        """(T, H, W, 3), any dtype, red first, to the same in float32; levels may leave 0 to 255."""
        video = video.float()
        for what, weight in self.steps:
            if what == "brightness":
                video = video * weight
                continue
            grey = (video * video.new_tensor((0.299, 0.587, 0.114))).sum(3, keepdim=True)
            if what == "contrast":
                grey = grey.mean((1, 2, 3), keepdim=True)
            video = video * weight + grey * (1 - weight)
        return video


def draw_jitter(strengths: tuple[float, float, float], generator: torch.Generator) -> Jitter | None:
    """Draw weights from 1 - strength to 1 + strength, and their order; None without strengths.

    Args:
        strengths: Of brightness, contrast and saturation, 0 for none.
        generator: Source of all random numbers; none is drawn without strengths.
    """
    names = ("brightness", "contrast", "saturation")
    wanted = [pair for pair in zip(names, strengths, strict=True) if pair[1] > 0]
    if not wanted:
        return None
    order = torch.randperm(len(wanted), generator=generator).tolist()
    draws = torch.rand(len(wanted), generator=generator).tolist()
    return Jitter(
        tuple(
            (wanted[place][0], 1 + wanted[place][1] * (2 * draw - 1))
            for place, draw in zip(order, draws, strict=True)
        )
    )


def _column(numbers: tuple[float, ...], planes: Tensor) -> float | Tensor:
    if len(numbers) == 1:
        return numbers[0]
    return planes.new_tensor(numbers)[:, None, None, None]
