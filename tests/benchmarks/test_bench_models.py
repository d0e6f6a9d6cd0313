"""Networks: rows, overheads, judging, memory that does not suffice, mistakes on the way."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from benchmarks import bench_models, measure, model_cases, model_judge, model_measure, results
from benchmarks.checks import WrongResult
from benchmarks.model_cases import ModelCase, named_blocks
from benchmarks.model_steps import Reckoned
from nlkernels.training.measure import count_flops
from tests.benchmarks.small_models import PLAN, SMALL, by_provider, run

pytestmark = pytest.mark.usefixtures("quick_steps")

# Of which the scores of 1024 x 256 are a good part.
LONG = ModelCase("c2d_r50", "32x4", 64, batch=1, width=0.125)


@pytest.fixture(scope="module")
def report(quick_steps, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """A real run of a small network."""
    path = tmp_path_factory.mktemp("models") / "run.json"
    code, found = run(path, "--variants", "none,naive,fast", "--fits", "1")
    assert code == 0
    return found


@pytest.fixture(scope="module")
def forward(quick_steps, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The same without gradients."""
    path = tmp_path_factory.mktemp("forward") / "run.json"
    code, found = run(path, "--variants", "none,naive,fast", "--passes", "forward")
    assert code == 0
    return found


def test_run_is_described(report: dict) -> None:
    assert report["complete"]
    assert report["schema"] == results.MODELS_SCHEMA
    assert report["command"].startswith("python -m benchmarks.bench_models --models c2d_r50")
    assert report["settings"]["fits_gib"] == 1.0
    assert report["environment"]["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("passes", ["training", "forward"])
def test_rows_are_measured(report: dict, forward: dict, passes: str) -> None:
    rows = by_provider((report if passes == "training" else forward)["rows"])
    assert list(rows) == ["none", "naive", "fast"]
    for row in rows.values():
        assert row["status"] == "ok"
        assert row["pass"] == passes
        assert row["case"] == "c2d_r50_8x8@64"
        assert row["shape"] == {"B": 2, "T": 8, "H": 64, "W": 64}
        assert len(row["samples_ms"]) == 2
        assert row["peak_mib"] > 0
        assert row["clips_per_s"] == pytest.approx(2e3 / row["time_ms"]["p50"], rel=1e-4)
    none, naive, fast = rows.values()
    assert none["backend"] is None
    assert none["error"] == {}
    assert naive["backend"] == "reference"
    assert fast["backend"] not in (None, "reference")
    # res3 is 4 x 8 x 8 here, res4 4 x 4 x 4; keys are pooled by 2 x 2.
    assert fast["attention"] == ["256 x 64", "64 x 16"]
    assert fast["parameters"] == naive["parameters"] > none["parameters"]
    assert fast["published_gflop"] == naive["published_gflop"] > none["published_gflop"]
    assert fast["executed_gflop"] > 1.99 * fast["published_gflop"]


def test_overheads_and_speeds_are_those_of_the_medians(report: dict, forward: dict) -> None:
    for rows in (by_provider(report["rows"]), by_provider(forward["rows"])):
        none, naive, fast = (row["time_ms"]["p50"] for row in rows.values())
        assert rows["fast"]["over_none"]["ms"] == pytest.approx(fast - none, abs=1e-2)
        assert rows["fast"]["speedup_over"]["naive"] == pytest.approx(naive / fast, rel=1e-4)
        more = rows["fast"]["peak_mib"] - rows["none"]["peak_mib"]
        assert rows["fast"]["over_none"]["mib"] == pytest.approx(more, abs=1e-4)


def test_fast_is_judged_end_to_end_and_block_by_block(report: dict) -> None:
    fast = by_provider(report["rows"])["fast"]
    assert fast["judged_by"] == "naive"
    assert fast["error"].keys() == {
        "logits",
        "gradients in blocks",
        "other gradients",
        "outputs of blocks",
        "gradients of blocks' inputs",
        "gradients of blocks' weights",
    }
    for error in fast["error"].values():
        assert 0 < error["relative"] <= error["allowed"] < 0.05


def test_reckoned_peak_is_the_measured_one(report: dict, forward: dict) -> None:
    for row in report["rows"] + forward["rows"]:
        # A convolution's own scratch is not reckoned; a forward keeps little beside it.
        short = 0.03 if row["pass"] == "training" else 0.2
        assert (1 - short) * row["peak_mib"] < row["reckoned_mib"] < 1.005 * row["peak_mib"]


def test_largest_batch_is_on_the_line_of_its_peaks(report: dict) -> None:
    for row in report["rows"]:
        fits = row["fits"]
        assert list(fits["peaks_mib"]) == ["1", "2", "4"]
        assert fits["peaks"] == "measured"
        held = fits["fixed_mib"] + fits["batch"] * fits["clip_mib"]
        assert held <= 1024 < held + fits["clip_mib"] * 1.001


def test_overheads_on_a_clock_of_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"none": [10.0] * 3, "naive": [30.0, 29.0, 31.0], "fast": [15.0, 14.0, 16.0]}
    monkeypatch.setattr(
        measure, "interleave", lambda steps, timer, rounds: {name: times[name] for name in steps}
    )
    rows = by_provider(model_measure.measure_models(SMALL, list(times), PLAN))
    assert rows["none"]["over_none"]["ms"] == 0
    assert rows["naive"]["over_none"]["ms"] == pytest.approx(20)
    assert rows["fast"]["over_none"]["ms"] == pytest.approx(5)
    assert rows["fast"]["over_none"]["ms_percent"] == pytest.approx(50)
    assert rows["fast"]["speedup_over"]["naive"] == pytest.approx(2)
    assert rows["fast"]["blocks_speedup"] == pytest.approx(4)
    assert rows["none"]["blocks_speedup"] is None
    assert rows["fast"]["clips_per_s"] == pytest.approx(2e3 / 15)


