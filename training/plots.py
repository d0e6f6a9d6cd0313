"""PNG plots of a comparison report (``report.json`` as nested values), one picture per question."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe-Ito colours: distinguishable with any colour vision.
_COLOURS = {
    "none": "#7f7f7f",
    "naive": "#d55e00",
    "fast": "#0072b2",
    "local": "#009e73",
    "frame": "#cc79a7",
}
PART_COLOURS = {
    "data_ms": "#009e73",
    "forward_ms": "#56b4e9",
    "backward_ms": "#e69f00",
    "optimiser_ms": "#999999",
}
PART_NAMES = {part: part.removesuffix("_ms") for part in PART_COLOURS}


def draw_costs(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw what the variants of a comparison cost.

    Args:
        report: Contents of ``report.json``.
        folder: Where the PNG files go.

    Returns:
        The files, in the order in which the report shows them.
    """
    variants = report["variants"]
    shape = report["profile"]
    clip = f"{shape['frames']}x{shape['size']}x{shape['size']} clip"
    millions = max(one["parameters"] for one in variants) >= 1e6
    return [
        _bars(
            folder / "parameters.png",
            "Parameters",
            "million parameters" if millions else "thousand parameters",
            variants,
            [one["parameters"] / (1e6 if millions else 1e3) for one in variants],
            [one["overhead_percent"]["parameters"] for one in variants],
        ),
        _bars(
            folder / "flops.png",
            f"Forward FLOPs of one {clip}",
            "GFLOP (a multiply-add is two)",
            variants,
            [one["flops"] / 1e9 for one in variants],
            [one["overhead_percent"]["flops"] for one in variants],
        ),
        _time(folder / "time.png", f"Training step, batch {shape['batch']}, {clip}", variants),
        _bars(
            folder / "memory.png",
            f"Peak memory of a training step, batch {shape['batch']}, {clip}",
            "MiB of live tensors above the level before the step",
            variants,
            [one["memory_mib"] for one in variants],
            [one["overhead_percent"]["memory_mib"] for one in variants],
        ),
    ]


def draw_trainings(
    report: Mapping[str, Any], curves: Mapping[str, Sequence[Sequence[float]]], folder: Path
) -> list[Path]:
    """Draw how well the variants of a comparison were trained.

    Args:
        report: Contents of ``report.json``.
        curves: Variant -> one list of training losses per seed.
        folder: Where the PNG files go.

    Returns:
        The files, in the order in which the report shows them.
    """
    return [
        _accuracy(folder / "accuracy.png", report),
        _loss(folder / "loss.png", report, curves),
    ]


def _bars(
    path: Path,
    title: str,
    unit: str,
    variants: Sequence[Mapping[str, Any]],
    values: Sequence[float],
    overheads: Sequence[float | None],
) -> Path:
    figure, axes = _figure(len(variants))
    names = [one["name"] for one in variants]
    bars = axes.barh(names, values, color=[_COLOURS[name] for name in names])
    labels = [
        f"{_number(value)}" + ("" if overhead is None or overhead == 0 else f"  ({overhead:+.1f}%)")
        for value, overhead in zip(values, overheads, strict=True)
    ]
    axes.bar_label(bars, labels, padding=4)
    return _finish(figure, axes, path, title, unit, room=1.3)


def _time(path: Path, title: str, variants: Sequence[Mapping[str, Any]]) -> Path:
    figure, axes = _figure(len(variants))
    names = [one["name"] for one in variants]
    left = [0.0] * len(names)
    for part in ("forward_ms", "backward_ms", "optimiser_ms"):
        values = [one[part]["p50"] for one in variants]
        axes.barh(names, values, left=left, color=PART_COLOURS[part], label=PART_NAMES[part])
        left = [start + value for start, value in zip(left, values, strict=True)]
    for row, one in enumerate(variants):
        step = one["step_ms"]
        overhead = one["overhead_percent"]["step_ms"]
        axes.plot([step["p20"], step["p80"]], [row, row], color="black", linewidth=1.5)
        text = f"{_number(step['p50'])} ms"
        text += "" if overhead is None or overhead == 0 else f"  ({overhead:+.1f}%)"
        axes.annotate(
            text,
            (max(step["p80"], left[row]), row),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
        )
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.28), ncols=3, frameon=False)
    return _finish(
        figure, axes, path, title, "ms, medians; black line: 20% to 80% of the steps", room=1.35
    )


def _accuracy(path: Path, report: Mapping[str, Any]) -> Path:
    variants = report["variants"]
    figure, axes = _figure(len(variants))
    names = [one["name"] for one in variants]
    values = [100 * one["accuracy"] for one in variants]
    axes.barh(names, values, color=[_COLOURS[name] for name in names])
    chance = 100 / len(report["data"]["classes"])
    axes.axvline(chance, color="black", linestyle=":", linewidth=1, zorder=2)
    for row, one in enumerate(variants):
        single = [100 * run["accuracy"] for run in one["runs"]]
        if len(single) > 1:
            axes.plot(single, [row] * len(single), "o", color="black", markersize=4)
        axes.annotate(
            f"{values[row]:.1f}%",
            (max([values[row], *single]), row),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )
    seeds = len(variants[0]["runs"])
    unit = "test accuracy in %, dotted line: chance"
    unit += "" if seeds == 1 else f"; mean of {seeds} seeds, dots: each seed"
    axes.set_xlim(0, 112)
    axes.set_xticks(range(0, 101, 20))
    return _finish(figure, axes, path, f"Accuracy ({report['data']['protocol']})", unit, room=None)


def _loss(
    path: Path, report: Mapping[str, Any], curves: Mapping[str, Sequence[Sequence[float]]]
) -> Path:
    figure, axes = _canvas(4.2)
    for name, runs in curves.items():
        for number, losses in enumerate(runs):
            window = max(1, len(losses) // 40)
            smooth = moving_average(losses, window)
            # Naive and fast coincide when they agree: one is drawn wide and pale under the other.
            below = name == "naive"
            axes.plot(
                range(1, len(smooth) + 1),
                smooth,
                color=_COLOURS[name],
                linewidth=4 if below else 1.5,
                alpha=0.45 if below else 1.0,
                label=name if number == 0 else None,
            )
    axes.set_ylim(bottom=0)
    axes.set_ylabel("training loss, moving average")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    title = f"Training loss, batch {report['training']['batch']}"
    return _finish(figure, axes, path, title, "step", room=None)


def moving_average(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last ``window`` values at each position (fewer at the start)."""
    means, total = [], 0.0
    for position, value in enumerate(values):
        total += value
        if position >= window:
            total -= values[position - window]
        means.append(total / min(position + 1, window))
    return means


def _canvas(height: float) -> tuple[Figure, Axes]:
    # Without pyplot: no window system is looked for, and no figure outlives its function.
    figure = Figure(figsize=(7.5, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _figure(rows: int) -> tuple[Figure, Axes]:
    figure, axes = _canvas(1.3 + 0.5 * rows)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    # The first variant on top, as in the tables.
    axes.invert_yaxis()
    return figure, axes


def _finish(
    figure: Figure, axes: Axes, path: Path, title: str, unit: str, room: float | None
) -> Path:
    if room is not None:
        axes.set_xlim(right=axes.get_xlim()[1] * room)
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(unit)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=120)
    return path


def _number(value: float) -> str:
    """Three significant digits, or all digits before the point, without an exponent."""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:.{digits}f}"
