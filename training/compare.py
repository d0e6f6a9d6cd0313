"""``nlk compare``: the same network without blocks, with naive blocks, with fast blocks, ...

Every variant trains with the same seeds, starting weights and clips in the same order; then all of
them are measured in turns on clips of one shape, that of the training unless ``compare.profile``
says otherwise: attention is negligible at the clip sizes that train in a minute. The shape stands
beside every number.
"""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import report as reports
from .config import Config, ProfileConfig, profile_of, to_dict
from .data.synthetic import CLASSES
from .freezing import freeze
from .loading import load_data
from .measure import Cost, attention_sizes, measure, overhead
from .plots import draw_costs, draw_trainings
from .runs import Run, prepare, total_steps, train_and_test
from .starting import start_from
from .variants import DESCRIPTIONS, blocks_of, build_variant

AGREEMENT_STEPS = 20

# Of a measurement without data, where no configuration says how many: Kinetics-400's.
_CLASSES = 400


def compare_from_config(config: Config, *, command: str, measure_only: bool = False) -> Path:
    """Train, test and measure every variant.

    Writes into ``run.out``: ``config.json``, a ``.jsonl`` log and a ``.pt`` checkpoint of every
    training, ``report.json``, ``report.md`` and its plots; prints the summary table.

    Args:
        config: From ``config_file.load_config``.
        command: Command line, for the report.
        measure_only: Measure speed and memory on random clips and train nothing; no data are read.

    Returns:
        Path of ``report.md``.

    Raises:
        ValueError: Bad value, unknown model, no usable videos.
        NonFiniteError: A loss or a gradient is not finite.
    """
    begun = time.perf_counter()
    variants, seeds = config.compare.variants, config.compare.seeds
    if config.run.resume is not None:
        raise ValueError(
            f"compare: expected run.resume unset, got {config.run.resume!r}; "
            "a comparison trains every variant from its start"
        )
    out, device = prepare(config)
    # Mistakes in the variants' options show before clips are generated.
    with torch.device("meta"):
        for name in variants:
            build_variant(name, config.model, 2, seed=0)
    if config.model.blocks == 0:
        print(f"model.blocks is 0; the variants with blocks have {blocks_of(config.model)}")
    data = None if measure_only else load_data(config, seed=seeds[0])
    num_classes = _num_classes(config) if data is None else len(data.classes)
    if data is not None:
        print("\n".join(reports.data_lines(data)), flush=True)

    costs, sizes = _measured(config, num_classes, device)
    runs: dict[str, list[Run]] = {name: [] for name in variants}
    # Behind the measurement: too large a profile shows at once, and not after hours.
    for seed in () if data is None else seeds:
        data = data if seed == seeds[0] else load_data(config, seed=seed)
        for name in variants:
            label = name if len(seeds) == 1 else f"{name}-{seed}"
            model = build_variant(name, config.model, num_classes, seed=seed).to(device)
            if config.model.weights is not None:
                print(f"{label:<12} {start_from(model, config.model.weights)}", flush=True)
            run = train_and_test(model, data, config, name=label, seed=seed, device=device)
            runs[name].append(run)

    report = reports.head(
        "costs" if measure_only else "comparison",
        out=out,
        command=command,
        seconds=time.perf_counter() - begun,
        device=device,
        config=to_dict(config),
    )
    report["profile"] = {
        **dataclasses.asdict(profile_of(config)),
        "classes": num_classes,
        "memory_gib": config.compare.memory_gib,
        "attention": sizes["profile"],
    }
    if data is not None:
        report["data"] = reports.data_section(config, data)
        steps = total_steps(config, len(data.train))
        report["training"] = reports.training_section(config, steps, sizes["training"])
        report["agreement"] = _agreement(runs, seeds)
    report["variants"] = [
        _variant_section(name, costs[name], costs.get("none"))
        | ({} if measure_only else _trained_section(runs[name], seeds))
        for name in variants
    ]
    plots = draw_costs(report, out)
    if not measure_only:
        curves = {name: [run.losses for run in runs[name]] for name in variants}
        plots += draw_trainings(report, curves, out)
    reports.write_json(report, out / "report.json")
    print("\n" + reports.comparison_text(report))
    return reports.write_markdown(reports.comparison_markdown(report, plots), out / "report.md")


