"""Writes the tables of docs/kinds.md, patching.md and reproduce.md from committed files.

`python -m benchmarks.docs_tables` replaces what stands between the two marker lines; `--check`
changes nothing and exits with 1 if a document differs. Of kinds, the newest complete result file of
a device that measured every case of the group "targets" counts; of replaced blocks, the newest
complete one of a device named `*-patched.json`; of published runs, the comments at the head of
every configuration.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .acceptance import problems
from .readme_table import splice
from .registry import GROUPS
from .results import RESULTS, ROOT, SCHEMA, cpu_or_gpu, load, newest

CONFIGS = ROOT / "training" / "configs"
CASES = GROUPS["targets"]
REGION = "rnl_r50_8seg/layer2@224/one_clip"
KINDS = ("softmax", "gaussian", "dot_product", "concat")
DTYPES = ("float32", "bfloat16")
PASS = "forward_backward"
_TOPICS = ("Hardware", "Accuracy", "Source", "Start")
_HEAD = (
    "| layer | kind | naive ms | ours ms | speed | naive MiB | ours MiB | backend |",
    "|---|---|---:|---:|---:|---:|---:|---|",
)


def tables(results: Path = RESULTS) -> str:
    """The tables in Markdown, one for each device and dtype.

    Raises:
        ValueError: No complete file measured all cases.
    """
    reports = ((path, load(path)) for path in results.glob("*/*.json"))
    chosen = newest((found for found in reports if _fits(found[1])), cpu_or_gpu)
    if not chosen:
        raise ValueError(
            f"docs tables: expected a complete file of {', '.join(CASES)} under {results}, found "
            "none; run benchmarks.bench_ops --cases targets"
        )
    return "\n\n".join(_device(path, report) for path, report in chosen)


def _fits(report: Mapping[str, Any]) -> bool:
    if report["schema"] != SCHEMA or not report["complete"]:
        return False
    measured = {(row["case"], row["kind"]) for row in report["rows"] if row["status"] == "ok"}
    return all((case, kind) in measured for case in CASES for kind in KINDS)


def _device(path: Path, report: Mapping[str, Any]) -> str:
    parts = [_table(report, dtype) for dtype in DTYPES]
    parts.append(
        f"Forward and backward, medians of {report['settings']['rounds']} interleaved rounds; peak "
        "of live tensors beyond the operands, results included. *naive* holds the N x M matrix "
        f"(backend `reference`). {_source(path, report)}"
    )
    return "\n\n".join(parts)


def _source(path: Path, report: Mapping[str, Any]) -> str:
    """What was measured on, with what and when."""
    where = report["environment"]
    machine = f"{where['cpu_model']}, {where['threads']} threads, {where['instruction_set']}"
    if where["gpu"]:
        machine = where["gpu"]["name"]
    versions = ", ".join(f"{name} {one}" for name, one in where["versions"].items() if one)
    link = f"../{path.relative_to(ROOT).as_posix()}" if path.is_relative_to(ROOT) else path.name
    return (
        f"{machine}; {versions}; commit {(where['git_hash'] or '')[:12]}; {report['date'][:10]}. "
        f"Source: [`{path.name}`]({link})."
    )


def _table(report: Mapping[str, Any], dtype: str) -> str:
    lines = [f"**{dtype}, forward and backward**", "", *_HEAD]
    for case in (*CASES, REGION):
        measured = problems(report, case)
        for kind in (*KINDS, "region"):
            rows = measured.get((kind, dtype, PASS), {})
            if "auto" in rows:
                lines.append(_line(kind, rows))
    return "\n".join(lines)


def _line(kind: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    # The published code of the region operation is a masked dense convolution.
    ours, naive = rows["auto"], rows["masked_dense" if kind == "region" else "naive"]
    sizes = " ".join(f"{letter}={size}" for letter, size in ours["shape"].items())
    times = [row["time_ms"]["p50"] for row in (naive, ours)]
    cells = [
        f"{ours['case']}: {sizes}",
        kind,
        *(f"{time:.1f}" for time in times),
        f"{times[0] / times[1]:.1f}x",
        *(f"{row['peak_mib']:.0f}" for row in (naive, ours)),
        ours["backend"],
    ]
    return "| " + " | ".join(cells) + " |"


def patched(results: Path = RESULTS) -> str:
    """The tables of replaced blocks in Markdown, one for each device.

    Raises:
        ValueError: No complete file measured replaced blocks.
    """
    reports = ((path, load(path)) for path in results.glob("*/*-patched.json"))
    complete = (found for found in reports if found[1]["complete"])
    chosen = newest(complete, lambda report: report["environment"]["slug"])
    if not chosen:
        raise ValueError(
            f"docs tables: expected a complete *-patched.json under {results}, found none; "
            "run python -m tests.patching.measure"
        )
    return "\n\n".join(_replaced(path, report) for path, report in chosen)


def _replaced(path: Path, report: Mapping[str, Any]) -> str:
    lines = [
        "| block | kind | N x M | its own ms | replaced ms | speed | its own MiB | replaced MiB |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    rows = iter(report["rows"])
    for own, ours in zip(rows, rows, strict=True):
        if own["status"] != "ok":
            reason, *_ = own["reason"].split(";")
            cells = ["-", "-", "-", "-", reason, "-"]
        else:
            times = [row["time_ms"]["p50"] for row in (own, ours)]
            cells = [
                f"{ours['scores']:,}",
                *(f"{time:.1f}" for time in times),
                f"{times[0] / times[1]:.2f}x",
                *(f"{row['peak_mib']:.0f}" for row in (own, ours)),
            ]
        lines.append("| " + " | ".join([own["case"], own["kind"], *cells]) + " |")
    return "\n".join(lines) + (
        "\n\nForward and backward of one clip in float32, the same weights, medians of "
        f"{report['settings']['rounds']} interleaved rounds; peak of live tensors beyond the "
        f"block's own, results included. {_source(path, report)}"
    )


def runs(folder: Path = CONFIGS) -> str:
    """The table of published runs in Markdown: what a configuration's head says of it.

    Raises:
        ValueError: A configuration states an accuracy but not what it is of.
    """
    lines = [
        "| configuration | network and training | published accuracy, and its protocol | start |",
        "|---|---|---|---|",
    ]
    for path in sorted(folder.glob("*.yaml")):
        head = _head(path.read_text())
        if "Accuracy" not in head:
            continue
        if not head.get(""):
            raise ValueError(f"{path}: expected a line that names the network, got none; add it")
        start = head.get("Start", "").partition(": model.weights")[0]
        cells = [f"`{path.stem}`", head[""], head["Accuracy"], start]
        lines.append("| " + " | ".join(cell.rstrip(".") for cell in cells) + " |")
    return "\n".join(lines)


def _head(text: str) -> dict[str, str]:
    """Topic -> what the first comment says of it; "" is what stands before all topics."""
    found: dict[str, str] = {"": ""}
    topic = ""
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        said = line.removeprefix("#")
        first, colon, rest = said.strip().partition(": ")
        if colon and first in _TOPICS and not said.startswith("  "):
            topic, said = first, rest
        found[topic] = f"{found.get(topic, '')} {said.strip()}".strip()
    return found


DOCUMENTS: dict[str, Callable[[], str]] = {
    "kinds.md": tables,
    "patching.md": patched,
    "reproduce.md": runs,
}


def main(arguments: list[str] | None = None) -> int:
    """Returns 0, or 1 if `--check` finds a difference, or 2 if a file is missing or unfit."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.docs_tables", description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--folder", type=Path, default=ROOT / "docs")
    options = parser.parse_args(arguments)
    differ = []
    for name, generate in DOCUMENTS.items():
        path = options.folder / name
        try:
            text = path.read_text()
            wanted = splice(text, generate())
        except (OSError, ValueError) as error:
            print(f"docs_tables: {error}", file=sys.stderr)
            return 2
        if text != wanted:
            differ.append(name)
            if not options.check:
                path.write_text(wanted)
    if options.check and differ:
        print(
            f"docs_tables: {', '.join(differ)} differs from the committed files; "
            "run python -m benchmarks.docs_tables",
            file=sys.stderr,
        )
    return int(options.check and bool(differ))


if __name__ == "__main__":
    raise SystemExit(main())
