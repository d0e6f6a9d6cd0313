"""Reports of a run: ``report.json`` for programs, ``report.md`` and a terminal table for people.

Every field of ``report.json`` is documented in ``report_schema.py``.
"""

import dataclasses
import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import nlkernels

from .config import Config
from .loading import Data
from .measure import Cost

FORMAT = 2

# Classes that are named, and unusable videos that are listed, for people.
_NAMED, _LISTED = 10, 20


def head(
    kind: str,
    *,
    out: Path,
    command: str,
    seconds: float,
    device: torch.device,
    config: Mapping[str, Any],
) -> dict[str, Any]:
    """The part that every ``report.json`` starts with."""
    return {
        "format": FORMAT,
        "kind": kind,
        "name": out.name,
        "command": command,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "seconds": round(seconds, 1),
        "environment": environment(device),
        "config": dict(config),
    }


def environment(device: torch.device) -> dict[str, Any]:
    """Where a report was measured."""
    return {
        "device": str(device),
        "device_name": _device_name(device),
        "dtype": str(torch.get_default_dtype()).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "nlkernels": nlkernels.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
    }


def data_section(config: Config, data: Data) -> dict[str, Any]:
    """What ``report.json`` says about the clips."""
    return {
        "kind": config.data.kind,
        "classes": data.classes,
        "train_clips": len(data.train),
        "test_clips": len(data.test),
        "protocol": data.protocol,
        "problems": data.problems,
    }


