"""The stage `correct`: which tests it runs, how it reads `nlk verify` and its processes' ends."""

import json

import pytest

from benchmarks import correct, results
from benchmarks.sanitize import Ended
from benchmarks.stage import DEADLINE

CHECK = {"op": "softmax", "verdict": "failed", "detail": "out max error"}


def test_the_kernels_own_tests_come_first() -> None:
    files = correct.files()
    assert len(files) == len(set(files))
    assert all((results.ROOT / file).is_file() for file in files)
    kernels = [file for file in files if "triton" in file or "cuda" in file]
    assert kernels and files[: len(kernels)] == kernels
    assert {"tests/ops/test_attention.py", "tests/modules/test_block.py"} <= set(files)
    stems = {file.rpartition("/")[2].removesuffix(".py") for file in files}
    assert set(correct.HARDWARE_FREE) <= stems


def test_report_among_warnings() -> None:
    report = json.dumps({"device": "x", "checks": [CHECK]}, indent=1)
    output = f"nlk: warning: a kernel was {{switched}} off\n{report}\nnlk: that was all\n"
    assert correct.verdicts("softmax", Ended(1, output, 1.0)) == [CHECK]


@pytest.mark.parametrize(
    ("end", "verdict", "word"),
    [
        (Ended(None, "", 460.0), "not finished", "460 s"),
        (Ended(-6, "Fatal Python error: Aborted", 1.0), "failed", "Aborted"),
        (Ended(1, "{\n broken \n}", 1.0), "failed", "broken"),
    ],
    ids=["late", "crash", "no JSON"],
)
def test_no_report(end: Ended, verdict: str, word: str) -> None:
    (check,) = correct.verdicts("region float16", end)
    assert (check["op"], check["verdict"]) == ("region float16", verdict)
    assert word in check["detail"]


@pytest.mark.parametrize(
    ("codes", "expected"),
    [([0, 5, 0], 0), ([5, 5], 5), ([0, 1], 1), ([1, DEADLINE, 0], DEADLINE), ([0, -11, 5], -11)],
)
def test_worst_exit_code(codes: list[int], expected: int) -> None:
    assert correct.worst(codes) == expected


def test_every_kernel_is_verified_in_every_dtype() -> None:
    commands = correct.verify_commands("cuda")
    assert len(commands) == 27 + 18
    for backend in ("triton", "cuda"):
        kernels = results.ROOT.glob(f"nlkernels/ops/*/{backend}.py")
        asked = {name.split()[0] for name in commands if name.endswith(backend)}
        assert asked == {path.parent.name for path in kernels}
    for name, command in commands.items():
        op, dtype, backend = name.split()
        assert command[-6:] == ["--backend", backend, "--op", op, "--dtype", dtype]
