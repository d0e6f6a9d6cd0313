"""The GPU script refuses loudly, its stages run end to end without one, and its rows survive."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.stage import read_rows

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "benchmarks" / "on_gpu.sh")

pytest_plugins = ["pytester"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    # Into a cache of their own: stages would compile for half a minute each.
    environment = os.environ | {"PYTHON": sys.executable, "NLKERNELS_JIT": "0"}
    return subprocess.run(
        ["bash", SCRIPT, *arguments], capture_output=True, text=True, timeout=120, env=environment
    )


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["paint"],
        ["correct", "--device", "abacus"],
        ["bench", "--out"],
        ["train", "-x", "1"],
    ],
    ids=["no stage", "unknown stage", "device", "value", "option"],
)
def test_wrong_use_prints_the_stages(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert "stages: correct sanitize bench train ablate" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_gpu_is_a_failure(tmp_path: Path) -> None:
    done = run("bench", "--out", str(tmp_path / "out"))
    assert done.returncode == 3
    assert "FAILED: torch sees no GPU" in done.stderr
    assert not (tmp_path / "out").exists()


DRY = {
    "correct": ["--files", "tests/ops/test_attention.py", "--every", "150"],
    "sanitize": ["--part", "region-float32-channels"],
    "bench": ["--most", "1", "--rounds", "1"],
    "train": [],
    "ablate": ["--heads", "256x256", "512x512"],
}


@pytest.mark.parametrize("stage", DRY)
def test_dry_run(stage: str, tmp_path: Path) -> None:
    if stage == "sanitize":
        pytest.importorskip("triton")
    done = run(stage, "--device", "cpu", "--out", str(tmp_path), "--", *DRY[stage])
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{stage} passed on cpu" in done.stdout
    rows = read_rows(tmp_path / f"{stage}.jsonl")
    assert (tmp_path / f"{stage}.log").read_text()
    assert rows[0]["event"] == "start"
    assert rows[0]["stage"] == stage
    assert rows[0]["environment"]["versions"]["torch"] == torch.__version__
    assert rows[-1]["event"] == ("finished" if stage == "correct" else "end")
    assert len(rows) > 3


def test_a_failed_stage_fails_the_script(tmp_path: Path) -> None:
    done = run("sanitize", "--device", "cpu", "--out", str(tmp_path), "--", "--part", "engine")
    assert done.returncode == 2
    assert "FAILED: sanitize: see" in done.stderr
    assert "invalid choice: 'engine'" in (tmp_path / "sanitize.log").read_text()


TESTS = """
    import pytest
    import torch

    @pytest.fixture(params=["cpu", "cuda"])
    def device(request):
        return request.param

    def test_on_device(device):
        pass

    def test_without_device():
        raise RuntimeError("selected though it has no device")

    @pytest.mark.parametrize("n", [1, 2])
    def test_odd(device, n):
        assert n % 2, "even"

    def test_skipped(device):
        pytest.skip("no reason")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_dtype(device, dtype):
        assert torch.get_float32_matmul_precision() == "highest"
