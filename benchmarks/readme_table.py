"""Writes the benchmark table of the README from committed result files.

`python -m benchmarks.readme_table` replaces what stands between the two marker lines; `--check`
changes nothing and exits with 1 if the README differs. Of CPUs and of GPUs the newest file that
measured the acceptance case of softmax is shown, with the other kinds that it measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .acceptance import CASE, Rows, problems
from .registry import DTYPES
from .results import RESULTS, ROOT, cpu_or_gpu, load, newest

BEGIN = "<!-- benchmark table: begin -->"
END = "<!-- benchmark table: end -->"

KINDS = ("softmax", "dot_product", "concat")
PASSES = {"forward": "forward", "forward_backward": "forward + backward"}
SDPA = ("sdpa_flash", "sdpa_efficient", "sdpa_cudnn", "sdpa_math")
PEERS = (*SDPA, "two_bmm", "tiled", "compiled", "flex", "ffpa", "ffpa_tma")


def table(results: Path = RESULTS) -> str:
    """The README's table in Markdown, one for CPUs and one for GPUs.

    Raises:
        ValueError: No result file measured the acceptance case, or one was cut short or taken
            without passing tests.
    """
    parts = [_device_table(path, report) for path, report in _newest(results)]
    if not parts:
        raise ValueError(
            f"readme table: expected results of {CASE} under {results}, found none; "
            "run the measurement described in benchmarks/README.md"
        )
    return "\n\n".join(parts)


def _newest(results: Path) -> list[tuple[Path, Mapping[str, Any]]]:
    """The newest file of any CPU, and that of any GPU."""
    reports = [(path, load(path)) for path in sorted(results.glob("*/*.json"))]
    fit = [
        (path, report)
        for path, report in reports
        if any(kind == KINDS[0] for kind, _, _ in problems(report, CASE))
    ]
    chosen = newest(fit, cpu_or_gpu)
    for path, report in chosen:
        if not report["complete"] or report["tests"]["outcome"] != "passed":
            raise ValueError(
                f"{path}: expected a complete run with passing tests, got "
                f"complete={report['complete']}, tests {report['tests']['outcome']}; "
                "run it with --tests tests/ops"
            )
    return chosen


def _device_table(path: Path, report: Mapping[str, Any]) -> str:
    lines = [
        "| operation | speed over naive | over best other | MiB naive | best other | ours |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    measured = problems(report, CASE)
    for kind in KINDS:
        for dtype in DTYPES:
            for passes in PASSES:
                rows = measured.get((kind, dtype, passes), {})
                if "naive" in rows and "auto" in rows:
                    lines.append(_line(kind, dtype, passes, rows))
    return "\n".join(lines) + "\n\n" + _caption(path, report, next(iter(measured.values())))


def _line(kind: str, dtype: str, passes: str, rows: Rows) -> str:
    naive, ours = rows["naive"], rows["auto"]
    peers = [rows[name] for name in PEERS if name in rows]
    peer = min(peers, key=lambda row: _ahead(ours, row)) if peers else None
    cells = [
        f"{kind} {dtype} {PASSES[passes]}",
        f"{_time(naive) / _time(ours):.2f}x",
        f"{_ahead(ours, peer):.2f}x" if peer else "",
        _mib(naive),
        f"{_mib(peer)} ({peer['provider']})" if peer else "none",
        f"{_mib(ours)} ({ours['backend']})",
    ]
    return "| " + " | ".join(cells) + " |"


def _ahead(ours: Mapping[str, Any], peer: Mapping[str, Any]) -> float:
    """Speed of ours over a peer's, within the rounds in which both took turns."""
    return peer.get("auto_speedup") or _time(peer) / _time(ours)


def _mib(row: Mapping[str, Any]) -> str:
    return f"{row['peak_mib']:.0f}"


def _time(row: Mapping[str, Any]) -> float:
    return row["time_ms"]["p50"]


def _caption(path: Path, report: Mapping[str, Any], rows: Rows) -> str:
    where, shape = report["environment"], next(iter(rows.values()))["shape"]
    machine = f"{where['cpu_model']}, {where['threads']} threads, {where['instruction_set']}"
    others = "PyTorch's SDPA backends"
    if where["gpu"]:
        machine = where["gpu"]["name"]
        others += ", compiled eager code, FlexAttention and ffpa-attn"
    versions = ", ".join(
        f"{name} {version}" for name, version in where["versions"].items() if version
    )
    sizes = ", ".join(f"{letter} = {size}" for letter, size in shape.items())
    if any(kind == "concat" for kind, *_ in problems(report, CASE)):
        sizes += " (concat takes one score for each position)"
    commit = (where["git_hash"] or "unknown")[:12] + (" with changes" if where["git_dirty"] else "")
    folder = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
    return (
        f"{sizes}: res3 of a 128-frame clip at 224 px. Ratios of median times over "
        f"{report['settings']['rounds']} interleaved rounds, and peak of live tensors beyond the "
        "operands (results included). *naive* materialises N x M; *best other* is the fastest of "
        f"{others}, for dot_product two `torch.bmm` in the cheaper order; a ratio "
        f"above 1 means ours is faster. {machine}; {versions}; commit {commit}; "
        f"{report['date'][:10]}.\n\n"
        f"Source: [`{folder}`]({folder}), by `{report['command']}`."
    )


def splice(text: str, generated: str) -> str:
    """README text with `generated` between the markers.

    Raises:
        ValueError: The markers do not stand there exactly once, in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"README: expected one line {BEGIN} and below it one line {END}")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{generated}\n{END}{rest.split(END)[1]}"


def main(arguments: list[str] | None = None) -> int:
    """Returns 0, or 1 if `--check` finds a difference, or 2 if a file is missing or unfit."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme_table", description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    try:
        text = options.readme.read_text()
        wanted = splice(text, table(options.results))
    except (OSError, ValueError) as error:
        print(f"readme_table: {error}", file=sys.stderr)
        return 2
    if options.check:
        if text != wanted:
            print(
                f"readme_table: {options.readme.name} differs from the results; "
                "run python -m benchmarks.readme_table",
                file=sys.stderr,
            )
        return int(text != wanted)
    options.readme.write_text(wanted)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
