"""Result files: valid at every moment, complete, and honest about what was not measured."""

import copy
import json
from pathlib import Path

import pytest

from benchmarks import acceptance, bench_ops, peak, results
from benchmarks.gpu_summary import PEERS

COMMITTED = sorted(results.RESULTS.glob("*/*.json"))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """A real run on the smallest registered shape."""
    path = tmp_path_factory.mktemp("results") / "run.json"
    command = "--cases quick --kinds softmax,gaussian --batch 1 --dtype float32 --rounds 2"
    providers = "naive,sdpa_flash,sdpa_cudnn,chunked,auto"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peak, "SAMPLE_S", 0.001)
        code = bench_ops.main([*command.split(), "--providers", providers, "--out", str(path)])
    assert code == 0
    return results.load(path)


def rows(report: dict, kind: str, passes: str) -> dict[str, dict]:
    return {r["provider"]: r for r in report["rows"] if (r["kind"], r["pass"]) == (kind, passes)}


def test_run_is_described(report: dict) -> None:
    assert report["complete"]
    assert report["command"].startswith("python -m benchmarks.bench_ops --cases quick")
    assert report["command"].endswith("--out run.json")
    assert report["tests"]["outcome"] == "not run"
    assert report["settings"]["gemm_tflops"]["float32"] > 0
    where = report["environment"]
    assert where["device"] == "cpu"
    assert where["slug"].startswith("cpu-")
    assert where["slug"].endswith(f"-{where['instruction_set']}-{where['cores']}c")
    assert where["cores"] >= 1
    assert where["threads"] >= 1
    assert {"python", "torch", "triton", "numpy", "nlkernels"} <= where["versions"].keys()


def test_rows_are_measured(report: dict) -> None:
    measured = rows(report, "softmax", "forward_backward")
    assert list(measured) == ["naive", "sdpa_flash", "sdpa_cudnn", "chunked", "auto"]
    assert [r["status"] for r in measured.values()] == ["ok", "ok", "unserved", "ok", "ok"]
    assert measured["sdpa_cudnn"]["reason"].startswith("torch refuses CUDNN_ATTENTION")
    for row in measured.values():
        assert row["shape"] == {"B": 1, "N": 784, "M": 196, "D": 512, "V": 512}
        if row["status"] == "ok":
            assert len(row["samples_ms"]) == 2
            assert row["error"].keys() == {"out", "grad_query", "grad_key", "grad_value"}
            # Output and query gradient (784, 512), key and value gradient (196, 512), in float32.
            results_mib = 4 * 512 * (2 * 784 + 2 * 196) / 2**20
            assert row["output_mib"] == pytest.approx(results_mib, rel=1e-5)
            assert row["peak_mib"] >= row["output_mib"]
            assert row["share_of_gemm"] > 0
    assert measured["auto"]["backend"]


def test_rows_state_their_share_of_what_the_machine_gave(report: dict) -> None:
    settings, timed = report["settings"], [r for r in report["rows"] if r["status"] == "ok"]
    reached = peak.machine_peak(settings["peak_gflops"], "float32")
    for row in timed:
        seconds = row["time_ms"]["p50"] / 1e3
        moved = row["least_bytes"] / seconds / 1e9 / settings["copy_gb_s"]
        assert row["share_of_copy"] == pytest.approx(moved, rel=1e-4)
        if reached is None:  # no compiler
            assert row["share_of_peak"] is None
            continue
        assert row["least_flop"] == pytest.approx(row["nominal_tflops"] * 1e12 * seconds, rel=1e-4)
        computed = row["least_flop"] / seconds / 1e9 / reached
        assert row["share_of_peak"] == pytest.approx(computed, rel=1e-4)


def test_speedup_is_over_the_medians_of_this_run(report: dict) -> None:
    measured = rows(report, "softmax", "forward")
    medians = {name: r["time_ms"]["p50"] for name, r in measured.items() if r["status"] == "ok"}
    speedups = measured["chunked"]["speedup_over"]
    ratio = pytest.approx(medians["naive"] / medians["chunked"], rel=1e-5)
    assert speedups["naive"] == ratio
    ratio = pytest.approx(medians["sdpa_flash"] / medians["chunked"], rel=1e-5)
    assert speedups["sdpa"] == ratio
    assert speedups["two_bmm"] is None


