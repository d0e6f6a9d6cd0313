"""Which backend is the fastest, problem by problem: what the tables of `choice.py` are made from.

`python -m benchmarks.fastest FILE.json [--kinds softmax] [--dtype bfloat16] [--pass backward]`
prints a line per problem, sorted by size. A backward's time is that of both passes less the
forward's, two medians of the same file; `choice.py` decides on each pass by itself.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .results import load
from .text import words

BACKENDS = {
    "cpp": ("cpp",),
    "triton": ("triton",),
    "cuda": ("cuda",),
    "chunked": ("chunked",),
    "sdpa": ("sdpa_flash", "sdpa_efficient", "sdpa_cudnn"),
    "naive": ("naive", "conv3d"),
}
"""Backend -> its providers, the faster of which counts. naive is `reference`; sdpa is refused by
this package where torch would materialise."""

PASSES = ("forward", "backward", "forward_backward")


@dataclass(frozen=True)
class Standing:
    """One problem and pass.

    Attributes:
        kind, dtype, passes, case: The problem; `passes` is one of `PASSES`.
        shape: Its sizes by letter.
        time_ms: Backend -> its median, the fastest first.
    """

    kind: str
    dtype: str
    passes: str
    case: str
    shape: Mapping[str, int]
    time_ms: Mapping[str, float]

    @property
    def size(self) -> int:
        """Scores of an item, N*M, or positions times channels: what the lines are sorted by."""
        shape = self.shape
        if "N" in shape:
            return shape["N"] * shape["M"]
        return math.prod(size for letter, size in shape.items() if letter != "B")

    @property
    def backend(self) -> str:
        """The fastest one."""
        return next(iter(self.time_ms))


def standings(report: Mapping[str, Any]) -> list[Standing]:
    """All problems of a result file of which two backends were measured."""
    times: dict[tuple[str, str, str], dict[str, dict[str, float]]] = {}
    shapes: dict[tuple[str, str, str], Mapping[str, int]] = {}
    for row in report["rows"]:
        if row["status"] != "ok":
            continue
        key = (row["kind"], row["dtype"], row["case"])
        shapes[key] = row["shape"]
        own = times.setdefault(key, {}).setdefault(row["pass"], {})
        for backend, providers in BACKENDS.items():
            if row["provider"] in providers:
                own[backend] = min(own.get(backend, math.inf), row["time_ms"]["p50"])
    found = []
    for (kind, dtype, case), by_pass in times.items():
        both, forward = by_pass.get("forward_backward", {}), by_pass.get("forward", {})
        by_pass["backward"] = {
            name: both[name] - forward[name]
            for name in both
            if name in forward and both[name] > forward[name]
        }
        for passes in PASSES:
            own = by_pass.get(passes, {})
            if len(own) > 1:
                order = dict(sorted(own.items(), key=lambda item: item[1]))
                found.append(Standing(kind, dtype, passes, case, shapes[kind, dtype, case], order))
    return sorted(found, key=lambda s: (s.kind, s.dtype, PASSES.index(s.passes), s.size, s.case))


def lines(found: Iterable[Standing]) -> list[str]:
    """The fastest backend of each problem, and how many times as long each other one takes."""
    text = []
    for standing in found:
        best, *others = standing.time_ms
        ratios = "  ".join(
            f"{name} {standing.time_ms[name] / standing.time_ms[best]:.2f}x" for name in others
        )
        sizes = " ".join(f"{letter}={size}" for letter, size in standing.shape.items())
        text.append(
            f"{standing.kind:11} {standing.dtype:8} {standing.passes:16} {sizes:42} "
            f"{best:8} {standing.time_ms[best]:9.2f} ms  {ratios}"
        )
    return text


def main(arguments: list[str] | None = None) -> int:
    """Returns 0, or 2 if the file cannot be read or answers nothing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fastest")
    parser.add_argument("file", type=Path)
    parser.add_argument("--kinds", type=words, default=None)
    parser.add_argument("--dtype", type=words, default=None)
    parser.add_argument("--pass", dest="passes", type=words, default=None, help=", ".join(PASSES))
    options = parser.parse_args(arguments)
    try:
        found = standings(load(options.file))
    except (OSError, ValueError) as error:
        print(f"fastest: {error}", file=sys.stderr)
        return 2
    asked = (("kind", options.kinds), ("dtype", options.dtype), ("passes", options.passes))
    for field, words_asked in asked:
        if words_asked is not None:
            found = [standing for standing in found if getattr(standing, field) in words_asked]
    if not found:
        print(
            f"fastest: expected problems of which two backends were measured, got none in "
            f"{options.file}; ask for less, or measure more",
            file=sys.stderr,
        )
        return 2
    print("\n".join(lines(found)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
