"""``nlk compare`` of the packaged configurations: of every network, on every kind of data."""

import json
import re

import pytest
import torch

from nlkernels.cli import main
from nlkernels.training.config import VARIANTS
from nlkernels.training.config_file import load_config
from nlkernels.training.report_schema import COMPARISON, COSTS, check_schema
from tests.training import miniature
from tests.training.published import CONFIGS

pytestmark = pytest.mark.usefixtures("one_thread")


def _different():
    """Names of configurations that do not differ in depth and length of clips alone."""
    found = {}
    for name in CONFIGS:
        config = load_config(name)
        network = re.sub(r"_\d+x\d+$", "", config.model.name).replace("r101", "r50")
        key = (network, "affine" in name, str(config.model.block), config.data.sampler)
        found.setdefault((*key, config.data.reader), name)
    return list(found.values())


def compare(name, folder, *argv):
    """Run it in small, one measured round and one step; its report."""
    overrides = [*miniature.in_small(load_config(name), folder), "optim.steps=1"]
    overrides += ["data.test_clips=1", "compare.profile.rounds=1", f"run.out={folder / 'out'}"]
    overrides += ["run.checkpoint_every=null", "optim.precise_norms=0"]
    assert main(["compare", name, *overrides, *argv]) == 0
    return json.loads((folder / "out" / "report.json").read_text())


@pytest.mark.gate
@pytest.mark.parametrize("name", _different())
def test_every_published_configuration_can_be_compared(name, tmp_path, capsys):
    config = load_config(name)
    report = compare(name, tmp_path)
    check_schema(report, COMPARISON)
    none, naive, fast = report["variants"]
    assert [one["name"] for one in report["variants"]] == ["none", "naive", "fast"]
    assert none["parameters"] < naive["parameters"] == fast["parameters"]
    assert naive["multiply_adds"] == fast["multiply_adds"] > none["multiply_adds"]
    # Of the first step of the same network on the same clips.
    (pair,) = report["agreement"]
    assert pair["loss_difference"] < 1e-4
    # What the configuration leaves open is that of its own clips.
    profile = report["profile"]
    assert (profile["batch"], profile["frames"]) == (2, min(16, config.data.frames))
    assert profile["size"] == 32
    blocks = config.model.blocks or (2 if name.startswith("inception") else 5)
    assert len(profile["attention"]) == blocks
    assert ("model.blocks is 0" in capsys.readouterr().out) == (config.model.blocks == 0)


MEASURED = [
    pytest.param("rnl_tsm_r50_sthv1_8f_50e", ["none", "fast"], 400, id="regions"),
    # Without blocks, but for the variants that have them.
    pytest.param("c2_c2d_r50_8x8_400k", ["fast"], 400, id="no-blocks"),
    *(
        pytest.param(name, VARIANTS, classes, id=f"all-variants-{name}", marks=pytest.mark.gate)
        for name, classes in (
            ("inception_nl_flow_hmdb51", 51),
            ("rnl_tsm_r50_sthv1_8f_50e", 400),
            ("mindspore_i3d_r50_nl_32x6_5e", 400),
        )
    ),
]


@pytest.mark.parametrize(("name", "variants", "classes"), MEASURED)
def test_a_measurement_needs_no_data(name, variants, classes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = ["model.width=0.125", "data.frames=16", "data.size=32", "run.device=cpu"]
    argv += ["data.short_side=[32, 32]", "data.test_size=32", "data.test_short_side=32"]
    argv += ["run.threads=1", "optim.sync_norms=false", "compare.profile.rounds=1"]
    argv += [f"compare.variants={list(variants)}"]
    assert main(["compare", name, *argv, "--measure-only"]) == 0
    assert "accuracy" not in capsys.readouterr().out
    out = tmp_path / "runs" / name
    report = json.loads((out / "report.json").read_text())
    check_schema(report, COSTS)
    assert report["kind"] == "costs"
    assert report["profile"]["classes"] == classes
    assert [one["name"] for one in report["variants"]] == list(variants)
    for one in report["variants"]:
        assert one["step_ms"]["p50"] > 0
    files = {path.name for path in out.iterdir()}
    plots = {"parameters.png", "flops.png", "time.png", "memory.png"}
    assert files == {"config.json", "report.json", "report.md", *plots}


@pytest.mark.gate
def test_variants_start_from_given_weights(tmp_path, capsys):
    name = "c2_c2d_r50_nl_8x8_400k"
    small = [*miniature.in_small(load_config(name), tmp_path), "optim.steps=1"]
    small += ["run.checkpoint_every=null", "optim.precise_norms=0", "data.test_clips=1"]
    out = tmp_path / "plain"
    assert main(["train", name, *small, "model.blocks=0", f"run.out={out}"]) == 0
    weights = torch.load(out / "model.pt", weights_only=True)["model"]
    argv = [f"model.weights={out / 'model.pt'}", "optim.lr=0"]
    compare(name, tmp_path, *argv)
    assert capsys.readouterr().out.count("weights: ") == 3
    for variant in ("none", "naive", "fast"):
        own = torch.load(tmp_path / "out" / f"{variant}.pt", weights_only=True)["model"]
        assert torch.equal(own["conv1.weight"], weights["conv1.weight"])
