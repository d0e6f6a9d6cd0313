"""The folder data set: which clips, which labels, the same for any number of loader processes."""

import os
import shutil
from contextlib import closing
from itertools import pairwise

import pytest
import torch
from torch.utils.data import DataLoader

from nlkernels.training.data.augment import Augmentation
from nlkernels.training.data.crops import TestCrops
from nlkernels.training.data.dataset import DecodeRateError
from nlkernels.training.data.folder import FolderDataset
from nlkernels.training.data.openers import FileOpener
from nlkernels.training.data.reader import VideoReadError, open_video
from nlkernels.training.data.samplers import Caffe2Sampler
from nlkernels.training.data.transforms import TestTransform, TrainTransform
from nlkernels.training.data.views import View

STEP = 4  # levels between two frames of a numbered video


@pytest.fixture(scope="module")
def root(tmp_path_factory, numbered):
    """Two classes with two training videos each, one test video each, 40 frames."""
    root = tmp_path_factory.mktemp("videos")
    for place in ("train/left/1", "train/left/2", "train/right/1", "train/right/2"):
        numbered(root / f"{place}.mp4", 40, step=STEP)
    for place in ("test/left/1", "test/right/1"):
        numbered(root / f"{place}.mp4", 40, step=STEP)
    return root


def clips(root, split="train", **options):
    chosen = {"frames": 4, "stride": 2, "clips": 1} | options
    sampler = Caffe2Sampler(*(chosen.pop(name) for name in ("frames", "stride", "clips")))
    settings = {"transform": KeepNumbers(), "seed": 0, "sampler": sampler} | chosen
    return FolderDataset(root, split=split, **settings)


class Keep:
    """The frames themselves."""

    crops = 1

    def view(self, height, width, generator, *, crop, label):
        return View(None, 0, 0, height, width)

    def render(self, video, view, out=None):
        return video


class KeepNumbers(Keep):
    """The frame numbers of a numbered video, in place of a picture."""

    def render(self, video, view, out=None):
        return ((video.double().mean((1, 2, 3)) - 10) / STEP).round().int()


def random_windows(short_side=(24, 30), size=16):
    return TrainTransform(Augmentation("caffe2", short_side, size))


def centre(short_side, size):
    return TestTransform(TestCrops("centre", "caffe2", short_side, size))


def content(data, **loader):
    """Everything that a loader gives for the data, as lists."""
    batches = DataLoader(data, batch_size=2, **loader)
    return [(x.tolist(), y.tolist()) for x, y in batches]


def test_classes_labels_and_length(root):
    train, test = clips(root), clips(root, "test")
    assert train.classes == test.classes == ["left", "right"]
    assert [label for _, label in train] == [0, 0, 1, 1]
    assert [label for _, label in test] == [0, 1]
    assert train.problems == test.problems == []


def test_transforms_give_network_input(root):
    clip, label = clips(root, transform=random_windows())[-1]
    assert (clip.shape, clip.dtype, label) == ((3, 4, 16, 16), torch.float32, 1)


def test_training_clips_change_with_epoch_and_index_alone(root):
    train = clips(root)
    first = [clip.tolist() for clip, _ in train]
    assert [clip.tolist() for clip, _ in train] == first
    assert len({clip[0] for clip in first}) > 1
    train.set_epoch(1)
    assert [clip.tolist() for clip, _ in train] != first
    train.set_epoch(0)
    assert [clip.tolist() for clip, _ in clips(root)] == first
    assert [clip.tolist() for clip, _ in clips(root, seed=1)] != first
    for clip in first:
        assert [b - a for a, b in pairwise(clip)] == [2, 2, 2]


