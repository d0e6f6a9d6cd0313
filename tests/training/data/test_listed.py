"""Data sets of lists, from the configuration to batches: files and folders of images."""

import json
import os

import numpy as np
import pytest
import torch

from nlkernels.training.config import Config, OptimConfig, RunConfig, check_values
from nlkernels.training.config_data import DataConfig
from nlkernels.training.data.child import ChildReader
from nlkernels.training.data.frame_folders import Naming
from nlkernels.training.data.listed import ListDataset
from nlkernels.training.data.reader import VideoReadError
from nlkernels.training.loading import load_data, load_test, training_batches
from nlkernels.training.loading import test_batches as batches_of_the_test

SMALL = {"frames": 4, "size": 16, "short_side": (20, 24), "kind": "list"}


@pytest.fixture(autouse=True)
def no_children_are_left():
    yield
    ChildReader.stop_children()


def config(**data):
    made = Config(
        data=DataConfig(**(SMALL | data)),
        optim=OptimConfig(steps=2, batch=4),
        run=RunConfig(out="unused", device="cpu"),
    )
    check_values(made)
    return made


def everything(settings, seed=0):
    """Data, all training batches of two steps, all test batches."""
    data = load_data(settings, seed=seed)
    train = list(training_batches(data.train, settings, seed=seed, steps=2))
    return data, train, list(batches_of_the_test(data.test, settings))


@pytest.fixture(scope="module")
def videos(tmp_path_factory, numbered):
    root = tmp_path_factory.mktemp("listed")
    for name in ("a", "b", "c", "d"):
        numbered(root / "clips" / f"{name}.mp4", 30, step=4)
    (root / "train.txt").write_text("a.mp4 0\nb.mp4 1\nc.mp4 2\nmissing.mp4 1\n")
    (root / "test.txt").write_text("d.mp4 2\na.mp4 0\n")
    return root


def of_videos(root, **data):
    lists = {
        name: str(root / f"{name.partition('_')[0]}.txt") for name in ("train_list", "test_list")
    }
    return config(root=str(root / "clips"), **lists, **data)


@pytest.mark.usefixtures("decord")
def test_list_of_video_files(videos):
    settings = of_videos(videos, test_clips=2, test_crops="three", test_size=20)
    data, train, test = everything(settings)
    assert data.classes == ["0", "1", "2"]
    assert data.problems == [{"path": str(videos / "clips/missing.mp4"), "reason": "no such file"}]
    assert data.protocol == "2 clips x 3 crops of 20, probabilities averaged"
    assert train[0][0].shape == (4, 3, 4, 16, 16)
    labels = torch.cat([labels for _, labels, _ in test])
    assert labels.tolist() == [2] * 6 + [0] * 6
    assert [data.test.video_of(number) for number in range(12)] == [0] * 6 + [1] * 6
    assert test[0][0].shape == (4, 3, 4, 20, 20)


@pytest.mark.usefixtures("decord")
@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
def test_clips_do_not_depend_on_workers_children_or_device(videos):
    def found(**options):
        _, train, test = everything(of_videos(videos, **options))
        return [(x, y, n) for x, y, n in (*train, *test)]

    expected = found(decode="inside")
    for options in (
        {"decode": "child"},
        {"decode": "child", "workers": 2},
        {"decode": "inside", "workers": 4},
        {"decode": "inside", "augment_on": "device", "workers": 2},
        {"check": "decode"},
        {"preload": True, "workers": 2},
    ):
        for one, other in zip(expected, found(**options), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True)), options


