"""Lists, frames and flow from a folder of videos; the lists are read again by their formats."""

import os
import sys

import numpy as np
import pytest

from nlkernels import cli
from nlkernels.training.data.flow import flow_images, grey, to_levels, tv_l1
from nlkernels.training.data.frame_folders import FrameFolder, Naming
from nlkernels.training.data.lists import read_text_list
from nlkernels.training.data.prepare import prepare


class Still:
    """Stands for a flow method: three pixels to the right, one up."""

    def calc(self, before, after, flow):
        return np.broadcast_to(np.float32([3, -1]), (*before.shape, 2))


@pytest.fixture
def videos(tmp_path, numbered, decord):
    pytest.importorskip("PIL.Image", reason="needs Pillow: pip install 'nlkernels[train]'")
    root = tmp_path / "videos"
    for name in ("clap/1", "clap/2", "clap/3", "wave/1", "wave/2", "wave/3"):
        numbered(root / f"{name}.mp4", 9, step=8)
    (root / "clap" / "4.mp4").write_text("no video")
    (root / "notes.txt").write_text("ignored")
    return root


def test_lists_of_videos(videos, tmp_path):
    made = prepare(videos, tmp_path / "out", test_share=0.4)
    assert (made.classes, made.train, made.test) == (["clap", "wave"], 4, 2)
    assert [os.path.basename(path) for path, _ in made.problems] == ["4.mp4"]
    train = read_text_list(tmp_path / "out" / "train.txt", "mmaction").records
    assert [(record.path, record.label) for record in train] == [
        ("clap/1.mp4", 0),
        ("clap/2.mp4", 0),
        ("wave/1.mp4", 1),
        ("wave/2.mp4", 1),
    ]
    comma = read_text_list(tmp_path / "out" / "train.csv", "pyslowfast", separator=",").records
    assert comma == train
    test = read_text_list(tmp_path / "out" / "test.txt", "caffe2").records
    assert [record.path for record in test] == ["clap/3.mp4", "wave/3.mp4"]
    assert (tmp_path / "out" / "classes.txt").read_text() == "clap\nwave\n"
    assert "4.mp4\t" in (tmp_path / "out" / "problems.txt").read_text()
    assert all(path.is_file() for path in made.lists)


