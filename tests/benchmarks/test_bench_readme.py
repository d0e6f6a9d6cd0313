"""The README's numbers come from committed results, and the promised lines are read correctly."""

import copy
import json
from pathlib import Path

import pytest

from benchmarks import acceptance, readme_table, results

SHAPE = {"B": 2, "N": 12544, "M": 3136, "D": 256, "V": 256}
TIMES = {"naive": 300.0, "sdpa_flash": 600.0, "chunked": 150.0, "auto": 150.0}
DOT_TIMES = {"naive": 300.0, "two_bmm": 16.0, "chunked": 16.0, "auto": 16.0}
CONCAT_TIMES = {"naive": 300.0, "chunked": 15.0, "auto": 15.0}


def row(kind: str, dtype: str, passes: str, provider: str, times: dict[str, float]) -> dict:
    own = times[provider]
    over = {
        name: times.get("sdpa_flash" if name == "sdpa" else name)
        for name in ("naive", "two_bmm", "sdpa")
    }
    return {
        "case": acceptance.CASE,
        "kind": kind,
        "dtype": dtype,
        "pass": passes,
        "shape": SHAPE | ({"D": 1} if kind == "concat" else {}),
        "provider": provider,
        "backend": "chunked" if provider == "auto" else None,
        "status": "ok",
        "reason": "",
        "time_ms": {"p20": own, "p50": own, "p80": own},
        "samples_ms": [own] * 7,
        "foreign_cores": 0.01,
        "speedup_over": {name: time and time / own for name, time in over.items()},
        "nominal_tflops": 0.1,
        "share_of_gemm": None,
        "peak_mib": 1024.0 if provider == "naive" else 64.0,
        "output_mib": 24.5,
        "device_peak_mib": None,
        "error": {},
    }


@pytest.fixture
def report() -> dict:
    rows = [
        row(kind, dtype, passes, provider, times)
        for kind, times in (
            ("softmax", TIMES),
            ("dot_product", DOT_TIMES),
            ("relu", CONCAT_TIMES),
            ("concat", CONCAT_TIMES),
        )
        for dtype in ("float32", "bfloat16")
        for passes in ("forward", "forward_backward")
        for provider in times
    ]
    return {
        "schema": results.SCHEMA,
        "complete": True,
        "date": "2026-01-02T03:04:05+00:00",
        "command": "python -m benchmarks.bench_ops --cases acceptance",
        "environment": {
            "device": "cpu",
            "slug": "cpu-avx2-2c",
            "cpu_model": "Example CPU",
            "cores": 2,
            "threads": 2,
            "instruction_set": "avx2",
            "gpu": None,
            "versions": {"python": "3.11.1", "torch": "2.13.0", "triton": None},
            "git_hash": "0123456789abcdef",
            "git_dirty": False,
        },
        "tests": {"command": "python -m pytest tests/ops", "outcome": "passed", "summary": ""},
        "settings": {"rounds": 7, "seed": 0, "gemm_tflops": {}},
        "rows": rows,
    }


@pytest.fixture
def folder(report: dict, tmp_path: Path) -> Path:
    path = tmp_path / "results" / "cpu-avx2-2c" / "2026-01-02.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(report))
    return tmp_path / "results"


def test_table_shows_the_measured_numbers(folder: Path) -> None:
    text = readme_table.table(folder)
    lines = text.splitlines()
    assert sum(line.startswith("| softmax ") for line in lines) == 4
    for kind in ("dot_product", "concat"):
        assert sum(line.startswith(f"| {kind} ") for line in lines) == 4
    assert "| concat float32 forward | 20.00x |  | 1024 | none | 64 (chunked) |" in lines
    assert "concat takes one score for each position" in text
    assert (
        "| softmax bfloat16 forward | 2.00x | 4.00x | 1024 | 64 (sdpa_flash) | 64 (chunked) |"
    ) in lines
    for said in (
        "N = 12544",
        "Example CPU",
        "2 threads",
        "torch 2.13.0",
        "0123456789ab",
        "2026-01-02",
        "7 interleaved rounds",
        "--cases acceptance",
    ):
        assert said in text
    assert "triton" not in text


def test_newest_file_counts(folder: Path, report: dict) -> None:
    newer = copy.deepcopy(report)
    newer["date"] = "2026-02-01T00:00:00+00:00"
    (folder / "cpu-avx2-2c" / "2026-02-01.json").write_text(json.dumps(newer))
    text = readme_table.table(folder)
    assert "2026-02-01" in text
    assert "2026-01-02" not in text


def test_one_table_for_all_cpus_and_one_for_gpus(folder: Path, report: dict) -> None:
    def add(slug: str, date: str, **environment: object) -> None:
        named = report["environment"] | {"cpu_model": slug} | environment
        path = folder / slug / f"{date}.json"
        path.parent.mkdir()
        path.write_text(json.dumps(report | {"environment": named, "date": f"{date}T03:04:05"}))

    add("cpu-a", "2026-01-01")
    add("cpu-z", "2026-01-03")
    add("cpu-b", "2025-12-31")
    assert "cpu-z, 2 threads" in readme_table.table(folder)
    assert readme_table.table(folder).count("Ratios of median times") == 1
    add("gpu", "2025-01-01", gpu={"name": "Example GPU"})
    text = readme_table.table(folder)
    assert text.count("Ratios of median times") == 2 and "Example GPU" in text