def training_section(
    config: Config, steps: int, attention: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What ``report.json`` says about the trainings as such."""
    return {
        "steps": steps,
        "batch": config.optim.batch,
        "frames": config.data.frames,
        "size": config.data.size,
        "attention": list(attention),
    }


def plain(cost: Cost) -> dict[str, Any]:
    """A cost as nested plain values; times to a microsecond, memory to a KiB.

    Of the largest batch stay the number and its reckoning as text, both None if it was not asked.
    """

    def shorten(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: shorten(inner) for name, inner in value.items()}
        return round(value, 3) if isinstance(value, float) else value

    fields = dataclasses.asdict(cost)
    del fields["fit"]
    fields["largest_batch"] = None if cost.fit is None else cost.fit.batch
    fields["largest_batch_text"] = None if cost.fit is None else str(cost.fit)
    return shorten(fields)


def write_json(report: Mapping[str, Any], path: Path) -> None:
    """Write a report, replacing the file in one go."""
    _replace(path, json.dumps(report, indent=1, allow_nan=False) + "\n")


def write_markdown(text: str, path: Path) -> Path:
    """Write a report, replacing the file in one go; returns its path."""
    _replace(path, text)
    return path


def data_lines(data: Data) -> list[str]:
    """The clips of a run for the terminal; videos that could not be used are counted and listed."""
    names = ", ".join([*data.classes[:_NAMED], *["..."] * (len(data.classes) > _NAMED)])
    lines = [
        f"{len(data.classes)} classes ({names}), {len(data.train)} training and "
        f"{len(data.test)} test clips"
    ]
    return lines + problem_lines(data.problems)


def problem_lines(
    problems: Sequence[Mapping[str, str]], *, others: str = ", all of them in report.json"
) -> list[str]:
    """Unusable videos, counted, the first ones listed; empty if there are none.

    Args:
        problems: Path and reason of each.
        others: Where the others are, behind their number.
    """
    if not problems:
        return []
    count = "1 video" if len(problems) == 1 else f"{len(problems)} videos"
    lines = [f"{count} could not be used:"]
    lines += [f"- {one['path']}: {one['reason']}" for one in problems[:_LISTED]]
    if len(problems) > _LISTED:
        lines.append(f"- and {len(problems) - _LISTED} more{others}")
    return lines


def attention_line(sizes: Sequence[Mapping[str, Any]]) -> str:
    """Names and N x M of the blocks in one line."""
    if not sizes:
        return "no non-local blocks"
    return "blocks N x M " + ", ".join(
        f"{one['block']} {one['n']} x {one['m']} ({one['backend']})" for one in sizes
    )


def comparison_text(report: Mapping[str, Any]) -> str:
    """Summary of a comparison for the terminal."""
    rows = comparison_rows(report)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells))
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([*lines, *_notes(report)])


def comparison_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """Header and rows of the summary of a comparison; what none does not cost in parentheses."""

    def over(one: Mapping[str, Any], key: str, unit: str = "") -> str:
        percent = one["overhead_percent"][key]
        if percent is None or percent == 0:
            return ""
        more = f"{one['over_none'][key]:+.1f} {unit}, " if unit else ""
        return f" ({more}{percent:+.1f}%)"

    gib = report["profile"]["memory_gib"]
    head = ["variant", "parameters", "GFLOP/clip", "published", "ms/step", "clips/s", "MiB"]
    trained = "training" in report
    head += [] if gib is None else [f"batch in {gib:g} GiB"]
    rows = [head + ["accuracy"] * trained]
    for one in report["variants"]:
        largest = "any" if one["largest_batch"] is None else str(one["largest_batch"])
        rows.append(
            [
                one["name"],
                f"{one['parameters']:,}{over(one, 'parameters')}",
                f"{one['flops'] / 1e9:.3f}{over(one, 'flops')}",
                f"{one['multiply_adds'] / 1e9:.3f}{over(one, 'multiply_adds')}",
                f"{one['step_ms']['p50']:.1f}{over(one, 'step_ms', 'ms')}",
                f"{one['clips_per_s']:.2f}",
                f"{one['memory_mib']:.1f}{over(one, 'memory_mib', 'MiB')}",
                *([] if gib is None else [largest]),
                *([f"{one['accuracy']:.1%}"] if trained else []),
            ]
        )
    return rows


def comparison_markdown(report: Mapping[str, Any], plots: Sequence[Path]) -> str:
    """``report.md`` of a comparison."""
    costs, trained = report["profile"], "training" in report
    parts = [
        f"# Comparison {report['name']}",
        _markdown_table(comparison_rows(report)),
        "\n".join(f"- {line}" for line in _notes(report)),
        "\n".join(f"- `{one['name']}`: {one['description']}" for one in report["variants"]),
        f"## Cost of a training step (batch {costs['batch']}, median of {costs['rounds']} rounds)",
        _markdown_table(_cost_rows(report)),
        "Times are 20% / 50% / 80% quantiles in ms. Memory is the peak above the level before the "
        "step: live tensor bytes counted exactly, the GPU allocator's peak, and the growth of the "
        "resident set as a cross-check.",
        "## Trainings" if trained else "",
        _markdown_table(_training_rows(report)) if trained else "",
        "Naive and fast compute the same function. Their trainings start alike and later drift "
        "apart by rounding, as two naive ones do whose inputs differ in the last bit."
        if trained and report["agreement"]
        else "",
        *(f"![{path.stem}]({path.name})" for path in plots),
        _problems(report) if trained else "",
        _origin(report),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def training_markdown(report: Mapping[str, Any], curves: Path | None) -> str:
    """``report.md`` of a single training.

    Args:
        report: Contents of ``report.json``.
        curves: The picture of its course, in the same folder; None without a course.
    """
    result = report["result"]
    rows = [
        ["", "test accuracy"],
        [report["config"]["model"]["name"], f"{result['accuracy']:.1%}"],
    ]
    colour = result["mean_colour_accuracy"]
    if colour is not None:
        rows.append(["mean-colour classifier", f"{colour:.1%}"])
    training = report["training"]
    course = report.get("course")
    breaks = [] if course is None else course["breaks"]
    since = f" from step {breaks[-1]['step']} on" if breaks else ""
    parts = [
        f"# Training {report['name']}",
        _markdown_table(rows),
        f"{result['parameters']:,} parameters, {training['steps']} steps of {training['batch']} "
        f"clips in {result['train_s']} s{since}; last training loss {result['train_loss']:.4f}, "
        f"test loss {result['test_loss']:.4f}. Test: {report['data']['protocol']}. "
        f"Attention: {attention_line(training['attention'])}.",
        ""
        if colour is None
        else "The mean-colour classifier sees only each clip's mean colour: where it does well, "
        "the accuracy above checks the pipeline and is no evidence for the blocks.",
        f"![Loss, accuracy, learning rate, time and memory by step]({curves.name})"
        if curves
        else "",
        "" if course is None else _course(course),
        _problems(report),
        _origin(report),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _course(course: Mapping[str, Any]) -> str:
    """Where the time of the steps went, and every test."""
    names = {"data_ms": "data", "forward_ms": "forward", "backward_ms": "backward"}
    names["optimiser_ms"] = "optimiser"
    rows = [["", *names.values(), "whole step"]]
    rows.append(["median ms", *(f"{course[part]:.1f}" for part in (*names, "step_ms"))])
    rows.append(["share of all steps", *(f"{course['share'][p]:.1%}" for p in names), ""])
    parts = [
        _markdown_table(rows),
        f"{course['clips_per_s']:.1f} clips/s (median); peak memory {course['peak_mib']:.0f} MiB "
        "(of the GPU allocator, on CPU of the resident set).",
    ]
    if len(course["tests"]) > 1:
        rows = [["step", "test accuracy", "test loss"]]
        for test in course["tests"]:
            rows.append([str(test["step"]), f"{test['accuracy']:.1%}", f"{test['loss']:.4f}"])
        parts.append(_markdown_table(rows))
    return "\n\n".join(parts)


def _notes(report: Mapping[str, Any]) -> list[str]:
    """What the numbers of the summary mean."""
    profile = report["profile"]
    shape = f"{profile['frames']} x {profile['size']} x {profile['size']}"
    notes = [
        f"cost: batch {profile['batch']} of {shape}, {profile['classes']} classes; "
        f"{attention_line(profile['attention'])}",
        *(_training_notes(report) if "training" in report else []),
        "GFLOP of the forward pass: executed, a multiply-add is two; published, as papers count: a "
        "multiply-add is one, and products with N x M count whole",
    ]
    if any(one["overhead_percent"]["parameters"] is not None for one in report["variants"]):
        notes.append("in parentheses: over none")
    notes += [
        f"{one['name']}: {one['largest_batch_text']}"
        for one in report["variants"]
        if one["largest_batch_text"] is not None
    ]
    notes += [
        f"naive against fast, first {one['steps']} steps of seed {one['seed']}: losses differ by "
        f"at most {one['loss_difference']:.1e}"
        for one in report.get("agreement", [])
    ]
    where = report["environment"]
    notes.append(
        f"{where['device_name']}, {where['device']}, {where['dtype']}, {where['threads']} threads, "
        f"torch {where['torch']}"
    )
    return notes


def _training_notes(report: Mapping[str, Any]) -> list[str]:
    training = report["training"]
    clip = f"{training['frames']} x {training['size']} x {training['size']}"
    seeds = [run["seed"] for run in report["variants"][0]["runs"]]
    numbers = ", ".join(map(str, seeds))
    seed_text = f"seed {numbers}" if len(seeds) == 1 else f"mean of seeds {numbers}"
    return [
        f"accuracy: {training['steps']} steps of {training['batch']} clips of {clip}, {seed_text}; "
        f"{attention_line(training['attention'])}; test {report['data']['protocol']}"
    ]


def _cost_rows(report: Mapping[str, Any]) -> list[list[str]]:
    def times(quantiles: Mapping[str, float]) -> str:
        return " / ".join(f"{quantiles[name]:.1f}" for name in ("p20", "p50", "p80"))

    def mib(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f}"

    rows = [
        ["variant", "forward", "backward", "optimiser", "step", "live MiB", "GPU MiB", "RSS MiB"]
    ]
    for one in report["variants"]:
        parts = ("forward_ms", "backward_ms", "optimiser_ms", "step_ms")
        memory = ("memory_mib", "device_mib", "resident_mib")
        rows.append([one["name"], *(times(one[p]) for p in parts), *(mib(one[m]) for m in memory)])
    return rows


def _training_rows(report: Mapping[str, Any]) -> list[list[str]]:
    rows = [["variant", "seed", "test accuracy", "test loss", "last training loss", "seconds"]]
    for one in report["variants"]:
        for run in one["runs"]:
            numbers = [f"{run['accuracy']:.1%}", f"{run['test_loss']:.4f}"]
            numbers += [f"{run['train_loss']:.4f}", f"{run['train_s']:.0f}"]
            rows.append([one["name"], str(run["seed"]), *numbers])
    return rows


def _markdown_table(rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, "|---|" + "---:|" * (len(rows[0]) - 1))
    return "\n".join(lines)


def _problems(report: Mapping[str, Any]) -> str:
    lines = problem_lines(report["data"]["problems"])
    return "\n".join(["## Videos\n", f"{lines[0]}\n", *lines[1:]]) if lines else ""


def _origin(report: Mapping[str, Any]) -> str:
    where = report["environment"]
    return (
        f"`{report['command']}`, {report['created']}, {report['seconds']} s in all; "
        f"{where['device_name']} ({where['device']}), {where['dtype']}, "
        f"{where['threads']} threads, torch {where['torch']}, Python {where['python']}, "
        f"nlkernels {where['nlkernels']}, {where['platform']}. "
        "All numbers: `report.json`; resolved configuration: `config.json`."
    )


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
