"""The picture of a training: loss, accuracy, learning rate, time and memory above one axis."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .history import PARTS, History
from .plots import PART_COLOURS, PART_NAMES, moving_average

_TRAINING, _TEST, _PALE = "#0072b2", "#d55e00", "#9ecae1"
# More steps are drawn as the range and mean of as many groups.
_POINTS = 600


def draw_training(history: History, path: Path, *, title: str) -> Path:
    """Draw the course of a training.

    Args:
        history: Of one step or more.
        path: PNG file.
        title: Stands above the picture.

    Returns:
        The file.
    """
    # Without pyplot: no window system is looked for, and no figure outlives its function.
    figure = Figure(figsize=(8, 10))
    FigureCanvasAgg(figure)
    panels = figure.subplots(5, 1, sharex=True, height_ratios=[3, 2.2, 1.3, 2.2, 1.1])
    loss, accuracy, rate, time, memory = panels
    _loss(loss, history)
    _accuracy(accuracy, history)
    _steps(rate, history, "lr", "learning rate")
    rate.ticklabel_format(axis="y", scilimits=(-3, 4))
    _time(time, history)
    _steps(memory, history, "peak_mib", "peak MiB")
    peak = history.columns["peak_mib"][-1]
    _note(memory, history.columns["step"][-1], peak, f"{peak:,.0f}")
    memory.xaxis.set_major_locator(MaxNLocator(integer=True))
    memory.set_xlabel("step" + (", dotted: interrupted and resumed" if history.breaks else ""))
    for panel in panels:
        panel.grid(alpha=0.3)
        panel.set_axisbelow(True)
        for step in history.breaks:
            panel.axvline(step + 0.5, color="black", linestyle=":", linewidth=1)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    # Fixed margins: a computed layout takes as long as the drawing.
    figure.subplots_adjust(left=0.13, right=0.98, top=0.965, bottom=0.055, hspace=0.13)
    figure.align_ylabels(panels)
    loss.set_title(title, fontsize=11)
    figure.savefig(path, dpi=110)
    return path


def _loss(axes: Axes, history: History) -> None:
    step, loss = history.columns["step"], history.columns["loss"]
    smooth = _smooth(loss)
    if len(loss) <= _POINTS:
        marker = "." if len(loss) == 1 else None
        axes.plot(
            step, loss, marker=marker, color=_PALE, linewidth=0.8, label="training, every step"
        )
    else:
        groups = np.array_split(np.arange(len(loss)), _POINTS)
        places = [step[group].mean() for group in groups]
        low, high = ([f(loss[group]) for group in groups] for f in (np.min, np.max))
        axes.fill_between(places, low, high, color=_PALE, linewidth=0, label="training, range")
    axes.plot(step, smooth, color=_TRAINING, linewidth=1.6, label="training, moving average")
    if history.tests:
        _tests(axes, history, [test["loss"] for test in history.tests])
    axes.set_ylabel("loss")
    # A first peak does not flatten the rest.
    values = [*np.percentile(loss, [99.5]), smooth.max(), *(t["loss"] for t in history.tests)]
    axes.set_ylim(0, 1.25 * max(values) or 1)
    _legend(axes)


def _accuracy(axes: Axes, history: History) -> None:
    axes.set_ylabel("accuracy in %")
    axes.set_ylim(0, 122)
    axes.set_yticks(range(0, 101, 20))
    smooth = 100 * _smooth(history.columns["accuracy"])
    axes.plot(history.columns["step"], smooth, color=_TRAINING, linewidth=1.6, label="training")
    if history.tests:
        _tests(axes, history, [100 * test["accuracy"] for test in history.tests])
        last = history.tests[-1]
        value = 100 * last["accuracy"]
        _note(axes, last["step"], value, f"{value:.1f}%")
    _legend(axes)


def _tests(axes: Axes, history: History, values: list[float]) -> None:
    steps = [test["step"] for test in history.tests]
    axes.plot(steps, values, "o-", color=_TEST, markersize=4, linewidth=1, label="test")


def _time(axes: Axes, history: History) -> None:
    groups = np.array_split(np.arange(len(history)), min(len(history), _POINTS // 3))
    step = history.columns["step"]
    edges = [step[group[0]] - 0.5 for group in groups] + [step[-1] + 0.5]
    below = np.zeros(len(groups))
    for part in PARTS:
        values = np.array([np.median(history.columns[part][group]) for group in groups])
        axes.stairs(
            below + values,
            edges,
            baseline=below,
            fill=True,
            color=PART_COLOURS[part],
            label=PART_NAMES[part],
        )
        below = below + values
    # The first steps compile and measure; what they take would hide the others.
    top = 1.3 * np.percentile(below, 95)
    cut = "" if below.max() <= top else f"\n(up to {below.max():,.0f})"
    axes.set_ylim(0, top)
    axes.set_ylabel(f"ms a step{cut}")
    _legend(axes)


def _legend(axes: Axes) -> None:
    """In one row, in the room that the limits leave above the curves."""
    axes.legend(frameon=False, loc="upper right", ncols=4, fontsize=8.5)


def _steps(axes: Axes, history: History, column: str, label: str) -> None:
    """What changes from step to step only now and then."""
    step, values = history.columns["step"], history.columns[column]
    marker = "." if len(step) == 1 else None
    axes.plot(step, values, color="black", linewidth=1.2, drawstyle="steps-post", marker=marker)
    axes.set_ylabel(label)
    axes.set_ylim(0, 1.25 * values.max() or 1)


def _note(axes: Axes, step: float, value: float, text: str) -> None:
    """The last value, below its point where there is room: test curves run below training's."""
    below = value > 0.2 * axes.get_ylim()[1]
    place = (-6, -14) if below else (-6, 6)
    axes.annotate(text, (step, value), xytext=place, textcoords="offset points", ha="right")


def _smooth(values: np.ndarray) -> np.ndarray:
    count = len(values)
    window = max(1, min(5, count // 4), count // 40)
    return np.array(moving_average(values.tolist(), window))
