"""Pictures of measured rows: medians with p20 and p80, and peak memory, one line per problem."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if importlib.util.find_spec("matplotlib") is None:
    raise ImportError(
        "expected matplotlib for --png, got none; pip install 'nlkernels[bench]', or leave it out"
    )

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Row = Mapping[str, Any]

# Okabe-Ito colours: distinguishable with any colour vision.
OURS, OTHERS, MUTED = "#0072b2", "#d55e00", "#7f7f7f"
_OURS = ("chunked", "cpp", "cpp_avx2", "triton", "triton_lean", "auto", "fast", "unfused")
_HEIGHT_IN, _WIDTH_IN, _HEAD_IN, _DPI = 0.34, 10.0, 1.1, 110


def draw(rows: Sequence[Row], machine: str, path: Path) -> None:
    """Draw all problems into a PNG file.

    Args:
        rows: As they stand in result files. Unserved ones are left out, wrong ones named.
        machine: What they were measured on.
        path: File to write.
    """
    problems: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["status"] == "unserved":
            continue
        key = (row["case"], row["kind"], row["dtype"], row["pass"], *row["shape"].items())
        problems.setdefault(key, []).append(row)
    heights = [_HEAD_IN + _HEIGHT_IN * len(group) for group in problems.values()]
    figure = Figure(figsize=(_WIDTH_IN, sum(heights) + 0.3), dpi=_DPI, layout="constrained")
    grid = figure.add_gridspec(len(problems), 2, height_ratios=heights)
    for line, group in enumerate(problems.values()):
        time, memory = (figure.add_subplot(grid[line, column]) for column in range(2))
        _bars(time, group, "time_ms", "time in ms: median, p20 to p80")
        _bars(memory, group, "peak_mib", "peak of live tensors in MiB")
        memory.set_yticklabels([])
        time.set_title(_title(group[0]), loc="left", fontsize=9)
    figure.supxlabel(f"blue: nlkernels, orange: others; {machine}", fontsize=7)
    FigureCanvasAgg(figure).print_png(path)


def _title(row: Row) -> str:
    sizes = " ".join(f"{letter}={size}" for letter, size in row["shape"].items())
    name = "" if row["case"] == "asked" else f"{row['case']}  "
    return f"{name}{row['kind']}  {row['dtype']}  {row['pass']}\n{sizes}"


def _bars(axes: Axes, rows: Sequence[Row], field: str, label: str) -> None:
    for place, row in enumerate(rows):
        colour = OURS if row["provider"] in _OURS else OTHERS
        found = row.get(field)
        if found is None:
            axes.text(0, place, f" {row['status']}", va="center", fontsize=7, color=MUTED)
            continue
        middle, spread = found, None
        if isinstance(found, Mapping):
            middle = found["p50"]
            spread = [[middle - found["p20"]], [found["p80"] - middle]]
        axes.barh(place, middle, xerr=spread, color=colour, height=0.7, ecolor="black", capsize=2)
        edge = middle if spread is None else found["p80"]
        axes.text(edge, place, f" {middle:.4g}", va="center", fontsize=7)
    axes.set_yticks(range(len(rows)), [_label(row) for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.margins(x=0.15)
    axes.set_xlim(left=0)
    axes.set_xlabel(label, fontsize=8)
    axes.tick_params(axis="x", labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def _label(row: Row) -> str:
    backend = row.get("backend")
    return row["provider"] + (f" ({backend})" if backend and row["provider"] in _OURS else "")
