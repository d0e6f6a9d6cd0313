"""``nlk train``: train and test one network; writes logs, a checkpoint and a report."""

import math
import time
from pathlib import Path

import torch

from . import report as reports
from .config import Config, to_dict
from .distributed import Processes, joined
from .evaluate import mean_colour_accuracy
from .loading import Data, load_data, test_batches, training_batches
from .measure import attention_sizes, count_parameters
from .runs import prepare, resumed_content, total_steps, train_and_test
from .starting import start_from
from .stopping import Stopped, StopSignals
from .variants import build_model


def train_from_config(config: Config, *, command: str) -> Path:
    """Train and test the configured network, alone or as one of the processes of torchrun.

    Writes into ``run.out``: ``config.json``, ``model.jsonl`` (a line per step), ``model.pt`` (the
    checkpoint), ``report.json`` and ``report.md``.

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
    model = build_model(config.model, len(data.classes), seed=seed).to(device)
    if config.model.weights is not None and resumed is None:
        print(start_from(model, config.model.weights))
    parameters = count_parameters(model)
    sizes = attention_sizes(model, frames=config.data.frames, size=config.data.size)
    print(f"{config.model.name}: {parameters:,} parameters, {reports.attention_line(sizes)}")

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
        data=reports.data_section(config, data),
        training=reports.training_section(config, total_steps(config, len(data.train)), sizes),
    )
    report["result"] = {
        "parameters": parameters,
        "accuracy": run.test.accuracy,
        "test_loss": run.test.loss,
        "train_loss": run.last_loss,
        "train_s": round(run.train_s, 1),
        "mean_colour_accuracy": colour,
    }
    reports.write_json(report, out / "report.json")
    return reports.write_markdown(reports.training_markdown(report), out / "report.md")


def _mean_colour(data: Data, config: Config) -> float:
    # One pass over the training videos, rounded up to whole batches.
    steps = math.ceil(len(data.train) / config.optim.batch)
    torch.manual_seed(config.run.seed)
    return mean_colour_accuracy(
        training_batches(data.train, config, seed=config.run.seed, steps=steps),
        test_batches(data.test, config),
        num_classes=len(data.classes),
    )
