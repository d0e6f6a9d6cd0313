"""Folders of images and of flow pairs under the published templates."""

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from nlkernels.training.data.frame_folders import (
    TEMPLATES,
    FrameFolder,
    Naming,
    guess_template,
    locate,
)
from nlkernels.training.data.reader import VideoReadError

image = pytest.importorskip("PIL.Image", reason="needs Pillow: pip install 'nlkernels[train]'")


def write(path, level, size=(6, 8), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (*size, 3) if mode == "RGB" else size
    image.fromarray(np.full(shape, level, np.uint8)).save(path, quality=95)


def fill(root, name, naming, count):
    for number in range(count):
        for axis, path in enumerate(naming.paths(root, name, number)):
            level = 10 + 10 * number + axis
            write(path, level, mode="L" if naming.flow else "RGB")


@pytest.mark.parametrize(
    ("template", "flow", "name", "files"),
    [
        ("img_{:05d}.jpg", False, "tea/a", ["tea/a/img_00003.jpg"]),
        ("{:06d}.jpg", False, "12", ["12/000003.jpg"]),
        ("flow_{}_{:05d}.jpg", True, "a", ["a/flow_x_00003.jpg", "a/flow_y_00003.jpg"]),
        ("{}_{:05d}.jpg", True, "a", ["a/x_00003.jpg", "a/y_00003.jpg"]),
        (
            "{:06d}-{}_{:05d}.jpg",
            True,
            "12",
            ["000012/000012-x_00003.jpg", "000012/000012-y_00003.jpg"],
        ),
        ("frame{:06d}.jpg", True, "a", ["u/a/frame000003.jpg", "v/a/frame000003.jpg"]),
    ],
)
def test_published_names(tmp_path, template, flow, name, files):
    naming = Naming(template, flow=flow)
    paths = [path.relative_to(tmp_path).as_posix() for path in naming.paths(tmp_path, name, 2)]
    assert paths == files
    assert Naming(template, flow=flow, first=0).paths(tmp_path, name, 3) == naming.paths(
        tmp_path, name, 2
    )
    fill(tmp_path, name, naming, 5)
    (naming.folders(tmp_path, name)[0] / "notes.txt").write_text("no image")
    assert naming.count(tmp_path, name) == 5
    with closing(FrameFolder.open(tmp_path, name, naming)) as video:
        frames = video.frames([4, 0, 0, 2])
    assert (len(video), video.fps) == (5, 30.0)
    assert frames.shape == (4, 6, 8, 2 if flow else 3)
    assert frames.dtype == torch.uint8
    expected = torch.tensor([50, 10, 10, 30])[:, None] + torch.arange(2 if flow else 1)
    assert (frames[:, 3, 4].int() - expected).abs().max() <= 1


def test_every_template_is_legal():
    for name, template in TEMPLATES.items():
        Naming(template, flow=name.startswith("flow"))


def test_n_frames_says_the_length(tmp_path):
    naming = Naming("frame{:06d}.jpg", flow=True)
    fill(tmp_path, "a", naming, 3)
    (tmp_path / "u" / "a" / "n_frames").write_text("2\n")
    assert len(FrameFolder.open(tmp_path, "a", naming)) == 2


def test_lists_of_something_v1_count_both_images():
    assert Naming("{:06d}-{}_{:05d}.jpg", flow=True).frames_of(97) == 48
    assert Naming("flow_{}_{:05d}.jpg", flow=True).frames_of(97) == 97


def test_flow_in_the_colours_of_one_image_is_refused(tmp_path):
    write(tmp_path / "a" / "img_00001.jpg", (90, 160, 0))
    naming = Naming("img_{:05d}.jpg", flow=True)
    with pytest.raises(VideoReadError, match=r"no such folder, but .*not from the colours of one"):
        FrameFolder.open(tmp_path, "a", naming)
    for axis in "uv":
        write(tmp_path / axis / "b" / "img_00001.jpg", (90, 160, 0))
        write(tmp_path / axis / "c" / "img_00001.jpg", 90)
    with pytest.raises(VideoReadError, match=r"img_00001.jpg is a colour image, flow is read from"):
        FrameFolder.open(tmp_path, "b", naming).frames([0])
    # Three equal colours are grey.
    assert (FrameFolder.open(tmp_path, "c", naming).frames([0]) == 90).all()


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_are_found_by_the_images(tmp_path, name):
    naming = Naming(TEMPLATES[name], flow=name.startswith("flow"))
    fill(tmp_path, "12", naming, 2)
    for folder in naming.folders(tmp_path, "12"):
        found = Naming(guess_template(folder, flow=naming.flow), flow=naming.flow)
        root, video = locate(folder, found)
        expected = naming.paths(tmp_path, "12", 1)
        assert found.paths(root, video, 1) == expected
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"expected (flow|RGB) images in .*; set data.template"):
        guess_template(tmp_path / "none", flow=naming.flow)


def test_flow_of_two_folders_is_named_by_either():
    naming = Naming("frame{:06d}.jpg", flow=True)
    with pytest.raises(ValueError, match=r"expected a folder of images in u or v .*; name ROOT/u"):
        locate(Path("a/b"), naming)


def gone(root):
    (root / "a" / "img_00002.jpg").unlink()


def text(root):
    (root / "a" / "img_00002.jpg").write_text("no image")


def empty(root):
    (root / "a" / "img_00002.jpg").write_bytes(b"")


def cut(root):
    whole = (root / "a" / "img_00002.jpg").read_bytes()
    (root / "a" / "img_00002.jpg").write_bytes(whole[: len(whole) // 2])


def other_size(root):
    write(root / "a" / "img_00002.jpg", 9, size=(4, 4))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (gone, "no such image: img_00002.jpg"),
        (text, "img_00002.jpg: cannot identify"),
        (empty, "img_00002.jpg: cannot identify"),
        (cut, "img_00002.jpg: .*[Tt]runcated"),
        (other_size, "images of several sizes"),
    ],
)
def test_damaged_images_are_one_class_of_error(tmp_path, damage, reason):
    fill(tmp_path, "a", Naming("img_{:05d}.jpg"), 3)
    damage(tmp_path)
    video = FrameFolder.open(tmp_path, "a", Naming("img_{:05d}.jpg"), num_frames=3)
    assert video.frames([0, 2]).shape[0] == 2
    with pytest.raises(VideoReadError, match=reason):
        video.frames([0, 1])


def test_folders_that_are_none(tmp_path):
    with pytest.raises(VideoReadError, match="no such folder"):
        FrameFolder.open(tmp_path, "none", Naming("{:05d}.jpg"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(VideoReadError, match="no images named like"):
        FrameFolder.open(tmp_path, "empty", Naming("{:05d}.jpg"))
    fill(tmp_path, "a", Naming("{:05d}.jpg"), 2)
    video = FrameFolder.open(tmp_path, "a", Naming("{:05d}.jpg"))
    with pytest.raises(VideoReadError, match="has 2 frames, frames 0 to 2 were asked for"):
        video.frames([0, 2])
    with pytest.raises(ValueError, match="at least one index"):
        video.frames([])
    with pytest.raises(VideoReadError, match="expected the number of a video"):
        Naming("{:06d}-{}_{:05d}.jpg", flow=True).paths(tmp_path, "tea", 0)


@pytest.mark.parametrize(
    ("template", "flow"),
    [("img.jpg", False), ("{}_{:05d}.jpg", False), ("flow.jpg", True), ("{:05d", False)],
)
def test_impossible_templates_are_refused(template, flow):
    with pytest.raises(ValueError, match=r"expected a template with .* places in braces"):
        Naming(template, flow=flow)
