"""``nlk test``: means over views, ensembles, files of scores, processes, protocols."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from nlkernels.cli import main
from nlkernels.models import create_model
from nlkernels.models.weights import save_weights
from nlkernels.training import checkpoint
from nlkernels.training.batches import Batches
from nlkernels.training.config import to_dict
from nlkernels.training.config_file import from_dict, load_config
from nlkernels.training.data.synthetic import write_synthetic
from nlkernels.training.distributed import Processes
from nlkernels.training.loading import load_data
from nlkernels.training.scores import Accuracy, Scores, combine, read_scores, write_scores
from nlkernels.training.sharding import test_order as order_of
from nlkernels.training.testing import run_combination
from nlkernels.training.testing import run_test as run
from nlkernels.training.trained import load_trained
from nlkernels.training.view_scores import add_views, merge
from tests.training.test_distributed import free_port

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
SMALL = {"width": 0.25, "blocks": 1}


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    root = tmp_path_factory.mktemp("generated") / "clips"
    write_synthetic(root, train=4, test=5, seed=0, frames=4, size=32)
    return root


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """Two files of weights: other blocks, other numbers."""
    folder = tmp_path_factory.mktemp("networks")
    paths = []
    for number, kind in enumerate(("softmax", "dot_product")):
        torch.manual_seed(number)
        options = {"num_classes": 2, **SMALL, "block": {"kind": kind, "zero_init": None}}
        paths.append(folder / f"{kind}.safetensors")
        save_weights(paths[-1], create_model("c2d_tiny", **options), "c2d_tiny", options)
    return paths


def argv(generated, *more):
    return [
        "smoke",
        f"data.root={generated}",
        "data.train_files=4",
        "data.test_files=5",
        "data.test_clips=1",
        "data.test_crops=three",
        "data.short_side=[32, 40]",
        "optim.batch=4",
        "run.device=cpu",
        *more,
    ]


def test_top_5_and_equal_scores():
    scores = np.zeros((2, 7), np.float32)
    scores[0, [1, 2, 3, 4]] = 1
    names = [str(number) for number in range(7)]
    found = Scores(["a", "b"], np.array([0, 4]), scores, names, "logits", "")
    # Behind the four higher ones comes class 0, the first of equal ones; b's fifth is class 4.
    assert found.accuracy() == Accuracy(0.0, 1.0)
    assert str(found.accuracy()) == "top-1 0.00%, top-5 100.00%"


def scores_of(values, videos=("a", "b"), labels=(0, 1), average="probabilities"):
    values = np.array(values, np.float32)
    names = [f"class {number}" for number in range(values.shape[1])]
    return Scores(list(videos), np.array(labels), values, names, average, "1 clip")


def test_ensembles_by_hand():
    one = scores_of([[0.5, 0.5], [0.75, 0.25]])
    other = scores_of([[0.0, 1.0], [1.0, 0.0]], videos=("b", "a"), labels=(1, 0))
    both = combine([(one, 1.0), (other, 0.5)], ["one", "other"])
    assert both.videos == ["a", "b"]
    expected = [[(0.5 + 0.5) / 1.5, 0.5 / 1.5], [0.75 / 1.5, (0.25 + 0.5) / 1.5]]
    assert np.allclose(both.scores, expected, atol=1e-7)
    assert both.accuracy().top1 == 0.5  # b's scores are equal: class 0 comes first
    assert both.protocol == "1 x one + 0.5 x other, each: 1 clip"


MISMATCHES = {
    "videos": (
        {"videos": ("a", "c")},
        "expected the 2 videos of one in other, got 2, b is missing",
    ),
    "labels": ({"labels": (1, 1)}, "expected the labels of one in other"),
    "average": ({"average": "logits"}, "expected averages of probabilities in other"),
}


@pytest.mark.parametrize(("changed", "message"), MISMATCHES.values(), ids=MISMATCHES)
def test_scores_that_do_not_belong_together(changed, message):
    values = [[0.5, 0.5], [0.75, 0.25]]
    with pytest.raises(ValueError, match=message):
        combine([(scores_of(values), 1.0), (scores_of(values, **changed), 1.0)], ["one", "other"])


@pytest.mark.parametrize("suffix", [".npz", ".jsonl"])
def test_scores_are_read_back_exactly(tmp_path, suffix):
    values = np.random.default_rng(0).normal(size=(2, 6)).astype(np.float32)
    scores = scores_of(values, videos=("a/b c.mp4", "ü.mp4"), average="logits")
    write_scores(tmp_path / f"scores{suffix}", scores)
    back = read_scores(tmp_path / f"scores{suffix}")
    assert (back.scores == values).all() and back.scores.dtype == np.float32
    assert (back.labels == scores.labels).all()
    for name in ("videos", "classes", "average", "protocol"):
        assert getattr(back, name) == getattr(scores, name)
    assert [path.name for path in tmp_path.iterdir()] == [f"scores{suffix}"]


def test_files_that_hold_no_scores(tmp_path):
    for name in ("a.npz", "a.jsonl"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 no scores")
        with pytest.raises(ValueError, match=r"expected scores of nlk test in .*; write the file"):
            read_scores(tmp_path / name)
    with pytest.raises(ValueError, match=r"ends in \.npz or \.jsonl, got 'a.csv'"):
        write_scores(tmp_path / "a.csv", scores_of([[0.5, 0.5], [0.75, 0.25]]))


def test_an_uneven_number_of_videos_is_counted_once(generated, networks):
    config = load_config("smoke", argv(generated)[1:])
    data = load_data(config, seed=0)
    model = load_trained(networks[0]).model
    parts = []
    for count in (1, 2):
        for rank in range(count):
            order = order_of(data.test, config, Processes(rank, count))
            batches = Batches(data.test, order, config)
            sums = add_views(
                [model],
                batches,
                video_of=data.test.video_of,
                average="probabilities",
                device=CPU,
            )
            parts.append(sums)
    whole, *halves = parts
    assert sorted(len(half) for half in halves) == [2, 3]
    merged = merge(halves)
    assert merged.keys() == whole.keys() == set(range(5))
    for number, one in whole.items():
        assert merged[number].views == one.views == 3
        assert merged[number].label == one.label
        assert torch.allclose(merged[number].scores, one.scores, atol=1e-6)
    with pytest.raises(RuntimeError, match="every video in one process, got 0 twice"):
        merge([whole, whole])


def test_command_line_ensemble_dump_and_combination(generated, networks, tmp_path, capsys):
    dumps = [tmp_path / "one.npz", tmp_path / "other.jsonl", tmp_path / "both.npz"]
    arguments = argv(generated, "--weights")
    for path, dump in zip(networks, dumps, strict=False):
        assert main(["test", *arguments, str(path), "--dump", str(dump)]) == 0
    weighted = [str(networks[0]), f"{networks[1]}:0.5"]
    assert main(["test", *arguments, *weighted, "--dump", str(dumps[2])]) == 0
    out = capsys.readouterr().out
    protocol = "(1 clip x 3 crops of 32, probabilities averaged)"
    lines = [line for line in out.splitlines() if "top-1" in line]
    assert len(lines) == 5
    assert all(line.endswith(f"of 5 videos {protocol}") for line in lines[:4])
    assert lines[4].startswith("ensemble: top-1 ")
    assert f"1 x {networks[0]} + 0.5 x {networks[1]}, each: 1 clip" in lines[4]

    one, other, both = map(read_scores, dumps)
    assert one.classes == ["different", "same"]
    assert [Path(name).parts[0] for name in one.videos] == ["test"] * 5
    assert np.allclose(one.scores.sum(1), 1, atol=1e-6)
    assert np.allclose(both.scores, (one.scores + 0.5 * other.scores) / 1.5, atol=1e-6)

    combined = tmp_path / "combined.jsonl"
    files = [str(dumps[0]), f"{dumps[1]}:0.5"]
    assert main(["test", "--scores", *files, "--dump", str(combined)]) == 0
    assert np.allclose(read_scores(combined).scores, both.scores, atol=1e-6)
    assert run_combination(files).top1 == both.accuracy().top1
    assert capsys.readouterr().out.count("ensemble: top-1 ") == 2


@pytest.mark.gate
def test_a_checkpoint_is_tested_as_at_the_end_of_its_training(generated, tmp_path):
    options = argv(generated, "optim.steps=2", "optim.ema=0.5", f"run.out={tmp_path}")
    assert main(["train", *options]) == 0
    trained = json.loads((tmp_path / "report.json").read_text())["result"]["accuracy"]
    config = load_config("smoke", options[1:])
    accuracy = run(config, [str(tmp_path / "model.pt")], dump=tmp_path / "scores.npz")
    assert accuracy == Accuracy(trained, None)
    assert load_trained(tmp_path / "model.pt").classes == ["different", "same"]


def test_the_moving_average_and_the_names_of_a_checkpoint(tmp_path):
    config = from_dict({"model": {"width": 0.25}, "optim": {"steps": 1}})
    model = create_model("c2d_tiny", num_classes=2, **{**SMALL, "blocks": 2})
    average = {f"module.{key}": value + 1 for key, value in model.state_dict().items()}
    checkpoint.save(
        tmp_path / "model.pt",
        model=model,
        optimiser=torch.optim.SGD(model.parameters()),
        step=1,
        config=config,
        more={"average": {"n_averaged": torch.tensor(1), **average}},
    )
    loaded = load_trained(tmp_path / "model.pt").model
    assert torch.equal(loaded.fc.bias, model.fc.bias + 1)
    assert not loaded.training

    report = {"data": {"classes": ["different", "same"]}, "config": to_dict(config)}
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert load_trained(tmp_path / "model.pt").classes == ["different", "same"]
    # The report of another training beside it says nothing about this one.
    report["config"]["data"]["frames"] += 1
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert load_trained(tmp_path / "model.pt").classes is None


def errors(capsys, *arguments):
    code = main(["test", *arguments])
    err = capsys.readouterr().err.splitlines()
    assert code == 2
    assert err[-1].startswith("nlk test: ")
    return err[-1]


def test_mistakes_are_one_line(generated, networks, tmp_path, capsys):
    options = {"num_classes": 3, **SMALL}
    other = tmp_path / "other.safetensors"
    save_weights(other, create_model("c2d_tiny", **options), "c2d_tiny", options)
    arguments = argv(generated, "--weights")
    line = errors(capsys, *arguments, str(other))
    assert "expected a network of 2 classes, as the data set has, got 3 in" in line

    options = {"num_classes": 2, **SMALL}
    names = {"classes": json.dumps(["same", "different"])}
    save_weights(other, create_model("c2d_tiny", **options), "c2d_tiny", options, names)
    line = errors(capsys, *arguments, str(other))
    assert "got 'same' as class 0 in place of 'different'; reorder them with nlk convert" in line

    broken = create_model("c2d_tiny", **options)
    nn.init.constant_(broken.fc.bias, math.nan)
    save_weights(other, broken, "c2d_tiny", options)
    assert "expected finite scores" in errors(capsys, *arguments, str(other))

    torch.save({"state_dict": {}}, tmp_path / "foreign.pth")
    line = errors(capsys, *arguments, str(tmp_path / "foreign.pth"))
    assert "or convert another system's with nlk convert" in line
    line = errors(capsys, *arguments, str(networks[0]), "data.test_clips=3")
    assert "write section.key=value in front of the options" in line
    line = errors(capsys, *arguments, f"{networks[0]}:-1")
    assert "expected a coefficient > 0" in line
    line = errors(capsys, *arguments, str(networks[0]), "--dump", str(tmp_path / "no" / "a.npz"))
    assert "expected a folder" in line
    for wrong in (["smoke"], ["smoke", "--scores", "a.npz"], ["--weights", "a.pt"]):
        assert "expected CONFIG --weights FILE ..., or --scores" in errors(capsys, *wrong)


def test_a_folder_of_test_videos_is_enough(generated, networks, tmp_path, capsys):
    shutil.copytree(generated / "test", tmp_path / "videos" / "test")
    options = ["data.kind=folder", "data.preload=false", f"data.root={tmp_path / 'videos'}"]
    dumps = [tmp_path / "all.npz", tmp_path / "alone.npz"]
    both = [*argv(generated), *options[:2]]
    assert main(["test", *both, "--weights", str(networks[0]), "--dump", str(dumps[0])]) == 0
    weights = ["--weights", str(networks[0]), "--dump", str(dumps[1])]
    assert main(["test", *both, options[2], *weights]) == 0
    whole, alone = map(read_scores, dumps)
    assert whole.classes == alone.classes == ["different", "same"]
    assert whole.videos == alone.videos and (whole.scores == alone.scores).all()


@pytest.mark.gate
def test_two_processes_test_as_one(generated, networks, tmp_path):
    dump = tmp_path / "two.npz"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"),
        *(f"--master-port={free_port()}", "-m", "nlkernels.cli", "test", *argv(generated)),
        *("--weights", str(networks[0]), "--dump", str(dump)),
    ]
    result = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("of 5 videos (1 clip x 3 crops of 32") == 1
    config = load_config("smoke", argv(generated)[1:])
    run(config, [str(networks[0])], dump=tmp_path / "one.npz")
    one, two = (read_scores(tmp_path / name) for name in ("one.npz", "two.npz"))
    assert one.videos == two.videos and (one.labels == two.labels).all()
    assert np.allclose(one.scores, two.scores, atol=1e-6)