@pytest.mark.usefixtures("decord")
def test_a_video_that_breaks_later_is_replaced_and_listed(videos, tmp_path):
    (tmp_path / "bad.mp4").write_bytes(b"\0" * 999)
    good = [f"{videos}/clips/{name}.mp4 {label}" for label, name in enumerate("abc")]
    (tmp_path / "train.txt").write_text("\n".join([*good, f"{tmp_path}/bad.mp4 1"]) + "\n")
    settings = config(
        train_list=str(tmp_path / "train.txt"), test_list=str(videos / "test.txt"), check="none"
    )
    data = load_data(settings, seed=0)
    batches = list(training_batches(data.train, settings, seed=0, steps=2))
    again = list(training_batches(data.train, settings, seed=0, steps=2))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(batches, again, strict=True))
    assert all(labels.max() <= 2 for _, labels, _ in batches)
    assert data.problems == [
        {
            "path": f"{tmp_path}/bad.mp4",
            "reason": "4 clips could not be decoded, others were taken",
        }
    ]
    with pytest.raises(VideoReadError, match=r"clips/d\.mp4|d\.mp4 \(no such file\)"):
        list(batches_of_the_test(data.test, settings))


def of_one_list(folder, **data):
    """Training and test videos of ``list.txt``, below its folder."""
    path = str(folder / "list.txt")
    return config(**{"root": str(folder), "train_list": path, "test_list": path} | data)


def write_images(root, name, naming, count, size=(24, 30)):
    image = pytest.importorskip("PIL.Image", reason="needs Pillow: pip install 'nlkernels[train]'")
    for number in range(count):
        for axis, path in enumerate(naming.paths(root, name, number)):
            path.parent.mkdir(parents=True, exist_ok=True)
            shape = size if naming.flow else (*size, 3)
            level = 10 + 4 * number + 2 * axis
            image.fromarray(np.full(shape, level, np.uint8)).save(path, quality=95)


@pytest.mark.parametrize("totals", [True, False])
def test_list_of_image_folders(tmp_path, totals):
    for name in ("x", "y"):
        write_images(tmp_path, name, Naming("{:05d}.jpg"), 20)
    lines = [f"{name}{' 20' if totals else ''} {label}" for label, name in enumerate("xy")]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    settings = of_one_list(
        tmp_path,
        reader="frames",
        template="{:05d}.jpg",
        sampler="tsm_twice",
        augment="tsm",
        crop_rule="tsm",
        colours="imagenet",
        check="decode",
    )
    data, train, test = everything(settings)
    assert data.test.views_per_video == 2
    assert data.protocol == "2 clips x 1 centre crop of 16, probabilities averaged"
    levels = test[0][0][0, 0].mean((1, 2)) * 58.395 + 123.675
    # The middles of four segments of five frames: 2, 7, 12, 17.
    assert levels.tolist() == pytest.approx([18, 38, 58, 78], abs=1.5)
    assert train[0][0].shape == (4, 3, 4, 16, 16)


@pytest.mark.parametrize("preload", [False, True])
def test_offsets_share_a_folder(tmp_path, preload):
    write_images(tmp_path, "x", Naming("img_{:05d}.jpg"), 20)
    (tmp_path / "list.txt").write_text("x 0 4 0\nx 10 4 1\n")
    settings = of_one_list(
        tmp_path,
        reader="frames",
        preload=preload,
    )
    data = load_data(settings, seed=0)
    if preload:
        for path in (tmp_path / "x").iterdir():
            path.unlink()
    test = list(batches_of_the_test(data.test, settings))
    levels = test[0][0][:, 0].mean((2, 3)) * 57.375 + 114.75
    assert levels[0].tolist() == pytest.approx([10, 14, 18, 22], abs=1.5)
    assert levels[1].tolist() == pytest.approx([50, 54, 58, 62], abs=1.5)


