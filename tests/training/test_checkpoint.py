"""Checkpoints: round trip, a crash at any point of saving, files that are refused."""

import contextlib
import itertools
import json
import os
import pickle
import pydoc
import random
import resource
import signal
import time

import pytest
import torch
from torch import nn

from nlkernels.training import checkpoint
from nlkernels.training.config import Config, OptimConfig, to_dict
from nlkernels.training.optimisers import make_optimiser

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
    checkpoint.restore_rng(content["rng"][0])
    assert torch.equal(torch.rand(3), expected)
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    mine, theirs = optimiser.state_dict()["state"], other_optimiser.state_dict()["state"]
    assert all(torch.equal(mine[i]["momentum_buffer"], theirs[i]["momentum_buffer"]) for i in mine)
    assert content["step"] == 3
    assert content["config"] == json.loads(json.dumps(to_dict(CONFIG)))
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
    "older": lambda path: torch.save({"format": 1}, path),
    "newer": lambda path: torch.save({"format": 3}, path),
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


def test_the_last_ones_are_kept(tmp_path):
    path = tmp_path / "model.pt"
    for step in (1, 2, 3, 4):
        model, optimiser = trained(seed=step)
        checkpoint.save(path, model=model, optimiser=optimiser, step=step, config=CONFIG, keep=3)
    assert sorted(os.listdir(tmp_path)) == [
        "model-00000002.pt",
        "model-00000003.pt",
        "model-00000004.pt",
        "model.pt",
    ]
    assert checkpoint.load(path)["step"] == 4
    assert checkpoint.load(tmp_path / "model-00000002.pt")["step"] == 2


def test_without_hard_links_copies_are_kept(tmp_path, monkeypatch):
    def refuse(*names):
        raise PermissionError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    model, optimiser = trained()
    path = tmp_path / "model.pt"
    checkpoint.save(path, model=model, optimiser=optimiser, step=7, config=CONFIG, keep=2)
    assert checkpoint.load(tmp_path / "model-00000007.pt")["step"] == 7
    assert len(os.listdir(tmp_path)) == 2


def test_newest_passes_over_damaged_files(tmp_path):
    path = tmp_path / "model.pt"
    assert checkpoint.newest(path) is None
    model, optimiser = trained()
    for step in (1, 2):
        checkpoint.save(path, model=model, optimiser=optimiser, step=step, config=CONFIG, keep=2)
    # One file under two names; a replaced name leaves the other's content alone.
    path.unlink()
    path.write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="an older one is looked for"):
        assert checkpoint.newest(path)["step"] == 2
    (tmp_path / "model-00000002.pt").unlink()
    with pytest.warns(UserWarning, match="an older one is looked for"):
        assert checkpoint.newest(path)["step"] == 1
    (tmp_path / "model-00000001.pt").unlink()
    with (
        pytest.warns(UserWarning, match="an older one"),
        pytest.raises(ValueError, match="checkpoint: expected a checkpoint in"),
    ):
        checkpoint.newest(path)


def test_checkpoints_of_an_earlier_run_are_set_aside(tmp_path):
    path = tmp_path / "model.pt"
    model, optimiser = trained()
    for step in (1, 2):
        checkpoint.save(path, model=model, optimiser=optimiser, step=step, config=CONFIG, keep=2)
    checkpoint.set_aside(path, but=tmp_path / "model-00000001.pt")
    assert sorted(os.listdir(tmp_path)) == [
        "before-model-00000002.pt",
        "before-model.pt",
        "model-00000001.pt",
    ]
    assert checkpoint.newest(path)["step"] == 1


CALLS = (
    "torch.save",
    "os.fsync",
    "os.link",
    "os.replace",
    "os.open",
    "os.close",
    "pathlib.Path.unlink",
)


def interrupted_save(path, model, optimiser, *, point, crash):
    """Save step ``point + 2``, interrupted at a call; whether there are so many calls."""
    calls = itertools.count()
    reached = False

    def watched(real):
        def call(*arguments, **options):
            nonlocal reached
            if next(calls) == point:
                reached = True
                if real is torch.save:
                    arguments[1].write(b"half a file")
                crash()
            return real(*arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            owner, _, attribute = name.rpartition(".")
            patch.setattr(name, watched(getattr(pydoc.locate(owner), attribute)))
        with contextlib.suppress(Crash, OSError):
            checkpoint.save(
                path, model=model, optimiser=optimiser, step=point + 2, config=CONFIG, keep=3
            )
    return reached


def raise_crash():
    raise Crash


def raise_full():
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("crash", [raise_crash, raise_full])
def test_a_failure_at_any_call_of_saving_loses_nothing(tmp_path, crash):
    path = tmp_path / "model.pt"
    model, optimiser = save(path, step=1)
    known, point = 1, 0
    while interrupted_save(path, model, optimiser, point=point, crash=crash):
        content = checkpoint.newest(path)
        # The old one or the new one, and never an older one than before.
        assert content["step"] in (known, point + 2)
        known = content["step"]
        assert torch.equal(content["model"]["0.weight"], model[0].weight)
        assert checkpoint.load(path)["step"] <= known
        point += 1
    assert point >= 8
    assert checkpoint.newest(path)["step"] == point + 2


def test_a_disk_without_room_keeps_the_last_checkpoint(tmp_path):
    """The system itself refuses to write more, after any share of the file."""
    path = tmp_path / "model.pt"
    model, optimiser = save(path, step=1)
    size = path.stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in range(0, size, size // 20):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                checkpoint.save(path, model=model, optimiser=optimiser, step=2, config=CONFIG)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert checkpoint.load(path)["step"] == 1
        assert os.listdir(tmp_path) == ["model.pt"]
    checkpoint.save(path, model=model, optimiser=optimiser, step=3, config=CONFIG)
    assert checkpoint.load(path)["step"] == 3


@pytest.mark.gate
def test_100_kills_while_saving_lose_nothing(tmp_path):
    """Processes that save on and on, killed after random times; what was announced is there."""
    path = tmp_path / "model.pt"
    generator = random.Random(0)
    step = 0
    for _ in range(100):
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            torch.set_num_threads(1)
            model, optimiser = nn.Linear(1000, 1000), None
            optimiser = make_optimiser(model, CONFIG.optim)
            while True:
                step += 1
                checkpoint.save(
                    path, model=model, optimiser=optimiser, step=step, config=CONFIG, keep=2
                )
                os.write(writing, step.to_bytes(8, "little"))
        os.close(writing)
        time.sleep(generator.uniform(0.01, 0.12))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with os.fdopen(reading, "rb") as pipe:
            announced = pipe.read()
        saved = int.from_bytes(announced[-8:], "little") if announced else step
        content = checkpoint.newest(path)
        found = 0 if content is None else content["step"]
        # Killed between the rename and the announcement, it is one further.
        assert saved <= found <= saved + 1
        step = found
        checkpoint.remove_leftovers(path)
    assert step > 100
    assert not list(tmp_path.glob(".*"))