@pytest.mark.parametrize(("dtype", "factor"), [("float32", 1.02), ("bfloat16", 2.0)])
def test_wrong_result_has_no_time(
    dtype: str,
    factor: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    switch = model_cases.switch

    def wrong(model: nn.Module, variant: str) -> None:
        switch(model, variant)
        for block in named_blocks(model).values():
            block.scale = factor * block.inner**-0.5 if variant == "fast" else None

    monkeypatch.setattr(model_cases, "switch", wrong)
    more = ["--variants", "naive,fast", "--blocks", "1", "--dtype", dtype]
    code, found = run(tmp_path / "run.json", *more)
    rows = by_provider(found["rows"])
    assert code == 1
    assert rows["naive"]["status"] == "ok"
    assert rows["fast"]["status"] == "refused"
    assert "more than the allowed" in rows["fast"]["reason"]
    assert "time_ms" not in rows["fast"]
    assert "refused: fast" in capsys.readouterr().err


def test_a_result_that_is_not_finite_is_wrong() -> None:
    judge = model_judge.Judge.of(lambda x: {"out": 2 * x}, torch.ones(4), str)
    assert judge.check("same", {"out": torch.full((4,), 2.0)}) == {
        "out": {"relative": 0.0, "allowed": judge.allowed["out"]}
    }
    with pytest.raises(WrongResult, match="not finite"):
        judge.check("nan", {"out": torch.full((4,), float("nan"))})
    with pytest.raises(WrongResult, match="results that naive has"):
        judge.check("other", {"logits": torch.ones(4)})


def test_what_does_not_fit_is_not_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_measure, "available_mib", lambda device: 1.0)
    monkeypatch.setattr(model_cases, "make_clips", None)
    more = ["--variants", "naive,compiled_naive", "--blocks", "1", "--fits", "1"]
    code, found = run(tmp_path / "run.json", *more)
    assert code == 0
    for row in found["rows"]:
        assert row["status"] == "unserved"
        assert row["reason"].startswith("a step needs about 0.0 GiB, 0.0 GiB are free; lower")
        assert row["reckoned_mib"] > 1
        assert row["over_none"]["ms"] is None
        assert ("fits" in row) == (row["provider"] != "compiled_naive")
        if "fits" in row:
            assert row["fits"]["peaks"] == "reckoned"


def test_without_room_for_naive_another_form_judges(monkeypatch: pytest.MonkeyPatch) -> None:
    naive, fast = (Reckoned(LONG, name, "float32", "training") for name in ("naive", "fast"))
    peaks = naive.peak_mib(1), fast.peak_mib(1)
    assert peaks[0] > peaks[1] + 1
    room = model_measure.MARGIN * (naive.state_mib + fast.state_mib + sum(peaks) / 2)
    monkeypatch.setattr(model_measure, "available_mib", lambda device: room)
    rows = by_provider(model_measure.measure_models(LONG, ["naive", "fast"], PLAN))
    assert rows["naive"]["status"] == "unserved"
    assert rows["fast"]["status"] == "ok"
    assert rows["fast"]["judged_by"] == "chunked"
    assert rows["fast"]["speedup_over"] == {"naive": None}


def test_network_without_blocks_is_measured_alone() -> None:
    (row,) = model_measure.measure_models(SMALL, ["none"], PLAN)
    assert row["status"] == "ok"
    assert row["speedup_over"] == {"naive": None}


