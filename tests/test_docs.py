"""What the documents say holds: examples run, links lead somewhere, limits are kept."""

import doctest
import importlib
import re
from pathlib import Path

import pytest

import nlkernels

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "*/README.md", "*/*/README.md")
    for path in ROOT.glob(pattern)
    if not path.relative_to(ROOT).as_posix().startswith((".", "build/", "runs/"))
)
PACKAGES = {
    "nlkernels": "nlkernels",
    "models": "nlkernels.models",
    "training": "nlkernels.training",
}


def _modules_with_examples() -> list[str]:
    found = []
    for folder, package in PACKAGES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            if ">>> " in path.read_text():
                inside = path.relative_to(ROOT / folder).with_suffix("").parts
                found.append(".".join([package, *inside]).removesuffix(".__init__"))
    return found


@pytest.mark.parametrize("name", _modules_with_examples())
def test_examples_in_docstrings(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0


def test_examples_in_readme_run():
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.M | re.S)
    assert blocks
    # One after the other in one namespace, as a reader would type them.
    namespace: dict[str, object] = {"__name__": "readme"}
    for number, block in enumerate(blocks):
        exec(compile(block, f"README.md block {number}", "exec"), namespace)


def test_readme_is_short_and_starts_with_code():
    lines = README.read_text().splitlines()
    assert len(lines) <= 150
    assert any(line.startswith("```") for line in lines[:15])


def test_contributing_is_short():
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 120


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_to_files(path):
    targets = re.findall(r"\]\(([^)#\s]+)", path.read_text())
    local = [t for t in targets if not t.startswith(("http://", "https://", "mailto:"))]
    assert [target for target in local if not (path.parent / target).exists()] == []


def test_every_release_opens_with_wrong_results():
    text = (ROOT / "CHANGELOG.md").read_text()
    releases = re.split(r"^## ", text, flags=re.M)[1:]
    assert any(nlkernels.__version__ in release.splitlines()[0] for release in releases)
    for release in releases:
        assert re.findall(r"^### (.*)$", release, re.M)[0] == "Wrong results fixed", release
