"""A run of ``nlk train`` that is interrupted and goes on: nothing of it may differ."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nlkernels.cli import main
from nlkernels.training import checkpoint, log_extras, session
from nlkernels.training.data.synthetic import write_synthetic
from tests.training.test_distributed import left_over

ROOT = Path(__file__).parents[2]
FILES = ["data.train_files=12", "data.test_files=4"]


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    root = tmp_path_factory.mktemp("generated")
    write_synthetic(root / "clips", train=12, test=4, seed=0, frames=4, size=32)
    return root / "clips"


def events(path, kind="step"):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


def equal(one, other):
    """Nested values of two checkpoints that are equal to the bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


class Killed(BaseException):
    """Stands for the end of a process."""


SETTINGS = {
    "plain": [],
    "workers-ema-clip": [
        "data.workers=2",
        "optim.ema=0.8",
        "optim.clip_norm=1",
        "optim.accumulate=2",
        "model.dropout=0.5",
    ],
    "float16-precise": [
        "data.workers=2",
        "optim.precision=float16",
        "optim.precise_norms=2",
        "optim.ema=0.9",
        "model.dropout=0.5",
        "optim.name=adamw",
    ],
    "plateau": [
        "optim.schedule=plateau",
        "optim.patience=0",
        "run.test_every=2",
        "optim.lr=0.001",
        "run.keep=2",
    ],
}


# The others take as long again.
FEW = ("plain", "workers-ema-clip")


@pytest.mark.parametrize(
    "setting",
    [
        pytest.param(setting, id=name, marks=() if name in FEW else pytest.mark.gate)
        for name, setting in SETTINGS.items()
    ],
)
def test_a_killed_run_goes_on_to_the_same_end(generated, tmp_path, monkeypatch, setting):
    argv = ["train", "smoke", f"data.root={generated}", *FILES, "optim.steps=10"]
    argv += ["run.checkpoint_every=4", *setting]
    assert main([*argv, f"run.out={tmp_path / 'whole'}"]) == 0

    behind = session.Session._behind

    def killed(self, record, stop):
        behind(self, record, stop)
        if record.step == 7:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(session.Session, "_behind", killed)
        with pytest.raises(Killed):
            main([*argv, f"run.out={tmp_path / 'parts'}"])
    assert checkpoint.load(tmp_path / "parts" / "model.pt")["step"] == 4
    torch.manual_seed(99)
    assert main([*argv, f"run.out={tmp_path / 'parts'}", "run.resume=auto"]) == 0

    whole, parts = (checkpoint.load(tmp_path / name / "model.pt") for name in ("whole", "parts"))
    for content in (whole, parts):
        content["config"]["run"] = None
    for key in whole:
        assert equal(whole[key], parts[key]), key
    one, other = (tmp_path / name / "model.jsonl" for name in ("whole", "parts"))
    assert [e["step"] for e in events(other)] == list(range(1, 11))
    assert [e["loss"] for e in events(other)] == [e["loss"] for e in events(one)]
    assert [e["lr"] for e in events(other)] == [e["lr"] for e in events(one)]
    keep = ("step", "accuracy", "loss")
    assert [[e[k] for k in keep] for e in events(other, "test")] == [
        [e[k] for k in keep] for e in events(one, "test")
    ]
    results = [json.loads((tmp_path / n / "report.json").read_text()) for n in ("whole", "parts")]
    for name in ("accuracy", "test_loss", "train_loss"):
        assert results[0]["result"][name] == results[1]["result"][name]


def test_the_plateau_of_that_run_lowers_the_rate(generated, tmp_path):
    argv = ["train", "smoke", f"data.root={generated}", *FILES, "optim.steps=8"]
    # Nothing changes, so no test is better than the first.
    argv += [*SETTINGS["plateau"], "optim.lr=0", "optim.norms=running", f"run.out={tmp_path}"]
    assert main(argv) == 0
    assert len(events(tmp_path / "model.jsonl", "test")) == 4
    assert checkpoint.load(tmp_path / "model.pt")["schedule"]["reductions"] == 2


