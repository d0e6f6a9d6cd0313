"""The stage `train`: what the blocks cost in a training step, and whether they learn, on a GPU.

`python -m benchmarks.gpu_train --device cuda --out DIR` writes two kinds of rows to
DIR/train.jsonl: `cost`, a training step of every variant at one clip shape, in interleaved rounds,
and `training`, a short training of every variant on the generated task of `nlk compare`. Clips are
drawn in memory and configurations written here: neither a video reader nor PyYAML is needed.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from nlkernels.training.config import ModelConfig, OptimConfig, ProfileConfig
from nlkernels.training.data.synthetic import draw_clip
from nlkernels.training.engine import StepRecord, train
from nlkernels.training.measure import attention_sizes, measure
from nlkernels.training.optimisers import make_optimiser
from nlkernels.training.schedules import Schedule
from nlkernels.training.updates import Updater
from nlkernels.training.variants import build_variant

from .stage import (
    DEADLINE,
    RowFile,
    Watch,
    clean,
    describe,
    lost_items,
    read_rows,
    run_child,
    supervise,
)

BUDGET_S = 450.0
VARIANTS = ("none", "naive", "fast")
CLASSES = 2
TRAIN_CLIPS, TEST_CLIPS = 4000, 500
LAST_STEPS = 20


class Amp(nn.Module):
    """A network under autocast: bfloat16 products, float32 weights, as videos are trained."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, clips: Tensor) -> Tensor:
        with torch.autocast(clips.device.type, torch.bfloat16):
            return self.model(clips).float()


class Setting(NamedTuple):
    """A network and a clip shape whose training step is measured."""

    name: str
    model: ModelConfig
    profile: ProfileConfig


class Task(NamedTuple):
    """The short training that every variant does."""

    model: ModelConfig
    optim: OptimConfig
    frames: int
    size: int
    train_clips: int
    test_clips: int


