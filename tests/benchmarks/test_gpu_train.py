"""The training stage without a GPU: what it needs, what it writes, how it ends."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_train, results
from benchmarks.stage import read_rows

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def clips() -> gpu_train.Clips:
    return gpu_train.Clips(gpu_train.SMALL_TASK, CPU)


def test_needs_no_video_reader_and_no_yaml() -> None:
    block = "import sys; sys.modules.update(dict.fromkeys(('yaml', 'av', 'decord', 'matplotlib')))"
    command = [sys.executable, "-c", f"{block}; import benchmarks.gpu_train"]
    done = subprocess.run(command, cwd=results.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_costs_of_every_variant_at_one_shape() -> None:
    rows = gpu_train.cost_rows(gpu_train.SMALL_SETTINGS[0], CPU)
    found = {row["variant"]: row for row in rows}
    assert list(found) == ["none", "naive", "fast"]
    assert found["none"]["step_over_none"] == 1
    assert found["fast"]["parameters"] == found["naive"]["parameters"]
    assert found["fast"]["parameters_over_none"] > 1
    for row in rows:
        assert row["step_ms"]["p50"] > 0
        assert row["memory_mib"] > 0
        assert row["profile"]["frames"] == 4


def test_training_ends_with_its_steps_or_its_time(clips: gpu_train.Clips) -> None:
    task = gpu_train.SMALL_TASK
    row = gpu_train.training_row(task, "fast", clips, CPU, time.time() + 60)
    assert row["steps"] == row["of_steps"] == 3
    assert len(row["first_losses"]) == 3
    assert 0 <= row["accuracy"] <= 1
    row = gpu_train.training_row(task, "fast", clips, CPU, time.time() - 1)
    assert row["steps"] == 1


def test_variants_see_the_same_clips(clips: gpu_train.Clips) -> None:
    task = gpu_train.SMALL_TASK
    first, second = (next(clips.batches(task)) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
    assert first[0].shape == (4, 3, 8, 32, 32)
    assert first[0].dtype == torch.float32


def test_what_was_lost_fails_the_stage(tmp_path: Path) -> None:
    lost = '{"item": "training fast", "reason": "did not come back in time"}\n'
    (tmp_path / "lost.jsonl").write_text(lost)
    (tmp_path / "train.jsonl").write_text('{"event": "start", "begun": 0}\n{"event": "cost"}\n')
    options = gpu_train.parse_arguments(["--device", "cpu", "--out", str(tmp_path)])
    assert gpu_train.finish(options, 0) == 1
    end = read_rows(tmp_path / "train.jsonl")[-1]
    assert end["lost"] == {"training fast": "did not come back in time"}
    assert "training naive" in end["missing"]
