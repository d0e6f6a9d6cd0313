"""Which frames of a video are a clip, by the rules of every published system.

One class per rule, one name per class in `SAMPLERS`. Frame numbers count from 0; readers of image
folders add the number of the first image. Random numbers come from a `torch.Generator`, so they are
not those of the original programs, but every clip that an original draws can be drawn, no other
can, and all are as likely. `samplers_segments.py` has the rules that cut a video into segments.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from .sampling import random_clip, uniform_clip


@dataclass(frozen=True)
class Sampler(ABC):
    """What a data set needs of a rule.

    Args:
        frames: Frames of a clip, at least 1.
        stride: Distance between two frames of a clip, at least 1.
        clips: Clips per test video, at least 1; rules with a number of their own ignore it.

    Raises:
        ValueError: A number below 1.
    """

    frames: int
    stride: int = 1
    clips: int = 1

    # Does the number of test clips depend on the length of the video?
    by_length: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("frames", "stride", "clips"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"sampler: expected {name} of at least 1, got {getattr(self, name)}; raise it"
                )

    @abstractmethod
    def train(self, num_frames: int, fps: float, generator: torch.Generator) -> list[int]:
        """Frame numbers of a random clip.

        Args:
            num_frames: Frames of the video, at least 1.
            fps: Its frames per second.
            generator: Source of all random numbers.

        Returns:
            ``frames`` numbers in ``range(num_frames)``.
        """

    @abstractmethod
    def test(self, num_frames: int, fps: float, clip: int, generator: torch.Generator) -> list[int]:
        """Frame numbers of test clip ``clip``, in ``range(self.test_clips(num_frames))``."""

    def test_clips(self, num_frames: int) -> int:
        """Number of test clips of a video."""
        return self.clips


class Caffe2Sampler(Sampler):
    """video-nonlocal-net: start anywhere it fits, test starts at multiples of F / clips, wrapped.

    Example:
        >>> sampler = Caffe2Sampler(frames=32, stride=2, clips=10)
        >>> sampler.test(300, 30.0, 9, None)[-1]
        32
    """

    def train(self, num_frames: int, fps: float, generator: torch.Generator) -> list[int]:
        return random_clip(num_frames, self.frames, self.stride, generator)

    def test(self, num_frames: int, fps: float, clip: int, generator: torch.Generator) -> list[int]:
        return uniform_clip(num_frames, self.frames, self.stride, clip, self.clips)


class MmactionSampler(Sampler):
    """mmaction2's SampleFrames of 3-D networks: test starts from 0 to the last that fits.

    Training clips are those of `Caffe2Sampler`. One test clip starts in the middle.

    Example:
        >>> sampler = MmactionSampler(frames=32, stride=2, clips=10)
        >>> [sampler.test(300, 30.0, clip, None)[0] for clip in (0, 1, 9)]
        [0, 26, 237]
    """

    def train(self, num_frames: int, fps: float, generator: torch.Generator) -> list[int]:
        return random_clip(num_frames, self.frames, self.stride, generator)

    def test(self, num_frames: int, fps: float, clip: int, generator: torch.Generator) -> list[int]:
        last = max(num_frames - ((self.frames - 1) * self.stride + 1), 0)
        if self.clips == 1:
            start = last // 2
        else:
            # Halves go to the even number, as NumPy rounds.
            start = int(np.round(np.float64(clip) * (last / float(self.clips - 1))))
        return _looped(start, num_frames, self.frames, self.stride)


class MmactionDenseSampler(Sampler):
    """mmaction2's DenseSampleFrames of 3-D networks: starts from 0 to F - 64, wrapped.

    Example:
        >>> sampler = MmactionDenseSampler(frames=32, stride=2, clips=10)
        >>> [sampler.test(300, 30.0, clip, None)[0] for clip in (0, 1, 9)]
        [0, 26, 236]
    """

    def train(self, num_frames: int, fps: float, generator: torch.Generator) -> list[int]:
        start = dense_start(num_frames, generator)
        return _looped(start, num_frames, self.frames, self.stride)

    def test(self, num_frames: int, fps: float, clip: int, generator: torch.Generator) -> list[int]:
        start = dense_starts(num_frames, self.clips)[clip]
        return _looped(start, num_frames, self.frames, self.stride)


class SlowfastSampler(Sampler):
    """PySlowFast: clips of frames * stride / 30 seconds, test starts at multiples of delta / clips.

    Frames are cut off from evenly spaced places, first and last frame of the span included, so
    eight frames at stride 8 are 9 apart; places beyond the video are its last frame.

    Example:
        >>> sampler = SlowfastSampler(frames=8, stride=8, clips=10)
        >>> sampler.test(300, 30.0, 0, None)
        [0, 9, 18, 27, 36, 45, 54, 63]
    """

    def span(self, fps: float) -> float:
        """Length of a clip in frames of the video."""
        return self.frames * self.stride * fps / 30

    def starts(self, num_frames: int, fps: float) -> list[float]:
        """First places of the test clips."""
        delta = max(num_frames - self.span(fps), 0)
        return [delta * clip / self.clips for clip in range(self.clips)]

    def train(self, num_frames: int, fps: float, generator: torch.Generator) -> list[int]:
        delta = max(num_frames - self.span(fps), 0)
        start = delta * float(torch.rand((), generator=generator, dtype=torch.float64))
        return self._spread(start, num_frames, fps)

    def test(self, num_frames: int, fps: float, clip: int, generator: torch.Generator) -> list[int]:
        return self._spread(self.starts(num_frames, fps)[clip], num_frames, fps)

    def _spread(self, start: float, num_frames: int, fps: float) -> list[int]:
        # torch's single precision, as in the original: it decides where places are whole numbers.
        places = torch.linspace(start, start + self.span(fps) - 1, self.frames)
        return places.clamp(0, num_frames - 1).long().tolist()


class SlowfastOffsetSampler(SlowfastSampler):
    """PySlowFast with USE_OFFSET_SAMPLING: whole starts up to the last that fits."""

    def starts(self, num_frames: int, fps: float) -> list[float]:
        """First places of the test clips."""
        delta = max(num_frames - self.span(fps), 0)
        if self.clips == 1:
            return [math.floor(delta / 2)]
        return [clip * math.floor(delta / (self.clips - 1)) for clip in range(self.clips)]


class PytorchvideoSampler(Sampler):
    """pytorchvideo: clips in seconds, their frames from decord, then evenly chosen ones of these.

    RandomClipSampler and ConstantClipsPerVideoSampler with UniformTemporalSubsample.
    """

    def train(self, num_frames: int, fps: float, generator: torch.Generator) -> list[int]:
        latest = max(num_frames / fps - self._seconds(), 0)
        draw = float(torch.rand((), generator=generator, dtype=torch.float64))
        return self._subsampled(latest * draw, num_frames, fps)

    def test(self, num_frames: int, fps: float, clip: int, generator: torch.Generator) -> list[int]:
        latest = max(num_frames / fps - self._seconds(), 0)
        return self._subsampled(latest / self.clips * clip, num_frames, fps)

    def _seconds(self) -> float:
        return self.frames * self.stride / 30

    def _subsampled(self, start_s: float, num_frames: int, fps: float) -> list[int]:
        first = min(math.ceil(fps * start_s), num_frames - 1)
        end = min(max(math.ceil(fps * (start_s + self._seconds())), first + 1), num_frames)
        places = torch.linspace(0, end - first - 1, self.frames)
        return (first + places.clamp(0, end - first - 1).long()).tolist()


class TusharSampler(Sampler):
    """Tushar-N/pytorch-resnet3d: consecutive stored frames, test clips around even centres.

    ``stride`` stores every so-manieth frame first. A video shorter than the clip starts again.

    Example:
        >>> sampler = TusharSampler(frames=32, clips=10)
        >>> [sampler.test(300, 30.0, clip, None)[16] for clip in (0, 1, 9)]
        [16, 45, 284]
    """

    def train(self, num_frames: int, fps: float, generator: torch.Generator) -> list[int]:
        stored = range(0, num_frames, self.stride)
        start = 0
        if len(stored) > self.frames:
            # The last start that fits is never drawn, as NumPy leaves out the upper end.
            start = int(torch.randint(len(stored) - self.frames, (1,), generator=generator))
        return _padded(stored[start : start + self.frames], self.frames)

    def test(self, num_frames: int, fps: float, clip: int, generator: torch.Generator) -> list[int]:
        stored = list(range(0, num_frames, self.stride))
        half = self.frames // 2
        centre = int(np.linspace(half, len(stored) - half, self.clips)[clip])
        # Of a short video the slice may begin below 0 and then counts from the end, as there.
        return _padded(stored[centre - half : centre + half], self.frames)


class TusharCentreSampler(TusharSampler):
    """Tushar-N/pytorch-resnet3d's validation of clips: the middle of the video."""

    def test(self, num_frames: int, fps: float, clip: int, generator: torch.Generator) -> list[int]:
        stored = range(0, num_frames, self.stride)
        start = len(stored) // 2 - self.frames // 2 if len(stored) > self.frames else 0
        return _padded(stored[start : start + self.frames], self.frames)

    def test_clips(self, num_frames: int) -> int:
        """Always one."""
        return 1


