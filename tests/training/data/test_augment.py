"""Recipes of training clips: which windows can be drawn, and what becomes of pixels."""

import pytest
import torch

from nlkernels.training.config_data import DataConfig
from nlkernels.training.data.augment import (
    RECIPES,
    Augmentation,
    fixed_places,
    multi_scale_sizes,
)
from nlkernels.training.data.colours import NORMALISATIONS, Jitter, draw_jitter
from nlkernels.training.data.crops import TestCrops
from nlkernels.training.data.resizing import RULES
from nlkernels.training.data.transforms import TestTransform, TrainTransform
from nlkernels.training.data.views import Look, View, cut, render

PLAIN = Look(RULES["caffe2"], NORMALISATIONS["grey"])


def frames(height, width, count=2, channels=3):
    generator = torch.Generator().manual_seed(height * 1000 + width)
    levels = torch.randint(256, (count, height, width, channels), generator=generator)
    return levels.to(torch.uint8)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def drawn(recipe, height, width, *, short_side=(8, 8), size=8, count=600):
    augmentation = Augmentation(recipe, short_side, size)
    return [augmentation.draw(height, width, seeded(seed)) for seed in range(count)]


def test_caffe2_scales_to_every_whole_side_and_cuts_anywhere():
    views = drawn("caffe2", 64, 80, short_side=(32, 35), size=32, count=2000)
    assert {view.scaled for view in views} == {(32, 40), (33, 41), (34, 42), (35, 43)}
    largest = [view for view in views if view.scaled == (35, 43)]
    assert {view.top for view in largest} == set(range(4))
    assert {view.left for view in largest} == set(range(12))
    assert 400 < len(largest) < 600


def test_slowfast_rounds_a_uniform_side_and_leaves_the_last_place_out():
    views = drawn("slowfast", 64, 80, short_side=(32, 35), size=32, count=2000)
    sides = [view.scaled[0] for view in views]
    assert {side: sides.count(side) > 500 for side in set(sides)} == {
        32: False,  # half as often as those in the middle
        33: True,
        34: True,
        35: False,
    }
    largest = [view for view in views if view.scaled == (35, 43)]
    assert {view.top for view in largest} == set(range(3))
    assert {view.left for view in largest} == set(range(11))


def test_slowfast_can_draw_inverse_sides():
    low = [view.scaled[0] for view in drawn("slowfast_inverse", 64, 64, short_side=(20, 60))]
    even = [view.scaled[0] for view in drawn("slowfast", 64, 64, short_side=(20, 60))]
    assert min(low) == min(even) == 20
    # Means of 20 to 60: 40, and ln(3) / (1/20 - 1/60) = 33.
    assert sum(even) / len(even) == pytest.approx(40, abs=1.5)
    assert sum(low) / len(low) == pytest.approx(33, abs=1.5)


def test_mmaction_i3d_cuts_two_squares_at_five_places():
    views = drawn("mmaction_i3d", 256, 340, short_side=(256, 256), size=224)
    assert {(view.height, view.width) for view in views} == {(256, 256), (204, 204)}
    assert {(v.top, v.left) for v in views if v.height == 256} == {(0, 0), (0, 84), (0, 42)}
    small = {(v.top, v.left) for v in views if v.height == 204}
    assert small == {(0, 0), (0, 136), (52, 0), (52, 136), (26, 68)}
    assert {view.size for view in views} == {(224, 224)}


def test_windows_of_tsm_are_nearly_square_and_near_sides_are_the_result_s():
    sizes = multi_scale_sizes(256, 340, 224, (1, 0.875, 0.75, 0.66), 1)
    # 256 * .875 = 224, 192, 168; scales next to each other only.
    sides = (256, 224, 192, 168)
    assert sizes == [
        (h, w) for i, h in enumerate(sides) for j, w in enumerate(sides) if abs(i - j) <= 1
    ]
    assert len(sizes) == 10
    assert multi_scale_sizes(226, 300, 224, (1, 0.5), 0) == [(224, 224), (113, 113)]
    assert len(set(fixed_places(40, 80, 13))) == 13
    assert fixed_places(43, 83, 5) == [(0, 0), (0, 80), (40, 0), (40, 80), (20, 40)]
    views = drawn("tsm", 256, 340, short_side=(256, 256), size=224, count=3000)
    assert {(view.height, view.width) for view in views} == set(sizes)
    assert {view.scaled for view in views} == {None}
    assert len({(v.top, v.left) for v in views if (v.height, v.width) == (168, 168)}) == 13
    scaled = drawn("mmaction_tsm", 512, 680, short_side=(256, 256), size=224, count=3000)
    assert {(view.height, view.width) for view in scaled} == set(sizes)
    assert {view.scaled for view in scaled} == {(256, 340)}
    five = drawn("mmaction_c2d", 512, 680, short_side=(256, 256), size=224, count=3000)
    assert len({(v.top, v.left) for v in five if (v.height, v.width) == (168, 168)}) == 5


