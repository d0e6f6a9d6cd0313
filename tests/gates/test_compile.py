"""Every shipped configuration compiles for every architecture, and fits it.

The kernels are compiled in processes of their own, because the interpreter runs in this one.
`python -m tests.gates.table` rewrites the committed tables.
"""

import fcntl
import importlib
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from tests.gates import compiling, table, variants

ROOT = Path(__file__).resolve().parents[2]
VERSION = metadata.version("triton")
# In all, over both versions of Triton: some 200 for each of ten families, a second each.
MOST_VARIANTS = 2000
COMMITTED = sorted(Path(__file__).parent.glob("table-*.json"))


@pytest.fixture(scope="session")
def measured(tmp_path_factory) -> dict:
    """The table as this checkout gives it, measured once for all processes of a run."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    file = shared / "table.json"
    with open(shared / "table.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.exists():
            measure(file)
    return json.loads(file.read_text())


def measure(file: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.gates.table", "--measure", str(file)],
        cwd=ROOT,
        env={name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def every_fault(rows: table.Rows, *words: str) -> list[str]:
    """Faults of the rows whose names hold all words."""
    return [
        f"{name}: {fault}"
        for name, row in rows.items()
        if set(words) <= set(name.split())
        for fault in compiling.faults(name, row)
    ]


def report(lines: list[str]) -> str:
    return f"{len(lines)} of them\n" + "\n".join(lines[:40])


@pytest.mark.gate
@pytest.mark.parametrize("architecture", variants.ARCHITECTURES)
def test_compiled_kernels_fit(architecture, measured):
    faults = every_fault(measured["rows"], f"sm{architecture}")
    assert faults == [], report(faults)


@pytest.mark.gate
def test_nothing_grew(measured):
    file = table.path(VERSION)
    if not file.exists():
        pytest.skip(f"no table is committed for triton {VERSION}")
    found = table.regressions(table.read(file), measured["rows"])
    assert found == [], f"{report(found)}\nif it is meant: {table.command(VERSION)}"


@pytest.mark.gate
def test_every_launched_kernel_is_compiled(measured):
    compiled = {(name.split()[0], name.split()[1]) for name in measured["rows"]}
    wanted = {(k, f"sm{a}") for k in variants.launched() for a in variants.ARCHITECTURES}
    assert wanted <= compiled, wanted - compiled


def test_every_module_with_kernels_is_covered():
    assert variants.modules_with_kernels() == sorted(f.module for f in variants.FAMILIES)


def test_two_tables_are_committed():
    assert [file.name for file in COMMITTED] == ["table-3.6.0.json", "table-3.7.1.json"]


def test_number_of_variants():
    counts = [json.loads(file.read_text())["versions"]["variants"] for file in COMMITTED]
    assert sum(counts) <= MOST_VARIANTS


@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: file.stem)
def test_committed_tables_hold_no_fault(file):
    faults = every_fault(table.read(file))
    assert faults == [], report(faults)


def test_few_configurations():
    """At most six for each kernel, problem and architecture, all different."""
    for family in variants.FAMILIES:
        module = importlib.import_module(f"nlkernels.ops.{family.module}")
        for name, candidates in module.KERNELS.items():
            for architecture in variants.ARCHITECTURES:
                for case in family.first:
                    found = candidates(family.describe(case), architecture)
                    assert 1 <= len(found) <= 6, (name, architecture, case)
                    assert len(set(found)) == len(found), (name, architecture, case)