class InceptionSampler(Sampler):
    """inception-I3D-NON-LOCAL: a random window, or for the test all windows, one after the other.

    Windows do not overlap; the last one may be short and then starts again. A video of one frame
    has none. ``stride`` keeps every so-manieth frame first.

    Example:
        >>> sampler = InceptionSampler(frames=64)
        >>> sampler.test_clips(150), sampler.test(150, 25.0, 2, None)[-1]
        (3, 147)
    """

    by_length: ClassVar[bool] = True

    def train(self, num_frames: int, fps: float, generator: torch.Generator) -> list[int]:
        stored = range(0, num_frames, self.stride)
        latest = max(len(stored) - self.frames - 1, 0)
        start = int(torch.randint(latest + 1, (1,), generator=generator))
        return _padded(stored[start : start + self.frames], self.frames)

    def test(self, num_frames: int, fps: float, clip: int, generator: torch.Generator) -> list[int]:
        stored = range(0, num_frames, self.stride)
        start = self._starts(len(stored))[clip]
        return _padded(stored[start : start + self.frames], self.frames)

    def test_clips(self, num_frames: int) -> int:
        """One per window."""
        return len(self._starts(len(range(0, num_frames, self.stride))))

    def _starts(self, stored: int) -> range:
        return range(0, stored - 1, self.step(stored))

    def step(self, stored: int) -> int:
        """Distance between two windows."""
        return self.frames