def test_hmdb51_flow_with_all_windows(tmp_path):
    naming = Naming("frame{:06d}.jpg", flow=True)
    database = {}
    for name, label, subset, count in (
        ("clap_1", "clap", "training", 12),
        ("wave_1", "wave", "training", 9),
        ("wave_2", "wave", "validation", 11),
        ("clap_2", "clap", "validation", 5),
    ):
        write_images(tmp_path, name, naming, count)
        (tmp_path / "u" / name / "n_frames").write_text(str(count))
        database[name] = {"subset": subset, "annotations": {"label": label}}
    content = {"labels": ["", "clap", "wave"], "database": database}
    (tmp_path / "split1.json").write_text(json.dumps(content))
    settings = config(
        root=str(tmp_path),
        train_list=str(tmp_path / "split1.json"),
        list_format="hmdb51_json",
        reader="flow",
        template="frame{:06d}.jpg",
        sampler="inception",
        augment="inception",
        crop_rule="inception",
        colours="unit",
    )
    data, train, test = everything(settings)
    assert data.classes == ["clap", "wave"]
    # Windows of four frames: starts 0, 4, 8 of eleven frames; 0 of five, whose last start is 3.
    assert data.test.views_per_video is None
    assert [data.test.video_of(number) for number in range(len(data.test))] == [0, 0, 0, 1]
    assert data.protocol == "all clips x 1 centre crop of 16, probabilities averaged"
    assert train[0][0].shape == (4, 2, 4, 16, 16)
    last = torch.cat([clips for clips, _, _ in test])[2]
    levels = (last.mean((2, 3)) + 1) * 127.5
    # Frames 8, 9, 10 and 8 again; the second channel is two levels higher.
    assert levels[0].tolist() == pytest.approx([42, 46, 50, 42], abs=1.5)
    assert (levels[1] - levels[0]).mean().item() == pytest.approx(2, abs=0.7)


@pytest.mark.usefixtures("decord")
def test_kinetics_csv_and_names(videos, tmp_path):
    head = "label,youtube_id,time_start,time_end\n"
    (tmp_path / "train.csv").write_text(head + "wave left,a,1,2\nclap,b,1,2\n")
    (tmp_path / "test.csv").write_text(head + "clap,d,1,2\n")
    settings = config(
        root=str(videos / "clips"),
        train_list=str(tmp_path / "train.csv"),
        test_list=str(tmp_path / "test.csv"),
        list_format="kinetics_csv",
        class_order="first_appearance",
        path_template="{youtube_id}.mp4",
    )
    data = load_data(settings, seed=0)
    assert data.classes == ["wave left", "clap"]
    assert data.test[0][1] == 1
    assert data.train.transform.unflipped == {0}


@pytest.mark.usefixtures("decord")
def test_whole_frames_are_tested_one_video_at_a_time(videos, tmp_path, numbered):
    numbered(tmp_path / "wide.mp4", 9, size=(32, 64))
    numbered(tmp_path / "tall.mp4", 9, size=(48, 32))
    (tmp_path / "test.txt").write_text(f"{tmp_path}/wide.mp4 0\n{tmp_path}/tall.mp4 1\n")
    settings = config(
        root=str(videos / "clips"),
        train_list=str(videos / "train.txt"),
        test_list=str(tmp_path / "test.txt"),
        test_crops="full",
        test_clips=2,
    )
    data = load_data(settings, seed=0)
    shapes = [tuple(clips.shape) for clips, _, _ in batches_of_the_test(data.test, settings)]
    assert shapes == [(2, 3, 4, 20, 40), (2, 3, 4, 30, 20)]
    assert data.protocol == "2 clips x whole frames of short side 20, probabilities averaged"


@pytest.mark.usefixtures("decord")
def test_preloaded_files_are_read_once_and_within_a_limit(videos, tmp_path, monkeypatch):
    (tmp_path / "bad.mp4").write_bytes(b"\0" * 999)
    names = [f"{videos}/clips/{name}.mp4 {label}" for label, name in enumerate("abc")]
    (tmp_path / "train.txt").write_text("\n".join([*names, f"{tmp_path}/bad.mp4 1"]) + "\n")
    lists = {"train_list": str(tmp_path / "train.txt"), "test_list": str(videos / "test.txt")}
    settings = config(root=str(videos / "clips"), preload=True, **lists)
    data = load_data(settings, seed=0)
    assert [os.path.basename(one["path"]) for one in data.problems] == ["bad.mp4"]
    monkeypatch.setattr(ChildReader, "open", None)
    assert len(list(training_batches(data.train, settings, seed=0, steps=2))) == 2
    monkeypatch.undo()
    init = ListDataset.__init__
    monkeypatch.setattr(
        ListDataset, "__init__", lambda *a, **k: init(*a, **(k | {"preload_limit_mib": 0.1}))
    )
    with pytest.raises(ValueError, match=r"at most 0.1 MiB to keep in memory, got 0.\d MiB"):
        load_data(settings, seed=0)


