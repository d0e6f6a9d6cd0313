"""``nlk train --dry-run``: the training's own first steps, what it will take, what is wrong."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from nlkernels._memory import PeakMemory
from nlkernels.cli import main
from nlkernels.training import dry_run as dry
from nlkernels.training import forecast
from nlkernels.training.config_file import load_config
from nlkernels.training.data.synthetic import write_synthetic
from nlkernels.training.dry_run import dry_run
from tests.training import miniature
from tests.training.published import CONFIGS
from tests.training.test_distributed import torchrun

FILES = ["data.train_files=12", "data.test_files=4"]


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    root = tmp_path_factory.mktemp("generated")
    write_synthetic(root / "clips", train=12, test=4, seed=0, frames=4, size=32)
    return root / "clips"


def steps_of(path):
    lines = map(json.loads, path.read_text().splitlines())
    return [line for line in lines if line["event"] == "step"]


def test_takes_the_first_steps_of_the_training_and_writes_nothing(
    generated, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    argv = ["smoke", f"data.root={generated}", *FILES, "model.dropout=0.5", "optim.ema=0.5"]
    argv += ["optim.batch=6", "optim.precise_norms=1", "optim.steps=2", "run.device=cpu"]
    found = dry_run(load_config("smoke", argv[1:]))
    assert found.problems == []
    assert list(tmp_path.iterdir()) == []
    text = capsys.readouterr().out
    assert "training: 12 videos, 12 clips, 2 of 2 classes (6 videos each); opened" in text
    assert text.splitlines()[-1] == "dry run: the training can start"
    assert main(["train", *argv]) == 0
    taken = steps_of(tmp_path / "runs" / "smoke" / "model.jsonl")
    assert found.losses == [step["loss"] for step in taken[:2]]
    capsys.readouterr()
    assert main(["train", *argv, "run.resume=auto", "--dry-run"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("dry run: the training is finished, it would only be tested; raise")


@pytest.mark.gate
def test_continues_a_run_and_leaves_it_alone(generated, tmp_path):
    argv = ["smoke", f"data.root={generated}", *FILES, "run.checkpoint_every=2", "optim.steps=4"]
    argv += ["run.keep=2", f"run.out={tmp_path}"]
    assert main(["train", *argv]) == 0
    (tmp_path / "model.pt").unlink()
    (tmp_path / "model-00000004.pt").unlink()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    found = dry_run(load_config("smoke", [*argv[1:], "run.resume=auto"]))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    taken = steps_of(tmp_path / "model.jsonl")
    assert found.losses == [step["loss"] for step in taken[2:]]


def test_lists_what_is_broken_and_ends_with_code_1(generated, tmp_path, capsys):
    clips = sorted((generated / "train").rglob("*.mp4"))[:4]
    for number, path in enumerate(clips):
        shutil.copy(path, tmp_path / f"{number}.mp4")
    (tmp_path / "broken.mp4").write_bytes(b"no video at all" * 100)
    lines = [f"{number}.mp4 {number % 2}" for number in range(4)]
    (tmp_path / "train.txt").write_text("\n".join([*lines, "gone.mp4 0", "broken.mp4 1"]))
    (tmp_path / "test.txt").write_text("\n".join(lines[:2]))
    argv = ["smoke", "data.kind=list", f"data.root={tmp_path}", "optim.batch=2"]
    argv += [f"data.{split}_list={tmp_path / split}.txt" for split in ("train", "test")]
    argv += ["model.num_classes=3", f"run.out={tmp_path / 'out'}", "data.max_failed=0.1"]
    assert main(["train", *argv, "--dry-run"]) == 1
    text = capsys.readouterr().out
    assert f"- {tmp_path / 'gone.mp4'}: no such file" in text
    assert f"- {tmp_path / 'broken.mp4'}: " in text
    assert "opened all of them, 1 failed; 1 left out" in text
    assert "warning: no training video of 1 classes: 2" in text
    assert "warning: 2 videos are in both lists" in text
    assert "got 1 of 6 that are left out" in text
    assert "got 1 of 5 that cannot be decoded" in text
    assert text.splitlines()[-1] == "dry run: not yet"
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit(generated, tmp_path, monkeypatch, capsys):
    argv = ["train", "smoke", f"data.root={generated}", *FILES, "run.device=cpu", "--dry-run"]
    argv.append(f"run.out={tmp_path / 'a' / 'b'}")
    monkeypatch.setattr(dry, "free_mib", lambda device: 1.0)
    assert main(argv) == 1
    text = capsys.readouterr().out
    assert "expected steps of 8 clips to fit into the 1 MiB that are free, got about " in text
    assert "; set optim.accumulate=" in text
    assert "step 1" not in text
    # The remedy is one; then the disk is too small.
    parts = text.partition("set optim.accumulate=")[2].split()[0]
    usage = SimpleNamespace(free=2**20)
    monkeypatch.setattr(forecast.shutil, "disk_usage", lambda path: usage)
    assert main([*argv, f"optim.accumulate={parts}", "optim.steps=20000"]) == 1
    text = capsys.readouterr().out
    assert "step 2: loss " in text
    assert text.count("problem: ") == 1
    assert "MiB free; choose another run.out" in text
    assert not (tmp_path / "a").exists()


@pytest.mark.gate
def test_memory_is_that_of_the_training(generated, tmp_path):
    argv = [f"data.root={generated}", *FILES, "optim.batch=12", "optim.steps=2", "run.device=cpu"]
    argv.append(f"run.out={tmp_path}")
    found = dry_run(load_config("smoke", argv))
    with PeakMemory("cpu") as peak:
        assert main(["train", "smoke", *argv]) == 0
    assert found.memory_mib == pytest.approx(peak.live_mib, rel=0.25)


def test_loaders_work_beside_the_device():
    assert forecast.together_ms(300.0, 200.0, workers=0) == 500.0
    assert forecast.together_ms(300.0, 200.0, workers=2) == 300.0
    clips = (torch.zeros(1), torch.zeros(1), torch.zeros(1))
    drawn = forecast.draw(iter([clips] * 9), workers=3, keep=2)
    assert (drawn.count, len(drawn.first)) == (6, 2)
    assert forecast.draw(iter([clips] * 9), workers=3, keep=2, limit_s=0).count == 2
    assert forecast.draw(iter([clips]), workers=0, keep=2).count == 1


@pytest.mark.gate
def test_two_processes_take_the_steps_of_their_training(generated, tmp_path):
    argv = ["smoke", f"data.root={generated}", *FILES, "run.device=cpu", f"run.out={tmp_path}"]
    result = torchrun([*argv, "--dry-run"])
    assert result.returncode == 0, result.stderr
    assert list(tmp_path.iterdir()) == []
    assert result.stdout.splitlines()[-1] == "dry run: the training can start"
    assert torchrun(argv).returncode == 0
    for step in steps_of(tmp_path / "model.jsonl")[:2]:
        assert f"step {step['step']}: loss {step['loss']:.4f} of 8 clips" in result.stdout


# Of every list format and kind of clip one.
KINDS = [
    "c2_i3d_r50_nl_8x8_400k",
    "mmaction_tsm_r50_nl_gaussian_8f_50e",
    "slowfast_c2d_r50_nl_8x8_196e",
    "rnl_tsm_r50_k400_8f_100e",
    "inception_nl_flow_hmdb51",
    "mindspore_i3d_r50_nl_32x6_5e",
]


def test_kinds_are_of_all_list_formats():
    formats = {load_config(name).data.list_format for name in CONFIGS}
    assert {load_config(name).data.list_format for name in KINDS} == formats - {"tsm"}


@pytest.mark.gate
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", KINDS)
def test_published_configurations(name, tmp_path, capsys):
    argv = miniature.in_small(load_config(name), tmp_path)
    out = tmp_path / "out"
    assert main(["train", name, *argv, f"run.out={out}", "--dry-run"]) == 0, capsys.readouterr()
    text = capsys.readouterr().out
    assert not out.exists()
    assert "4 videos, 4 clips, 2 of 2 classes (2 videos each); opened all of them, 0" in text
    assert "whole training: " in text


@pytest.mark.gate
@pytest.mark.usefixtures("one_thread")
def test_a_gate_whose_norm_trains_never_sees_one_clip(tmp_path, capsys):
    name = "rnl_tsm_r50_k400_8f_100e"
    argv = [*miniature.in_small(load_config(name), tmp_path), "optim.batch=4", "optim.accumulate=1"]
    argv += ["optim.sync_norms=false", f"run.out={tmp_path / 'out'}"]
    assert main(["train", name, *argv, "--dry-run"]) == 0, capsys.readouterr()
