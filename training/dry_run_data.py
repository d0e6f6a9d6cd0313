"""What ``nlk train --dry-run`` looks for in the data: videos that do not open, empty classes."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .data.dataset import ClipDataset
from .loading import Data

# Videos of a split that are opened at most, and for how long.
SAMPLE, LIMIT_S = 200, 60.0
_LISTED = 10


@dataclass
class DataCheck:
    """What was found."""

    lines: list[str] = field(default_factory=list)
    """For the terminal."""
    problems: list[str] = field(default_factory=list)
    """What has to be mended before a training."""


def check_data(data: Data, *, max_failed: float) -> DataCheck:
    """Open videos of both splits, spread over the lists, and count those of every class.

    Lists and labels were checked when they were read; what was left out then is counted here.

    Args:
        data: Of ``load_data``.
        max_failed: Share of the videos of a split that may be unusable.

    Returns:
        Lines to print, and problems.
    """
    found = DataCheck()
    for name, clips in (("training", data.train), ("test", data.test)):
        _check_split(found, name, clips, max_failed)
    if data.train.videos and data.train.videos[0].frames is None:
        _check_overlap(found, data)
    return found


def _check_split(found: DataCheck, name: str, clips: ClipDataset, max_failed: float) -> None:
    videos, left_out = clips.num_videos, len(clips.problems)
    counts = np.bincount([video.label for video in clips.videos], minlength=len(clips.classes))
    opened, broken = _open(clips)
    spread = "all of them" if opened == videos else f"{opened} of them, spread evenly"
    least, most = counts[counts > 0].min(), counts.max()
    each = f"{least:,}" if least == most else f"{least:,} to {most:,}"
    found.lines.append(
        f"{name}: {videos:,} videos, {len(clips):,} {'views' if name == 'test' else 'clips'}, "
        f"{np.count_nonzero(counts)} of {len(counts)} classes ({each} videos each); "
        f"opened {spread}, {len(broken)} failed; {left_out:,} left out"
    )
    found.lines += _listed(broken)
    empty = [clips.classes[number] for number in np.flatnonzero(counts == 0)]
    if empty:
        found.lines.append(
            f"  warning: no {name} video of {len(empty)} classes: {_shortened(empty)}"
        )
    for count, of, what in (
        (left_out, videos + left_out, "are left out"),
        (len(broken), opened, "cannot be decoded"),
    ):
        if count > max_failed * of:
            found.problems.append(
                f"data: expected at most {max_failed:.0%} unusable {name} videos, got {count} of "
                f"{of} that {what}; mend the data, or raise data.max_failed"
            )


def _open(clips: ClipDataset) -> tuple[int, list[tuple[str, str]]]:
    """How many videos were opened, and (path, reason) of those that failed."""
    count = min(SAMPLE, clips.num_videos)
    numbers = np.linspace(0, clips.num_videos - 1, count).round().astype(int)
    begun, broken = time.perf_counter(), []
    # Shuffled: what there was time for is spread over the list as well.
    for opened, number in enumerate(np.random.default_rng(0).permutation(numbers).tolist(), 1):
        reason = clips.problem_of(number)
        if reason is not None:
            broken.append((clips.videos[number].path, reason))
        if time.perf_counter() - begun > LIMIT_S:
            return opened, broken
    return count, broken


def _check_overlap(found: DataCheck, data: Data) -> None:
    """Lists only: of folders that are split by time every video is in both."""
    both = {video.path for video in data.train.videos} & {v.path for v in data.test.videos}
    if both:
        found.lines.append(
            f"  warning: {len(both)} videos are in both lists: {_shortened(sorted(both))}"
        )


def _listed(broken: Sequence[tuple[str, str]]) -> list[str]:
    lines = [f"  - {path}: {reason}" for path, reason in broken[:_LISTED]]
    return lines + [f"  - and {len(broken) - _LISTED} more"] * (len(broken) > _LISTED)


def _shortened(names: Sequence[str]) -> str:
    return ", ".join([*names[:_LISTED], *["..."] * (len(names) > _LISTED)])
