"""The stages' rows become a result file, and only what is fit does."""

import copy
import json
from pathlib import Path

import pytest

from benchmarks import collect, results

ENVIRONMENT = {
    "device": "cuda",
    "slug": "nvidia-example",
    "cpu_model": "Example CPU",
    "cores": 16,
    "threads": 16,
    "instruction_set": "avx2",
    "gpu": {"name": "NVIDIA Example"},
    "versions": {"python": "3.12.3", "torch": "2.11.0", "triton": "3.6.0"},
    "git_hash": "0123456789abcdef",
    "git_dirty": False,
}


def start(stage: str) -> dict:
    return {
        "event": "start",
        "stage": stage,
        "begun": 1767322800,
        "command": f"benchmarks/on_gpu.sh {stage} --device cuda",
        "environment": copy.deepcopy(ENVIRONMENT),
    }


def measured(provider: str, job: str, ms: float) -> dict:
    return {
        "event": "row",
        "section": "attention",
        "job": job,
        "case": "x",
        "kind": "softmax",
        "dtype": "bfloat16",
        "pass": "forward",
        "shape": {"B": 1, "N": 2, "M": 2, "D": 2, "V": 2},
        "provider": provider,
        "backend": None,
        "status": "ok",
        "reason": "",
        "time_ms": {"p20": ms, "p50": ms, "p80": ms},
        "samples_ms": [ms] * 7,
        "graph": {"time_ms": None, "reason": "no"},
        "foreign_cores": 0.0,
        "speedup_over": {},
        "auto_speedup": 1.0,
        "nominal_tflops": 1.0,
        "share_of_gemm": 0.5,
        "peak_mib": 1.0,
        "output_mib": 1.0,
        "device_peak_mib": 1.0,
        "error": {},
    }


@pytest.fixture
def stages() -> dict[str, list[dict]]:
    test = {"event": "test", "test": "t", "outcome": "passed", "time_s": 0.1}
    ends = [{"event": "end", "exit": 0, "tf32": tf32} for tf32 in (False, True)]
    return {
        "correct": [
            start("correct"),
            test | {"tf32": False},
            {"event": "finished", "code": 0},
            *ends,
        ],
        "sanitize": [
            start("sanitize"),
            {"event": "tool", "tool": "memcheck", "status": "unavailable", "reason": "refused"},
            {"event": "end", "bad": 0},
        ],
        "bench": [
            start("bench"),
            {"event": "ceilings", "gemm_tflops": {"bfloat16": 790.0}, "copy_gb_s": 4300.0},
            measured("auto", "x", 2.0),
            measured("auto", "x compiled", 3.0),
            measured("compiled", "x compiled", 4.0),
            measured("cuda", "g", 1.0) | {"section": "gate", "kind": "gate"},
            {"event": "row", "section": "kernels", "job": "k", "kernel": "attend"},
            {"event": "job", "job": "x", "seconds": 1.0},
            {"event": "floor", "case": "x", "holds": True},
            {"event": "end", "missing": ["y"], "lost": {}, "cut": False},
        ],
        "train": [start("train"), {"event": "cost", "item": "c", "variant": "fast"}],
        "ablate": [
            start("ablate"),
            {"event": "plan", "head": [256, 256], "plan": "p", "tflops": 1.0},
            {"event": "end", "missing": [], "faults": 0},
        ],
    }


def write(folder: Path, stages: dict[str, list[dict]]) -> Path:
    for name, rows in stages.items():
        lines = [json.dumps(row | {"at_s": 1.0}) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_result_file(tmp_path: Path, stages, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "RESULTS", tmp_path / "results")
    assert collect.main([str(write(tmp_path, stages))]) == 0
    report = results.load(tmp_path / "results" / "nvidia-example" / "2026-01-02.json")
    assert report["complete"]
    assert report["date"] == "2026-01-02T03:00:00+00:00"
    assert report["tests"]["outcome"] == "passed"
    assert report["tests"]["summary"] == "1 passed"
    assert report["settings"]["gemm_tflops"] == {"bfloat16": 790.0}
    assert report["settings"]["rounds"] == 7
    # `auto` once, as it was measured first.
    times = {row["provider"]: row["time_ms"]["p50"] for row in report["rows"]}
    assert times == {"auto": 2.0, "compiled": 4.0, "cuda": 1.0}
    assert len(report["rows"]) == 3
    assert not {"event", "job", "section", "at_s"} & set(report["rows"][0])
    assert report["missing"] == ["y"]
    assert report["kernels"] == [{"kernel": "attend"}]
    assert report["sanitizer"][0]["status"] == "unavailable"
    assert report["training"][0]["what"] == "cost"
    assert report["ablation"] == [{"head": [256, 256], "plan": "p", "tflops": 1.0}]
    assert report["floors"] == [{"case": "x", "holds": True}]


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda s: s.pop("correct"), "not run"),
        (lambda s: s["correct"].pop(), "the tests failed"),
        (lambda s: s["correct"][2].update(code=124), "the tests failed"),
        (lambda s: s["correct"][1].update(outcome="failed"), "1 failed"),
        (lambda s: s["correct"][1].update(outcome="lost"), "1 lost"),
        (lambda s: s["correct"].append({"event": "verify", "verdict": "failed"}), "tests failed"),
        (lambda s: s["sanitize"][1].update(status="findings"), "memcheck: findings"),
        (lambda s: s["bench"].pop(), "end"),
        (lambda s: s["train"][0]["environment"].update(git_hash="other"), "git_hash"),
        (lambda s: s["bench"][0]["environment"].update(git_dirty=True), "changes"),
        (lambda s: s["bench"][0]["environment"].update(device="cpu"), "dry run"),
        (
            lambda s: [rows[0]["environment"].update(git_hash=None) for rows in s.values()],
            "--commit",
        ),
    ],
    ids=[
        "no tests",
        "no tf32",
        "late",
        "failed",
        "lost",
        "verdict",
        "finding",
        "cut",
        "mixed",
        "changed",
        "dry",
        "unknown commit",
    ],
)
def test_unfit_results_are_refused_unless_written_elsewhere(
    damage, word, tmp_path: Path, stages, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(collect, "RESULTS", tmp_path / "results")
    damage(stages)
    folder = write(tmp_path, stages)
    assert collect.main([str(folder)]) == 1
    assert word in capsys.readouterr().err
    assert not (tmp_path / "results").exists()
    assert collect.main([str(folder), "--out", str(tmp_path / "look.json")]) == 1
    assert len(results.load(tmp_path / "look.json")["rows"]) == 3


def test_nothing_to_collect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert collect.main([str(tmp_path)]) == 2
    assert "on_gpu.sh bench" in capsys.readouterr().err
