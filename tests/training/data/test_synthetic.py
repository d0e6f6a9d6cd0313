"""The generated task: no shortcut to the label, recognisable after encoding, files written once."""

import json
from collections import Counter
from contextlib import closing

import numpy as np
import pytest
import torch

from nlkernels.training.data import synthetic
from nlkernels.training.data.reader import open_video
from nlkernels.training.data.synthetic import (
    CLASSES,
    SHAPES,
    draw_clip,
    draw_scene,
    write_synthetic,
)

SCENES = 12_000


@pytest.fixture(scope="module")
def scenes():
    generator = np.random.default_rng(0)
    return [draw_scene(generator) for _ in range(SCENES)]


@pytest.fixture(scope="module")
def drawn():
    """Clips (800, 8, 48, 48, 3), float32, and labels."""
    generator = np.random.default_rng(1)
    pairs = [draw_clip(generator, label=number % 2) for number in range(800)]
    return torch.stack([clip for clip, _ in pairs]).float(), torch.tensor([y for _, y in pairs])


def test_label_says_whether_shapes_agree(scenes):
    assert all((s.first.shape == s.second.shape) == bool(s.label) for s in scenes)
    assert abs(np.mean([s.label for s in scenes]) - 0.5) < 4 * 0.5 / SCENES**0.5


@pytest.mark.parametrize("which", ["first", "second"])
def test_shape_of_one_object_says_nothing(scenes, which):
    # Chi-square of a table of 2 labels x 4 shapes against equal cells, 7 degrees of freedom.
    cells = Counter((s.label, getattr(s, which).shape) for s in scenes)
    expected = SCENES / 8
    table = [cells[label, shape] for label in (0, 1) for shape in SHAPES]
    assert sum((count - expected) ** 2 / expected for count in table) < 26  # p = 0.0005


@pytest.mark.parametrize("which", ["first", "second"])
def test_nothing_else_of_one_object_says_anything(scenes, which):
    items = [getattr(s, which) for s in scenes]
    values = np.array([[*i.colour, i.area, i.x, i.y, i.drift] for i in items])
    for factor in (np.array([s.label for s in scenes]), np.array([i.shape for i in items])):
        for level in np.unique(factor):
            group, rest = values[factor == level], values[factor != level]
            error = np.sqrt(group.var(0) / len(group) + rest.var(0) / len(rest))
            assert (abs(group.mean(0) - rest.mean(0)) < 4.5 * error).all()


def test_objects_are_drawn_independently(scenes):
    first, second = (
        np.array([[*i.colour, i.area, i.x, i.y, i.drift] for i in items])
        for items in ([s.first for s in scenes], [s.second for s in scenes])
    )
    correlation = np.corrcoef(first.T, second.T)[:7, 7:]
    assert abs(correlation).max() < 4.5 / SCENES**0.5


def object_pixels(clips):
    """Where a clip differs from its middle frame, which is background, (B, T, H, W)."""
    return (clips - clips[:, 4:5]).abs().amax(4) > 45


def test_objects_are_never_visible_together_and_keep_their_half(drawn):
    seen = object_pixels(drawn[0])
    assert not seen[:, 2:6].any(), "the middle of the clip is empty"
    left, right = seen[..., :24].sum((2, 3)), seen[..., 24:].sum((2, 3))
    assert (left[:, :2].min(), right[:, 6:].min()) > (90, 90)
    assert (right[:, :2].max(), left[:, 6:].max()) == (0, 0)
    assert not seen[:, :, [0, -1]].any(), "no object leaves the picture"


def test_all_shapes_cover_the_same_area():
    generator = np.random.default_rng(2)
    ratios = {shape: [] for shape in SHAPES}
    for _ in range(80):
        item = draw_scene(generator).first
        ratios[item.shape].append(synthetic._cover(item, item.y, 48).sum() / item.area)
    for shape, found in ratios.items():
        assert np.mean(found) == pytest.approx(1, abs=0.03), shape


def nearest_mean_accuracy(features, labels):
    """Trained on the first half, tested on the second."""
    features = (features - features.mean(0)) / features.std(0).clamp(min=1e-6)
    half = len(labels) // 2
    means = torch.stack([features[:half][labels[:half] == label].mean(0) for label in (0, 1)])
    guess = torch.cdist(features[half:], means).argmin(1)
    return (guess == labels[half:]).double().mean().item()


@pytest.mark.parametrize(
    "statistics",
    [
        lambda clips: clips.mean((1, 2, 3)),
        lambda clips: clips.mean((2, 3)).flatten(1),
        lambda clips: clips.std((2, 3)).flatten(1),
        lambda clips: object_pixels(clips).sum((2, 3)).float(),
        lambda clips: clips.amax((2, 3)).flatten(1),
    ],
    ids=["mean-colour", "mean-per-frame", "spread-per-frame", "object-pixels", "brightest"],
)
def test_statistics_of_frames_do_not_tell_the_label(drawn, statistics):
    # 400 clips to test on: 4 standard deviations of a coin are 10 points.
    assert 0.4 < nearest_mean_accuracy(statistics(drawn[0]), drawn[1]) < 0.6