def test_without_a_compiler_compiled_code_is_unserved(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(model: nn.Module, *, dynamic: bool):
        def call(clips: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no C++ compiler was found")

        return call

    monkeypatch.setattr(torch, "compile", no_compiler)
    rows = by_provider(model_measure.measure_models(SMALL, ["naive", "compiled_naive"], PLAN))
    assert rows["naive"]["status"] == "ok"
    assert rows["compiled_naive"]["status"] == "unserved"
    assert rows["compiled_naive"]["reason"] == "RuntimeError: no C++ compiler was found"


def test_memory_only_runs_nothing(
    tmp_path: Path, report: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_measure, "compare", None)
    code, found = run(tmp_path / "run.json", "--memory-only")
    assert code == 0
    rows = by_provider(found["rows"])
    assert rows.pop("compiled_naive")["status"] == "unserved"
    for name, row in rows.items():
        measured = by_provider(report["rows"])[name]
        assert row["status"] == "reckoned"
        assert row["peak_mib"] == measured["reckoned_mib"]
        assert row["executed_gflop"] == measured["executed_gflop"]
        assert row["over_none"]["mib"] == pytest.approx(measured["over_none"]["mib"], rel=0.1)


# Multiply-adds of a clip as they were counted for the original; with 5 blocks the long settings
# attend in groups of 4 frames in res3.
PUBLISHED = {
    ("i3d_r50", "32x2", 224, 0): 32.8,
    ("i3d_r50", "32x2", 256, 5): 54.7,
    ("c2d_r50", "32x4", 224, 5): 115.3,
    ("i3d_r50", "128x1", 224, 0): 131.3,
    ("c2d_r50", "128x1", 224, 5): 119.1,
}


@pytest.mark.parametrize(("model", "setting", "size", "blocks"), PUBLISHED)
def test_settings_are_the_published_ones(model: str, setting: str, size: int, blocks: int) -> None:
    case = ModelCase(model, setting, size)
    with FakeTensorMode():
        network = model_cases.build(case, "naive" if blocks else "none", "float32")
        for name, block in named_blocks(network).items():
            if name.startswith("layer2") and setting in ("32x4", "128x1"):
                block.temporal_group = 4
        multiply_adds = count_flops(network, torch.empty(case.clip_shape())) / 2
    wanted = PUBLISHED[model, setting, size, blocks]
    assert round(multiply_adds / 1e9, 1) == wanted


ERRORS = {
    "model": (["--models", "i3d"], "models: expected some of i3d_r50, c2d_r50, got i3d; name"),
    "setting": (["--settings", "8x9"], "settings: expected some of 8x8, 32x2, 32x4, 128x1"),
    "size": (["--sizes", "16"], "sizes: expected numbers of at least 32, got 16; the networks"),
    "no-number": (["--sizes", "big"], "sizes: expected a number, got 'big'; write for example"),
    "count": (["--blocks", "0"], "blocks: expected numbers of at least 1, got 0; the variant none"),
    "places": (["--blocks", "3"], "blocks: expected some of 1, 5, 10, got 3; name one of these"),
    "kind": (["--kind", "cosine"], "kind: expected some of softmax"),
    "variant": (["--variants", "slow"], "variants: expected some of none, naive, fast"),
    "twice": (["--variants", "fast,fast"], "variants: expected each once, got fast, fast; drop"),
    "dtype": (["--dtype", "float16"], "dtype: expected some of float32, bfloat16, got float16"),
    "pass": (["--passes", "sideways"], "passes: expected some of training, forward"),
    "rounds": (["--rounds", "0"], "rounds: expected numbers of at least 1, got 0"),
    "width": (["--width", "0"], "width: expected a number above 0, got 0.0"),
    "fits": (["--fits", "0"], "fits: expected a memory of more than 0 GiB, got 0.0; give"),
    "order": (["--blocks-only", "--pool-orders", "never"], "pool-orders: expected some of before"),
    "provider": (["--blocks-only", "--variants", "none"], "variants: expected some of naive"),
    "batch-of-block": (["--blocks-only", "--fits", "8"], "fits: expected no --fits with"),
    "device": (["--device", "tpu"], "device: expected cpu or cuda, got tpu; take one of these"),
    "reckoned": (["--device", "cuda", "--memory-only"], "device: expected cpu with --memory-only"),
}


@pytest.mark.parametrize(("arguments", "said"), ERRORS.values(), ids=ERRORS)
def test_wrong_command_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench_models.main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"bench_models: {said}")


def test_table_shows_what_blocks_cost(report: dict, capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads(json.dumps(report["rows"]))[:3]
    rows[2] |= {"over_none": {"ms": 5.0, "ms_percent": 50.0, "mib": 2.0, "mib_percent": 25.0}}
    rows[2] |= {"blocks_speedup": 4.0, "speedup_over": {"naive": 2.0}}
    bench_models.print_models(rows)
    said = capsys.readouterr().out
    assert "+5.0 ms (+50.0%)" in said
    assert "+2.0 MiB (+25.0%)" in said
    assert "2.00x (blocks 4.00x)" in said
    assert "batch in 1 GiB" in said
    assert "reckoned from peaks at B=1, 2, 4, which were measured" in said
