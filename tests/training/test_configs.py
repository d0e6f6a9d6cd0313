"""Packaged configurations of the published runs: whole networks and schedules, and runs in small.

The numbers are those of the published configurations, scripts and tables, by recipe.
"""

import json
import math
import re
import warnings
from typing import NamedTuple

import pytest
import torch

from nlkernels.cli import main
from nlkernels.models.zoo import describe
from nlkernels.training import checkpoint
from nlkernels.training.config import Config
from nlkernels.training.config_data import FIXED_CLIPS, view_side, view_size
from nlkernels.training.config_file import (
    ConfigWarning,
    find_config,
    load_config,
    packaged_configs,
)
from nlkernels.training.data.child import ChildReader
from nlkernels.training.data.crops import COUNTS
from nlkernels.training.data.frame_folders import Naming
from nlkernels.training.freezing import freeze
from nlkernels.training.optimisers import make_optimiser
from nlkernels.training.runs import total_steps
from nlkernels.training.schedules import Schedule
from nlkernels.training.variants import build_model
from tests.training import miniature

OWN = {"demo", "demo_videos", "evidence", "smoke"}

# Steps of a pass in the tests of schedules by epoch.
PASS = 100


class Recipe(NamedTuple):
    """What trainings of one kind have in common."""

    batch: int
    steps: int
    """Length of the training; by epochs, of ``PASS`` steps each."""
    rates: dict[int, float]
    """Learning rates of first and last step, and on both sides of what changes them."""
    groups: set[tuple[str, float, float]]
    """Parameter groups: name, factor of the rate, weight decay."""
    clip: float | None = None
    nesterov: bool = False
    dampening: float = 0.0


def _parts(lr, first, second, end):
    """Rates of three parts, each a tenth of the one before."""
    return {
        0: lr,
        first - 1: lr,
        first: lr / 10,
        second - 1: lr / 10,
        second: lr / 100,
        end - 1: lr / 100,
    }


def _cosine(lr, progress):
    return 0.5 * lr * (1 + math.cos(math.pi * progress))


def _caffe2(batch, lr, *ends, affine=False):
    groups = {("weights and biases", 1, 1e-4), ("norms", 1, 0)}
    if affine:
        groups.remove(("norms", 1, 0))  # they are factors, which are not trained
    return Recipe(batch, ends[-1], _parts(lr, *ends), groups, nesterov=True)


def _all(batch, epochs, rates, decay=1e-4, **more):
    return Recipe(batch, epochs * PASS, rates, {("all", 1, decay)}, **more)


def _fast(decay):
    """Groups of TSM."""
    return {
        ("weights", 1, decay),
        ("biases", 2, 0),
        ("norms", 1, 0),
        ("fast weights", 5, decay),
        ("fast biases", 10, 0),
    }


