"""Holds a result file against the performance this package promises, line by line.

`python -m benchmarks.acceptance FILE.json` prints every line with the measured ratio, then what is
wanted of the C++ kernels (targets.py), and exits with 1 if anything does not hold. `--of promises`
or `--of targets` prints one of the two.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .results import load
from .targets import outcomes, print_outcomes

CASE = "c2d_r50_128x1/res3@224"
SHAPE = {"B": 2, "N": 12544, "M": 3136, "D": 256, "V": 256}
# Scores are one number for each position.
SHAPES = {"concat": SHAPE | {"D": 1}}

Rows = Mapping[str, Mapping[str, Any]]
"""Provider name -> its row, within one problem."""


@dataclass(frozen=True)
class Line:
    """`measure` of the rows of one problem has to be at least, or at most, `bound`.

    With `rate` it is promised where the library multiplies bfloat16 that many times as fast as
    float32, at which speed torch's kernel runs: nobody is further ahead of it than that.
    """

    kind: str
    dtype: str
    passes: str
    text: str
    bound: float
    measure: Callable[[Rows], float]
    at_most: bool = False
    rate: float = 0.0


def _speedup(provider: str, *baselines: str) -> Callable[[Rows], float]:
    """Speed of a provider over the fastest of the baselines."""

    def measure(rows: Rows) -> float:
        return min(rows[provider]["speedup_over"][name] for name in baselines)

    return measure


def _extra_memory(rows: Rows) -> float:
    """Bytes of chunked beyond operands and results, as a share of those of naive."""
    chunked, naive = (
        row["peak_mib"] - row["output_mib"] for row in (rows["chunked"], rows["naive"])
    )
    return chunked / naive


def _auto(rows: Rows) -> float:
    """Speed of what `auto` takes over the fastest that it could take beside it."""
    others = [rows["chunked"], *(row for name, row in rows.items() if name == "sdpa_flash")]
    best = min(row["time_ms"]["p50"] for row in others)
    return best / rows["auto"]["time_ms"]["p50"]


def _softmax(dtype: str, passes: str, text: str, bound: float, *baselines: str) -> Line:
    rate = 4.0 if dtype == "bfloat16" else 0.0
    measure = _speedup("chunked", *baselines)
    return Line("softmax", dtype, passes, text, bound, measure, rate=rate)


LINES = (
    _softmax("bfloat16", "forward", "chunked over SDPA", 3.0, "sdpa"),
    _softmax("bfloat16", "forward", "chunked over naive", 1.5, "naive"),
    _softmax("float32", "forward", "chunked over SDPA", 0.85, "sdpa"),
    _softmax("bfloat16", "forward_backward", "chunked over SDPA", 2.0, "sdpa"),
    _softmax("bfloat16", "forward_backward", "chunked over naive", 1.0, "naive"),
    _softmax(
        "float32", "forward_backward", "chunked over the better of both", 0.8, "sdpa", "naive"
    ),
    *(
        line
        for dtype in ("bfloat16", "float32")
        for passes in ("forward", "forward_backward")
        for line in (
            Line("softmax", dtype, passes, "auto over chunked and SDPA", 0.95, _auto),
            Line(
                "softmax",
                dtype,
                passes,
                "extra memory, of naive's",
                0.05,
                _extra_memory,
                at_most=True,
            ),
        )
    ),
    Line(
        "dot_product",
        "float32",
        "forward",
        "chunked over naive",
        15.0,
        _speedup("chunked", "naive"),
    ),
    Line(
        "dot_product",
        "float32",
        "forward",
        "chunked over two bmm",
        0.95,
        _speedup("chunked", "two_bmm"),
    ),
    *(
        Line("concat", "float32", passes, "chunked over naive", bound, _speedup("chunked", "naive"))
        for passes, bound in (("forward", 14.0), ("forward_backward", 8.0))
    ),
)


def problems(report: Mapping[str, Any], case: str) -> dict[tuple[str, str, str], Rows]:
    """(kind, dtype, pass) -> provider -> row, for the measured rows of one case."""
    found: dict[tuple[str, str, str], dict[str, Mapping[str, Any]]] = {}
    for row in report["rows"]:
        if row["case"] == case and row["status"] == "ok":
            found.setdefault((row["kind"], row["dtype"], row["pass"]), {})[row["provider"]] = row
    return found


def verdicts(report: Mapping[str, Any]) -> list[tuple[Line, float | None, bool]]:
    """(line, measured value or None where it was not measured, whether it holds), line by line.

    Lines that are not promised at this machine's rates are left out.
    """
    measured = problems(report, CASE)
    gemm = report["settings"].get("gemm_tflops", {})
    known = {"float32", "bfloat16"} <= set(gemm)
    rate = gemm["bfloat16"] / gemm["float32"] if known else float("inf")
    result = []
    for line in LINES:
        if line.rate > rate:
            continue
        rows = measured.get((line.kind, line.dtype, line.passes), {})
        shape = SHAPES.get(line.kind, SHAPE)
        at_shape = all(row["shape"] == shape for row in rows.values())
        try:
            value = line.measure(rows) if at_shape else None
        except (KeyError, TypeError):
            # A provider the line speaks of has no measured row, or no such baseline was measured.
            value = None
        holds = value is not None and (value <= line.bound if line.at_most else value >= line.bound)
        result.append((line, value, holds))
    return result


def main(arguments: list[str] | None = None) -> int:
    """Prints the lines of one file; returns 1 if any fails, 2 if the file cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.acceptance")
    parser.add_argument("file", type=Path)
    parser.add_argument("--of", choices=("all", "promises", "targets"), default="all")
    options = parser.parse_args(arguments)
    try:
        report = load(options.file)
    except (OSError, ValueError) as error:
        print(f"acceptance: {error}", file=sys.stderr)
        return 2
    held = []
    if options.of != "targets":
        found = verdicts(report)
        print_verdicts(found)
        held += [holds for _, _, holds in found]
    if options.of != "promises":
        wanted = outcomes(report)
        print_outcomes(wanted, report["settings"].get("peak_gflops", {}))
        held += [outcome.holds for outcome in wanted]
    busy = max((row.get("foreign_cores") or 0.0 for row in report["rows"]), default=0.0)
    print(f"other processes used up to {busy:.2f} cores meanwhile")
    return 0 if all(held) else 1


def print_verdicts(found: list[tuple[Line, float | None, bool]]) -> None:
    """A line for each promise."""
    for line, value, holds in found:
        said = "not measured" if value is None else f"{value:.3f}"
        sign = "<=" if line.at_most else ">="
        print(
            f"{'holds' if holds else 'FAILS'}  {line.kind:12} {line.dtype:9} {line.passes:17}"
            f"{line.text:32} {said:>12} {sign} {line.bound}"
        )


if __name__ == "__main__":
    raise SystemExit(main())