def test_command_line(videos, tmp_path, capsys):
    out = tmp_path / "out"
    argv = ["prepare", str(videos), str(out), "--test-share", "0.4", "--frames"]
    assert cli.main([*argv, "--short-side", "16"]) == 0
    said = capsys.readouterr().out
    assert f"{out}: 4 training and 2 test videos of 2 classes" in said
    assert "left out" in said and "4.mp4" in said
    for name in ("train.txt", "test.csv", "classes.txt", "train_frames.txt"):
        assert (out / name).is_file() and str(out / name) in said
    assert cli.main(["prepare", str(tmp_path / "none"), str(out)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_frames_and_flow(videos, tmp_path):
    out = tmp_path / "out"
    options = {"frames": True, "flow": True, "short_side": 16, "method": Still()}
    prepare(videos, out, **options)
    record = read_text_list(out / "train_frames.txt", "tsm").records[0]
    assert (record.path, record.num_frames) == ("clap/1", 9)
    video = FrameFolder.open(out / "frames", record.path, Naming("img_{:05d}.jpg"), num_frames=9)
    frames = video.frames(range(9))
    assert frames.shape == (9, 16, 20, 3)
    levels = frames.double().mean((1, 2, 3)).tolist()
    assert levels == pytest.approx([10 + 8 * number for number in range(9)], abs=2)
    record = read_text_list(out / "train_flow.txt", "tsm").records[0]
    assert record.num_frames == 8
    naming = Naming("flow_{}_{:05d}.jpg", flow=True)
    flow = FrameFolder.open(out / "flow", record.path, naming).frames([0, 7])
    assert flow.shape == (2, 16, 20, 2)
    assert flow[0, 8, 10].tolist() == pytest.approx([147, 121], abs=1)
    assert not (out / "flow" / ".unfinished").exists()

    marked = out / "frames" / "clap" / "1" / "img_00001.jpg"
    before = marked.stat().st_mtime_ns
    prepare(videos, out, **options)
    assert marked.stat().st_mtime_ns == before


def test_flow_in_the_folders_of_hmdb51(videos, tmp_path):
    prepare(videos, tmp_path, flow=True, flow_template="frame{:06d}.jpg", method=Still())
    assert (tmp_path / "flow" / "u" / "clap" / "1" / "n_frames").read_text() == "8\n"
    video = FrameFolder.open(tmp_path / "flow", "clap/1", Naming("frame{:06d}.jpg", flow=True))
    assert video.frames([7])[0, 8, 10].tolist() == pytest.approx([147, 121], abs=1)


def test_splits_of_the_folder_are_kept(videos, tmp_path):
    (videos / "train").mkdir()
    for name in ("clap", "wave"):
        (videos / name).rename(videos / "train" / name)
    (videos / "val" / "wave").mkdir(parents=True)
    (videos / "train" / "wave" / "3.mp4").rename(videos / "val" / "wave" / "3.mp4")
    made = prepare(videos, tmp_path / "out")
    assert (made.train, made.test) == (5, 1)
    assert (tmp_path / "out" / "test.txt").read_text() == "val/wave/3.mp4 1\n"


def test_levels_of_flow():
    assert to_levels(np.float32([-21, -20, -10, 0, 10, 20])).tolist() == [0, 0, 64, 128, 191, 255]
    pictures = iter(np.zeros((4, 5, 6), np.uint8))
    flow = list(flow_images(pictures, Still()))
    assert [one.shape for one in flow] == [(2, 5, 6)] * 3
    colours = np.uint8([[[[255, 0, 0], [0, 255, 0], [0, 0, 255]]]])
    assert grey(colours).tolist() == [[[76, 150, 29]]]


def test_flow_needs_the_contributed_modules(monkeypatch, videos, tmp_path):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ImportError, match=r"cv2\.optflow.*pip install 'nlkernels\[flow\]'"):
        prepare(videos, tmp_path / "out", flow=True)
    assert not (tmp_path / "out").exists()


def test_motion_is_found():
    cv2 = pytest.importorskip("cv2", reason="needs OpenCV: pip install 'nlkernels[flow]'")
    if not hasattr(cv2, "optflow"):
        pytest.skip("needs OpenCV's contributed modules: pip install 'nlkernels[flow]'")
    rows, columns = np.mgrid[:48, :64]
    before = (120 + 80 * np.sin(rows / 5) * np.cos(columns / 6)).astype(np.uint8)
    flow = tv_l1().calc(before, np.roll(before, 2, axis=1), None)
    assert np.median(flow[8:-8, 8:-8, 0]) == pytest.approx(2, abs=0.3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"folder": "none"}, FileNotFoundError, "expected a folder of videos"),
        ({"folder": "clap"}, ValueError, "at least two classes .* got none"),
        ({"test_share": 1.0}, ValueError, "0 < test_share < 1, got 1.0"),
        ({"short_side": 0}, ValueError, "short_side >= 1, got 0"),
        ({"template": "img.jpg"}, ValueError, "expected a template"),
        ({"reader": "cv2"}, ValueError, "expected one of auto, decord, av, got 'cv2'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_impossible_requests_are_refused(videos, tmp_path, change, error, message):
    folder = videos / change.pop("folder", "")
    with pytest.raises(error, match=message):
        prepare(folder, tmp_path / "out", **change)
    assert not (tmp_path / "out").exists()


def test_blanks_in_paths_are_refused(videos, tmp_path):
    (videos / "clap" / "2.mp4").rename(videos / "clap" / "my clip.mp4")
    with pytest.raises(ValueError, match=r"without blanks.*'clap/my clip\.mp4'; rename 1 files"):
        prepare(videos, tmp_path / "out")