def test_test_clips_are_spread_evenly_and_stay_together(root):
    test = clips(root, "test", clips=4)
    test.set_epoch(5)
    assert [(clip[0].item(), label) for clip, label in test] == [
        (start, label) for label in (0, 1) for start in (0, 10, 20, 30)
    ]


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
@pytest.mark.parametrize("preload", [False, True], ids=["disk", "memory"])
def test_same_clips_for_any_number_of_workers(root, preload):
    data = clips(root, preload=preload, transform=random_windows())
    data[0]  # a video was read in this process before the loader forks
    expected = content(data)
    for workers in (2, 4):
        assert content(data, num_workers=workers) == expected
    assert content(clips(root, transform=random_windows()), num_workers=1) == expected


def test_preloaded_clips_reach_spawned_workers(root):
    data = clips(root, "test", preload=True, transform=centre(24, 16))
    spawned = content(data, num_workers=1, multiprocessing_context="spawn")
    assert spawned == content(data)


@pytest.mark.parametrize("preload", [False, True], ids=["disk", "memory"])
def test_preloading_changes_no_pixel(root, preload):
    whole = clips(root, "test", frames=40, stride=1, transform=Keep(), preload=preload)
    with closing(open_video(root / "test" / "left" / "1.mp4")) as video:
        assert torch.equal(whole[0][0], video.frames(range(40)))


def test_preloading_stops_at_its_limit(root):
    # 4 videos of 40 frames of 32 x 40 pixels: 0.586 MiB.
    with pytest.raises(ValueError, match=r"at most 0.5 MiB .* got 0.6 MiB for the first 4 videos"):
        clips(root, preload=True, preload_limit_mib=0.5)
    assert len(clips(root, preload=True, preload_limit_mib=0.6)) == 4


@pytest.mark.parametrize("preload", [False, True], ids=["disk", "memory"])
def test_time_split_shows_no_test_frame_in_training(tmp_path, numbered, preload):
    numbered(tmp_path / "flat.mp4", 40, step=STEP)
    numbered(tmp_path / "deep" / "1.mp4", 40, step=STEP)
    (tmp_path / "README.md").write_text("not a video")
    options = {"split_by": "time", "holdout": 0.25, "preload": preload}
    train, test = clips(tmp_path, **options), clips(tmp_path, "test", clips=3, **options)
    assert train.classes == test.classes == ["deep", "flat"]
    assert train.problems == []
    seen = set()
    for epoch in range(60):
        train.set_epoch(epoch)
        seen |= {int(number) for clip, _ in train for number in clip}
    # The published rule: a clip starts at most at 30 - 4 * 2, so the last one ends at frame 28.
    assert seen == set(range(29))
    assert [clip.tolist() for clip, _ in test][:3] == [
        [30, 32, 34, 36],
        [33, 35, 37, 39],
        [36, 38, 30, 32],
    ]


@pytest.mark.parametrize("preload", [False, True], ids=["disk", "memory"])
def test_parts_of_a_video_are_test_videos_of_their_own(tmp_path, numbered, preload):
    for name in ("a", "b"):
        numbered(tmp_path / f"{name}.mp4", 40, step=STEP)
    options = {"split_by": "time", "holdout": 0.3, "gap": 0.1, "parts": 3, "preload": preload}
    train, test = clips(tmp_path, **options), clips(tmp_path, "test", stride=1, **options)
    assert (len(train), len(test), test.num_videos) == (2, 6, 6)
    # 40 frames: 24 train, 4 do neither, 12 test.
    seen = set()
    for epoch in range(60):
        train.set_epoch(epoch)
        seen |= {int(number) for clip, _ in train for number in clip}
    assert seen <= set(range(24))
    assert [(clip.tolist(), label) for clip, label in test] == [
        (list(range(start, start + 4)), label) for label in (0, 1) for start in (28, 32, 36)
    ]
    assert [video.part for video in test.videos[:2]] == ["frames 28-31", "frames 32-35"]
    with pytest.raises(ValueError, match=r"expected 0 <= gap < 1 - holdout, got 0\.8"):
        clips(tmp_path, **{**options, "gap": 0.8})


