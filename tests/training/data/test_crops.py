"""Sizes of scaled frames and places of test windows, by the rule of every system."""

import pytest
import torch

from nlkernels.training.config_data import DataConfig
from nlkernels.training.data.crops import COUNTS, TestCrops, three_places
from nlkernels.training.data.resizing import RULES, resize


def lefts(rule, width, kind="three", height=256, size=256):
    crops = TestCrops(kind, rule, short_side=256, size=size)
    return [crops.view(height, width, crop).left for crop in range(len(crops))]


@pytest.mark.parametrize(
    ("rule", "of_340", "of_343"),
    [
        ("caffe2", [0, 42, 84], [0, 43, 86]),
        ("mmaction", [0, 84, 42], [0, 86, 43]),
        ("slowfast", [0, 42, 84], [0, 44, 87]),
        ("tsm", [0, 84, 42], [0, 84, 42]),
        ("mindspore", [0, 84, 42], [0, 86, 43]),
    ],
)
def test_three_windows_of_frames_256_high(rule, of_340, of_343):
    assert lefts(rule, 340) == of_340
    assert lefts(rule, 343) == of_343


def tops(rule, size=256):
    crops = TestCrops("three", rule, short_side=256, size=size)
    return [(crops.view(343, 256, crop).top, crops.view(343, 256, crop).left) for crop in range(3)]


def test_upright_frames_move_down():
    assert tops("caffe2") == [(0, 0), (43, 0), (86, 0)]
    assert tops("mmaction") == [(0, 0), (86, 0), (43, 0)]
    assert tops("slowfast") == [(0, 0), (44, 0), (87, 0)]
    # TSM takes left, right and centre of any frame: here three times the same window.
    assert tops("tsm") == [(42, 0)] * 3


def test_windows_smaller_than_the_short_side():
    assert three_places("slowfast", 33, 40) == [(17, 0), (17, 20), (17, 40)]
    assert three_places("tsm", 32, 116) == [(16, 0), (16, 116), (16, 58)]
    # video-nonlocal-net moves along the rows as soon as there are two free ones.
    assert three_places("caffe2", 32, 116) == [(0, 58), (16, 58), (32, 58)]
    assert three_places("caffe2", 1, 116) == [(0, 0), (0, 58), (0, 116)]


@pytest.mark.parametrize(
    ("rule", "left"),
    [
        ("caffe2", 59),
        ("mmaction", 59),
        ("slowfast", 60),
        ("tsm", 60),
        ("inception", 60),
        ("mindspore", 60),
    ],
)
def test_centre_of_an_odd_rest(rule, left):
    # 343 - 224 = 119: cut off, rounded up, or to the even number.
    assert lefts(rule, 343, "centre", size=224) == [left]
    assert lefts("tsm", 341, "centre", size=224) == [58]  # 58.5


def test_ten_windows_are_pairs_of_mirror_images():
    crops = TestCrops("ten", "tsm", short_side=256, size=224)
    views = [crops.view(256, 340, crop) for crop in range(10)]
    assert [(view.top, view.left) for view in views[::2]] == [
        (0, 0),
        (0, 116),
        (32, 0),
        (32, 116),
        (16, 58),
    ]
    assert [view.mirrored for view in views] == [False, True] * 5
    assert [(v.top, v.left) for v in views[::2]] == [(v.top, v.left) for v in views[1::2]]
    five = TestCrops("five", "tsm", short_side=256, size=224)
    assert [five.view(256, 340, crop) for crop in range(5)] == views[::2]


def test_six_windows_are_three_and_their_mirror_images():
    crops = TestCrops("six_flip", "caffe2", short_side=256, size=256)
    views = [crops.view(256, 340, crop) for crop in range(6)]
    assert [view.left for view in views] == [0, 42, 84, 0, 42, 84]
    assert [view.mirrored for view in views] == [False] * 3 + [True] * 3


def test_random_windows_depend_on_the_generator_alone():
    crops = TestCrops("three_random", "tsm", short_side=256, size=224)
    seen = [crops.view(256, 340, 0, torch.Generator().manual_seed(seed)) for seed in range(3000)]
    assert seen[5] == crops.view(256, 340, 2, torch.Generator().manual_seed(5))
    assert {view.top for view in seen} == set(range(33))
    assert {view.left for view in seen} == set(range(117))


def test_whole_frames():
    view = TestCrops("full", "caffe2", short_side=256, size=999).view(720, 1280, 0)
    assert (view.scaled, view.height, view.width) == ((256, 455), 256, 455)