"""


def rows_of(pytester: pytest.Pytester, tests: str, *options: str) -> tuple[int, list[dict]]:
    pytester.makepyfile(tests)
    rows = pytester.path / "deep" / "rows.jsonl"
    result = pytester.runpytest_inprocess(
        "-p", "benchmarks.pytest_rows", "--rows", str(rows), *options
    )
    found = read_rows(rows)
    for row in found:
        row.pop("at_s", None)
    return int(result.ret), found


def outcomes(rows: list[dict]) -> dict[str, str]:
    return {
        row["test"].partition("::")[2]: row["outcome"] for row in rows if row["event"] == "test"
    }


def test_rows_of_the_chosen_device_only(pytester: pytest.Pytester) -> None:
    code, rows = rows_of(pytester, TESTS, "--rows-device", "cpu")
    assert code == pytest.ExitCode.TESTS_FAILED
    assert rows[0]["event"] == "start"
    assert rows[1] == {
        "event": "collected",
        "tests": 6,
        "of_others": 7,
        "not_sampled": 0,
        "tf32": False,
    }
    assert outcomes(rows) == {
        "test_on_device[cpu]": "passed",
        "test_odd[cpu-1]": "passed",
        "test_odd[cpu-2]": "failed",
        "test_skipped[cpu]": "skipped",
        "test_dtype[cpu-torch.float32]": "passed",
        "test_dtype[cpu-torch.float16]": "passed",
    }
    failed = next(row for row in rows if row.get("outcome") == "failed")
    assert "even" in failed["message"]
    counts = {"passed": 4, "failed": 1, "skipped": 1}
    assert rows[-1] == {"event": "end", "exit": 1, "tf32": False, **counts}


def test_tf32_runs_the_float32_tests_with_the_switch_on(pytester: pytest.Pytester) -> None:
    code, rows = rows_of(pytester, TESTS, "--rows-device", "cpu", "--rows-tf32")
    assert code == pytest.ExitCode.TESTS_FAILED
    assert outcomes(rows) == {"test_dtype[cpu-torch.float32] with tf32": "failed"}
    assert "high" in next(row["message"] for row in rows if row.get("outcome") == "failed")
    assert torch.get_float32_matmul_precision() == "highest"


def test_what_was_done_or_lost_is_not_run_again(pytester: pytest.Pytester) -> None:
    folder = pytester.path / "deep"
    folder.mkdir()
    name = "test_what_was_done_or_lost_is_not_run_again.py"
    done = {"event": "test", "test": f"{name}::test_odd[cpu-2]", "outcome": "failed"}
    lost = {"item": f"{name}::test_on_device[cpu]", "reason": "did not come back in time"}
    start = {"event": "start", "begun": 0}
    lines = [json.dumps(row) for row in (start, done | {"tf32": False})]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "lost.jsonl").write_text(json.dumps(lost) + "\n")
    code, rows = rows_of(pytester, TESTS, "--rows-device", "cpu")
    assert code == pytest.ExitCode.TESTS_FAILED
    found = outcomes(rows)
    assert len(found) == 6
    assert found["test_odd[cpu-2]"] == "failed"
    assert found["test_on_device[cpu]"] == "lost"
    assert rows[-1]["passed"] == 3
    assert rows[-1]["lost"] == rows[-1]["failed"] == 1


def test_a_sample_of_the_tests(pytester: pytest.Pytester) -> None:
    _, rows = rows_of(pytester, TESTS, "--rows-device", "cpu", "--rows-every", "2")
    assert list(outcomes(rows)) == [
        "test_on_device[cpu]",
        "test_odd[cpu-2]",
        "test_dtype[cpu-torch.float32]",
    ]
    assert rows[1]["not_sampled"] == 3


def test_shares_cover_every_test_once(pytester: pytest.Pytester) -> None:
    found: list[str] = []
    for share in range(4):
        folder = pytester.path / str(share)
        folder.mkdir()
        options = ("--rows-share", f"{share}/4", "--rows-state", str(folder))
        _, rows = rows_of(pytester, TESTS, "--rows-device", "cpu", *options)
        found = list(outcomes(rows))
        assert rows[-1]["event"] == "end"
    assert len(found) == len(set(found)) == 6


def test_modules_whose_tests_need_no_device(pytester: pytest.Pytester) -> None:
    module = "test_modules_whose_tests_need_no_device"
    plain = "def test_plain():\n    pass"
    code, rows = rows_of(pytester, plain, "--rows-hardware-free", f"other,{module}")
    assert code == pytest.ExitCode.OK
    assert outcomes(rows) == {"test_plain": "passed"}


@pytest.mark.parametrize(
    "tests",
    ["def test_plain():\n    pass", TESTS.partition("def test_on")[0]],
    ids=["no device", "no test"],
)
def test_run_without_a_passed_test_fails(pytester: pytest.Pytester, tests: str) -> None:
    code, rows = rows_of(pytester, tests, "--rows-device", "cpu")
    assert code == pytest.ExitCode.NO_TESTS_COLLECTED
    assert rows[-1]["exit"] == code


def test_skips_alone_fail(pytester: pytest.Pytester) -> None:
    only_skips = TESTS.partition("    def test_on_device")[0] + (
        "    def test_skipped(device):\n        pytest.skip('no reason')\n"
    )
    code, rows = rows_of(pytester, only_skips, "--rows-device", "cuda")
    assert code == pytest.ExitCode.NO_TESTS_COLLECTED
    assert rows[-1] == {"event": "end", "exit": code, "tf32": False, "skipped": 1}


def test_broken_module_is_a_row(pytester: pytest.Pytester) -> None:
    code, rows = rows_of(pytester, "import nowhere_to_be_found", "--rows-device", "cpu")
    assert code != 0
    assert any(row.get("outcome") == "collection error" for row in rows)
