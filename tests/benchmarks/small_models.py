"""Networks that are small enough to be measured in a test."""

from pathlib import Path

import torch

from benchmarks import bench_models, results
from benchmarks.model_cases import ModelCase
from benchmarks.model_measure import Plan

CPU = torch.device("cpu")
PLAN = Plan("float32", "training", CPU, rounds=1)
SMALL = ModelCase("c2d_r50", "8x8", 32, blocks=1, batch=2, width=0.125)
OPTIONS = ("--models", "c2d_r50", "--sizes", "64", "--width", "0.125", "--batch", "2")


def run(path: Path, *more: str) -> tuple[int, dict]:
    """Exit code and result file of the command."""
    code = bench_models.main([*OPTIONS, "--rounds", "2", *more, "--out", str(path)])
    return code, results.load(path)


def by_provider(rows: list[dict], **fields: str) -> dict[str, dict]:
    """Those rows that have these fields."""
    return {
        row["provider"]: row
        for row in rows
        if all(row[key] == value for key, value in fields.items())
    }
