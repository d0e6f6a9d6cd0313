"""Checkpoints: round trip, a crash at any point of saving, files that are refused."""

import os
import pickle

import pytest
import torch
from torch import nn

from nlkernels.training import checkpoint
from nlkernels.training.config import Config, OptimConfig, to_dict
from nlkernels.training.engine import make_optimiser

CONFIG = Config(optim=OptimConfig(steps=3))


def trained(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    optimiser = make_optimiser(model, CONFIG.optim)
    model(torch.randn(5, 3)).square().sum().backward()
    optimiser.step()
    return model, optimiser


def save(path, seed=0, step=3):
    model, optimiser = trained(seed)
    checkpoint.save(path, model=model, optimiser=optimiser, step=step, config=CONFIG)
    return model, optimiser


def test_round_trip(tmp_path):
    path = tmp_path / "last.pt"
    model, optimiser = save(path)
    expected = torch.rand(3)
    content = checkpoint.load(path)
    other, other_optimiser = trained(seed=1)
    other.load_state_dict(content["model"])
    other_optimiser.load_state_dict(content["optimiser"])
    checkpoint.restore_rng(content["rng"])
    assert torch.equal(torch.rand(3), expected)
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    mine, theirs = optimiser.state_dict()["state"], other_optimiser.state_dict()["state"]
    assert all(torch.equal(mine[i]["momentum_buffer"], theirs[i]["momentum_buffer"]) for i in mine)
    assert content["step"] == 3
    assert content["config"]["optim"] == to_dict(CONFIG)["optim"] | {"milestones": []}
    assert os.listdir(tmp_path) == ["last.pt"]


class Crash(BaseException):
    """Stands for a kill: no handler of ours catches it."""


@pytest.mark.parametrize("point", ["torch.save", "os.fsync", "os.replace"])
def test_crash_while_saving_keeps_the_last_valid_file(tmp_path, monkeypatch, point):
    path = tmp_path / "last.pt"
    model, _ = save(path, seed=0, step=1)

    def crash(*arguments, **options):
        if point == "torch.save":
            arguments[1].write(b"half a file")
        raise Crash

    monkeypatch.setattr(point, crash)
    with pytest.raises(Crash):
        save(path, seed=1, step=2)
    monkeypatch.undo()
    content = checkpoint.load(path)
    assert content["step"] == 1
    assert torch.equal(content["model"]["0.weight"], model[0].weight)


def test_kill_between_temporary_file_and_rename(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    save(path, step=1)
    # A killed process runs no clean-up: its temporary file stays, the checkpoint is the old one.
    model, optimiser = trained()
    pid = os.fork()
    if pid == 0:
        os.replace = lambda *names: os._exit(9)
        checkpoint.save(path, model=model, optimiser=optimiser, step=2, config=CONFIG)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert checkpoint.load(path)["step"] == 1
    assert len(list(tmp_path.iterdir())) == 2
    save(path, step=3)
    assert checkpoint.load(path)["step"] == 3


class Payload:
    def __reduce__(self):
        return os.mkdir, ("executed",)


BAD_FILES = {
    "garbage": lambda path: path.write_bytes(b"not a checkpoint" * 10),
    "empty": lambda path: path.write_bytes(b""),
    "pickle": lambda path: path.write_bytes(pickle.dumps({"format": 1})),
    "payload": lambda path: torch.save({"format": 1, "model": Payload()}, path),
    "foreign": lambda path: torch.save({"state_dict": {}}, path),
    "tensor": lambda path: torch.save(torch.zeros(2), path),
    "newer": lambda path: torch.save({"format": 2}, path),
}


@pytest.mark.parametrize("write", BAD_FILES.values(), ids=BAD_FILES)
def test_other_files_are_refused_and_nothing_is_executed(tmp_path, monkeypatch, write):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bad.pt"
    write(path)
    with pytest.raises(ValueError, match="checkpoint: expected") as caught:
        checkpoint.load(path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


def test_truncated_file_is_refused(tmp_path):
    path = tmp_path / "last.pt"
    save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="checkpoint: expected a checkpoint in"):
        checkpoint.load(path)


def test_missing_file():
    with pytest.raises(FileNotFoundError, match=r"checkpoint: expected a file, got 'no\.pt'"):
        checkpoint.load("no.pt")