def test_sdpa_does_not_serve_unequal_widths_on_cpu(report: dict) -> None:
    row = rows(report, "gaussian", "forward")["sdpa_flash"]
    assert row["status"] == "unserved"
    assert "No available kernel" in row["reason"]
    assert "Triggered" not in row["reason"]


def test_file_is_valid_after_every_row(report: dict, tmp_path: Path) -> None:
    path = tmp_path / "part.json"
    header = {key: report[key] for key in ("command", "environment", "tests", "settings")}
    file = results.ResultFile(path, header)
    for count, row in enumerate(report["rows"][:3]):
        assert len(results.load(path)["rows"]) == count
        file.add([row])
    assert results.load(path)["complete"] is False
    file.close()
    assert results.load(path)["complete"] is True
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda r: r.pop("environment"), "environment"),
        (lambda r: r["environment"].pop("git_hash"), "git_hash"),
        (lambda r: r.update(schema="other/1"), "other/1"),
        (lambda r: r["rows"][0].pop("error"), "error"),
        (lambda r: r["rows"][0].update(status="fine"), "fine"),
        (lambda r: r["rows"][2].update(reason=""), "reason"),
        (lambda r: r["rows"][0]["time_ms"].update(p20=1e9), "p20"),
    ],
    ids=["section", "hash", "schema", "row", "status", "reason", "quantiles"],
)
def test_damaged_report_is_an_error(report: dict, damage, word: str) -> None:
    damaged = copy.deepcopy(report)
    damage(damaged)
    with pytest.raises(ValueError, match=word):
        results.validate(damaged)


def test_file_that_is_no_report(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"x\.json"):
        results.load(path)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--cases", "nowhere"],
        ["--providers", "magic"],
        ["--dtype", "int8"],
        ["--dtype", "float16"],
        ["--pass", "sideways"],
        ["--device", "nowhere"],
    ],
    ids=" ".join,
)
def test_wrong_command_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_ops.main(arguments) == 2
    assert "expected" in capsys.readouterr().err


def test_nothing_is_measured_while_tests_fail(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    red = tmp_path / "test_red.py"
    red.write_text("def test_red():\n    raise ArithmeticError\n")
    out = tmp_path / "out.json"
    assert bench_ops.main(["--tests", str(red), "--out", str(out)]) == 2
    assert "1 failed" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_committed_result(path: Path) -> None:
    report = results.load(path)
    assert report["complete"]
    assert report["environment"]["slug"] == path.parent.name
    refused = [r for r in report["rows"] if r["status"] in ("refused", "failed")]
    if report["environment"]["device"] == "cuda":
        # What a peer fails in on a GPU is a result; ours has to work.
        refused = [r for r in refused if r["provider"] not in PEERS]
    assert refused == []
    assert json.dumps(report).count("/tmp") == 0


def _newest_of_each_kind() -> list[tuple[Path, str]]:
    """Per machine and kind of which something is promised, the newest file that measured it."""
    promised = {line.kind for line in acceptance.LINES}
    newest = {}
    for path in COMMITTED:
        report = results.load(path)
        if report["environment"]["device"] == "cpu":
            measured = {kind for kind, _, _ in acceptance.problems(report, acceptance.CASE)}
            for kind in sorted(promised & measured):
                newest[path.parent.name, kind] = path, kind
    return list(newest.values())


@pytest.mark.parametrize(
    ("path", "kind"),
    _newest_of_each_kind(),
    ids=lambda value: value if isinstance(value, str) else value.parent.name,
)
def test_promised_lines_hold_in_the_newest_result(path: Path, kind: str) -> None:
    verdicts = [v for v in acceptance.verdicts(results.load(path)) if v[0].kind == kind]
    assert [(line.text, value) for line, value, holds in verdicts if not holds] == []


def test_every_promise_was_measured() -> None:
    assert {line.kind for line in acceptance.LINES} == {kind for _, kind in _newest_of_each_kind()}
