"""Which frames of a video make a clip: pure functions of numbers, no decoding.

The rules are those of the original Kinetics training code: a clip that runs past the end goes on at
the beginning, so a video of any length gives clips of any length.
"""

from itertools import pairwise

import numpy as np
import torch


def random_clip(num_frames: int, frames: int, stride: int, generator: torch.Generator) -> list[int]:
    """Frame numbers of a clip that starts anywhere it fits, at 0 if it fits nowhere.

    Args:
        num_frames: Frames of the video, at least 1.
        frames: Frames of the clip, at least 1.
        stride: Distance between two frames of the clip, at least 1.
        generator: Source of the start; one number is drawn, whatever the sizes.

    Returns:
        ``frames`` numbers in ``range(num_frames)``.

    Raises:
        ValueError: A size below 1.

    Example:
        >>> random_clip(3, 4, 2, torch.Generator().manual_seed(0))
        [0, 2, 1, 0]
    """
    _check(num_frames, frames, stride)
    last = max(num_frames - frames * stride, 0)
    start = int(torch.randint(last + 1, (1,), generator=generator))
    return _wrapped(start, num_frames, frames, stride)


def uniform_clip(num_frames: int, frames: int, stride: int, clip: int, clips: int) -> list[int]:
    """Frame numbers of one of ``clips`` test clips whose starts are spread evenly over the video.

    Args:
        num_frames: Frames of the video, at least 1.
        frames: Frames of the clip, at least 1.
        stride: Distance between two frames of the clip, at least 1.
        clip: Which clip, in ``range(clips)``; clip 0 starts at frame 0.
        clips: Clips per video, at least 1.

    Returns:
        ``frames`` numbers in ``range(num_frames)``.

    Raises:
        ValueError: A size below 1, or no such clip.

    Example:
        >>> [uniform_clip(300, 8, 8, clip, 10)[0] for clip in (0, 1, 9)]
        [0, 30, 270]
    """
    _check(num_frames, frames, stride)
    if not 0 <= clip < clips:
        raise ValueError(
            f"uniform_clip: expected a clip number in range({clips}), got {clip}; "
            "clips are counted from 0"
        )
    # float32 as in the original: it decides where starts are not whole numbers.
    start = int(np.float32(num_frames) / np.float32(clips) * np.float32(clip)) % num_frames
    return _wrapped(start, num_frames, frames, stride)


def time_split(num_frames: int, holdout: float) -> int:
    """The first test frame of a video whose first part trains and whose last part tests.

    Args:
        num_frames: Frames of the video, at least 2.
        holdout: Share of the video that tests, between 0 and 1; both parts get a frame at least.

    Returns:
        A number in ``range(1, num_frames)``.

    Raises:
        ValueError: Fewer than two frames, or ``holdout`` not strictly between 0 and 1.

    Example:
        >>> time_split(300, 0.3)
        210
    """
    if not 0 < holdout < 1:
        raise ValueError(
            f"time_split: expected holdout between 0 and 1, got {holdout}; "
            "0.3 keeps the last 30 % of each video for testing"
        )
    if num_frames < 2:
        raise ValueError(
            f"time_split: expected at least 2 frames, got {num_frames}; leave this video out"
        )
    return min(max(num_frames - round(num_frames * holdout), 1), num_frames - 1)


def time_parts(
    num_frames: int, holdout: float, *, gap: float = 0.0, parts: int = 1
) -> tuple[range, list[range]]:
    """Training frames at the beginning of a video and disjoint test parts at its end.

    Args:
        num_frames: Frames of the video, at least 2.
        holdout: Share of the video that tests, between 0 and 1.
        gap: Share of the video before the test frames that does neither, so that no test frame
            follows a training frame; training keeps a frame at least.
        parts: Equal parts of the test frames; fewer where there are fewer frames.

    Returns:
        Frames that train, and those of every test part.

    Raises:
        ValueError: Fewer than two frames, ``holdout`` not strictly between 0 and 1, ``gap`` not
            between 0 and what ``holdout`` leaves, or no part.

    Example:
        >>> time_parts(300, 0.3, gap=0.05, parts=2)
        (range(0, 195), [range(210, 255), range(255, 300)])
    """
    start = time_split(num_frames, holdout)
    if not 0 <= gap < 1 - holdout:
        raise ValueError(
            f"time_parts: expected 0 <= gap < 1 - holdout, got {gap} with holdout {holdout}; "
            "0.05 leaves out 5 % of each video between training and test"
        )
    if parts < 1:
        raise ValueError(f"time_parts: expected at least 1 part, got {parts}; 1 keeps it whole")
    count = min(parts, num_frames - start)
    ends = [start + (num_frames - start) * number // count for number in range(count + 1)]
    training = range(max(start - round(num_frames * gap), 1))
    return training, [range(*pair) for pair in pairwise(ends)]


def _wrapped(start: int, num_frames: int, frames: int, stride: int) -> list[int]:
    return [(start + step * stride) % num_frames for step in range(frames)]


def _check(num_frames: int, frames: int, stride: int) -> None:
    for name, value in (("num_frames", num_frames), ("frames", frames), ("stride", stride)):
        if value < 1:
            raise ValueError(f"clip: expected {name} of at least 1, got {value}; clips need frames")
