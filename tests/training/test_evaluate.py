"""Tests of a training are those of ``nlk test``: the same views, averages and protocol."""

import json
import math

import pytest
import torch
from torch import nn

from nlkernels.cli import main
from nlkernels.training.config import Config, ModelConfig, RunConfig
from nlkernels.training.config_data import DataConfig
from nlkernels.training.config_file import load_config
from nlkernels.training.config_optim import OptimConfig
from nlkernels.training.data.synthetic import write_synthetic
from nlkernels.training.evaluate import evaluate
from nlkernels.training.loading import load_data
from nlkernels.training.scores import read_scores
from nlkernels.training.testing import run_test as run
from nlkernels.training.updates import NonFiniteError

CPU = torch.device("cpu")


class Given(nn.Module):
    """Its logits are the first two numbers of a clip."""

    def forward(self, clips):
        return clips.flatten(1)[:, :2]


class Located(Given):
    """Its probabilities, as those at locations, are not the softmax of its logits."""

    def probabilities(self, clips):
        return torch.tensor([[0.875, 0.125]]).expand(len(clips), 2)


def batches(*logits):
    """Views with these logits, two of a video, in one batch; all videos are of class 1."""
    clips = torch.tensor(logits).view(len(logits), 2, 1, 1, 1)
    return [(clips, torch.ones(len(logits), dtype=torch.int64), torch.arange(len(logits)))]


def test_means_of_probabilities_and_of_logits_decide_differently():
    third = math.log(3)
    # Probabilities (9/10, 1/10) and (1/4, 3/4) of the first video, twice (3/4, 1/4) of the second.
    views = batches([2 * third, 0], [0, third], [third, 0], [third, 0])
    both = {"video_of": lambda number: number // 2, "device": CPU}
    found = evaluate(Given(), views, average="probabilities", **both)
    assert found.accuracy == 0
    expected = -(math.log((1 / 10 + 3 / 4) / 2) + math.log(1 / 4)) / 2
    assert found.loss == pytest.approx(expected, abs=1e-6)
    found = evaluate(Given(), views, average="logits", **both)
    softmax = torch.tensor([third, third / 2]).softmax(0)[1].item()
    assert found.loss == pytest.approx(-(math.log(softmax) + math.log(1 / 4)) / 2, abs=1e-6)

    # One view that is very sure outweighs three others among logits only.
    views = batches([2.0, 0.0], [2.0, 0.0], [2.0, 0.0], [0.0, 9.0])
    sure = {"video_of": lambda number: 0, "device": CPU}
    assert evaluate(Given(), views, average="logits", **sure).accuracy == 1
    assert evaluate(Given(), views, average="probabilities", **sure).accuracy == 0


def test_scores_that_are_not_finite_are_no_accuracy():
    views = batches([math.nan, 0.0], [1.0, 0.0])
    with pytest.raises(NonFiniteError, match=r"finite scores of the test, got a loss of nan"):
        evaluate(Given(), views, video_of=int, average="logits", device=CPU)


def test_the_models_own_probabilities_are_taken():
    both = {"video_of": int, "device": CPU}
    found = evaluate(Located(), batches([0.0, 5.0]), average="probabilities", **both)
    assert (found.accuracy, found.loss) == (0, pytest.approx(-math.log(0.125)))
    assert evaluate(Located(), batches([0.0, 5.0]), average="logits", **both).accuracy == 1


def test_the_model_stays_in_its_mode():
    for training in (True, False):
        model = Given().train(training)
        evaluate(model, batches([0.0, 1.0]), video_of=int, average="logits", device=CPU)
        assert model.training is training


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    root = tmp_path_factory.mktemp("generated") / "clips"
    write_synthetic(root, train=4, test=5, seed=0, frames=8, size=32)
    return root


SYSTEMS = {
    "c2d_tiny": "1 clip x 3 crops of 32, probabilities averaged",
    "tsm_r50": "1 clip x 3 crops of 32, logits averaged",
    "i3d_r50_8x8": "1 clip x 3 crops of 32, softmax at every location, probabilities averaged",
    "mmaction_i3d_r50_32x2": "1 clip x 3 crops of 32, probabilities averaged",
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_average_of_a_training_is_that_of_its_system(generated, name):
    data = load_data(
        Config(
            model=ModelConfig(name=name),
            data=DataConfig(
                root=str(generated),
                train_files=4,
                test_files=5,
                size=32,
                short_side=(32, 40),
                test_crops="three",
            ),
            optim=OptimConfig(steps=1),
            run=RunConfig(out="unused", device="cpu"),
        ),
        seed=0,
    )
    assert data.protocol == SYSTEMS[name]
    assert data.average == ("logits" if name == "tsm_r50" else "probabilities")


@pytest.mark.gate
@pytest.mark.parametrize("name", SYSTEMS)
def test_nlk_test_finds_what_the_training_found(generated, name, tmp_path, capsys):
    options = [
        f"model.name={name}",
        "model.width=0.125",
        "model.blocks=0",
        f"data.root={generated}",
        "data.train_files=4",
        "data.test_files=5",
        "data.frames=8",
        "data.size=32",
        "data.test_crops=three",
        "data.short_side=[32, 40]",
        "optim.batch=4",
        "optim.lr=0.001",
        "optim.steps=2",
        "run.test_every=1",
        "run.device=cpu",
        f"run.out={tmp_path}",
    ]
    assert main(["train", "smoke", *options]) == 0
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if "test accuracy" in line]
    assert len(lines) == 2
    assert all(line.endswith(f"({SYSTEMS[name]})") for line in lines)
    accuracy = run(
        load_config("smoke", options), [str(tmp_path / "model.pt")], dump=tmp_path / "scores.npz"
    )
    events = map(json.loads, (tmp_path / "model.jsonl").read_text().splitlines())
    *_, test = (event for event in events if event["event"] == "test")
    assert test["accuracy"] == accuracy.top1
    assert test["protocol"] == SYSTEMS[name]
    found = read_scores(tmp_path / "scores.npz")
    scores = torch.from_numpy(found.scores).double()
    logs = scores.log_softmax(1) if found.average == "logits" else scores.log()
    loss = nn.functional.nll_loss(logs, torch.from_numpy(found.labels)).item()
    assert test["loss"] == pytest.approx(loss, abs=1e-5)
    assert SYSTEMS[name] in (tmp_path / "report.md").read_text()