def test_a_finished_run_is_tested_again_by_auto(generated, tmp_path, capsys):
    argv = ["train", "smoke", f"data.root={generated}", *FILES, f"run.out={tmp_path}"]
    assert main([*argv, "run.resume=auto"]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    os.remove(tmp_path / "report.json")
    assert main([*argv, "run.resume=auto"]) == 0
    again = json.loads((tmp_path / "report.json").read_text())
    for name in ("accuracy", "test_loss", "train_loss"):
        assert report["result"][name] == again["result"][name]
    # Nothing but the checkpoint is needed.
    os.remove(tmp_path / "model.jsonl")
    assert main([*argv, "run.resume=auto"]) == 0
    assert "course" not in json.loads((tmp_path / "report.json").read_text())
    # A new run never goes on from what it finds.
    assert main(argv) == 0
    assert checkpoint.load(tmp_path / "before-model.pt")["step"] == 4


def test_another_order_of_clips_is_told(generated, tmp_path, capsys):
    argv = ["train", "smoke", f"data.root={generated}", *FILES]
    assert main([*argv, f"run.out={tmp_path / 'one'}", "optim.steps=2"]) == 0
    argv += [f"run.resume={tmp_path / 'one' / 'model.pt'}", f"run.out={tmp_path / 'two'}"]
    assert main([*argv, "optim.batch=4"]) == 0
    assert "in another order than before the break (batch 8 -> 4)" in capsys.readouterr().err


def test_changed_options_hold_in_a_resumed_run(generated, tmp_path):
    argv = ["train", "smoke", f"data.root={generated}", *FILES]
    assert main([*argv, f"run.out={tmp_path / 'one'}", "optim.steps=2"]) == 0
    argv += [f"run.resume={tmp_path / 'one' / 'model.pt'}", f"run.out={tmp_path / 'two'}"]
    assert main([*argv, "optim.weight_decay=0.25", "optim.momentum=0.5", "optim.ema=0.9"]) == 0
    content = checkpoint.load(tmp_path / "two" / "model.pt")
    groups = content["optimiser"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.25, 0]
    assert {group["momentum"] for group in groups} == {0.5}
    assert content["average"]["n_averaged"] == 2


def test_epochs_are_a_unit_of_checkpoints_and_tests(generated, tmp_path):
    argv = ["train", "smoke", f"data.root={generated}", *FILES, f"run.out={tmp_path}"]
    argv += ["optim.epochs=4", "optim.steps=null", "optim.batch=8", "run.unit=epoch"]
    argv += ["run.checkpoint_every=2", "run.test_every=1", "run.keep=9"]
    assert main(argv) == 0
    # Passes of 12 clips end in steps 2, 3, 5 and 6 of 8 clips.
    assert [e["step"] for e in events(tmp_path / "model.jsonl", "test")] == [2, 3, 5, 6]
    names = sorted(path.name for path in tmp_path.glob("model-*.pt"))
    assert names == ["model-00000003.pt", "model-00000006.pt"]


RECIPES = {
    "caffe2": [
        "optim.decay=caffe2",
        "optim.schedule=multistep",
        "optim.lengths=[2,1]",
        "optim.rates=[1,0.1]",
        "optim.precise_norms=2",
    ],
    "tsm": ["optim.decay=tsm", "optim.clip_norm=20", "optim.norms=partial", "optim.nesterov=false"],
    "mmaction": [
        "optim.decay=all",
        "optim.clip_norm=40",
        "optim.unit=epoch",
        "optim.warmup=2",
        "optim.warmup_form=both",
        "optim.schedule=step",
        "optim.milestones=[3]",
    ],
    "only-nonlocal": ["optim.only_nonlocal=true", "optim.freeze=['layers.0.*']"],
    "bfloat16": ["optim.precision=bfloat16", "optim.accumulate=4", "optim.norms=frozen"],
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_options_of_recipes_train(generated, tmp_path, recipe):
    argv = ["train", "smoke", f"data.root={generated}", *FILES, f"run.out={tmp_path}"]
    assert main([*argv, "optim.steps=4", "optim.lr=0.01", *recipe]) == 0
    assert len(events(tmp_path / "model.jsonl")) == 4


MISTAKES = {
    "parts": (["optim.batch=9", "optim.accumulate=2"], "expected optim.batch to be a multiple of"),
    "ema": (["optim.ema=1"], "expected 0 <= optim.ema < 1, got 1"),
    "rates": (["optim.schedule=multistep", "optim.rates=[1]"], "expected optim.lengths >= 1 and"),
    "negative-rate": (
        ["optim.schedule=multistep", "optim.rates=[-1]", "optim.lengths=[1]"],
        "expected optim.rates >= 0",
    ),
    "milestones": (["optim.schedule=step", "optim.milestones=[4,2]"], "milestones that grow"),
    "warmup": (["optim.warmup=1", "optim.warmup_form=both"], "of 2 steps or more"),
    "warmup-of-epochs": (
        ["optim.warmup=2", "optim.warmup_every=epoch"],
        "expected optim.unit=epoch with optim.warmup_every=epoch, got step",
    ),
    "dampening": (["optim.dampening=0.9"], "expected optim.dampening 0 with optim.nesterov"),
    "plateau": (["optim.schedule=plateau"], "expected run.test_every with optim.schedule=plateau"),
    "freezing-twice": (["optim.only_nonlocal=true", "optim.ft_begin_index=8"], "expected one of"),
    "precise-frozen": (["optim.norms=frozen", "optim.precise_norms=2"], "precise_norms unset"),
    "sync-on-cpu": (["optim.sync_norms=true", "run.device=cpu"], "expected a GPU for optim.sync"),
    "pattern": (["optim.freeze=['layer9.*']"], "got 'layer9.*' which matches none"),
    "begin-index": (["optim.ft_begin_index=8"], "expected an Inception-I3D"),
    "no-blocks": (["model.blocks=0", "optim.only_nonlocal=true"], "expected a network with blocks"),
    "clip": (["optim.clip_norm=0"], "expected optim.clip_norm > 0, got 0"),
    "keep": (["run.keep=0"], "expected run.keep >= 1, got 0"),
    "seed": (["run.seed=-1"], "expected 0 <= run.seed < 2**63, got -1"),
    "empty-project": (["run.wandb=''"], "expected run.wandb to be a name"),
    "missing-extra": (["run.wandb=mine"], "expected the package wandb for run.wandb, got none"),
}


@pytest.mark.parametrize(("overrides", "part"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_one_line_before_any_work(tmp_path, capsys, monkeypatch, overrides, part):
    find_spec = log_extras.importlib.util.find_spec
    monkeypatch.setattr(
        log_extras.importlib.util, "find_spec", lambda n: None if n == "wandb" else find_spec(n)
    )
    out = tmp_path / "out"
    assert main(["train", "smoke", *overrides, f"run.out={out}"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("nlk train: ")
    assert part in error
    assert "; " in error
    assert not out.exists()


class Recorder:
    """Stands for SummaryWriter and for a run of wandb."""

    def __init__(self, *arguments, **options):
        self.options, self.numbers, self.closed = options, [], False

    def add_scalar(self, key, value, step):
        self.numbers.append((key, value, step))

    def log(self, numbers, step):
        self.numbers += [(key, value, step) for key, value in numbers.items()]

    def close(self):
        self.closed = True

    finish = close


def test_extras_get_what_is_logged(generated, tmp_path, monkeypatch):
    import types

    made = []

    def record(*arguments, **options):
        made.append(Recorder(*arguments, **options))
        return made[-1]

    board = types.ModuleType("torch.utils.tensorboard")
    board.SummaryWriter = record
    wandb = types.ModuleType("wandb")
    wandb.init = record
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(log_extras, "check_extras", lambda config: None)
    monkeypatch.setattr("nlkernels.training.runs.check_extras", lambda config: None)
    argv = ["train", "smoke", f"data.root={generated}", *FILES, f"run.out={tmp_path}"]
    assert main([*argv, "run.tensorboard=true", "run.wandb=project"]) == 0
    losses = [e["loss"] for e in events(tmp_path / "model.jsonl")]
    for recorder in made:
        assert [v for k, v, _ in recorder.numbers if k == "step/loss"] == losses
        assert [s for k, _, s in recorder.numbers if k == "test/accuracy"] == [4]
        assert recorder.closed
    assert made[1].options["project"] == "project"
    assert made[1].options["config"]["optim"]["steps"] == 4


def start(argv, out, **options):
    """``nlk train`` in a process of its own, running when this returns."""
    process = subprocess.Popen(
        [sys.executable, "-m", "nlkernels.cli", "train", "smoke", *argv, f"run.out={out}"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )
    log = out / "model.jsonl"
    deadline = time.monotonic() + 60
    while not (log.is_file() and log.read_text().count('"event": "step"') > 5):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "no step in 60 seconds"
        time.sleep(0.05)
    return process


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_saves_and_exits_with_0(generated, tmp_path, number, workers):
    argv = [f"data.root={generated}", *FILES, "optim.steps=100000", f"data.workers={workers}"]
    process = start(argv, tmp_path, start_new_session=True)
    # To the whole group, as a terminal does with Ctrl-C and torchrun with SIGTERM.
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "run.resume=auto goes on from there" in out
    step = checkpoint.load(tmp_path / "model.pt")["step"]
    logged = events(tmp_path / "model.jsonl")
    assert step == logged[-1]["step"] > 5
    assert not left_over(tmp_path)
    argv[-2] = f"optim.steps={step + 2}"
    assert main(["train", "smoke", *argv, f"run.out={tmp_path}", "run.resume=auto"]) == 0
    assert [e["step"] for e in events(tmp_path / "model.jsonl")] == list(range(1, step + 3))


def test_a_signal_behind_a_test_leaves_its_plateau_to_the_repeated_one(
    generated, tmp_path, monkeypatch
):
    argv = ["train", "smoke", f"data.root={generated}", *FILES, "optim.steps=6", "optim.lr=0"]
    # No test is better than the first: each but that lowers the rate.
    argv += [*SETTINGS["plateau"], "optim.norms=running", f"run.out={tmp_path}"]
    tested = session.Session._test_on_the_way

    def interrupted(self):
        tested(self)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(session.Session, "_test_on_the_way", interrupted)
        with pytest.raises(SystemExit):
            main(argv)
    assert checkpoint.load(tmp_path / "model.pt")["step"] == 2
    assert main([*argv, "run.resume=auto"]) == 0
    assert [event["step"] for event in events(tmp_path / "model.jsonl", "test")] == [2, 4, 6]
    assert checkpoint.load(tmp_path / "model.pt")["schedule"]["reductions"] == 1


def test_a_signal_during_a_test_is_obeyed_at_once(generated, tmp_path, monkeypatch):
    evaluate = session.evaluate

    def interrupted(model, batches, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(model, batches, **options)

    argv = ["train", "smoke", f"data.root={generated}", *FILES, f"run.out={tmp_path}"]
    with monkeypatch.context() as patch:
        patch.setattr(session, "evaluate", interrupted)
        with pytest.raises(SystemExit) as caught:
            main(argv)
    assert caught.value.code == 0
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert checkpoint.load(tmp_path / "model.pt")["step"] == 4
    assert main([*argv, "run.resume=auto"]) == 0
