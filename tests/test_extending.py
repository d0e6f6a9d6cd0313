"""docs/extending.md is followed, step by step, in a copy of the checkout."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "extending.md").read_text()
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", TEXT, re.M | re.S))
FOLDERS = ("nlkernels", "models", "training", "csrc")


@pytest.mark.gate
@pytest.mark.parametrize("title", ["Add a kind", "Add a backend", "Add a model"])
def test_five_steps(title, tmp_path):
    section = SECTIONS[title]
    assert re.findall(r"^\*\*(\d)\. ", section, re.M) == list("12345")
    for folder in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    programs = []
    for language, how, code in re.findall(r"^```(\w+) (\S+)\n(.*?)^```", section, re.M | re.S):
        path = tmp_path / how.removeprefix("file=")
        if how == "run":
            programs.append(code)
        elif language == "diff":
            _replace(path, code)
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(code)
    assert len(programs) == 1
    done = subprocess.run(
        [sys.executable, "-c", programs[0]],
        cwd=tmp_path,
        env={**os.environ, "NLKERNELS_JIT": "0"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    for style in (["check"], ["format", "--check"]):
        linted = subprocess.run(
            [sys.executable, "-m", "ruff", *style, "."],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert linted.returncode == 0, linted.stdout


def _replace(path: Path, diff: str) -> None:
    """Replaces the lines that begin with "-" by those that begin with "+"."""
    old, new = (
        "\n".join(line[1:] for line in diff.splitlines() if line.startswith(sign)) for sign in "-+"
    )
    text = path.read_text()
    assert text.count(old) == 1, f"{path}: {old!r} stands there {text.count(old)} times"
    path.write_text(text.replace(old, new))
