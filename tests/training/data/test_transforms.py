"""Transforms on decoded frames: sizes, values, randomness, errors."""

import pytest
import torch

from nlkernels.training.data.transforms import (
    TestTransform,
    TrainTransform,
    crop,
    flip,
    normalise,
    resize_short_side,
)


def frames(height, width, count=2):
    generator = torch.Generator().manual_seed(height * 1000 + width)
    return torch.randint(256, (count, height, width, 3), generator=generator, dtype=torch.int64).to(
        torch.uint8
    )


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("height", "width", "short_side", "size"),
    [
        (720, 1280, 256, (256, 455)),
        (1280, 720, 256, (455, 256)),
        (256, 340, 320, (320, 425)),
        (64, 64, 48, (48, 48)),
    ],
)
def test_longer_side_is_rounded_down(height, width, short_side, size):
    assert resize_short_side(frames(height, width, 1), short_side).shape == (1, *size, 3)


def test_resize_interpolates_between_pixel_centres():
    ramp = torch.tensor([0, 40, 80, 120], dtype=torch.uint8)
    video = ramp[None, None, :, None].expand(1, 2, 4, 3)
    row = resize_short_side(video, 4)[0, 0, :, 0].tolist()
    assert row == [0, 10, 30, 50, 70, 90, 110, 120]


def test_resize_matches_float_interpolation():
    video = frames(37, 53, 3)
    planes = video.permute(0, 3, 1, 2).double()
    exact = torch.nn.functional.interpolate(planes, (24, 34), mode="bilinear").permute(0, 2, 3, 1)
    assert (resize_short_side(video, 24).double() - exact).abs().max() <= 1


def test_resize_to_the_same_size_changes_nothing():
    video = frames(48, 60)
    assert resize_short_side(video, 48) is video


def test_crop_and_flip():
    video = frames(6, 8)
    assert torch.equal(crop(video, 1, 2, 3, 4), video[:, 1:4, 2:6])
    assert torch.equal(flip(video)[:, :, 0], video[:, :, 7])
    assert torch.equal(flip(flip(video)), video)


def test_normalise_values_and_layout():
    video = frames(4, 5)
    out = normalise(video)
    assert out.shape == (3, 2, 4, 5)
    assert out.dtype == torch.float32
    assert out.is_contiguous()
    assert out[2, 1, 3, 4].item() == pytest.approx((int(video[1, 3, 4, 2]) - 114.75) / 57.375)


def test_test_transform_takes_the_centre():
    video = frames(50, 61)
    assert torch.equal(TestTransform(50, 48)(video, seeded(0)), normalise(video[:, 1:49, 6:54]))


def test_train_transform_is_a_function_of_its_generator():
    transform = TrainTransform((48, 56), 40)
    video = frames(60, 80)
    assert torch.equal(transform(video, seeded(1)), transform(video, seeded(1)))
    assert not torch.equal(transform(video, seeded(1)), transform(video, seeded(2)))


def test_train_transform_reaches_every_window_and_mirror_image():
    video = frames(5, 6, 1)
    windows = {
        (top, left, mirrored): normalise(flip(part) if mirrored else part)
        for top in range(2)
        for left in range(3)
        for mirrored in (False, True)
        for part in [crop(video, top, left, 4, 4)]
    }
    seen = []
    for seed in range(200):
        out = TrainTransform((5, 5), 4)(video, seeded(seed))
        seen += [where for where, window in windows.items() if torch.equal(out, window)]
    assert len(seen) == 200
    assert set(seen) == set(windows)
    assert 70 <= sum(mirrored for _, _, mirrored in seen) <= 130


def test_train_transform_scales_over_its_whole_range():
    video = frames(64, 64, 1)
    seen = set()
    for seed in range(40):
        out = TrainTransform((32, 34), 32, flip=False)(video, seeded(seed))
        for side in (32, 33, 34):
            scaled = resize_short_side(video, side)
            windows = [
                crop(scaled, top, left, 32, 32)
                for top in range(side - 31)
                for left in range(side - 31)
            ]
            if any(torch.equal(out, normalise(window)) for window in windows):
                seen.add(side)
    assert seen == {32, 33, 34}


def test_one_window_for_all_frames_of_a_clip():
    still = frames(60, 80, 1).expand(5, -1, -1, -1)
    out = TrainTransform((48, 56), 40)(still, seeded(4))
    assert torch.equal(out, out[:, :1].expand_as(out))


def test_flip_can_be_switched_off():
    video = frames(8, 8)
    transform = TrainTransform((8, 8), 8, flip=False)
    assert all(torch.equal(transform(video, seeded(s)), normalise(video)) for s in range(20))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: TrainTransform((40, 56), 48), ValueError, "expected 1 <= size <= short_side"),
        (lambda: TrainTransform((56, 48), 48), ValueError, "expected 1 <= size <= short_side"),
        (lambda: TestTransform(40, 48), ValueError, "expected 1 <= size <= short_side"),
        (lambda: crop(frames(8, 8), 4, 0, 5, 5), ValueError, "window inside 8x8"),
        (lambda: resize_short_side(frames(8, 8), 0), ValueError, "at least 1 pixel, got 0"),
        (lambda: normalise(frames(8, 8).float()), TypeError, "expected uint8 frames"),
        (lambda: flip(frames(8, 8)[0]), ValueError, r"expected frames \(T, H, W, 3\)"),
    ],
)
def test_impossible_requests_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