_R50 = ModelConfig(name="c2d_r50_8x8", blocks=5)
_I3D = ModelConfig(name="i3d_r50_8x8", blocks=5)
_BLOCK = {"init": "default"}
SETTINGS = (
    Setting("i3d_r50_8x8 8x224", _I3D, ProfileConfig(batch=8, frames=8, size=224, rounds=7)),
    Setting("c2d_r50_8x8 8x224", _R50, ProfileConfig(batch=8, frames=8, size=224, rounds=7)),
    Setting("c2d_r50_8x8 32x224", _R50, ProfileConfig(batch=8, frames=32, size=224, rounds=7)),
    Setting("c2d_r50_8x8 64x256", _R50, ProfileConfig(batch=2, frames=64, size=256, rounds=5)),
)
TASK = Task(
    ModelConfig(name="c2d_tiny", blocks=2, block=_BLOCK),
    OptimConfig(name="adamw", lr=2e-3, warmup=20, steps=450, batch=32),
    frames=8,
    size=48,
    train_clips=TRAIN_CLIPS,
    test_clips=TEST_CLIPS,
)
SMALL_SETTINGS = (
    Setting(
        "c2d_tiny 4x32",
        ModelConfig(name="c2d_tiny", blocks=2),
        ProfileConfig(batch=1, frames=4, size=32, rounds=1),
    ),
)
SMALL_TASK = TASK._replace(
    optim=replace(TASK.optim, steps=3, warmup=1, batch=4), size=32, train_clips=16, test_clips=8
)


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line of `python -m benchmarks.gpu_train`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_train")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds, the start counted")
    parser.add_argument("--commit", default=None, help="commit to record where git cannot tell")
    parser.add_argument("--child", type=float, default=None, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Returns 0, or 1 if a variant failed or was lost, or nothing was measured."""
    given = sys.argv[1:] if arguments is None else arguments
    options = parse_arguments(given)
    if options.child is not None:
        return run_child(lambda: work(options))
    begun = time.time()
    clean(options.out, "train")
    command = [sys.executable, "-m", "benchmarks.gpu_train", *given, "--child", str(begun)]
    code = supervise(command, options.out, begun + options.budget + 20)
    return finish(options, code)


def work(options: argparse.Namespace) -> int:
    """The child: whatever no child before it finished or was lost in."""
    device = torch.device(options.device)
    settings, task = (SETTINGS, TASK) if device.type == "cuda" else (SMALL_SETTINGS, SMALL_TASK)
    watch = Watch(options.out)
    watch.begin("start", 120)
    path = options.out / "train.jsonl"
    file = RowFile(path, "train", device, options.commit)
    done = {row["item"] for row in read_rows(path) if "item" in row} | set(lost_items(options.out))
    end = options.child + options.budget
    for setting in settings:
        if setting.name not in done and time.time() < end:
            watch.begin(setting.name, 150)
            for row in cost_rows(setting, device):
                file.add(event="cost", item=setting.name, **row)
                said = {name: row[name] for name in ("step_ms", "device_mib", "memory_mib")}
                print(f"{setting.name} {row['variant']}: {describe(said)}", flush=True)
    data = None
    for variant in VARIANTS:
        item = f"training {variant}"
        if item in done or time.time() > end:
            continue
        watch.begin(item, 200)
        data = data or Clips(task, device)
        row = training_row(task, variant, data, device, end)
        file.add(event="training", item=item, variant=variant, **row)
        print(f"{item}: {describe(row)}", flush=True)
    return 0


def cost_rows(setting: Setting, device: torch.device) -> list[dict[str, Any]]:
    """A row per variant: parameters, FLOPs, times and memory of a training step."""
    models = {
        name: Amp(build_variant(name, setting.model, CLASSES, seed=0).to(device))
        for name in VARIANTS
    }
    profile, optim = setting.profile, OptimConfig(steps=1)
    with torch.autocast(device.type, torch.bfloat16):
        sizes = attention_sizes(models["fast"].model, frames=profile.frames, size=profile.size)
    costs = measure(models, profile, optim, num_classes=CLASSES, device=device)
    plain = costs["none"]
    rows = []
    for name, cost in costs.items():
        rows.append(
            {
                "variant": name,
                "model": setting.model.name,
                "profile": asdict(profile),
                "dtype": "autocast bfloat16",
                "attention": sizes,
                **asdict(cost),
                "step_over_none": cost.step_ms.p50 / plain.step_ms.p50,
                "memory_over_none": cost.memory_mib / plain.memory_mib,
                "parameters_over_none": cost.parameters / plain.parameters,
            }
        )
    return rows


class Clips:
    """Clips of the generated task on the device, the same for every variant."""

    def __init__(self, task: Task, device: torch.device) -> None:
        self.train = self._draw(task, task.train_clips, 0, device)
        self.test = self._draw(task, task.test_clips, 1, device)

    @staticmethod
    def _draw(task: Task, count: int, split: int, device: torch.device) -> tuple[Tensor, Tensor]:
        drawn = [
            draw_clip(
                np.random.default_rng([0, split, number]),
                label=number % CLASSES,
                frames=task.frames,
                size=task.size,
            )
            for number in range(count)
        ]
        clips = torch.stack([clip for clip, _ in drawn]).permute(0, 4, 1, 2, 3)
        return clips.to(device), torch.tensor([label for _, label in drawn], device=device)

    def batches(self, task: Task) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Clips in a random order, again and again."""
        generator = torch.Generator().manual_seed(0)
        clips, labels = self.train
        while True:
            for numbers in torch.randperm(len(labels), generator=generator).split(task.optim.batch):
                chosen = numbers.to(clips.device)
                yield self.scaled(clips[chosen]), labels[chosen], numbers

    @staticmethod
    def scaled(clips: Tensor) -> Tensor:
        """8-bit pictures as numbers around zero."""
        return (clips.float() - 114.75) / 57.375


class _TimeIsOver(Exception):
    pass


def training_row(
    task: Task, variant: str, data: Clips, device: torch.device, end: float
) -> dict[str, Any]:
    """Trains a variant for the task's steps, or until the time is over; tests it."""
    model = Amp(build_variant(variant, task.model, CLASSES, seed=0).to(device))
    records: list[StepRecord] = []

    def on_step(record: StepRecord, asked: bool) -> None:
        records.append(record)
        if time.time() > end:
            raise _TimeIsOver

    torch.manual_seed(0)
    begun = time.time()
    with contextlib.suppress(_TimeIsOver):
        train(
            Updater(model, make_optimiser(model, task.optim), task.optim, device),
            data.batches(task),
            Schedule(task.optim, steps=task.optim.steps),
            steps=task.optim.steps,
            on_step=on_step,
        )
    seconds = time.time() - begun
    model.eval()
    clips, labels = data.test
    with torch.no_grad():
        batches = clips.split(task.optim.batch)
        predicted = torch.cat([model(Clips.scaled(batch)).argmax(1) for batch in batches])
    last = [record.loss for record in records[-LAST_STEPS:]]
    return {
        "steps": len(records),
        "of_steps": task.optim.steps,
        "seconds": round(seconds, 2),
        "accuracy": (predicted == labels).float().mean().item(),
        "train_loss": sum(last) / len(last),
        "first_losses": [round(record.loss, 5) for record in records[:LAST_STEPS]],
    }


def finish(options: argparse.Namespace, code: int) -> int:
    """Writes the end; returns the exit code."""
    path = options.out / "train.jsonl"
    rows = read_rows(path)
    lost = lost_items(options.out)
    found = {row.get("item") for row in rows}
    settings = SETTINGS if options.device == "cuda" else SMALL_SETTINGS
    wanted = [setting.name for setting in settings] + [f"training {name}" for name in VARIANTS]
    missing = [item for item in wanted if item not in found and item not in lost]
    file = RowFile(path, "train", torch.device(options.device), options.commit)
    file.add(event="end", missing=missing, lost=lost, cut=code == DEADLINE)
    for item, reason in lost.items():
        print(f"lost: {item}: {reason}", file=sys.stderr)
    if missing:
        print(f"not done for want of time: {', '.join(missing)}")
    measured = any(row["event"] == "cost" for row in rows)
    return int(bool(lost) or code not in (0, DEADLINE) or not measured)


if __name__ == "__main__":
    raise SystemExit(main())
