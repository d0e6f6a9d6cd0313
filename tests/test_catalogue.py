"""The table in tests/README.md names tests that exist; what the main README places is there."""

import ast
import json
import re
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

from benchmarks import results
from tests import catalogue

ROOT = Path(__file__).resolve().parents[1]
TABLE = catalogue.TABLE.read_text()
ROWS = [row[:4] for row in catalogue.ROW.findall(TABLE)]
HERE = results.environment(torch.device("cpu"))


def named(where: str) -> list[list[str]]:
    """[file, test] of every test that a row names."""
    return [test.split("::") for test in catalogue.named(where)]


def is_gate(path: str, name: str) -> bool:
    """Whether a test, or some of its cases, are only run by ``make gates``."""
    tree = ast.parse((ROOT / "tests" / path).read_text())
    tests = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    marks = [ast.unparse(decorator) for decorator in tests[name].decorator_list]
    marks += [
        ast.unparse(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"
    ]
    return any("pytest.mark.gate" in mark for mark in marks)


def test_every_number_has_a_row_and_every_test_exists():
    assert [int(number) for number, *_ in ROWS] == list(range(1, 43))
    for number, _, where, _ in ROWS:
        assert named(where), f"{number} names no test"
        for path, name in named(where):
            source = (ROOT / "tests" / path).read_text()
            assert re.search(rf"^def {name}\(", source, re.M), f"{number}: {path} has no {name}"


def test_gates_are_said_to_be_gates():
    for number, _, where, tier in ROWS:
        for path, name in named(where):
            said = "gate" in tier or path.startswith("foreign/")
            assert said or not is_gate(path, name), f"{number}: {path}::{name} is a gate"


def test_results_are_those_that_are_kept():
    kept = json.loads(catalogue.KEPT.read_text())
    assert catalogue.written(TABLE, kept) == TABLE
    for test in {test for row in ROWS for test in catalogue.named(row[2])}:
        counts = catalogue.total_of([test], kept)
        assert counts["passed"] > 0, f"{test}: no case passed; {dict(counts)}"
        assert counts["failed"] == 0, f"{test}: {dict(counts)}"


@pytest.fixture
def report(tmp_path):
    """Three cases of a test and one of another."""
    cases = (
        '<testcase classname="tests.ops.test_a" name="test_b[1]"/>'
        '<testcase classname="tests.ops.test_a" name="test_b[2]"><skipped/></testcase>'
        '<testcase classname="tests.ops.test_a" name="test_b[3]"><failure/></testcase>'
        '<testcase classname="tests.ops.test_a" name="test_bc"><error/></testcase>'
    )
    file = tmp_path / "gates.xml"
    suite = f'<testsuite timestamp="2026-01-02T03:04:05+00:00">{cases}</testsuite>'
    file.write_text(f"<testsuites>{suite}</testsuites>")
    return file


def test_every_case_is_counted_once(report):
    kept = {"reports": {}, "tests": {"ops/test_a.py::test_b": {"test": {"passed": 4}}}}
    committed = datetime(2026, 1, 1, tzinfo=UTC)
    for _ in range(2):  # a report replaces what was kept of it
        catalogue.add(kept, report, {"ops/test_a.py::test_b"}, committed, HERE)
    text = "Results of none.\n| 1 | sums | `ops/test_a.py::test_b` | test | - |\n"
    line, row = catalogue.written(text, kept).splitlines()
    assert row.endswith("| test | 5 passed, 1 failed, 1 skipped |")
    assert line.startswith("Results of gates: ")
    unknown = "| 2 | x | `ops/test_c.py::test_d` | test | 1 passed |\n"
    assert catalogue.written(unknown, kept) == unknown.replace("1 passed", "not run")


def test_reports_older_than_the_commit_are_refused(report):
    with pytest.raises(ValueError, match="run them again"):
        catalogue.add({}, report, set(), datetime(2026, 1, 3, tzinfo=UTC), HERE)


def test_what_the_readme_places_is_there():
    """Under "What is where": what it names exists, and no folder of the checkout is left out."""
    readme = (ROOT / "README.md").read_text()
    block = re.search(r"^## What is where\n+```\n(.*?)^```", readme, re.M | re.S)[1]
    names = set(re.findall(r"(?<![\w/])(\w+/|\w+\.py)(?![\w/])", block))
    for name in names:
        assert (ROOT / name).exists() or (ROOT / "nlkernels" / name).exists(), name
    folders = {f"{path.name}/" for path in ROOT.iterdir() if path.is_dir()}
    made = {"build/", "dist/", "runs/", "nlkernels.egg-info/", "__pycache__/"}
    assert {name for name in folders - made if not name.startswith(".")} <= names
