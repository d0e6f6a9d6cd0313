"""Samplers of every system: published index vectors, ranges of random starts, short videos."""

import pytest
import torch

from nlkernels.training.config_data import FIXED_CLIPS, DataConfig
from nlkernels.training.data.samplers_segments import SAMPLERS, make_sampler

F = 300


def starts(name, frames, stride=1, clips=10, length=F, fps=30.0, place=0):
    sampler = make_sampler(name, frames=frames, stride=stride, clips=clips)
    return [
        sampler.test(length, fps, clip, None)[place] for clip in range(sampler.test_clips(length))
    ]


def test_caffe2_starts_wrap_at_the_end():
    assert starts("caffe2", 32, 2) == [0, 30, 60, 90, 120, 150, 180, 210, 240, 270]
    last = make_sampler("caffe2", frames=32, stride=2, clips=10).test(F, 30.0, 9, None)
    assert last[-1] == 32
    expected = [0, 29, 59, 89, 118, 148, 178, 207, 237, 267]
    assert starts("caffe2", 32, 2, length=297) == expected
    assert starts("caffe2", 32, 2, length=50) == list(range(0, 50, 5))


def test_mmaction_starts_end_with_the_last_that_fits():
    expected = [0, 26, 53, 79, 105, 132, 158, 184, 211, 237]
    assert starts("mmaction", 32, 2) == expected
    assert starts("mmaction", 32, 2, clips=1) == [237 // 2]
    assert starts("mmaction", 32, 2, length=40) == [0] * 10


def test_dense_starts():
    expected = [0, 26, 52, 78, 104, 131, 157, 183, 209, 236]
    assert starts("tsm_dense", 8) == expected
    assert starts("mmaction_dense", 32, 2) == expected
    sampler = make_sampler("tsm_dense", frames=8, clips=10)
    assert sampler.test(F, 30.0, 9, None) == [(236 + 8 * k) % F for k in range(8)]
    assert sampler.test(40, 30.0, 9, None) == [0, 8, 16, 24, 32, 0, 8, 16]


def test_twice_sample():
    for name in ("tsm_twice", "mmaction_segments_twice"):
        sampler = make_sampler(name, frames=8)
        assert sampler.test_clips(48) == 2
        assert sampler.test(48, 30.0, 0, None) == [3, 9, 15, 21, 27, 33, 39, 45]
        assert sampler.test(48, 30.0, 1, None) == [0, 6, 12, 18, 24, 30, 36, 42]


def test_slowfast_steps_by_nine():
    sampler = make_sampler("slowfast", frames=8, stride=8, clips=10)
    assert sampler.starts(F, 30.0) == pytest.approx([23.6 * clip for clip in range(10)])
    assert sampler.starts(F, 30.0)[-1] == pytest.approx(212.4)
    assert sampler.test(F, 30.0, 0, None) == [0, 9, 18, 27, 36, 45, 54, 63]
    assert sampler.test(F, 30.0, 1, None)[0] == 23
    # At 15 frames a second the same clip has half as many frames of the video in it.
    assert sampler.test(F, 15.0, 0, None) == [0, 4, 8, 13, 17, 22, 26, 31]
    # A short video stops at its last frame.
    assert sampler.test(20, 30.0, 9, None) == [0, 9, 18, 19, 19, 19, 19, 19]


def test_slowfast_with_offsets():
    assert starts("slowfast_offset", 8, 8) == [26 * clip for clip in range(10)]
    assert starts("slowfast_offset", 8, 8, clips=1) == [118]


def test_pytorchvideo_takes_seconds():
    sampler = make_sampler("pytorchvideo", frames=8, stride=8, clips=10)
    # 236 free frames in ten steps, frames 0 to 63 of the clip.
    assert sampler.test(F, 30.0, 0, None) == [0, 9, 18, 27, 36, 45, 54, 63]
    assert starts("pytorchvideo", 8, 8) == [0, 24, 48, 71, 95, 118, 142, 166, 189, 213]
    assert max(sampler.test(20, 30.0, 3, None)) == 19


def test_tushar_centres():
    expected = [16, 45, 75, 105, 135, 164, 194, 224, 254, 284]
    assert starts("tushar", 32, place=16) == expected
    assert starts("tushar_centre", 32) == [150 - 16]
    sampler = make_sampler("tushar", frames=32, clips=10)
    assert sampler.test(F, 30.0, 0, None) == list(range(32))
    # Twenty frames: the slice around centre 4 begins at -12, which counts from the end.
    short = sampler.test(20, 30.0, 9, None)
    assert short == [(8 + step % 12) for step in range(32)]


def test_tushar_stores_every_second_frame_of_a_video():
    sampler = make_sampler("tushar_centre", frames=32, stride=2)
    assert sampler.test(F, 30.0, 0, None) == list(range(118, 182, 2))


def test_inception_windows():
    sampler = make_sampler("inception", frames=64)
    assert sampler.by_length
    assert [sampler.test_clips(length) for length in (1, 2, 64, 65, 66, 150)] == [0, 1, 1, 1, 2, 3]
    assert sampler.test(150, 25.0, 2, None) == [128 + step % 22 for step in range(64)]
    # Validation: a step of ceil((F - 1 - 64) / 2), and windows to the end of the video.
    assert starts("inception_val", 64, clips=3, length=100) == [0, 18, 36, 54, 72, 90]
    assert starts("inception_val", 64, clips=3, length=300) == [0, 118, 236]


def test_mindspore_regions():
    sampler = make_sampler("mindspore", frames=32, stride=6, clips=4)
    # |300 - (192 + 4)| / 4 = 26, in the middles of four parts.
    assert [sampler.test(F, 30.0, clip, None)[0] for clip in range(4)] == [13, 39, 65, 91]
    one = make_sampler("mindspore", frames=32, stride=6)
    drawn = [one.test(F, 30.0, 0, seeded(seed)) for seed in range(2000)]
    assert {clip[0] for clip in drawn} == set(range(107 + 1))
    assert all(clip[1] == clip[0] + 6 for clip in drawn)
    # A short video: |100 - 193| = 93 free places all the same, and frames wrap.
    assert {one.train(100, 30.0, seeded(seed))[0] for seed in range(2000)} == set(range(94))
    assert max(one.train(100, 30.0, seeded(1))) < 100


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("name", "frames", "stride", "length", "first"),
    [
        ("caffe2", 4, 2, 20, range(13)),
        ("mmaction", 4, 2, 20, range(13)),
        ("mmaction_dense", 4, 2, 70, range(6)),
        ("tsm_dense", 8, 1, 70, range(6)),
        ("tushar", 4, 1, 10, range(6)),
        ("inception", 4, 1, 10, range(6)),
        ("mindspore", 4, 2, 20, range(12)),
        ("slowfast", 4, 2, 20, range(12)),
        ("pytorchvideo", 4, 2, 20, range(13)),
        ("tsm", 4, 1, 20, range(5)),
        ("mmaction_segments", 4, 1, 20, range(5)),
    ],
)
def test_training_clips_start_everywhere_they_should(name, frames, stride, length, first):
    sampler = make_sampler(name, frames=frames, stride=stride)
    drawn = [sampler.train(length, 30.0, seeded(seed)) for seed in range(600)]
    if name == "pytorchvideo":
        drawn = [clip for clip in drawn if clip[0] > 0]  # 0 has no width: the ceiling of a draw
        first = range(1, 13)
    assert {clip[0] for clip in drawn} == set(first)
    assert all(len(clip) == frames for clip in drawn)