def test_resized_crops_have_their_areas_and_ratios():
    views = drawn("mmaction_slowonly", 256, 340, short_side=(256, 256), size=224, count=1500)
    shares = [view.height * view.width / (256 * 340) for view in views]
    ratios = [view.width / view.height for view in views]
    assert 0.07 < min(shares) < 0.1
    assert 0.7 < max(shares) <= 1
    assert 0.73 < min(ratios) < 0.78
    assert 1.27 < max(ratios) < 1.37


def test_inception_cuts_corners_and_the_centre_of_five_scales():
    views = drawn("inception", 240, 320, short_side=(224, 224), size=224, count=1000)
    # 240 times powers of 2^(-1/4); windows in the middle have an even side.
    assert {view.height for view in views} == {240, 201, 200, 169, 168, 142, 119, 118}
    whole = {(view.top, view.left) for view in views if view.height == 240}
    assert whole == {(0, 0), (0, 80), (0, 40)}
    assert all(view.height == view.width for view in views)
    assert all(view.size == (224, 224) for view in views)


@pytest.mark.parametrize("recipe", ["tushar", "mindspore"])
def test_one_side_and_windows_anywhere(recipe):
    views = drawn(recipe, 64, 80, short_side=(16, 30), size=14, count=1000)
    assert {view.scaled for view in views} == {(16, 20)}
    assert {view.top for view in views} == set(range(3))
    assert {view.left for view in views} == set(range(7))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("height", "width"), [(30, 44), (52, 36), (24, 24), (23, 90)])
def test_every_recipe_renders_frames_of_any_shape(recipe, height, width):
    transform = TrainTransform(Augmentation(recipe, short_side=(24, 28), size=20))
    for seed in range(20):
        view = transform.view(height, width, seeded(seed), crop=0, label=0)
        clip = transform.render(frames(height, width), view)
        assert clip.shape == (3, 2, 20, 20)
        assert clip.dtype == torch.float32
        assert clip.is_contiguous()


def test_the_configuration_knows_every_recipe():
    fields = DataConfig.__dataclass_fields__
    assert set(fields["augment"].type.__args__) == set(RECIPES)
    assert set(fields["colours"].type.__args__) == set(NORMALISATIONS)


def test_half_of_the_clips_are_mirrored_and_none_of_left_and_right():
    transform = TrainTransform(Augmentation("none", (8, 8), 8), unflipped=frozenset({1}))
    views = [transform.view(8, 8, seeded(seed), label=0) for seed in range(400)]
    assert 160 < sum(view.mirrored for view in views) < 240
    assert not any(transform.view(8, 8, seeded(s), label=1).mirrored for s in range(50))
    off = TrainTransform(Augmentation("none", (8, 8), 8), flip=False)
    assert not any(off.view(8, 8, seeded(s), label=0).mirrored for s in range(50))


def test_mirroring_changes_nothing_else():
    options = {"augmentation": Augmentation("caffe2", (9, 12), 8), "jitter": (0.3, 0.3, 0.3)}
    one, other = TrainTransform(**options), TrainTransform(**options, flip=False)
    for seed in range(20):
        a, b = (transform.view(20, 30, seeded(seed)) for transform in (one, other))
        assert (a.scaled, a.top, a.left, a.jitter) == (b.scaled, b.top, b.left, b.jitter)


def test_render_cuts_scales_mirrors_and_normalises():
    video = frames(6, 8)
    clip = render(video, View(None, 1, 2, 3, 4, mirrored=True), PLAIN)
    assert clip.shape == (3, 2, 3, 4)
    pixel = (int(video[1, 2, 5, 2]) - 114.75) / 57.375
    assert clip[2, 1, 1, 0].item() == pytest.approx(pixel)
    scaled = render(video, View((12, 16), 0, 0, 12, 16, size=(6, 8)), PLAIN)
    assert scaled.shape == (3, 2, 6, 8)
    bgr = render(
        video, View(None, 0, 0, 6, 8), Look(PLAIN.rule, PLAIN.normalisation, channels="bgr")
    )
    assert torch.equal(bgr.flip(0), render(video, View(None, 0, 0, 6, 8), PLAIN))


@pytest.mark.parametrize(
    ("name", "level", "expected"),
    [
        ("grey", 255, (255 / 255 - 0.45) / 0.225),
        ("imagenet", 255, (1 - 0.485) / 0.229),
        ("mindspore", 0, -0.485 / 0.229),
        ("unit", 0, -1),
        ("unit", 255, 1),
        ("flow_tsm", 255, 0.5 / 0.226),
        ("flow_inception", 255, (255 - (114.7748 + 107.7354 + 99.475) / 3) / 255 * 2 - 1),
    ],
)
def test_normalisations(name, level, expected):
    channels = 2 if name.startswith("flow") else 3
    video = torch.full((1, 1, 1, channels), level, dtype=torch.uint8)
    look = Look(RULES["caffe2"], NORMALISATIONS[name])
    clip = render(video, View(None, 0, 0, 1, 1), look)
    assert clip[0].item() == pytest.approx(expected, abs=1e-5)


