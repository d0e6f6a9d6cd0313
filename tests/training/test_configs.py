"""Packaged configurations of the published runs: whole networks and schedules, and runs in small.

The numbers are those of the published configurations, scripts and tables, by recipe.
"""

import json
import math
import re
import warnings

import pytest
import torch

from nlkernels.cli import main
from nlkernels.models.zoo import describe
from nlkernels.training import checkpoint
from nlkernels.training.config_data import FIXED_CLIPS, view_size
from nlkernels.training.config_file import (
    ConfigWarning,
    find_config,
    load_config,
    packaged_configs,
)
from nlkernels.training.data.crops import COUNTS
from nlkernels.training.freezing import freeze
from nlkernels.training.optimisers import make_optimiser
from nlkernels.training.runs import total_steps
from nlkernels.training.schedules import Schedule
from nlkernels.training.variants import build_model
from nlkernels.training.view_scores import LOGITS_SYSTEMS
from tests.training import miniature
from tests.training.published import (
    ACCURACIES,
    CONFIGS,
    OF_RECIPES,
    PASS,
    RECIPES,
    UNPUBLISHED,
    clips_of,
    dropout_of,
)

OWN = {"demo", "demo_videos", "evidence", "smoke"}


def test_every_published_configuration_is_tested():
    assert set(packaged_configs()) - OWN == set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_published_configurations(name):
    parameters, kind = CONFIGS[name]
    recipe = RECIPES[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConfigWarning)
        config = load_config(name)
    optim = config.optim

    with torch.device("meta"):
        model = build_model(config.model, config.model.num_classes or 174, seed=0)
        count = sum(parameter.numel() for parameter in model.parameters())
        assert count == parameters or _printed(count, parameters) == parameters
        freeze(model, optim)
        optimiser = make_optimiser(model, optim)
    groups = optimiser.param_groups
    assert {(g["name"], g["lr_mult"], g["weight_decay"]) for g in groups} == recipe.groups
    assert optim.name == "sgd"
    for group in groups:
        assert group["momentum"] == 0.9
        assert group["nesterov"] is recipe.nesterov
        assert group["dampening"] == recipe.dampening
    assert optim.clip_norm == recipe.clip

    assert optim.batch == recipe.batch
    clips = PASS * optim.batch
    assert total_steps(config, clips) == recipe.steps
    schedule = Schedule(optim, steps=recipe.steps, clips=clips)
    found = {step: schedule.rate(step) for step in recipe.rates}
    assert found == pytest.approx(recipe.rates)
    _check_clips(name, config)
    _check_comment(name, config, model)


def _printed(number, like):
    """A number of millions with as many decimals as the published one."""
    decimals = len(str(like).rstrip("M").partition(".")[2])
    return f"{number / 1e6:.{decimals}f}M"


def _check_clips(name, config):
    """Clips and augmentation are the published ones."""
    data, given = config.data, describe(config.model.name).input
    found = (data.list_format, data.sampler, data.augment, data.short_side, data.colours)
    assert found == clips_of(name)
    assert data.frames == (16 if "_16f_" in name else given.frames)
    assert given.stride in (None, data.stride)
    assert (data.size, view_size(data)) == (given.size, given.test_size)
    assert data.flip is ("sthv1" not in name)
    assert config.model.dropout == dropout_of(name)


def _check_comment(name, config, model):
    """The head of the file states what is published, and the protocol is that of its views."""
    lines = find_config(name).read_text().partition("\nmodel:")[0].splitlines()
    assert all(line.startswith("# ") for line in lines)
    text = " ".join(" ".join(line[1:] for line in lines).split())
    parts = re.split(r" (Hardware|Accuracy|Source|Start): ", text)
    assert parts[1::2] == ["Hardware", "Accuracy", "Source", "Start"], text
    assert parts[6].startswith("github.com/")
    if name in UNPUBLISHED:
        assert parts[4] == "not published."
        return
    top = re.match(r"([\d.]+) top-1(?:, ([\d.]+) top-5)? on ([\w -]+) \(", parts[4])
    found = tuple(number and float(number) for number in top.groups()[:2])
    assert (top[3] == "Something-Something V1") == ("sthv1" in name)
    if name in ACCURACIES:
        assert found == (ACCURACIES[name], None)
    else:
        kinds = {getattr(module, "kind", None) for module in model.modules()} - {None}
        (result,) = (
            each
            for each in describe(config.model.name).results
            if each.blocks == config.model.blocks
            and {each.kind} - {None} == kinds
            and each.recipe == OF_RECIPES.get(name, "")
        )
        assert found == (result.top1, result.top5)
    data = config.data
    pattern = r"\((\d+) (?:\w+ )?(clip|segment)s? x (\d+) (?:\w+ )?crops?(?: of (\d+))?"
    views = re.search(pattern, text)
    if views[2] == "segment":
        assert data.sampler == "mmaction_segments" and data.frames == int(views[1])
    else:
        count = {"tsm_twice": 2}.get(data.sampler, data.test_clips)
        assert count == int(views[1])
    assert COUNTS[data.test_crops] == int(views[3])
    assert view_size(data) == int(views[4] or view_size(data))


@pytest.mark.gate
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", CONFIGS)
def test_published_configurations_run_in_small(name, tmp_path, capsys):
    config = load_config(name)
    argv = ["train", name, *miniature.in_small(config, tmp_path)]
    assert main([*argv, f"run.out={tmp_path / 'whole'}"]) == 0
    saved = tmp_path / "whole" / "model-00000001.pt"
    assert main([*argv, f"run.out={tmp_path / 'parts'}", f"run.resume={saved}"]) == 0
    assert "no effect" not in capsys.readouterr().err

    whole, parts = (checkpoint.load(tmp_path / out / "model.pt") for out in ("whole", "parts"))
    assert whole["step"] == parts["step"] == 2
    for key, value in whole["model"].items():
        assert torch.equal(value, parts["model"][key]), key
    for number, state in whole["optimiser"]["state"].items():
        other = parts["optimiser"]["state"][number]
        assert torch.equal(state["momentum_buffer"], other["momentum_buffer"])

    (test,) = _tests(tmp_path / "whole")[-1:]
    assert test == _tests(tmp_path / "parts")[-1]
    assert test["accuracy"] in (0, 0.5, 1)
    assert math.isfinite(test["loss"])
    data = config.data
    count = 2 if data.sampler == "tsm_twice" else data.test_clips
    clips = "1 clip" if count == 1 or data.sampler == "mmaction_segments" else f"{count} clips"
    if data.sampler == "inception_val":
        clips = "10 clips"  # every second start of 20 frames, in place of three
    assert (data.sampler in FIXED_CLIPS) == (data.sampler in ("tsm_twice", "mmaction_segments"))
    crops = {"centre": "1 centre crop", "three": "3 crops", "ten": "10 crops"}[data.test_crops]
    logits = describe(config.model.name).system in LOGITS_SYSTEMS
    scores = "logits" if logits else "probabilities"
    if name.startswith(("c2_", "slowfast")):
        scores = f"softmax at every location, {scores}"
    assert test["protocol"] == f"{clips} x {crops} of 32, {scores} averaged"


def _tests(out):
    lines = map(json.loads, (out / "model.jsonl").read_text().splitlines())
    return [
        {key: line[key] for key in ("accuracy", "loss", "protocol")}
        for line in lines
        if line["event"] == "test"
    ]