@pytest.mark.parametrize("name", ["tsm", "mmaction_segments"])
def test_every_segment_gives_one_frame(name):
    sampler = make_sampler(name, frames=8)
    for seed in range(50):
        clip = sampler.train(85, 30.0, seeded(seed))
        assert [frame // 10 for frame in clip] == list(range(8))


def test_segments_of_videos_that_are_too_short():
    assert make_sampler("tsm", frames=8).train(5, 30.0, seeded(0)) == [0] * 8
    expected = [0, 1, 1, 2, 2, 3, 4, 4]
    assert make_sampler("mmaction_segments", frames=8).train(5, 30.0, seeded(0)) == expected
    assert make_sampler("tsm", frames=8).test(5, 30.0, 0, None) == [0, 0, 1, 2, 2, 3, 4, 4]


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("length", [1, 2, 3, 7, 31, 64, 65, 300])
def test_frames_exist_whatever_the_length(name, length):
    sampler = make_sampler(name, frames=16, stride=4, clips=3)
    clips = [sampler.train(length, 24.0, seeded(seed)) for seed in range(5)]
    clips += [
        sampler.test(length, 24.0, clip, seeded(clip)) for clip in range(sampler.test_clips(length))
    ]
    for clip in clips:
        assert len(clip) == 16
        assert all(isinstance(frame, int) and 0 <= frame < length for frame in clip)


@pytest.mark.parametrize("name", SAMPLERS)
def test_training_clips_are_functions_of_their_generator(name):
    sampler = make_sampler(name, frames=8, stride=2)
    assert sampler.train(F, 30.0, seeded(3)) == sampler.train(F, 30.0, seeded(3))
    if name != "tushar_centre":
        assert len({tuple(sampler.train(F, 30.0, seeded(seed))) for seed in range(9)}) > 1


def test_the_configuration_knows_every_sampler():
    names = DataConfig.__dataclass_fields__["sampler"].type.__args__
    assert list(names) == list(SAMPLERS)
    ones = {name for name in SAMPLERS if make_sampler(name, frames=4, clips=7).test_clips(40) != 7}
    assert set(FIXED_CLIPS) == ones - {"inception_val"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "c2"}, "expected one of caffe2, .* got 'c2'"),
        ({"frames": 0}, "expected frames of at least 1, got 0"),
        ({"stride": 0}, "expected stride of at least 1, got 0"),
        ({"clips": 0}, "expected clips of at least 1, got 0"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_impossible_samplers_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_sampler(**({"name": "caffe2", "frames": 4} | options))