@pytest.mark.parametrize(
    "damage",
    [
        lambda report: report.update(complete=False),
        lambda report: report["tests"].update(outcome="not run"),
        lambda report: report["rows"].clear(),
    ],
    ids=["cut short", "untested", "another case"],
)
def test_unfit_results_are_an_error(folder: Path, report: dict, damage) -> None:
    damage(report)
    (folder / "cpu-avx2-2c" / "2026-01-02.json").write_text(json.dumps(report))
    with pytest.raises(ValueError, match="expected"):
        readme_table.table(folder)


def test_written_and_checked(folder: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"# A\n\n{readme_table.BEGIN}\nold\n{readme_table.END}\n\nend\n")
    arguments = ["--readme", str(readme), "--results", str(folder)]
    assert readme_table.main([*arguments, "--check"]) == 1
    assert "old" in readme.read_text()
    assert readme_table.main(arguments) == 0
    text = readme.read_text()
    assert text.startswith(f"# A\n\n{readme_table.BEGIN}\n| operation |")
    assert text.endswith(f"{readme_table.END}\n\nend\n")
    assert readme_table.main([*arguments, "--check"]) == 0
    readme.write_text(text.replace("2.00x", "2.01x", 1))
    assert readme_table.main([*arguments, "--check"]) == 1


@pytest.mark.parametrize(
    "text",
    ["no markers", readme_table.BEGIN, f"{readme_table.END}\n{readme_table.BEGIN}"],
    ids=["none", "one", "swapped"],
)
def test_readme_without_markers(text: str, folder: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(text)
    assert readme_table.main(["--readme", str(readme), "--results", str(folder)]) == 2
    assert readme.read_text() == text


def test_readme_of_this_project_is_up_to_date() -> None:
    assert readme_table.main(["--check"]) == 0


def test_promised_lines_hold_or_fail_by_their_bound(report: dict) -> None:
    values = {
        (line.kind, line.dtype, line.passes, line.text): (value, holds)
        for line, value, holds in acceptance.verdicts(report)
    }
    forward = "softmax", "bfloat16", "forward"
    assert values[(*forward, "chunked over SDPA")] == (4.0, True)
    assert values[(*forward, "chunked over naive")] == (2.0, True)
    extra = (64.0 - 24.5) / (1024.0 - 24.5)
    assert values[(*forward, "extra memory, of naive's")] == (extra, True)
    both = "softmax", "float32", "forward_backward", "chunked over the better of both"
    assert values[both] == (2.0, True)
    dot = "dot_product", "float32", "forward"
    assert values[(*dot, "chunked over naive")] == (300 / 16, True)
    assert values[(*dot, "chunked over two bmm")] == (1.0, True)


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda r: r["speedup_over"].update(sdpa=2.99), "chunked over SDPA"),
        (lambda r: r["speedup_over"].update(sdpa=None), "chunked over SDPA"),
        (lambda r: r.update(status="refused"), "chunked over naive"),
        (lambda r: r.update(shape={**SHAPE, "B": 1}), "chunked over naive"),
        (lambda r: r.update(peak_mib=500.0), "extra memory, of naive's"),
    ],
    ids=["slow", "no baseline", "refused", "other shape", "memory"],
)
def test_line_that_does_not_hold(report: dict, damage, text: str) -> None:
    problem = ("softmax", "bfloat16", "forward")
    for found in report["rows"]:
        key = (found["kind"], found["dtype"], found["pass"])
        if key == problem and found["provider"] == "chunked":
            damage(found)
    failing = [
        line.text
        for line, _, holds in acceptance.verdicts(report)
        if not holds and (line.kind, line.dtype, line.passes) == problem
    ]
    assert text in failing


def test_16_bits_are_promised_where_the_library_multiplies_them_fast(report: dict) -> None:
    def lines(rate: float) -> list[tuple[str, str]]:
        report["settings"]["gemm_tflops"] = {"float32": 0.2, "bfloat16": 0.2 * rate}
        return [(line.dtype, line.text) for line, *_ in acceptance.verdicts(report)]

    fast, slow = lines(4.1), lines(3.9)
    assert ("bfloat16", "chunked over SDPA") in fast and fast != slow
    assert set(fast) - set(slow) == {
        ("bfloat16", "chunked over SDPA"),
        ("bfloat16", "chunked over naive"),
    }


def test_auto_is_as_fast_as_what_it_leaves(report: dict) -> None:
    def holds() -> set[bool]:
        found = acceptance.verdicts(report)
        return {holds for line, _, holds in found if line.text == "auto over chunked and SDPA"}

    assert holds() == {True}
    for found in report["rows"]:
        if found["provider"] == "sdpa_flash":
            found["time_ms"]["p50"] = 0.94 * 150.0
    assert holds() == {False}


def test_acceptance_exit_codes(
    folder: Path, report: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = next(folder.glob("*/*.json"))
    assert acceptance.main([str(path), "--of", "promises"]) == 0
    report["rows"] = [r for r in report["rows"] if r["kind"] == "softmax"]
    path.write_text(json.dumps(report))
    assert acceptance.main([str(path), "--of", "promises"]) == 1
    assert capsys.readouterr().out.count("not measured") == 4
    assert acceptance.main([str(tmp_path / "absent.json")]) == 2
