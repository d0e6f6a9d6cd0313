"""What is wanted of the C++ kernels, and which backend is the fastest, are read correctly."""

import json
from pathlib import Path

import pytest

from benchmarks import acceptance, fastest, results, targets
from benchmarks.registry import CASES

SHAPE = {"B": 2, "N": 12544, "M": 3136, "D": 256, "V": 256}


def row(provider: str, ms: float, **more: object) -> dict:
    return {
        "case": targets.LONG,
        "kind": "softmax",
        "dtype": "bfloat16",
        "pass": "forward",
        "shape": SHAPE,
        "provider": provider,
        "backend": None,
        "status": "ok",
        "reason": "",
        "time_ms": {"p20": ms, "p50": ms, "p80": ms},
        "samples_ms": [ms],
        "foreign_cores": 0.0,
        "speedup_over": {},
        "nominal_tflops": 1.0,
        "share_of_gemm": None,
        "share_of_peak": 0.75,
        "share_of_copy": 0.01,
        "peak_mib": 1.0,
        "output_mib": 1.0,
        "device_peak_mib": None,
        "error": {},
        **more,
    }


def report(rows: list[dict]) -> dict:
    return {
        "schema": results.SCHEMA,
        "complete": True,
        "date": "2026-01-02T03:04:05+00:00",
        "command": "",
        "environment": dict.fromkeys(results._ENVIRONMENT),
        "tests": {"command": None, "outcome": "not run", "summary": ""},
        "settings": {"peak_gflops": {"avx512": {"float32": 234.0}}},
        "rows": rows,
    }


LONG_ROWS = [row("naive", 300.0), row("sdpa_flash", 600.0), row("sdpa_math", 900.0)]


def outcome(rows: list[dict], over: str, asked: float) -> targets.Outcome:
    (found,) = [
        o
        for o in targets.outcomes(report(rows))
        if (o.case, o.target.over, o.target.asked) == (targets.LONG, over, asked)
        and (o.target.kind, o.target.dtype, o.target.passes) == ("softmax", "bfloat16", "forward")
    ]
    return found


def test_target_that_holds() -> None:
    found = outcome([*LONG_ROWS, row("cpp", 120.0)], "SDPA", 4.0)
    assert (found.got, found.holds) == (5.0, True)


def test_missed_target_says_what_the_machine_allows() -> None:
    found = outcome([*LONG_ROWS, row("cpp", 200.0)], "SDPA", 4.0)
    assert (found.got, found.holds) == (3.0, False)
    assert found.bound == found.attainable == 4.0
    slower = outcome([*LONG_ROWS, row("cpp", 200.0, share_of_peak=0.9)], "SDPA", 4.0)
    assert slower.attainable == slower.bound == pytest.approx(3.0 / 0.9)
    faster = outcome([*LONG_ROWS, row("cpp", 200.0, share_of_peak=0.5)], "SDPA", 4.0)
    assert (faster.bound, faster.attainable) == (6.0, 4.0)


def test_the_nearer_ceiling_bounds() -> None:
    found = outcome([*LONG_ROWS, row("cpp", 200.0, share_of_copy=0.8)], "SDPA", 4.0)
    assert (found.share, found.of) == (0.8, "copy")


@pytest.mark.parametrize(
    "rows",
    [
        LONG_ROWS,
        [row("cpp", 1.0)],
        [*LONG_ROWS, row("cpp", 1.0, status="unserved")],
        [row("sdpa_flash", 9.0, shape=SHAPE | {"B": 1}), row("cpp", 1.0, shape=SHAPE | {"B": 1})],
    ],
    ids=["no cpp", "no baseline", "unserved", "other batch"],
)
def test_target_that_was_not_measured(rows: list[dict]) -> None:
    found = outcome(rows, "SDPA", 4.0)
    assert found.got is found.bound is None
    assert not found.holds
    assert not found.wrong


def test_peak_that_was_not_measured_is_no_bound() -> None:
    found = outcome([*LONG_ROWS, row("cpp", 200.0, share_of_peak=None)], "SDPA", 4.0)
    assert (found.got, found.share, found.bound, found.attainable) == (3.0, None, None, 4.0)


def test_every_registered_case_is_asked() -> None:
    wanted = {case.name for case in CASES if case.kind == "softmax"}
    found = {
        o.case
        for o in targets.outcomes(report([]))
        if (o.target.kind, o.target.over, o.target.asked) == ("softmax", "naive", 1.0)
    }
    assert found == wanted


def test_a_wrong_result_is_a_miss(capsys: pytest.CaptureFixture[str]) -> None:
    wrong = row("cpp", 1.0, status="refused", reason="max error of out")
    del wrong["time_ms"]
    found = outcome([*LONG_ROWS, wrong], "SDPA", 4.0)
    assert (found.got, found.holds, found.wrong) == (None, False, "refused: max error of out")
    targets.print_outcomes([found], {})
    printed = capsys.readouterr().out
    assert "asked  4.00 refused: max error of out" in printed
    assert "0 hold, 1 are missed, 0 of these beyond" in printed


def test_a_miss_is_printed_with_its_bound(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(report([*LONG_ROWS, row("cpp", 200.0, share_of_peak=0.9)])))
    assert acceptance.main([str(path), "--of", "targets"]) == 1
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if "asked  4.00" in line]
    assert line.startswith("MISSED softmax")
    assert "got   3.00   90% of peak, bound 3.33, attainable 3.33" in line
    assert "peak of avx512 in GFLOP/s: float32 234" in printed
    assert "2 hold, 2 are missed, 2 of these beyond" in printed


def test_fastest_backend_of_each_pass() -> None:
    both = {"pass": "forward_backward"}
    rows = [
        *LONG_ROWS,
        row("cpp", 200.0),
        row("chunked", 250.0),
        row("naive", 900.0, **both),
        row("cpp", 1000.0, **both),
        row("chunked", 900.0, **both, status="refused"),
    ]
    found = {standing.passes: standing for standing in fastest.standings(report(rows))}
    assert found["forward"].time_ms == {"cpp": 200, "chunked": 250, "naive": 300, "sdpa": 600}
    assert found["forward"].backend == "cpp"
    assert found["backward"].time_ms == {"naive": 600.0, "cpp": 800.0}
    assert found["forward_backward"].backend == "naive"
    first, second, third = fastest.lines(found.values())
    assert first.endswith("cpp         200.00 ms  chunked 1.25x  naive 1.50x  sdpa 3.00x")
    assert "backward" in second
    assert "N=12544" in third


def test_fastest_sorts_by_size_and_says_when_there_is_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"case": "small", "shape": SHAPE | {"N": 4}}
    rows = [
        row("cpp", 2.0),
        row("naive", 1.0),
        row("cpp", 1.0, **small),
        row("naive", 2.0, **small),
    ]
    path = tmp_path / "run.json"
    path.write_text(json.dumps(report(rows)))
    assert fastest.main([str(path), "--kinds", "softmax", "--pass", "forward"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert "N=4 " in first and " cpp " in first
    assert "N=12544 " in second and " naive " in second
    assert fastest.main([str(path), "--dtype", "float32"]) == 2
    assert fastest.main([str(tmp_path / "absent.json")]) == 2
