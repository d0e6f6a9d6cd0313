"""Clips of videos: which one an index stands for, and what happens if it cannot be decoded."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from .reader import VideoReader, VideoReadError
from .samplers import Sampler
from .transforms import Transform
from .views import View

# Clips drawn from one video before another one takes its place, or its damage is an error.
_ATTEMPTS = 3
# Videos tried in place of one that fails, for training.
_REPLACEMENTS = 5
# Clips over which the share of failures is judged at least.
_JUDGED = 200
# Loader processes that count clips apart from each other; more share their counters.
_SLOTS = 64


class DecodeRateError(RuntimeError):
    """More clips could not be decoded than are allowed."""


@dataclass(frozen=True)
class Video:
    """A video of a data set.

    Attributes:
        path: Its file or folder.
        label: Number of its class.
        frames: Frames that belong to the data set; None for all of a video whose length and frame
            rate are known when it is opened.
        fps: Frames per second.
        part: Which part of its file it is, in words; empty for the whole file.
    """

    path: str
    label: int
    frames: range | None = None
    fps: float = 30.0
    part: str = ""


class Opener(Protocol):
    """How videos are opened; goes to loader processes with the data set."""

    def __call__(self, number: int, video: Video) -> VideoReader:
        """Open video ``number`` of the data set; `VideoReadError` if that is impossible."""


class ClipDataset(Dataset[tuple[Tensor, int]]):
    """Labelled clips of videos.

    For training, one random clip per video and epoch; else the test clips of the sampler, each with
    all crops of the transform, those of a clip next to each other, and those of a video. A training
    clip is a pure function of (seed, epoch, index) and a test clip of its index, for any number of
    loader processes.

    A clip that cannot be decoded is replaced by another one of its video; a training video that
    fails again and again by another video. Failures are counted, and too many are an error.

    Args:
        videos: The videos.
        classes: Names of the classes by number.
        training: Random clips.
        sampler: Which frames are a clip.
        transform: What is done with them.
        opener: How videos are opened.
        seed: Seed of all random choices.
        problems: (path, reason) of every video that was left out.
        max_failed: Share of the training clips that may fail, from 0 to 1.

    Raises:
        ValueError: No videos, or a number of test clips that depends on an unknown length.
    """

    classes: list[str]
    problems: list[tuple[str, str]]

    def __init__(
        self,
        videos: Sequence[Video],
        classes: Sequence[str],
        *,
        training: bool,
        sampler: Sampler,
        transform: Transform,
        opener: Opener,
        seed: int,
        problems: Sequence[tuple[str, str]] = (),
        max_failed: float = 0.05,
    ) -> None:
        if not training and sampler.by_length:
            unknown = [video.path for video in videos if video.frames is None]
            if unknown:
                raise ValueError(
                    f"data: expected the lengths of all test videos, whose number of clips depends "
                    f"on them, got none of {unknown[0]}; set data.check=decode"
                )
        self.sampler, self.transform = sampler, transform
        self.classes, self.problems = list(classes), list(problems)
        self._training, self._seed, self._max_failed = training, seed, max_failed
        self._opener, self._epoch = opener, 0
        counts = [
            1 if training else sampler.test_clips(len(video.frames or ())) * transform.crops
            for video in videos
        ]
        if 0 in counts:
            self.problems += [
                (video.path, "too short for a test clip")
                for video, count in zip(videos, counts, strict=True)
                if count == 0
            ]
        kept = [number for number, count in enumerate(counts) if count > 0]
        self._videos, self._numbers = [videos[number] for number in kept], kept
        if not self._videos:
            got = f", the first of {len(problems)}: {problems[0]}" if problems else ""
            raise ValueError(
                f"data: expected videos that can be used, got none{got}; check paths and lists"
            )
        self._ends = np.cumsum([count for count in counts if count > 0])
        # Shared, so that what loader processes count is seen here.
        self._failures = torch.zeros(len(self._videos), dtype=torch.int64).share_memory_()
        self._drawn = torch.zeros(_SLOTS, dtype=torch.int64).share_memory_()
        # The last test clip that was decoded: its other crops come next.
        self._last: tuple[tuple[int, int], Tensor] | None = None

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """The clip (C, T, h, w), float32, and its label.

        Raises:
            IndexError: No such clip.
            VideoReadError: Several clips in a row could not be decoded.
            DecodeRateError: Too many training clips could not be decoded.
        """
        frames, view, label = self.decoded(index)
        return self.transform.render(frames, view), label

    def decoded(self, index: int) -> tuple[Tensor, View, int]:
        """Frames (T, H, W, C), uint8, of a clip, the view that is to be taken, and the label.

        `__getitem__` without its last step, which can then be taken on another device.
        """
        index = range(len(self))[index]
        number = self.video_of(index)
        view = index - (int(self._ends[number - 1]) if number else 0)
        clip, crop = divmod(view, self.transform.crops)
        # All crops of a test clip are cut from the same frames.
        epoch = self._epoch if self._training else 0
        generator = _generator(self._seed, epoch, index - crop)
        frames, number = self._frames(number, clip, generator)
        if not self._training:
            generator = _generator(self._seed, epoch, index)
        label = self._videos[number].label
        height, width = frames.shape[1:3]
        return frames, self.transform.view(height, width, generator, crop=crop, label=label), label

    def set_epoch(self, epoch: int) -> None:
        """Draw other training clips from now on; this process's copy only, as everything here.

        Loader processes that outlive an epoch have their own copies: hand them the epoch with the
        index, or start new ones.

        Args:
            epoch: Number of the epoch, from 0.
        """
        self._epoch = epoch

    def video_of(self, index: int) -> int:
        """Number of the video that a clip is of, from 0 and in the order of the clips."""
        return int(np.searchsorted(self._ends, index, side="right"))

    def problem_of(self, number: int) -> str | None:
        """Open a video and decode its first, middle and last frame.

        Args:
            number: Of `video_of`.

        Returns:
            Why that is impossible; None if it is not.
        """
        video = self._videos[number]
        try:
            with closing(self._opener(self._numbers[number], video)) as reader:
                frames = range(len(reader)) if video.frames is None else video.frames
                if not frames:
                    return "no frames"
                reader.frames(sorted({frames[0], frames[len(frames) // 2], frames[-1]}))
        except VideoReadError as error:
            return error.reason
        return None

    @property
    def videos(self) -> tuple[Video, ...]:
        """The videos, by the numbers of `video_of`."""
        return tuple(self._videos)

    @property
    def num_videos(self) -> int:
        """Number of videos."""
        return len(self._videos)

    @property
    def views_per_video(self) -> int | None:
        """Clips (crops included) of every video; None where videos have different numbers."""
        counts = np.diff(self._ends, prepend=0)
        return int(counts[0]) if (counts == counts[0]).all() else None

    @property
    def clips_per_video(self) -> int | None:
        """Clips of every video, however many crops are cut from each; None where they differ."""
        views = self.views_per_video
        return None if views is None else views // self.transform.crops

    @property
    def decode_failures(self) -> list[tuple[str, int]]:
        """(path, clips that failed) of videos that were not left out, loader processes included."""
        counts: dict[str, int] = {}
        for video, count in zip(self._videos, self._failures.tolist(), strict=True):
            if count:
                # Several videos may be parts of one file.
                counts[video.path] = counts.get(video.path, 0) + count
        return list(counts.items())

    def _frames(self, number: int, clip: int, generator: torch.Generator) -> tuple[Tensor, int]:
        """Frames of a clip, and the video that they are of in the end."""
        if self._training:
            return self._training_frames(number, generator)
        if self.transform.crops == 1:
            return self._attempts(number, clip, generator), number
        if self._last is None or self._last[0] != (number, clip):
            self._last = (number, clip), self._attempts(number, clip, generator)
        return self._last[1], number

    def _training_frames(self, number: int, generator: torch.Generator) -> tuple[Tensor, int]:
        worker = get_worker_info()
        self._drawn[0 if worker is None else worker.id % _SLOTS] += 1
        for _ in range(_REPLACEMENTS):
            try:
                return self._attempts(number, None, generator), number
            except VideoReadError:
                number = int(torch.randint(len(self._videos), (1,), generator=generator))
        return self._attempts(number, None, generator), number

    def _attempts(self, number: int, clip: int | None, generator: torch.Generator) -> Tensor:
        """Frames of a clip of a video, of another clip where the first ones fail."""
        video = self._videos[number]
        failed = 0
        while failed < _ATTEMPTS:
            chosen = None
            if video.frames is not None:
                chosen = self._choose(video.frames, video.fps, clip, generator)
            try:
                with closing(self._opener(self._numbers[number], video)) as reader:
                    if chosen is None:
                        chosen = self._choose(range(len(reader)), reader.fps, clip, generator)
                    return reader.frames(chosen)
            except VideoReadError as error:
                self._failures[number] += 1
                self._check_rate(error)
                failed, clip, last = failed + 1, None, error
            if chosen is None:
                # What cannot be opened once cannot be opened again, and may take its time-out.
                break
        reason = last.reason
        if failed > 1:
            reason = f"{failed} clips in a row failed, the last one: {reason}"
        raise VideoReadError(video.path, reason) from last

    def _choose(
        self, frames: range, fps: float, clip: int | None, generator: torch.Generator
    ) -> list[int]:
        """Frame numbers of a test clip, or of a random one."""
        if clip is None:
            places = self.sampler.train(len(frames), fps, generator)
        else:
            places = self.sampler.test(len(frames), fps, clip, generator)
        return [frames[place] for place in places]

    def _check_rate(self, error: VideoReadError) -> None:
        failed, drawn = int(self._failures.sum()), int(self._drawn.sum())
        if not self._training or failed <= self._max_failed * max(drawn, _JUDGED):
            return
        raise DecodeRateError(
            f"data: expected at most {self._max_failed:.1%} of the training clips to fail, got "
            f"{failed} failures in {drawn} clips of {int((self._failures > 0).sum())} videos, the "
            f"last one {error.path} ({error.reason}); take broken videos out, or raise "
            "data.max_failed"
        )


def _generator(seed: int, epoch: int, index: int) -> torch.Generator:
    # torch keeps 32 bits of a seed, so the three numbers are mixed into as many first.
    mixed = np.random.SeedSequence([seed, epoch, index]).generate_state(1)[0]
    return torch.Generator().manual_seed(int(mixed))
