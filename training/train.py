"""``nlk train``: train and test one network; writes logs, a checkpoint and a report."""

import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import report as reports
from .config import Config, to_dict
from .distributed import Processes, joined
from .evaluate import mean_colour_accuracy
from .history import read_history, section
from .loading import Data, load_data, test_batches, training_batches
from .measure import attention_sizes, count_parameters
from .plots_training import draw_training
from .runs import prepare, resumed_content, total_steps, train_and_test
from .starting import start_from
from .stopping import Stopped, StopSignals
from .variants import build_model


def train_from_config(config: Config, *, command: str) -> Path:
    """Train and test the configured network, alone or as one of the processes of torchrun.

    Writes into ``run.out``: ``config.json``, ``model.jsonl`` (a line per step), ``model.pt`` (the
    checkpoint), ``report.json``, ``report.md`` and ``curves.png``.

    Args:
        config: From ``config_file.load_config``.
        command: Command line, for the report.

    Returns:
        Path of ``report.md``.

    Raises:
        ValueError: Bad value, unknown model, no usable videos.
        NonFiniteError: The loss or a gradient is not finite.
        Stopped: SIGTERM, or SIGINT once: the training was saved, the process exits with code 0.
    """
    with joined(config.run.device) as processes:
        return _train(config, command, processes)


def _train(config: Config, command: str, processes: Processes) -> Path:
    begun = time.perf_counter()
    out, device = prepare(config, processes)
    seed = config.run.seed
    resumed = resumed_content(config, out / "model.pt", processes)
    with processes.first_alone():
        data = load_data(config, seed=seed)
    print("\n".join(reports.data_lines(data)))
    model, sizes = build(config, len(data.classes), device, fresh=resumed is None)
    parameters = count_parameters(model)

    try:
        with StopSignals() as stop:
            run = train_and_test(
                model,
                data,
                config,
                name="model",
                seed=seed,
                device=device,
                resumed=resumed,
                processes=processes,
                stop=stop,
            )
    except Stopped as stopped:
        print(f"stopped and saved at {stopped}; run.resume=auto goes on from there", flush=True)
        raise
    if not processes.first:
        return out / "report.md"
    colour = _mean_colour(data, config) if config.run.colour_check else None
    if colour is not None:
        print(
            f"mean-colour classifier: {colour:.1%}. The videos can be told apart by colour as far "
            "as that; this run checks the pipeline and is no evidence for the blocks."
        )
    report = reports.head(
        "training",
        out=out,
        command=command,
        seconds=time.perf_counter() - begun,
        device=device,
        config=to_dict(config),
    )
    report["data"] = reports.data_section(config, data)
    steps = total_steps(config, len(data.train))
    report["training"] = reports.training_section(config, steps, sizes)
    report["result"] = {
        "parameters": parameters,
        "accuracy": run.test.accuracy,
        "test_loss": run.test.loss,
        "train_loss": run.last_loss,
        "train_s": round(run.train_s, 1),
        "mean_colour_accuracy": colour,
    }
    history, curves = read_history(out / "model.jsonl"), None
    # None of a finished training that was tested again when its log was gone.
    if len(history) > 0:
        report["course"] = section(history)
        title = f"{config.model.name}, {out.name}"
        curves = draw_training(history, out / "curves.png", title=title)
    reports.write_json(report, out / "report.json")
    text = reports.training_markdown(report, curves)
    return reports.write_markdown(text, out / "report.md")


def build(
    config: Config, num_classes: int, device: torch.device, *, fresh: bool
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """The network that a training starts with; prints what it is.

    Args:
        config: Sections ``model``, ``data`` and ``run``.
        num_classes: Number of classes of the data set.
        device: Where it goes.
        fresh: No checkpoint is continued from: load ``model.weights``.

    Returns:
        The network, and its blocks' sizes, see ``measure.attention_sizes``.

    Raises:
        FileNotFoundError: No such weights.
        ValueError: Unknown model, or weights of another one.
    """
    model = build_model(config.model, num_classes, seed=config.run.seed).to(device)
    if config.model.weights is not None and fresh:
        print(start_from(model, config.model.weights))
    sizes = attention_sizes(model, frames=config.data.frames, size=config.data.size)
    print(
        f"{config.model.name}: {count_parameters(model):,} parameters, "
        f"{reports.attention_line(sizes)}"
    )
    return model, sizes


def _mean_colour(data: Data, config: Config) -> float:
    # One pass over the training videos, rounded up to whole batches.
    steps = math.ceil(len(data.train) / config.optim.batch)
    torch.manual_seed(config.run.seed)
    return mean_colour_accuracy(
        training_batches(data.train, config, seed=config.run.seed, steps=steps),
        test_batches(data.test, config),
        num_classes=len(data.classes),
    )
