"""The ratchet, the limits, and that compiling ahead of time specialises as a launch does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from tests.gates import compiling, table

ROOT = Path(__file__).resolve().parents[2]
ROW = {"shared": 1024, "registers": 100, "stack": 0, "spilled": 0, "warps": 8}
NAME = "kernel sm90 bf16 ROWS=64 w8 s3"


def test_a_table_that_did_not_grow_passes():
    smaller = {NAME: ROW | {"shared": 512, "registers": 90}}
    assert table.regressions({NAME: ROW}, {NAME: ROW}) == []
    assert table.regressions({NAME: ROW}, smaller) == []


@pytest.mark.parametrize("fact", table.RATCHETED)
def test_growth_is_found(fact):
    grown = {NAME: ROW | {fact: ROW[fact] + 8}}
    (found,) = table.regressions({NAME: ROW}, grown)
    assert found == f"{NAME}: {fact} grew from {ROW[fact]} to {ROW[fact] + 8}"


def test_rows_that_vanish_or_are_new_are_found():
    assert table.regressions({NAME: ROW}, {}) == [f"{NAME}: no longer compiled"]
    assert table.regressions({}, {NAME: ROW}) == [f"{NAME}: not in the table"]


def test_a_failed_compilation_is_a_fault_and_no_growth():
    failed = {NAME: {"error": "RuntimeError: no"}}
    assert compiling.faults(NAME, failed[NAME]) == ["RuntimeError: no"]
    assert table.regressions({NAME: ROW}, failed) == []


def test_rows_of_one_name_keep_the_most():
    other = ROW | {"shared": 2048, "registers": 90}
    assert table.merged([(NAME, dict(ROW)), (NAME, other)])[NAME] == ROW | {"shared": 2048}
    failed = {"error": "RuntimeError: no"}
    assert table.merged([(NAME, dict(ROW)), (NAME, failed)]) == {NAME: failed}


def test_a_table_is_read_as_written(tmp_path):
    rows = {NAME: ROW | {"wgmma": {"m64n64k16": 4}}, NAME.replace("90", "80"): ROW}
    file = tmp_path / "table.json"
    table.write(file, {"triton": "3.7.1", "variants": 2}, rows)
    assert table.read(file) == rows
    lines = file.read_text().splitlines()
    assert len(lines) == 2 + len(rows) + 1
    assert [line.split('"')[1] for line in lines[2:-1]] == sorted(rows)


@pytest.mark.parametrize(
    ("name", "changed", "fault"),
    [
        (NAME, {}, ""),
        (NAME, {"shared": 232449}, "shared memory 232449 B > 232448 B"),
        (NAME.replace("sm90", "sm89"), {"shared": 101377}, "shared memory 101377 B > 101376 B"),
        (NAME, {"spilled": 16}, "16 B of registers spilled"),
        (NAME, {"stack": 8}, ""),
        (NAME, {"registers": 256}, "256 registers > 255"),
        (NAME, {"registers": 169}, ""),
        (NAME, {"registers": 169, "warps": 12}, "169 registers > 168"),
        (NAME, {"specialised": True}, "no setmaxnreg"),
        (NAME, {"specialised": True, "setmaxnreg": [40, 232]}, ""),
        (NAME, {"hot": True, "mma": 8}, "8 mma.sync"),
        (NAME, {"hot": True}, "0 mma.sync"),
        (NAME, {"hot": True, "wgmma": {"m64n64k16": 4}, "mma": 8}, "8 mma.sync"),
        (NAME, {"hot": True, "wgmma": {"m64n64k16": 4}}, ""),
        (NAME, {"hot": True, "wgmma": {"m64n32k16": 4}}, ""),
        (NAME, {"hot": True, "wgmma": {"m64n32k16": 4}, "default": True}, "narrow"),
        (NAME.replace("bf16", "fp32"), {"hot": True, "mma": 8}, ""),
        (NAME.replace("sm90", "sm80"), {"hot": True, "mma": 8}, ""),
    ],
)
def test_faults(name, changed, fault):
    found = compiling.faults(name, ROW | changed)
    assert len(found) == bool(fault)
    assert fault in "".join(found)


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> dict:
    """What compiling a small kernel ahead of time finds."""
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.gates.toy"],
        cwd=ROOT,
        env=variables | {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_arguments_are_specialised_as_in_a_launch(toy):
    found = toy["specialised"]["first"]
    assert found["signature"] == {
        "x": "*bf16",
        "y": "*fp32",
        "box": "tensordesc<bf16[64, 32]>",
        "count": "i32",
        "stride": "i32",
        "one": "constexpr",
        "factor": "fp32",
        "SIZE": "constexpr",
        "OFF": "constexpr",
    }
    assert found["constants"] == {"one": 1, "SIZE": 64, "OFF": False}
    assert found["divisible"] == ["x", "count"]


def test_specialisations_differ_where_a_launch_compiles_again(toy):
    keys = {name: found["key"] for name, found in toy["specialised"].items()}
    assert keys["first"] == keys["other memory"] != keys["unaligned"]
    assert set(toy["names"].values()) == {"toy sm90 bf16 SIZE=64 one=one w4 s2"}


def test_a_compiled_kernel_is_read(toy):
    row, again = toy["rows"]
    assert row == again
    assert row["warps"] == 4
    assert row["registers"] > 8
    assert row["shared"] >= 64 * 32 * 2
    assert compiling.faults(toy["names"]["first"], row) == []


def test_what_does_not_compile_says_why(toy):
    assert "power of 2" in toy["wrong"]["error"]