def _num_classes(config: Config) -> int:
    """Classes of a measurement without data."""
    if config.model.num_classes is not None:
        return config.model.num_classes
    return len(CLASSES) if config.data.kind == "synthetic" else _CLASSES


def _measured(
    config: Config, num_classes: int, device: torch.device
) -> tuple[dict[str, Cost], dict[str, list[dict[str, Any]]]]:
    """Costs of every variant, and the sizes of their blocks."""
    models = {}
    for name in config.compare.variants:
        model = build_variant(name, config.model, num_classes, seed=config.compare.seeds[0])
        freeze(model, config.optim)
        models[name] = model.to(device)
    profile = profile_of(config)
    sizes = _attention(models, config, profile)
    print(
        f"measuring speed and memory: batch {profile.batch} of {profile.frames} x "
        f"{profile.size} x {profile.size}, {profile.rounds} rounds",
        flush=True,
    )
    costs = measure(
        models,
        profile,
        config.optim,
        num_classes=num_classes,
        device=device,
        memory_gib=config.compare.memory_gib,
    )
    return costs, sizes


def _attention(
    models: Mapping[str, nn.Module], config: Config, profile: ProfileConfig
) -> dict[str, list[dict[str, Any]]]:
    """Sizes of the blocks at the training and at the measured clips; empty without blocks."""
    blocks = next((models[name] for name in ("fast", "naive", "frame") if name in models), None)
    if blocks is None:
        return {"training": [], "profile": []}
    data = config.data
    return {
        "training": attention_sizes(blocks, frames=data.frames, size=data.size),
        "profile": attention_sizes(blocks, frames=profile.frames, size=profile.size),
    }


def _agreement(runs: dict[str, list[Run]], seeds: tuple[int, ...]) -> list[dict[str, Any]]:
    """How far apart the losses of naive and fast are in their first steps."""
    if "naive" not in runs or "fast" not in runs:
        return []
    pairs = []
    for seed, naive, fast in zip(seeds, runs["naive"], runs["fast"], strict=True):
        both = list(zip(naive.losses, fast.losses, strict=True))[:AGREEMENT_STEPS]
        difference = max(abs(one - other) for one, other in both)
        pairs.append({"seed": seed, "steps": len(both), "loss_difference": difference})
    return pairs


def _variant_section(name: str, cost: Cost, plain: Cost | None) -> dict[str, Any]:
    """What a variant costs."""
    more = dict.fromkeys(("step_ms", "memory_mib"))
    percent = dict.fromkeys(("parameters", "multiply_adds", "flops", *more))
    if plain is not None:
        own, base = _measures(cost), _measures(plain)
        over = {key: overhead(own[key], base[key]) for key in percent}
        percent = {key: over[key].percent for key in percent}
        more = {key: over[key].difference for key in more}
    return {
        "name": name,
        "description": DESCRIPTIONS[name],
        **reports.plain(cost),
        "over_none": more,
        "overhead_percent": percent,
    }


def _trained_section(runs: list[Run], seeds: tuple[int, ...]) -> dict[str, Any]:
    """How well a variant was trained."""
    return {
        "accuracy": sum(run.test.accuracy for run in runs) / len(runs),
        "runs": [
            {
                "seed": seed,
                "accuracy": run.test.accuracy,
                "test_loss": run.test.loss,
                "train_loss": run.last_loss,
                "train_s": round(run.train_s, 1),
            }
            for seed, run in zip(seeds, runs, strict=True)
        ],
    }


def _measures(cost: Cost) -> dict[str, float]:
    """What is compared with the network without blocks; medians of times."""
    names = ("parameters", "multiply_adds", "flops", "memory_mib")
    return {name: getattr(cost, name) for name in names} | {"step_ms": cost.step_ms.p50}
