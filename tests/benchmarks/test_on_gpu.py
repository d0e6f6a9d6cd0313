"""The GPU script refuses loudly, and its rows survive whatever happens to the run."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "benchmarks" / "on_gpu.sh")

pytest_plugins = ["pytester"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", SCRIPT, *arguments], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["paint"],
        ["correct", "--device", "abacus"],
        ["correct", "--out"],
        ["correct", "-x", "1"],
    ],
    ids=["no stage", "unknown stage", "device", "value", "option"],
)
def test_wrong_use_prints_the_stages(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert "stages: correct" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_gpu_is_a_failure(tmp_path: Path) -> None:
    done = run("correct", "--out", str(tmp_path / "out"))
    assert done.returncode == 3
    assert "FAILED: torch sees no GPU" in done.stderr
    assert not (tmp_path / "out").exists()


TESTS = """
    import pytest

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
"""


def rows_of(pytester: pytest.Pytester, tests: str, *options: str) -> tuple[int, list[dict]]:
    pytester.makepyfile(tests)
    rows = pytester.path / "deep" / "rows.jsonl"
    result = pytester.runpytest_inprocess(
        "-p", "benchmarks.pytest_rows", "--rows", str(rows), *options
    )
    return int(result.ret), [json.loads(line) for line in rows.read_text().splitlines()]


def test_rows_of_the_chosen_device_only(pytester: pytest.Pytester) -> None:
    code, rows = rows_of(pytester, TESTS, "--rows-device", "cpu")
    assert code == pytest.ExitCode.TESTS_FAILED
    assert rows[0]["event"] == "start"
    assert rows[0]["torch"] == torch.__version__
    assert rows[1] == {"event": "collected", "tests": 4, "of_other_devices": 5}
    tests = {row["test"].partition("::")[2]: row["outcome"] for row in rows[2:-1]}
    assert tests == {
        "test_on_device[cpu]": "passed",
        "test_odd[cpu-1]": "passed",
        "test_odd[cpu-2]": "failed",
        "test_skipped[cpu]": "skipped",
    }
    failed = next(row for row in rows if row.get("outcome") == "failed")
    assert "even" in failed["message"]
    assert rows[-1] == {"event": "end", "exit": 1, "passed": 2, "failed": 1, "skipped": 1}


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
    only_skips = (
        TESTS.partition("    def test_on_device")[0] + TESTS[TESTS.index("    def test_sk") :]
    )
    code, rows = rows_of(pytester, only_skips, "--rows-device", "cuda")
    assert code == pytest.ExitCode.NO_TESTS_COLLECTED
    assert rows[-1] == {"event": "end", "exit": code, "skipped": 1}


def test_broken_module_is_a_row(pytester: pytest.Pytester) -> None:
    code, rows = rows_of(pytester, "import nowhere_to_be_found", "--rows-device", "cpu")
    assert code != 0
    assert any(row.get("outcome") == "collection error" for row in rows)