class InceptionValSampler(InceptionSampler):
    """inception-I3D-NON-LOCAL's validation: windows meant to be ``clips``, of any overlap.

    The step is the ceiling of (F - 1 - frames) / (clips - 1), and windows go on to the end of the
    video, so there may be more of them than ``clips``.
    """

    def step(self, stored: int) -> int:
        """Distance between two windows."""
        if self.clips == 1:
            return max(1, stored)
        return max(1, math.ceil((stored - 1 - self.frames) / (self.clips - 1)))


class MindsporeSampler(Sampler):
    """MindSpore's nonlocal (interval mode): a random start, also in the test, wrapped.

    With more than one test clip, the even starts of mindvideo.
    """

    def train(self, num_frames: int, fps: float, generator: torch.Generator) -> list[int]:
        free = abs(num_frames - (self.frames * self.stride + 1))
        start = int(torch.randint(free + 1, (1,), generator=generator))
        return _looped(start, num_frames, self.frames, self.stride)

    def test(self, num_frames: int, fps: float, clip: int, generator: torch.Generator) -> list[int]:
        if self.clips == 1:
            return self.train(num_frames, fps, generator)
        step = abs(num_frames - (self.frames * self.stride + self.clips)) / self.clips or 1
        start = int(clip * step + step / 2)
        return _looped(start, num_frames, self.frames, self.stride)


def dense_start(num_frames: int, generator: torch.Generator) -> int:
    """Random start of dense sampling: a window of 64 frames; its last place is never drawn.

    Args:
        num_frames: Frames of the video.
        generator: Source of the start.
    """
    places = max(1, 1 + num_frames - 64)
    return 0 if places <= 2 else int(torch.randint(places - 1, (1,), generator=generator))


def dense_starts(num_frames: int, clips: int) -> list[int]:
    """Test starts of dense sampling, evenly from 0 to F - 64, cut off to whole numbers."""
    return np.linspace(0, max(1, 1 + num_frames - 64) - 1, num=clips, dtype=int).tolist()


def _looped(start: int, num_frames: int, frames: int, stride: int) -> list[int]:
    return [(start + step * stride) % num_frames for step in range(frames)]


def _padded(window: range | list[int], frames: int) -> list[int]:
    """A window from its beginning again and again until it has as many frames as a clip."""
    return [window[step % len(window)] for step in range(frames)]
