"""``nlk compare`` from end to end on a few generated clips."""

import json

import pytest
import torch

from nlkernels.cli import main
from nlkernels.training import checkpoint
from nlkernels.training.config import VARIANTS
from nlkernels.training.report_schema import COMPARISON, check_schema

PLOTS = ("parameters", "flops", "time", "memory", "accuracy", "loss")


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    """All variants with two seeds: the folder of the run and what it printed."""
    out = tmp_path_factory.mktemp("comparison")
    argv = ["smoke", f"run.out={out}", "compare.seeds=[0, 1]", f"compare.variants={list(VARIANTS)}"]
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda *texts, **_: printed.append(" ".join(texts)))
        assert main(["compare", *argv]) == 0
    return out, "\n".join(printed)


@pytest.fixture(scope="module")
def report(comparison):
    return json.loads((comparison[0] / "report.json").read_text())


def test_report_has_the_documented_fields(report):
    check_schema(report, COMPARISON)
    assert [one["name"] for one in report["variants"]] == list(VARIANTS)
    for one in report["variants"]:
        assert [run["seed"] for run in one["runs"]] == [0, 1]
        accuracies = [run["accuracy"] for run in one["runs"]]
        assert one["accuracy"] == pytest.approx(sum(accuracies) / 2)
        for part in ("forward_ms", "backward_ms", "optimiser_ms", "step_ms"):
            assert 0 < one[part]["p20"] <= one[part]["p50"] <= one[part]["p80"]
        assert one["device_mib"] is None


def test_schema_check_notices_a_missing_and_an_unknown_field(report):
    shorter = [{k: v for k, v in one.items() if k != "flops"} for one in report["variants"]]
    with pytest.raises(ValueError, match=r"missing.*variants.*flops"):
        check_schema(report | {"variants": shorter}, COMPARISON)
    with pytest.raises(ValueError, match=r"unknown.*surprise"):
        check_schema(report | {"surprise": 1}, COMPARISON)


def test_overheads_are_against_none(report):
    none, naive, fast, local, _ = report["variants"]
    assert set(none["overhead_percent"].values()) == {0.0}
    assert naive["parameters"] == fast["parameters"]
    assert naive["flops"] == fast["flops"]
    expected = 100 * (fast["parameters"] / none["parameters"] - 1)
    assert fast["overhead_percent"]["parameters"] == pytest.approx(expected)
    assert abs(local["parameters"] / fast["parameters"] - 1) < 0.03
    assert naive["memory_mib"] > none["memory_mib"]
    assert naive["multiply_adds"] == fast["multiply_adds"]
    assert fast["over_none"]["memory_mib"] == pytest.approx(
        fast["memory_mib"] - none["memory_mib"], abs=2e-3
    )
    difference = fast["step_ms"]["p50"] - none["step_ms"]["p50"]
    assert fast["over_none"]["step_ms"] == pytest.approx(difference, abs=2e-3)
    assert {one["largest_batch"] for one in report["variants"]} == {None}


def test_naive_and_fast_train_alike(report):
    assert [pair["seed"] for pair in report["agreement"]] == [0, 1]
    assert all(0 <= pair["loss_difference"] < 1e-4 for pair in report["agreement"])
    assert all(pair["steps"] == 4 for pair in report["agreement"])


def test_attention_sizes_stand_beside_the_numbers(comparison, report):
    assert [(one["n"], one["m"]) for one in report["profile"]["attention"]] == [(64, 16)] * 2
    assert comparison[1].count("64 x 16") >= 2


def test_plots_and_report_md(comparison):
    out, _ = comparison
    text = (out / "report.md").read_text()
    for name in PLOTS:
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"({name}.png)" in text
    for variant in VARIANTS:
        assert f"| {variant} |" in text
    assert "torch " + torch.__version__ in text
    assert "nlk compare smoke" in text


def test_terminal_shows_the_table_and_names_the_report(comparison):
    out, printed = comparison
    assert printed.splitlines()[-1] == f"report: {out / 'report.md'}"
    for word in ("parameters", "GFLOP/clip", "published", "ms/step", "MiB", "accuracy", *VARIANTS):
        assert word in printed


def test_every_training_leaves_a_log_and_a_checkpoint(comparison):
    out, _ = comparison
    for variant in VARIANTS:
        for seed in (0, 1):
            lines = (out / f"{variant}-{seed}.jsonl").read_text().splitlines()
            assert sum('"event": "step"' in line for line in lines) == 4
            assert checkpoint.load(out / f"{variant}-{seed}.pt")["step"] == 4


def test_without_the_plain_variant_there_are_no_percentages(comparison, tmp_path):
    data = comparison[0] / "data"
    argv = ["smoke", f"run.out={tmp_path}", f"data.root={data}", "compare.variants=[fast]"]
    argv += ["optim.steps=1", "compare.profile.rounds=1", "compare.memory_gib=2"]
    assert main(["compare", *argv]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    check_schema(report, COMPARISON)
    (fast,) = report["variants"]
    assert set(fast["overhead_percent"].values()) == {None}
    assert set(fast["over_none"].values()) == {None}
    assert fast["largest_batch"] > 100
    assert f"batch {fast['largest_batch']} fits 2 GiB" in fast["largest_batch_text"]
    assert "| batch in 2 GiB |" in (tmp_path / "report.md").read_text()
    assert report["agreement"] == []
    assert "%" not in (tmp_path / "report.md").read_text().split("accuracy |")[0]
