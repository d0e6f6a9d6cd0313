"""``nlk train`` from end to end on a few generated clips."""

import json
import shutil
import time

import pytest
import torch

from nlkernels.cli import main
from nlkernels.training import checkpoint, session
from nlkernels.training.data.synthetic import write_synthetic
from nlkernels.training.report_schema import TRAINING, check_schema

SMALL = ["model.width=0.5", "data.frames=4", "data.size=32", "data.short_side=[32, 32]"]


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    root = tmp_path_factory.mktemp("generated")
    write_synthetic(root / "clips", train=12, test=4, seed=0, frames=4, size=32)
    return root / "clips"


@pytest.fixture(scope="module")
def videos(generated, tmp_path_factory):
    """Two readable videos, one damaged one and a file that is none, in a flat folder."""
    root = tmp_path_factory.mktemp("videos")
    for number, path in enumerate(sorted((generated / "train").rglob("*.mp4"))[:2]):
        shutil.copy(path, root / f"class_{number}.mp4")
    (root / "damaged.mp4").write_bytes(b"no video at all" * 100)
    (root / "notes.txt").write_text("not a video")
    return root


def events(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_training_learns_its_clips_and_reports(generated, tmp_path, capsys):
    out = tmp_path / "out"
    argv = ["smoke", f"data.root={generated}", "data.train_files=12", "data.test_files=4"]
    argv += ["optim.name=adamw", "optim.lr=0.003", "optim.steps=60", "optim.batch=6"]
    argv += ["data.flip=false", "data.preload=true", "run.log_every=20", f"run.out={out}"]
    assert main(["train", *argv]) == 0
    printed = capsys.readouterr().out
    assert printed.count("steps/s") == 3
    assert printed.splitlines()[-1] == f"report: {out / 'report.md'}"

    steps = [event for event in events(out / "model.jsonl") if event["event"] == "step"]
    assert len(steps) == 60
    assert sum(step["loss"] for step in steps[-10:]) / 10 < 0.3 < steps[0]["loss"]

    report = json.loads((out / "report.json").read_text())
    check_schema(report, TRAINING)
    assert report["command"].startswith("nlk train smoke")
    assert report["training"]["steps"] == 60
    assert report["data"]["problems"] == []
    assert report["result"]["mean_colour_accuracy"] is None
    assert report["config"] == json.loads((out / "config.json").read_text())
    text = (out / "report.md").read_text()
    assert "test accuracy" in text
    assert "](curves.png)" in text
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert report["course"]["tests"][-1]["accuracy"] == report["result"]["accuracy"]
    assert sum(report["course"]["share"].values()) == pytest.approx(1, abs=1e-3)
    content = checkpoint.load(out / "model.pt")
    assert content["step"] == 60
    assert content["config"] == report["config"]


def test_resumed_training_equals_uninterrupted_training(generated, tmp_path, monkeypatch):
    save = checkpoint.save

    def save_and_keep(path, **contents):
        save(path, **contents)
        if contents["step"] == 4:
            shutil.copy(path, tmp_path / "four.pt")

    monkeypatch.setattr(session.checkpoint, "save", save_and_keep)
    argv = ["train", "smoke", f"data.root={generated}", "data.train_files=12"]
    argv += ["data.test_files=4", "optim.steps=10", "model.dropout=0.5", "run.checkpoint_every=4"]
    assert main([*argv, f"run.out={tmp_path / 'whole'}"]) == 0
    assert main([*argv, f"run.out={tmp_path / 'rest'}", f"run.resume={tmp_path / 'four.pt'}"]) == 0
    whole, rest = (checkpoint.load(tmp_path / name / "model.pt") for name in ("whole", "rest"))
    for name, value in whole["model"].items():
        assert torch.equal(value, rest["model"][name]), name
    assert [
        e["step"] for e in events(tmp_path / "rest" / "model.jsonl") if e["event"] == "step"
    ] == [*range(5, 11)]


def test_checkpoint_of_another_network_is_refused(generated, tmp_path, capsys):
    argv = ["train", "smoke", f"data.root={generated}", "data.train_files=12", "data.test_files=4"]
    assert main([*argv, "optim.steps=1", f"run.out={tmp_path / 'one'}"]) == 0
    capsys.readouterr()
    resume = f"run.resume={tmp_path / 'one' / 'model.pt'}"
    assert main([*argv, "model.width=1", resume, f"run.out={tmp_path / 'two'}"]) == 2
    assert "expected in run.resume a checkpoint of this network" in capsys.readouterr().err
    assert main([*argv, "optim.steps=1", resume, f"run.out={tmp_path / 'two'}"]) == 2
    assert "fewer than 1 steps, got one of 1; raise optim.steps" in capsys.readouterr().err


def test_videos_that_cannot_be_read_are_counted_and_listed(videos, tmp_path, capsys):
    out = tmp_path / "out"
    argv = ["demo_videos", *SMALL, f"data.root={videos}", f"run.out={out}", "data.workers=0"]
    argv += ["model.width=0.125", "optim.steps=2", "data.stride=1", "data.test_clips=2"]
    assert main(["train", *argv]) == 0
    printed = capsys.readouterr().out
    assert "2 classes (class_0, class_1), 2 training and 4 test clips" in printed
    assert "1 video could not be used:\n- " + str(videos / "damaged.mp4") in printed
    assert "no evidence for the blocks" in printed
    report = json.loads((out / "report.json").read_text())
    check_schema(report, TRAINING)
    (problem,) = report["data"]["problems"]
    assert problem["path"] == str(videos / "damaged.mp4")
    assert 0 <= report["result"]["mean_colour_accuracy"] <= 1
    text = (out / "report.md").read_text()
    assert "mean-colour classifier" in text
    assert "1 video could not be used" in text


def test_a_loss_that_is_not_finite_ends_the_run_with_code_1(generated, tmp_path, capsys):
    argv = ["smoke", f"data.root={generated}", "data.train_files=12", "data.test_files=4"]
    argv += ["optim.lr=1e30", "optim.schedule=constant", "optim.steps=9", f"run.out={tmp_path}"]
    assert main(["train", *argv]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("nlk train: train: expected a finite ")
    assert captured.err.count("\n") == 1
    last = events(tmp_path / "model.jsonl")[-1]
    assert last["event"] == "stopped"
    assert "at step" in last["reason"]
    assert not (tmp_path / "report.json").exists()


def test_real_videos(tmp_path, shared_videos, capsys):
    argv = ["demo_videos", *SMALL, f"data.root={shared_videos}", f"run.out={tmp_path}"]
    argv += ["optim.steps=2", "optim.batch=4", "model.width=0.125"]
    assert main(["train", *argv]) == 0
    assert "1 video could not be used" in capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert [problem["path"].rsplit("/")[-1] for problem in report["data"]["problems"]] == [
        "corrupted.mp4"
    ]


@pytest.mark.gate
def test_a_small_network_tells_held_out_parts_of_real_videos_apart(tmp_path, shared_videos, capsys):
    """Parts of the last 30 % of each video; training saw the first 65 %."""
    began = time.monotonic()
    argv = ["train", "demo_videos", f"data.root={shared_videos}", f"run.out={tmp_path}"]
    assert main(argv) == 0
    seconds = time.monotonic() - began
    report = json.loads((tmp_path / "report.json").read_text())
    result = report["result"]
    colour = result["mean_colour_accuracy"]
    printed = capsys.readouterr().out
    assert f"mean-colour classifier: {colour:.1%}" in printed
    assert "4 training and 36 test clips" in printed
    assert report["data"]["protocol"].endswith("of the last 30% of each video, in 3 parts")
    with capsys.disabled():
        print(f"\n{result['accuracy']:.1%} (mean colour {colour:.1%}) in {seconds:.0f} s")
    assert result["accuracy"] > 0.9
    assert seconds < 180