def test_mindspore_s_blue_is_its_own():
    video = torch.full((1, 1, 1, 3), 255, dtype=torch.uint8)
    view = View(None, 0, 0, 1, 1)
    blue = [
        render(video, view, Look(RULES["caffe2"], NORMALISATIONS[name]))[2].item()
        for name in ("imagenet", "mindspore")
    ]
    assert blue == pytest.approx([(1 - 0.406) / 0.225, (1 - 0.406) / 0.255], abs=1e-5)


def test_mirrored_flow_is_negated_except_in_inception():
    flow = frames(4, 6, channels=2)
    transform = TrainTransform(Augmentation("tsm", (4, 4), 4), colours="unit")
    view = View(None, 0, 0, 4, 6, mirrored=True)
    clip = transform.render(flow, view)
    levels = (clip + 1) * 127.5
    expected = flow.flip(2).permute(3, 0, 1, 2).float()
    assert torch.allclose(levels[0], 255 - expected[0], atol=1e-3)
    assert torch.allclose(levels[1], expected[1], atol=1e-3)
    kept = TrainTransform(Augmentation("inception", (4, 4), 4), colours="unit").render(flow, view)
    assert torch.allclose((kept + 1) * 127.5, expected, atol=1e-3)


def test_jitter_mixes_with_black_grey_and_mean_grey():
    video = frames(5, 7).float()
    assert torch.allclose(Jitter((("brightness", 0.5),))(video), video * 0.5)
    grey = video @ torch.tensor([0.299, 0.587, 0.114])
    saturated = Jitter((("saturation", 0.25),))(video)
    assert torch.allclose(saturated, 0.25 * video + 0.75 * grey[..., None], atol=1e-3)
    contrast = Jitter((("contrast", 0.25),))(video)
    mean = grey.mean((1, 2))[:, None, None, None]
    assert torch.allclose(contrast, 0.25 * video + 0.75 * mean, atol=1e-3)
    once = Jitter((("brightness", 0.5), ("contrast", 0.5)))(video)
    again = Jitter((("contrast", 0.5),))(Jitter((("brightness", 0.5),))(video))
    assert torch.equal(once, again)


def test_jitter_is_drawn_within_its_strength_and_in_any_order():
    draws = [draw_jitter((0.4, 0, 0.2), seeded(seed)).steps for seed in range(300)]
    assert {tuple(name for name, _ in steps) for steps in draws} == {
        ("brightness", "saturation"),
        ("saturation", "brightness"),
    }
    brightness = [dict(steps)["brightness"] for steps in draws]
    assert 0.6 <= min(brightness) < 0.65
    assert 1.35 < max(brightness) <= 1.4
    generator = seeded(0)
    assert draw_jitter((0, 0, 0), generator) is None
    assert torch.equal(generator.get_state(), seeded(0).get_state())


def test_test_transform_takes_the_centre():
    video = frames(50, 61)
    transform = TestTransform(TestCrops("centre", "caffe2", 50, 48))
    view = transform.view(50, 61, seeded(0))
    expected = render(video, View(None, 1, 6, 48, 48), PLAIN)
    assert torch.equal(transform.render(video, view), expected)


def test_one_window_for_all_frames_of_a_clip():
    still = frames(60, 80, 1).expand(5, -1, -1, -1)
    transform = TrainTransform(Augmentation("caffe2", (48, 56), 40))
    out = transform.render(still, transform.view(60, 80, seeded(4)))
    assert torch.equal(out, out[:, :1].expand_as(out))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Augmentation("c2", (56, 64), 48), ValueError, "expected one of none, .* got 'c2'"),
        (lambda: Augmentation("caffe2", (40, 56), 48), ValueError, "1 <= size <= short_side"),
        (lambda: Augmentation("caffe2", (56, 48), 48), ValueError, "1 <= size <= short_side"),
        (lambda: cut(frames(8, 8), 4, 0, 5, 5), ValueError, "window inside 8x8, got 5x5"),
        (
            lambda: render(frames(8, 8).float(), View(None, 0, 0, 8, 8), PLAIN),
            TypeError,
            "expected uint8 frames",
        ),
        (
            lambda: render(frames(8, 8)[0], View(None, 0, 0, 8, 8), PLAIN),
            ValueError,
            r"expected frames \(T, H, W, 3\)",
        ),
    ],
)
def test_impossible_requests_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