def test_shapes_survive_encoding(tmp_path, decord):
    pytest.importorskip("av", reason="needs PyAV: pip install 'nlkernels[video]'")
    write_synthetic(tmp_path, train=2, test=40, seed=3)
    for number in range(40):
        generator = np.random.default_rng([3, 1, number])
        scene = draw_scene(generator, label=number % 2)
        with closing(
            open_video(tmp_path / "test" / CLASSES[number % 2] / f"{number:05d}.mp4")
        ) as v:
            seen = object_pixels(v.frames(range(8))[None].float())[0]
        for item, frame in ((scene.first, 0), (scene.second, 6)):
            agreement = {}
            for shape in SHAPES:
                # The object that was drawn, in every shape: the true one has to fit best.
                other = synthetic.SceneObject(**{**vars(item), "shape": shape})
                cover = torch.from_numpy(synthetic._cover(other, item.y, 48) > 0.5)
                agreement[shape] = (
                    (cover & seen[frame]).sum() / (cover | seen[frame]).sum()
                ).item()
            ranked = sorted(SHAPES, key=agreement.get, reverse=True)
            assert ranked[0] == item.shape
            assert agreement[ranked[0]] > 0.75
            assert agreement[ranked[0]] > agreement[ranked[1]] + 0.1


def test_clips_are_functions_of_their_generator():
    one, other = (draw_clip(np.random.default_rng(5)) for _ in range(2))
    assert torch.equal(one[0], other[0])
    assert one[1] == other[1]


@pytest.mark.parametrize(("frames", "size"), [(4, 32), (8, 48), (16, 64)])
def test_other_lengths_and_sizes(frames, size):
    clip, label = draw_clip(np.random.default_rng(0), label=1, frames=frames, size=size)
    assert (clip.shape, clip.dtype, label) == ((frames, size, size, 3), torch.uint8, 1)


@pytest.fixture
def written(tmp_path):
    pytest.importorskip("av", reason="needs PyAV: pip install 'nlkernels[video]'")
    root = tmp_path / "clips"
    write_synthetic(root, train=6, test=4, seed=0)
    return root


def listing(root):
    return {
        str(path.relative_to(root)): path.stat().st_mtime_ns for path in sorted(root.rglob("*.mp4"))
    }


def test_files_and_classes(written):
    assert list(listing(written)) == [
        *(f"test/different/{n:05d}.mp4" for n in (0, 2)),
        *(f"test/same/{n:05d}.mp4" for n in (1, 3)),
        *(f"train/different/{n:05d}.mp4" for n in (0, 2, 4)),
        *(f"train/same/{n:05d}.mp4" for n in (1, 3, 5)),
    ]


def test_complete_folder_is_left_alone(written):
    before = listing(written)
    write_synthetic(written, train=6, test=4, seed=0)
    assert listing(written) == before


def test_more_files_keep_the_earlier_clips(written, tmp_path):
    write_synthetic(tmp_path / "more", train=8, test=4, seed=0)
    for name in listing(written):
        assert (written / name).read_bytes() == (tmp_path / "more" / name).read_bytes()


def lost_file(root):
    (root / "train" / "same" / "00003.mp4").unlink()


def interrupted(root):
    (root / "manifest.json").write_text(json.dumps({"complete": False}))


def other_version(root):
    manifest = json.loads((root / "manifest.json").read_text())
    (root / "manifest.json").write_text(json.dumps(manifest | {"version": -1}))


@pytest.mark.parametrize("damage", [lost_file, interrupted, other_version])
def test_incomplete_folder_is_written_anew(written, damage):
    before = listing(written)
    damage(written)
    write_synthetic(written, train=6, test=4, seed=0)
    after = listing(written)
    assert list(after) == list(before)
    assert all(after[name] > before[name] for name in before)


def test_other_parameters_replace_the_files(written):
    write_synthetic(written, train=2, test=2, seed=1)
    assert len(listing(written)) == 4


def test_folder_of_others_is_not_touched(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "precious.mp4").write_text("mine")
    with pytest.raises(ValueError, match="expected a new or empty folder"):
        write_synthetic(tmp_path, train=2, test=2, seed=0)
    assert (tmp_path / "train" / "precious.mp4").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": 1}, "expected train of at least 2 files, one per class, got 1"),
        ({"test": 0}, "expected test of at least 2 files, one per class, got 0"),
        ({"frames": 3}, "expected at least 4 frames, got 3"),
        ({"size": 47}, "expected an even size of at least 16 pixels, got 47"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_impossible_requests_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        write_synthetic(tmp_path / "new", **({"train": 2, "test": 2, "seed": 0} | options))
    assert not (tmp_path / "new").exists()


def test_missing_encoder_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ImportError, match=r"pip install 'nlkernels\[video\]'"):
        write_synthetic(tmp_path / "new", train=2, test=2, seed=0)
    assert not (tmp_path / "new").exists()