@pytest.mark.parametrize(
    ("rule", "height", "width", "side", "size"),
    [
        ("caffe2", 720, 1280, 256, (256, 455)),
        ("caffe2", 1280, 720, 256, (455, 256)),
        ("mmaction", 720, 1280, 256, (256, 455)),
        ("mmaction", 240, 426, 256, (256, 454)),
        ("slowfast", 240, 427, 256, (256, 455)),
        ("mmaction", 240, 427, 256, (256, 455)),
        ("mindspore", 240, 424, 256, (256, 452)),
        ("caffe2", 240, 424, 256, (256, 452)),
        ("mmaction", 100, 157, 50, (50, 79)),  # 78.5: up
        ("caffe2", 100, 157, 50, (50, 78)),
        ("tsm", 100, 157, 50, (50, 78)),
        ("caffe2", 64, 64, 48, (48, 48)),
        ("slowfast", 64, 64, 48, (48, 48)),
    ],
)
def test_sizes_of_scaled_frames(rule, height, width, side, size):
    assert RULES[rule].size(height, width, side) == size
    assert RULES[rule].size(width, height, side) == size[::-1] or height == width


def test_single_precision_of_caffe2_decides_whole_numbers():
    # 96 * 49 / 84 is 56; in single precision 49 / 84 is a little less than that.
    assert RULES["tsm"].size(84, 96, 49) == (49, 56)
    assert RULES["caffe2"].size(84, 96, 49)[1] in (55, 56)
    cut = [
        (short, long, side)
        for short in range(60, 100)
        for long in range(short, 160)
        for side in range(48, 64)
        if RULES["caffe2"].size(short, long, side) != RULES["tsm"].size(short, long, side)
    ]
    assert cut
    for short, long, side in cut:
        assert long * side % short == 0, "they differ where the exact product is whole only"
        assert RULES["caffe2"].size(short, long, side)[1] == long * side // short - 1


def frames(height, width, count=2):
    generator = torch.Generator().manual_seed(height * 1000 + width)
    levels = torch.randint(256, (count, height, width, 3), generator=generator)
    return levels.to(torch.uint8)


def test_interpolation_is_between_pixel_centres():
    ramp = torch.tensor([0, 40, 80, 120], dtype=torch.uint8)
    video = ramp[None, None, :, None].expand(1, 2, 4, 3)
    row = resize(video, 4, 8, RULES["caffe2"])[0, 0, :, 0].tolist()
    assert row == [0, 10, 30, 50, 70, 90, 110, 120]


def test_interpolation_matches_that_of_floating_point():
    video = frames(37, 53, 3)
    planes = video.permute(0, 3, 1, 2).double()
    exact = torch.nn.functional.interpolate(planes, (24, 34), mode="bilinear").permute(0, 2, 3, 1)
    whole = resize(video, 24, 34, RULES["caffe2"])
    assert whole.dtype == torch.uint8
    assert (whole.double() - exact).abs().max() <= 1
    levels = resize(video, 24, 34, RULES["slowfast"])
    assert levels.dtype == torch.float32
    assert (levels.double() - exact).abs().max() < 1e-3


def test_antialiasing_is_pillow_s():
    image = pytest.importorskip("PIL.Image", reason="needs Pillow")
    video = frames(90, 120, 1)
    picture = image.fromarray(video[0].numpy()).resize((40, 30), image.Resampling.BILINEAR)
    expected = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(30, 40, 3)
    found = resize(video, 30, 40, RULES["tsm"])[0]
    assert (found.int() - expected.int()).abs().max() <= 1
    plain = resize(video, 30, 40, RULES["caffe2"])[0]
    assert (plain.int() - expected.int()).abs().float().mean() > 10


def test_the_same_size_changes_nothing():
    video = frames(48, 60)
    assert resize(video, 48, 60, RULES["caffe2"]) is video


def test_the_configuration_knows_every_kind():
    fields = DataConfig.__dataclass_fields__
    assert set(fields["test_crops"].type.__args__) == set(COUNTS)
    assert set(fields["crop_rule"].type.__args__) == set(RULES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "four"}, "expected kind from centre, .* got 'four'"),
        ({"rule": "torch"}, "expected rule from caffe2, .* got 'torch'"),
        ({"size": 50}, "expected 1 <= size <= short_side, got size 50 and short_side 40"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_impossible_crops_are_refused(options, message):
    settings = {"kind": "centre", "rule": "caffe2", "short_side": 40, "size": 40} | options
    with pytest.raises(ValueError, match=message):
        TestCrops(**settings)