def _rnl(decay, epochs, warmup):
    last = _cosine(0.02, (epochs - 1 / PASS - warmup) / (epochs - warmup))
    rates = {0: 0.002, warmup * PASS // 2: 0.011, warmup * PASS: 0.02, epochs * PASS - 1: last}
    groups = {*_fast(decay), ("block weights", 1, decay), ("block biases", 2, 0)}
    return Recipe(64, epochs * PASS, rates, groups, clip=20)


def _mindspore(epochs):
    rates = {0: 3e-6, 99: 3e-4, 100: _cosine(3e-4, 0.01)}
    return _all(48, epochs, rates | {epochs * PASS - 1: _cosine(3e-4, (epochs - 1) / 100)})


_SLOWFAST = {("weights and biases", 1, 1e-4), ("norms", 1, 0)}
RECIPES = {
    "c2-400k": _caffe2(64, 0.01, 150_000, 300_000, 400_000),
    "c2-300k": _caffe2(64, 0.01, 150_000, 250_000, 300_000),
    "c2-600k-4": _caffe2(32, 0.005, 300_000, 500_000, 600_000),
    "c2-300k-4": _caffe2(32, 0.005, 150_000, 250_000, 300_000),
    "c2-affine": _caffe2(16, 0.0025, 150_000, 300_000, 400_000, affine=True),
    "mm-c2d": _all(256, 100, _parts(0.01, 4000, 8000, 10_000), clip=40),
    "mm-i3d": _all(64, 100, _parts(0.01, 4000, 8000, 10_000), clip=40),
    "mm-slowonly": _all(
        128, 150, _parts(0.01, 9000, 13_000, 15_000) | {0: 0.001, 999: 0.01}, clip=40
    ),
    "mm-tsm": Recipe(
        128,
        5000,
        _parts(0.02, 2500, 4500, 5000) | {0: 0.002, 499: 0.02},
        _fast(1e-4),
        clip=20,
    ),
    "tsm": Recipe(128, 10_000, _parts(0.02, 4000, 8000, 10_000), _fast(1e-4), clip=20),
    "rnl-k400": _rnl(2e-4, 100, 5),
    "rnl-sthv1": _rnl(1e-3, 50, 1),
    "inception": _all(8, 2000, {0: 1e-3, 199_999: 1e-3}, 1e-3, dampening=0.9),
    "ms": _mindspore(5),
    "mindvideo": _mindspore(100),
    "sf": Recipe(
        64,
        19_600,
        {0: 0.01, 3400: _cosine(0.1, 34 / 196), 19_599: _cosine(0.1, 195.99 / 196)},
        _SLOWFAST,
        nesterov=True,
    ),
    "sf-in1k": Recipe(64, 11_800, _parts(0.01, 4400, 8800, 11_800), _SLOWFAST, nesterov=True),
}

# Parameters: exact numbers, and printed ones where no more is published.
C2D, I3D, NL, NL_AFFINE, NL_PLAIN = 24_327_632, 28_043_472, 7_358_464, 7_350_272, 7_354_368
RNL = C2D + 3_801_088 + 263_937
INCEPTION = 12_317_587 + 989_552
# A row of the classifier; Something-Something V1 has 174 classes.
CLASS = 2049

CONFIGS = {
    "c2_c2d_r50_8x8_400k": (C2D, "c2-400k"),
    "c2_c2d_r50_nl_8x8_400k": (C2D + NL, "c2-400k"),
    "c2_i3d_r50_8x8_400k": (I3D, "c2-400k"),
    "c2_i3d_r50_nl_8x8_400k": (I3D + NL, "c2-400k"),
    "c2_c2d_r50_32x2_400k": (C2D, "c2-400k"),
    "c2_c2d_r50_nl_32x2_400k": (C2D + NL, "c2-400k"),
    "c2_i3d_r50_32x2_400k": (I3D, "c2-400k"),
    "c2_i3d_r50_nl_32x2_400k": (I3D + NL, "c2-400k"),
    "c2_i3d_r50_8x8_300k": (I3D, "c2-300k"),
    "c2_i3d_r50_8x8_600k_4gpu": (I3D, "c2-600k-4"),
    "c2_i3d_r50_8x8_300k_4gpu": (I3D, "c2-300k-4"),
    "c2_i3d_r50_32x4_affine_400k": (I3D, "c2-affine"),
    "c2_i3d_r50_nl_32x4_affine_400k": (I3D + NL_AFFINE, "c2-affine"),
    "c2_i3d_r50_128x1_affine_400k": (I3D, "c2-affine"),
    "c2_i3d_r50_nl_128x1_affine_400k": (I3D + NL_AFFINE, "c2-affine"),
    "mmaction_c2d_nopool_r50_8x8_100e": ("24.3M", "mm-c2d"),
    "mmaction_c2d_nopool_r101_8x8_100e": ("43.3M", "mm-c2d"),
    "mmaction_c2d_r50_8x8_100e": ("24.3M", "mm-c2d"),
    "mmaction_c2d_r50_16x4_100e": ("24.3M", "mm-c2d"),
    "mmaction_i3d_r50_32x2_100e": ("28.0M", "mm-i3d"),
    "mmaction_i3d_r50_dense_32x2_100e": ("28.0M", "mm-i3d"),
    "mmaction_i3d_heavy_r50_32x2_100e": ("33.0M", "mm-i3d"),
    "mmaction_i3d_r50_nl_dot_product_32x2_100e": (I3D + NL_PLAIN, "mm-i3d"),
    "mmaction_i3d_r50_nl_embedded_gaussian_32x2_100e": (I3D + NL_PLAIN, "mm-i3d"),
    "mmaction_i3d_r50_nl_gaussian_32x2_100e": (I3D + 3_680_256, "mm-i3d"),
    "mmaction_slowonly_r50_nl_4x16_150e": ("39.81M", "mm-slowonly"),
    "mmaction_slowonly_r50_nl_8x8_150e": ("39.81M", "mm-slowonly"),
    "mmaction_tsm_r50_nl_dot_product_8f_50e": ("31.68M", "mm-tsm"),
    "mmaction_tsm_r50_nl_embedded_gaussian_8f_50e": ("31.68M", "mm-tsm"),
    "mmaction_tsm_r50_nl_gaussian_8f_50e": ("28.0M", "mm-tsm"),
    "tsm_r50_nl_8f_100e": ("31.7M", "tsm"),
    "rnl_tsm_r50_k400_8f_100e": (RNL, "rnl-k400"),
    "rnl_tsm_r50_k400_16f_100e": (RNL, "rnl-k400"),
    "rnl_tsm_r50_sthv1_8f_50e": (RNL - 226 * CLASS, "rnl-sthv1"),
    "rnl_tsm_r50_sthv1_16f_50e": (RNL - 226 * CLASS, "rnl-sthv1"),
    "inception_nl_flow_hmdb51": (INCEPTION, "inception"),
    # A third input channel of the 64 kernels of 7 x 7 x 7.
    "inception_nl_rgb_hmdb51": (INCEPTION + 64 * 7**3, "inception"),
    "mindspore_i3d_r50_nl_32x6_5e": (I3D + NL_PLAIN, "ms"),
    "mindvideo_i3d_r50_nl_32x6_100e": (I3D + NL_PLAIN, "mindvideo"),
    "slowfast_c2d_r50_nl_8x8_196e": (C2D + NL, "sf"),
    "slowfast_i3d_r50_nl_8x8_196e": (I3D + NL, "sf"),
    "slowfast_c2d_r50_nl_8x8_in1k_118e": (C2D + NL, "sf-in1k"),
    "slowfast_i3d_r50_nl_8x8_in1k_118e": (I3D + NL, "sf-in1k"),
}
# Top-1 that the zoo, which is of Kinetics-400 and 8 frames of these networks, does not have.
ACCURACIES = {
    "rnl_tsm_r50_k400_16f_100e": 77.2,
    "rnl_tsm_r50_sthv1_8f_50e": 49.5,
    "rnl_tsm_r50_sthv1_16f_50e": 51.0,
}
UNPUBLISHED = {
    *("inception_nl_flow_hmdb51", "inception_nl_rgb_hmdb51", "mindvideo_i3d_r50_nl_32x6_100e"),
    *("slowfast_c2d_r50_nl_8x8_196e", "slowfast_c2d_r50_nl_8x8_in1k_118e"),
}
OF_RECIPES = {
    "c2_i3d_r50_8x8_300k": "300k",
    "c2_i3d_r50_8x8_600k_4gpu": "4 GPUs, 600k",
    "c2_i3d_r50_8x8_300k_4gpu": "4 GPUs, 300k",
    "mmaction_i3d_r50_dense_32x2_100e": "dense",
}


@pytest.fixture
def one_thread():
    """Of networks as small as these, threads cost more than they give; no child outlives a test."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    ChildReader.stop_children()


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
    _check_comment(name, config, model)


def _printed(number, like):
    """A number of millions with as many decimals as the published one."""
    decimals = len(str(like).rstrip("M").partition(".")[2])
    return f"{number / 1e6:.{decimals}f}M"


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


def _in_small(config: Config, folder) -> list[str]:
    """Overrides: an eighth of the width, at most 16 frames of 32 pixels, a miniature data set."""
    data, optim = config.data, config.optim
    videos = folder / "videos"
    if data.reader in ("frames", "flow"):
        miniature.write_images(videos, Naming(data.template, flow=data.reader == "flow"))
    else:
        miniature.write_videos(videos)
    lists = miniature.write_lists(folder, videos, data)
    # Frames keep their size beside the windows, where they are larger.
    sides = [max(32, side * 32 // 224) for side in data.short_side]
    whole = view_side(data) == view_size(data)
    overrides = [
        "model.width=0.125",
        "model.num_classes=null",
        *(f"data.{key}={value}" for key, value in lists.items()),
        f"data.frames={min(16, data.frames)}",
        "data.size=32",
        "data.test_size=32",
        f"data.short_side={sides}",
        f"data.test_short_side={32 if whole else max(32, view_side(data) * 32 // 224)}",
        "data.workers=0",
        "optim.steps=2",
        "optim.epochs=null",
        f"optim.batch={2 * optim.accumulate}",
        "optim.sync_norms=false",
        "run.device=cpu",
        "run.threads=1",
        "run.unit=step",
        "run.checkpoint_every=1",
        "run.keep=2",
    ]
    if optim.precise_norms:
        overrides.append("optim.precise_norms=2")
    if config.run.test_every:
        overrides.append("run.test_every=1")
    return overrides


@pytest.mark.gate
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", CONFIGS)
def test_published_configurations_run_in_small(name, tmp_path, capsys):
    config = load_config(name)
    argv = ["train", name, *_in_small(config, tmp_path)]
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
    crops = {"centre": "centre crop", "three": "3 crops", "ten": "10 crops"}[data.test_crops]
    frames = min(16, data.frames)
    assert test["protocol"].startswith(f"{clips} of {frames} frames per video, {crops} 32 x 32")


def _tests(out):
    lines = map(json.loads, (out / "model.jsonl").read_text().splitlines())
    return [
        {key: line[key] for key in ("accuracy", "loss", "protocol")}
        for line in lines
        if line["event"] == "test"
    ]
