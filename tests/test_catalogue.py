"""The table in tests/README.md names tests that exist; what the main README places is there."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = (ROOT / "tests/README.md").read_text()
ROWS = re.findall(r"^\| (\d+) \| (.*?) \| (.*) \| (.*) \|$", TABLE, re.M)


def named(where: str) -> list[tuple[str, str]]:
    """(file, test) of every test that a row names."""
    return re.findall(r"`([\w/]+\.py)::(test_\w+)`", where)


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
        assert named(where) or where == "open", f"{number} names no test"
        for path, name in named(where):
            source = (ROOT / "tests" / path).read_text()
            assert re.search(rf"^def {name}\(", source, re.M), f"{number}: {path} has no {name}"


def test_gates_are_said_to_be_gates():
    for number, _, where, tier in ROWS:
        for path, name in named(where):
            said = "gate" in tier or path.startswith("foreign/")
            assert said or not is_gate(path, name), f"{number}: {path}::{name} is a gate"


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
