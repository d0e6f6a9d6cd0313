"""Frame numbers of clips, against the published rules and by their properties."""

import pytest
import torch

from nlkernels.training.data.sampling import random_clip, time_parts, time_split, uniform_clip


def starts(num_frames, clips=10):
    return [uniform_clip(num_frames, 8, 2, clip, clips)[0] for clip in range(clips)]


@pytest.mark.parametrize(
    ("num_frames", "expected"),
    [
        (300, [0, 30, 60, 90, 120, 150, 180, 210, 240, 270]),
        (297, [0, 29, 59, 89, 118, 148, 178, 207, 237, 267]),
        (50, [0, 5, 10, 15, 20, 25, 30, 35, 40, 45]),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else None,
)
def test_starts_of_ten_clips_are_the_published_ones(num_frames, expected):
    assert starts(num_frames) == expected


def test_last_clip_wraps_to_the_beginning():
    # 32 frames with a stride of 2 from frame 270 of 300.
    clip = uniform_clip(300, 32, 2, 9, 10)
    assert clip[:2] == [270, 272]
    assert clip[15:] == list(range(0, 34, 2))


def test_random_starts_reach_both_ends_and_no_further():
    generator = torch.Generator().manual_seed(0)
    clips = [random_clip(20, 4, 3, generator) for _ in range(400)]
    assert {clip[0] for clip in clips} == set(range(9))
    assert all(clip == list(range(clip[0], clip[0] + 12, 3)) for clip in clips)


@pytest.mark.parametrize("num_frames", [1, 3, 7, 8])
def test_short_videos_start_at_zero_and_wrap(num_frames):
    clip = random_clip(num_frames, 4, 2, torch.Generator().manual_seed(0))
    assert clip == [step * 2 % num_frames for step in range(4)]


def test_random_clip_is_a_function_of_its_generator():
    one, other = (
        [random_clip(300, 8, 4, generator) for _ in range(5)]
        for generator in (torch.Generator().manual_seed(3), torch.Generator().manual_seed(3))
    )
    assert one == other
    assert len({clip[0] for clip in one}) > 1


@pytest.mark.parametrize(
    ("num_frames", "holdout", "cut"),
    [(300, 0.3, 210), (10, 0.01, 9), (10, 0.99, 1), (2, 0.5, 1), (3, 0.3, 2)],
)
def test_both_parts_of_a_video_get_frames(num_frames, holdout, cut):
    assert time_split(num_frames, holdout) == cut


@pytest.mark.parametrize("num_frames", [2, 3, 10, 41, 300])
@pytest.mark.parametrize(("holdout", "gap"), [(0.3, 0.05), (0.9, 0.0), (0.05, 0.9)])
@pytest.mark.parametrize("parts", [1, 3, 7])
def test_time_parts_are_disjoint_and_none_is_empty(num_frames, holdout, gap, parts):
    training, test = time_parts(num_frames, holdout, gap=gap, parts=parts)
    start = time_split(num_frames, holdout)
    assert training == range(max(start - round(gap * num_frames), 1))
    assert [frame for part in test for frame in part] == list(range(start, num_frames))
    assert len(test) == min(parts, num_frames - start)
    sizes = [len(part) for part in test]
    assert 1 <= max(sizes) <= min(sizes) + 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: time_parts(9, 0.3, parts=0), "at least 1 part, got 0"),
        (lambda: time_parts(9, 0.3, gap=-0.1), "0 <= gap < 1 - holdout, got -0.1"),
        (lambda: uniform_clip(0, 8, 1, 0, 1), "num_frames of at least 1, got 0"),
        (lambda: uniform_clip(9, 0, 1, 0, 1), "frames of at least 1, got 0"),
        (lambda: uniform_clip(9, 8, 0, 0, 1), "stride of at least 1, got 0"),
        (lambda: uniform_clip(9, 8, 1, 2, 2), r"range\(2\), got 2"),
        (lambda: time_split(1, 0.3), "at least 2 frames, got 1"),
        (lambda: time_split(9, 1.0), "between 0 and 1, got 1.0"),
    ],
)
def test_impossible_requests_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