def test_failures_of_parts_are_counted_by_file(tmp_path, numbered, fail):
    for name in ("a", "b"):
        numbered(tmp_path / f"{name}.mp4", 40, step=STEP)
    data = clips(tmp_path, "test", split_by="time", parts=3)
    fail(2)
    data[0]
    fail(1)
    data[1]
    assert data.decode_failures == [(str(tmp_path / "a.mp4"), 3)]


def test_short_videos_wrap(tmp_path, numbered):
    for name in ("a", "b"):
        numbered(tmp_path / "train" / name / "v.mp4", 3, step=STEP)
    assert [clip.tolist() for clip, _ in clips(tmp_path)] == [[0, 2, 1, 0]] * 2


def test_unusable_files_are_left_out_and_listed(tmp_path, root, numbered):
    shutil.copytree(root / "train", tmp_path / "train")
    numbered(tmp_path / "train" / "left" / "0.mp4", 1)
    (tmp_path / "train" / "left" / "empty.mp4").touch()
    (tmp_path / "train" / "right" / "text.avi").write_text("no video")
    (tmp_path / "train" / "right" / "notes.txt").write_text("ignored")
    (tmp_path / "train" / "right" / ".hidden.mp4").touch()
    data = clips(tmp_path)
    assert len(data) == 5
    assert [(os.path.basename(path), reason.split(":")[0]) for path, reason in data.problems] == [
        ("empty.mp4", "the file is empty"),
        ("text.avi", "cannot be opened"),
    ]
    (tmp_path / "train").rename(tmp_path / "all")
    data = clips(tmp_path / "all", split_by="time")
    assert ("left/0.mp4", "one frame, too few to split by time") in [
        (os.path.relpath(path, tmp_path / "all"), reason) for path, reason in data.problems
    ]


def test_real_clips(real_clips):
    options = {"split_by": "time", "frames": 8, "stride": 4, "transform": centre(64, 48)}
    data = clips(real_clips, "test", **options)
    assert data.classes == [
        "applying_eye_makeup",
        "arm_wrestling",
        "cleaning_pool",
        "flipping_pancake",
    ]
    assert [os.path.basename(path) for path, _ in data.problems] == ["corrupted.mp4"]
    assert data[3][0].shape == (3, 8, 48, 48)


class Failing:
    """Stands for opening a file; the first ``failures`` of each process fail."""

    def __init__(self, failures):
        self.left = failures

    def __call__(self, opener, number, video):
        self.left -= 1
        if self.left >= 0:
            raise VideoReadError(video.path, "damaged in the middle")
        return open_video(video.path)


@pytest.fixture
def fail(monkeypatch):
    """Function that makes the next so many decodings fail."""

    def failing(failures):
        broken = Failing(failures)
        monkeypatch.setattr(FileOpener, "__call__", lambda *call: broken(*call))

    return failing


def test_a_clip_that_fails_is_replaced_and_counted(root, fail):
    data = clips(root)
    intact = data[1][0].tolist()
    fail(2)
    replaced = data[1][0].tolist()
    assert replaced != intact
    assert data.decode_failures == [(str(root / "train" / "left" / "2.mp4"), 2)]
    fail(2)
    assert data[1][0].tolist() == replaced
    assert data.decode_failures[0][1] == 4


def test_a_training_video_that_keeps_failing_is_replaced(root, fail):
    data = clips(root)
    fail(3)
    clip, label = data[1]
    assert data.decode_failures == [(str(root / "train" / "left" / "2.mp4"), 3)]
    fail(3)
    again, label_again = data[1]
    assert (clip.tolist(), label) == (again.tolist(), label_again)


def test_too_many_failures_are_one_clear_error(root, fail):
    data = clips(root, max_failed=0.04)
    fail(1000)
    # 4 % of the 200 clips that are judged at least.
    message = (
        r"at most 4\.0% of the training clips to fail, got 9 failures in 1 clips of \d videos, the "
        r"last one .*mp4 \(damaged in the middle\); .*data\.max_failed"
    )
    with pytest.raises(DecodeRateError, match=message):
        data[0]
    assert sum(count for _, count in data.decode_failures) == 9


