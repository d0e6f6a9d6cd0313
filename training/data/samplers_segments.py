"""Samplers that cut a video into as many segments as a clip has frames; and the list of all.

The rules of TSM and of the region-based network, which are one (dataset code of TSN), and of
mmaction2's 2-D networks.
"""

import torch

from .samplers import (
    Caffe2Sampler,
    InceptionSampler,
    InceptionValSampler,
    MindsporeSampler,
    MmactionDenseSampler,
    MmactionSampler,
    PytorchvideoSampler,
    Sampler,
    SlowfastOffsetSampler,
    SlowfastSampler,
    TusharCentreSampler,
    TusharSampler,
    dense_start,
    dense_starts,
)


class TsmSampler(Sampler):
    """TSM and RNL, uniform: a random frame of every segment; the middle of each for the test.

    A training video of fewer frames than segments gives its first frame only.

    Example:
        >>> TsmSampler(frames=8).test(48, 30.0, 0, None)
        [3, 9, 15, 21, 27, 33, 39, 45]
    """

    def train(self, num_frames: int, fps: float, generator: torch.Generator) -> list[int]:
        length = num_frames // self.frames
        if length > 0:
            inside = torch.randint(length, (self.frames,), generator=generator).tolist()
            return [segment * length + place for segment, place in enumerate(inside)]
        return [0] * self.frames

    def test(self, num_frames: int, fps: float, clip: int, generator: torch.Generator) -> list[int]:
        tick = num_frames / float(self.frames)
        return [int(tick / 2.0 + tick * segment) for segment in range(self.frames)]

    def test_clips(self, num_frames: int) -> int:
        """Always one."""
        return 1


class TsmTwiceSampler(TsmSampler):
    """TSM and RNL with ``--twice_sample``: the middles of the segments, then their beginnings.

    Example:
        >>> TsmTwiceSampler(frames=8).test(48, 30.0, 1, None)
        [0, 6, 12, 18, 24, 30, 36, 42]
    """

    def test(self, num_frames: int, fps: float, clip: int, generator: torch.Generator) -> list[int]:
        if clip == 0:
            return super().test(num_frames, fps, clip, generator)
        tick = num_frames / float(self.frames)
        return [int(tick * segment) for segment in range(self.frames)]

    def test_clips(self, num_frames: int) -> int:
        """Always two."""
        return 2


class TsmDenseSampler(Sampler):
    """TSM and RNL with ``--dense_sample``: frames of a window of 64, wrapped. mmaction2's, too.

    Example:
        >>> sampler = TsmDenseSampler(frames=8, clips=10)
        >>> [sampler.test(300, 30.0, clip, None)[0] for clip in (0, 1, 9)]
        [0, 26, 236]
    """

    def train(self, num_frames: int, fps: float, generator: torch.Generator) -> list[int]:
        return self._window(dense_start(num_frames, generator), num_frames)

    def test(self, num_frames: int, fps: float, clip: int, generator: torch.Generator) -> list[int]:
        return self._window(dense_starts(num_frames, self.clips)[clip], num_frames)

    def _window(self, start: int, num_frames: int) -> list[int]:
        step = 64 // self.frames
        return [(start + segment * step) % num_frames for segment in range(self.frames)]


class MmactionSegmentsSampler(Sampler):
    """mmaction2's SampleFrames of 2-D networks: clips of one frame, as many as segments.

    Unlike TSM, a training video with fewer frames than segments gives rounded even places.

    Example:
        >>> MmactionSegmentsSampler(frames=8).test(48, 30.0, 0, None)
        [3, 9, 15, 21, 27, 33, 39, 45]
    """

    def train(self, num_frames: int, fps: float, generator: torch.Generator) -> list[int]:
        length = num_frames // self.frames
        if length > 0:
            inside = torch.randint(length, (self.frames,), generator=generator).tolist()
            return [segment * length + place for segment, place in enumerate(inside)]
        # Halves go to the even number, in Python as in NumPy.
        places = [round(segment * (num_frames / self.frames)) for segment in range(self.frames)]
        return [place % num_frames for place in places]

    def test(self, num_frames: int, fps: float, clip: int, generator: torch.Generator) -> list[int]:
        length = num_frames / float(self.frames)
        shift = length / 2.0 if clip == 0 else 0.0
        return [int(segment * length + shift) % num_frames for segment in range(self.frames)]

    def test_clips(self, num_frames: int) -> int:
        """Always one."""
        return 1


class MmactionSegmentsTwiceSampler(MmactionSegmentsSampler):
    """mmaction2's SampleFrames with ``twice_sample``: middles, then beginnings of segments."""

    def test_clips(self, num_frames: int) -> int:
        """Always two."""
        return 2


SAMPLERS: dict[str, type[Sampler]] = {
    "caffe2": Caffe2Sampler,
    "mmaction": MmactionSampler,
    "mmaction_dense": MmactionDenseSampler,
    "mmaction_segments": MmactionSegmentsSampler,
    "mmaction_segments_twice": MmactionSegmentsTwiceSampler,
    "slowfast": SlowfastSampler,
    "slowfast_offset": SlowfastOffsetSampler,
    "pytorchvideo": PytorchvideoSampler,
    "tsm": TsmSampler,
    "tsm_dense": TsmDenseSampler,
    "tsm_twice": TsmTwiceSampler,
    "tushar": TusharSampler,
    "tushar_centre": TusharCentreSampler,
    "inception": InceptionSampler,
    "inception_val": InceptionValSampler,
    "mindspore": MindsporeSampler,
}


def make_sampler(name: str, *, frames: int, stride: int = 1, clips: int = 1) -> Sampler:
    """Sampler of a system by its name in `SAMPLERS`.

    Args:
        name: ``caffe2``, ``mmaction``, ...
        frames: Frames of a clip.
        stride: Distance between two of them.
        clips: Clips per test video.

    Raises:
        ValueError: No such name, or a number below 1.

    Example:
        >>> make_sampler("caffe2", frames=4, stride=2, clips=2).test(8, 30.0, 1, None)
        [4, 6, 0, 2]
    """
    if name not in SAMPLERS:
        raise ValueError(
            f"make_sampler: expected one of {', '.join(SAMPLERS)}, got {name!r}; choose one"
        )
    return SAMPLERS[name](frames, stride, clips)
