"""The course of a training from its log, and its picture."""

import dataclasses
import json

import numpy as np
import pytest

from nlkernels.training.engine import StepRecord
from nlkernels.training.history import PARTS, read_history, section
from nlkernels.training.log import RunLog
from nlkernels.training.plots_training import draw_training


def record(step):
    return StepRecord(step, 2.0 / step, 0.5, 0.1, 1.0, 1.0, 2.0, 3.0, 4.0, 160.0, 512.0 + step)


def log(path, start, stop, steps, *, test=True):
    with RunLog(path, steps=steps, name="model", every=1000, start=start) as run:
        run.event("start", seed=0, start=start, steps=steps)
        for step in range(start + 1, stop + 1):
            run.step(record(step))
        if test:
            run.event("test", step=stop, accuracy=0.5, loss=1.5, protocol="")


def test_a_resumed_training_is_one_course(tmp_path):
    path = tmp_path / "model.jsonl"
    log(path, 0, 7, 10, test=False)
    with path.open("a") as file:
        file.write('{"event": "st')  # killed
    log(path, 5, 10, 10)  # from the checkpoint of step 5
    history = read_history(path)
    assert history.columns["step"].tolist() == list(range(1, 11))
    assert history.columns["loss"] == pytest.approx(2 / np.arange(1, 11))
    assert history.breaks == [5]
    assert history.tests == [{"step": 10, "accuracy": 0.5, "loss": 1.5}]
    found = section(history)
    assert found["breaks"] == [{"step": 5}]
    assert [found[part] for part in PARTS] == [1, 2, 3, 4]
    assert found["step_ms"] == 10
    assert found["share"]["optimiser_ms"] == 0.4
    assert found["peak_mib"] == 522
    assert json.dumps(found)


@pytest.mark.parametrize("steps", [1, 3, 2000])
def test_courses_of_all_lengths_are_drawn(tmp_path, steps):
    path = tmp_path / "model.jsonl"
    log(path, 0, steps, steps, test=steps > 1)
    picture = draw_training(read_history(path), tmp_path / "curves.png", title="model")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_every_time_of_a_step_is_in_the_course():
    names = {field.name for field in dataclasses.fields(StepRecord)}
    assert set(PARTS) == {name for name in names if name.endswith("_ms")}