def of_test(settings, classes=None, num_classes=3):
    return load_test(settings, classes=classes, num_classes=num_classes)


@pytest.mark.usefixtures("decord")
def test_a_test_needs_no_training_list(videos, tmp_path):
    both = {"root": str(videos / "clips"), "test_list": str(videos / "test.txt")}
    for train_list in (None, str(tmp_path / "absent.txt")):
        settings = config(train_list=train_list, **both)
        assert of_test(settings).classes == ["0", "1", "2"]
        test = of_test(settings, ["x", "y", "z"])
        assert test.classes == ["x", "y", "z"]
        assert [video.label for video in test.videos] == [2, 0]
    with pytest.raises(ValueError, match=r"labels below 2, .* got 2 of d\.mp4.*the network is one"):
        of_test(settings, num_classes=2)


@pytest.mark.usefixtures("decord")
def test_names_of_kinetics_come_from_where_they_are_known(videos, tmp_path):
    head = "label,youtube_id,time_start,time_end\n"
    (tmp_path / "test.csv").write_text(head + "wave,d,1,2\nclap,a,1,2\n")
    (tmp_path / "train.csv").write_text(head + "wave,a,1,2\nclap,b,1,2\n")
    (tmp_path / "names.txt").write_text("wave\nclap\n")

    def settings(**more):
        return config(
            root=str(videos / "clips"),
            test_list=str(tmp_path / "test.csv"),
            list_format="kinetics_csv",
            path_template="{youtube_id}.mp4",
            **more,
        )

    first = {"class_order": "first_appearance"}
    both = {"train_list": str(tmp_path / "train.csv")}
    for made, names, expected in (
        (settings(), None, ["clap", "wave"]),
        (settings(), ["wave", "clap"], ["wave", "clap"]),
        (settings(**first), ["wave", "clap"], ["wave", "clap"]),
        (settings(**first, **both), None, ["wave", "clap"]),
        (settings(class_names=str(tmp_path / "names.txt")), None, ["wave", "clap"]),
    ):
        test = of_test(made, names, 2)
        assert test.classes == expected
        assert [expected[video.label] for video in test.videos] == ["wave", "clap"]
    for made, count in ((settings(**first), 2), (settings(), 3)):
        with pytest.raises(ValueError, match=r"expected the names of . classes .*class_names=FILE"):
            of_test(made, None, count)


def test_labels_need_classes(videos, tmp_path):
    (tmp_path / "names.txt").write_text("one\ntwo\n")
    with pytest.raises(ValueError, match=r"labels below 2, .* got 2 of c\.mp4; .*class_names"):
        load_data(of_videos(videos, class_names=str(tmp_path / "names.txt")), seed=0)


def test_lists_without_usable_videos(tmp_path):
    (tmp_path / "list.txt").write_text("none.mp4 0\nalso.mp4 1\n")
    settings = of_one_list(tmp_path)
    with pytest.raises(ValueError, match=r"expected videos that can be used, got none, .*no such"):
        load_data(settings, seed=0)


def test_windows_of_unknown_lengths_are_refused(videos):
    with pytest.raises(ValueError, match=r"expected the lengths of all test videos.*check=decode"):
        load_data(of_videos(videos, sampler="inception"), seed=0)


@pytest.mark.usefixtures("real_clips")
def test_real_clips_as_a_list(real_clips, tmp_path):
    names = ["applying_eye_makeup.avi", "arm_wrestling.mp4", "cleaning_pool.mp4", "corrupted.mp4"]
    lines = [f"{real_clips / name} {label}" for label, name in enumerate(names)]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    settings = of_one_list(
        tmp_path,
        check="decode",
        sampler="slowfast",
        augment="slowfast",
        crop_rule="slowfast",
    )
    data = load_data(settings, seed=0)
    assert [os.path.basename(one["path"]) for one in data.problems] == ["corrupted.mp4"]
    clip, label = data.test[2]
    assert (clip.shape, label) == ((3, 4, 16, 16), 2)
