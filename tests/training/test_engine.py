"""The training loop: records, losses that are not finite, logs."""

import copy
import json

import pytest
import torch
from torch import nn

from nlkernels.training.config import OptimConfig
from nlkernels.training.engine import StepRecord, train
from nlkernels.training.log import RunLog
from nlkernels.training.optimisers import make_optimiser
from nlkernels.training.schedules import Schedule
from nlkernels.training.updates import NonFiniteError, Stopwatch, Updater

CPU = torch.device("cpu")


def small_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 2 * 6 * 6, 2)
    )


def batches(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(4, 3, 4, 8, 8, generator=generator),
            torch.randint(2, (4,), generator=generator),
            torch.arange(4) + 4 * number,
        )
        for number in range(count)
    ]


def run(model, clips, optim, on_step=None):
    records = []
    train(
        Updater(model, make_optimiser(model, optim), optim, CPU),
        clips,
        Schedule(optim, steps=len(clips)),
        steps=len(clips),
        on_step=lambda record, stop: (on_step or records.append)(record),
    )
    return records


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_training_lowers_the_loss_and_reports_every_step(name):
    optim = OptimConfig(name=name, lr=0.01, steps=30, warmup=3)
    records = run(small_model(), batches(1) * 30, optim)
    assert [record.step for record in records] == list(range(1, 31))
    assert records[-1].loss < 0.2 * records[0].loss
    assert records[-1].accuracy == 1.0
    assert records[0].lr == Schedule(optim, steps=30).rate(0)
    assert all(min(r.data_ms, r.forward_ms, r.backward_ms, r.optimiser_ms) >= 0 for r in records)
    assert all(r.clips_per_s > 0 and r.peak_mib > 1 and r.skips == 0 for r in records)


def poisoned_by_clip(clips):
    clips[2][0][1, 0, 0, 0, 0] = float("nan")


def poisoned_by_label_of_infinite_logit(clips):
    clips[2][0].fill_(3e38)


@pytest.mark.parametrize("poison", [poisoned_by_clip, poisoned_by_label_of_infinite_logit])
def test_loss_that_is_not_finite_stops_before_the_step(poison):
    model, optim = small_model(), OptimConfig(lr=0.01, steps=5)
    clips = batches(5)
    poison(clips)
    before = {}

    def remember(record):
        before.clear()
        before.update({name: p.detach().clone() for name, p in model.named_parameters()})

    message = r"expected a finite loss, got (nan|inf) at step 3 \(clips 8, 9, 10, 11\)"
    with pytest.raises(NonFiniteError, match=message):
        run(model, clips, optim, on_step=remember)
    assert len(before) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_gradient_that_is_not_finite_stops_before_the_step():
    class Exploding(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * float("inf")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = small_model()

        def forward(self, x):
            return Exploding.apply(self.inner(x))

    model, optim = Model(), OptimConfig(steps=1)
    before = copy.deepcopy(list(model.parameters()))
    with pytest.raises(
        NonFiniteError, match=r"expected a finite gradient, got (nan|inf) at step 1"
    ):
        run(model, batches(1), optim)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_stopwatch_laps_add_up():
    watch = Stopwatch(CPU)
    first, second = watch.lap_ms(), watch.lap_ms()
    assert 0 <= first < 1e3
    assert 0 <= second < 1e3


def record(step):
    return StepRecord(step, 0.5, 0.75, 0.1, 1.0, 1.0, 2.0, 3.0, 4.0, 160.0, 512.0)


def test_log_has_every_step_and_prints_some(tmp_path, capsys):
    path = tmp_path / "log.jsonl"
    with RunLog(path, steps=25, name="fast", every=10) as log:
        for step in range(1, 26):
            log.step(record(step))
        log.event("test", accuracy=0.5)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines[:-1]] == list(range(1, 26))
    assert set(lines[0]) == {"event"} | set(StepRecord.__annotations__)
    assert lines[-1] == {"event": "test", "accuracy": 0.5}
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 3
    assert printed[0].startswith("fast         step 10/25  0:00 left  loss 0.5000  accuracy  75.0%")
    assert printed[0].endswith("160.0 clips/s  data/fwd/bwd/opt 10/20/30/40%  512 MiB")
    assert "lr 0.1" in printed[0]
    assert "\r" not in "".join(printed)


def test_log_rewrites_its_line_on_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    with RunLog(tmp_path / "log.jsonl", steps=20, name="fast", every=10) as log:
        for step in range(1, 21):
            log.step(record(step))
    printed = capsys.readouterr().out
    assert printed.count("\r") == 2
    assert printed.count("\n") == 1
    # A line that wraps could not be rewritten.
    assert len(printed.split("\r")[1].removesuffix("\x1b[K")) == 59


def test_log_does_not_keep_silent_over_long_steps(tmp_path, capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    with RunLog(tmp_path / "log.jsonl", steps=100, name="fast", every=50) as log:
        for step in range(1, 7):
            now[0] += 13.0
            log.step(record(step))
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in printed] == ["3/100", "6/100"]
    assert "21:01 left" in printed[0]
    assert "0.0769 steps/s" in printed[0]


def test_log_of_a_broken_run_keeps_complete_lines_and_the_reason(tmp_path):
    path = tmp_path / "log.jsonl"

    def broken_run():
        with RunLog(path, steps=9, name="fast", every=10) as log:
            log.step(record(1))
            raise NonFiniteError("loss")

    with pytest.raises(NonFiniteError):
        broken_run()
    last = json.loads(path.read_text().splitlines()[-1])
    assert last == {"event": "stopped", "reason": "loss"}