def test_failures_in_loader_processes_are_counted_here(root, fail):
    data = clips(root)
    fail(1)
    content(data, num_workers=2)
    assert sum(count for _, count in data.decode_failures) == 2


# torch takes five seconds to end the workers after an exception.
@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.gate)])
def test_a_test_video_that_keeps_failing_is_an_error(root, fail, workers):
    data = clips(root, "test")
    fail(1000)
    with pytest.raises(VideoReadError, match="3 clips in a row failed, the last one: damaged"):
        content(data, num_workers=workers)
    assert dict(data.decode_failures)[str(root / "test" / "left" / "1.mp4")] == 3


def test_crops_of_a_clip_are_cut_from_frames_decoded_once(root, fail):
    test = clips(root, "test", clips=2, transform=TestTransform(TestCrops("three", "caffe2", 8, 8)))
    assert len(test) == 2 * 2 * 3
    assert test.views_per_video == 6
    assert [test.video_of(index) for index in range(12)] == [0] * 6 + [1] * 6
    left, middle, right = (test[index][0] for index in range(3))
    # 32 x 40 becomes 8 x 10: one column of room on either side.
    assert torch.equal(left[..., 1:], middle[..., :-1])
    assert torch.equal(middle[..., 1:], right[..., :-1])
    fail(1000)
    assert torch.equal(test[1][0], middle)
    with pytest.raises(VideoReadError):
        test[3]


def test_index_out_of_range(root):
    data = clips(root)
    with pytest.raises(IndexError):
        data[4]
    assert data[-1][1] == data[3][1]


def no_root(path, make):
    return {"root": path / "missing"}


def no_root_by_time(path, make):
    return {"root": path / "missing", "split_by": "time"}


def no_videos(path, make):
    (path / "train" / "a").mkdir(parents=True)
    return {}


def no_videos_by_time(path, make):
    return {"split_by": "time"}


def nothing_readable(path, make):
    for name in ("a", "b"):
        (path / "train" / name).mkdir(parents=True)
        (path / "train" / name / "v.mp4").touch()
    return {}


def one_class(path, make):
    make(path / "v.mp4", 9)
    return {"split_by": "time"}


def one_readable_class(path, make):
    make(path / "train" / "a" / "v.mp4", 9)
    (path / "train" / "b").mkdir()
    (path / "train" / "b" / "v.mp4").touch()
    return {}


def unknown_test_class(path, make):
    for place in ("train/a", "train/b", "test/c"):
        make(path / place / "v.mp4", 9)
    return {"split": "test"}


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (no_root, FileNotFoundError, "expected a folder"),
        (no_root_by_time, FileNotFoundError, "expected a folder"),
        (no_videos, ValueError, "expected video files in .*CLASS"),
        (no_videos_by_time, ValueError, "expected video files in"),
        (nothing_readable, ValueError, "got none and 2 unreadable files"),
        (one_class, ValueError, "at least two classes .* got only v"),
        (one_readable_class, ValueError, "got only a and 1 unreadable files"),
        (unknown_test_class, ValueError, "got others in .*: c;"),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_unusable_folders_are_one_clear_error(tmp_path, numbered, build, error, message):
    options = {"root": tmp_path} | build(tmp_path, numbered)
    with pytest.raises(error, match=message) as caught:
        clips(options.pop("root"), **options)
    assert "; " in str(caught.value)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"split": "val"}, "expected split train or test, got 'val'"),
        ({"split_by": "name"}, "expected split_by folder or time, got 'name'"),
        ({"split_by": "time", "holdout": 1.5}, "expected holdout between 0 and 1, got 1.5"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_impossible_options_are_refused_before_the_scan(option, message):
    with pytest.raises(ValueError, match=message):
        clips("/no/such/folder", **option)
