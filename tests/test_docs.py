"""What the documents say holds: examples run, links lead somewhere, tables come from files."""

import doctest
import importlib
import re
import runpy
import shlex
from pathlib import Path

import pytest

import nlkernels
from benchmarks import docs_tables
from nlkernels import _commands
from nlkernels.models import registry

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "*/*.md", "*/*/README.md")
    for path in ROOT.glob(pattern)
    if not path.relative_to(ROOT).as_posix().startswith((".", "build/", "runs/"))
)
DOCS = ROOT / "docs"
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


def _examples(path: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", path.read_text(), re.M | re.S)


# All of them: a document that must have examples fails below when it has none.
WITH_EXAMPLES = [
    README,
    *(path for path in sorted(DOCS.glob("*.md")) if _examples(path)),
]


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda path: path.name)
def test_examples_in_documents_run(path, monkeypatch):
    # What an example registers is gone afterwards.
    monkeypatch.setattr(registry, "_MODELS", dict(registry._MODELS))
    examples = _examples(path)
    assert examples
    # One after the other in one namespace, as a reader would type them.
    namespace: dict[str, object] = {"__name__": path.stem}
    for number, example in enumerate(examples):
        exec(compile(example, f"{path.name} example {number}", "exec"), namespace)


@pytest.mark.parametrize("name", ["kinds", "kernels", "checkpoints", "troubleshooting"])
def test_documents_about_code_have_examples(name):
    assert DOCS / f"{name}.md" in WITH_EXAMPLES


def test_tables_are_those_of_the_committed_files(capsys):
    assert docs_tables.main(["--check"]) == 0, capsys.readouterr().err


def test_every_published_run_has_a_row():
    text = docs_tables.runs()
    ours = ("demo", "demo_videos", "evidence", "smoke")
    for path in (ROOT / "training" / "configs").glob("*.yaml"):
        assert (f"| `{path.stem}` |" in text) == (path.stem not in ours)


def test_a_table_that_was_changed_is_noticed_and_made_again(tmp_path, capsys):
    for name in docs_tables.DOCUMENTS:
        (tmp_path / name).write_text((DOCS / name).read_text().replace(" | ", " | 9", 40))
    folder = ["--folder", str(tmp_path)]
    assert docs_tables.main(["--check", *folder]) == 1
    assert "kinds.md, patching.md, reproduce.md differs" in capsys.readouterr().err
    assert docs_tables.main(folder) == 0
    assert docs_tables.main(["--check", *folder]) == 0


def test_every_promise_has_tests_that_exist():
    rows = re.findall(r"^\| (\d+) \| (.*?) \| (.*) \|$", (DOCS / "promises.md").read_text(), re.M)
    assert [int(number) for number, _, _ in rows] == list(range(1, 11))
    for number, _, tests in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", tests)
        assert named, f"promise {number} names no test"
        for path, name in named:
            assert re.search(rf"^def {name}\(", (ROOT / path).read_text(), re.M), (path, name)


def test_pictures_are_those_that_the_script_draws():
    script = (DOCS / "pictures.py").read_text()
    drawn = set(re.findall(r'^    "(\w+)": \w+,$', script, re.M))
    shown = set(re.findall(r"\(pictures/(\w+)\.png\)", (DOCS / "kernels.md").read_text()))
    assert drawn == shown == {path.stem for path in (DOCS / "pictures").glob("*.png")}
    for path in (DOCS / "pictures").glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.gate
def test_pictures_can_be_drawn(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="needs pip install 'nlkernels[train]'")
    namespace = runpy.run_path(str(DOCS / "pictures.py"), run_name="pictures")
    namespace["main"].__globals__["FOLDER"] = tmp_path
    namespace["main"]()
    assert len(list(tmp_path.glob("*.png"))) == len(namespace["PICTURES"])


@pytest.mark.parametrize("path", sorted(DOCS.glob("*.md")), ids=lambda path: path.name)
def test_the_index_leads_to_every_document(path):
    if path.name != "README.md":
        assert f"]({path.name})" in (DOCS / "README.md").read_text()


@pytest.mark.parametrize("path", sorted(DOCS.glob("*.md")), ids=lambda path: path.name)
def test_commands_in_documents_are_understood(path):
    """Every line that begins with nlk names a command and options that exist."""
    lines = re.findall(r"^nlk (.*)$", path.read_text(), re.M)
    for line in lines:
        words = shlex.split(line.partition("  #")[0].rstrip("\\"))
        known = _commands.parser().parse_known_args(words)[1]
        assert [word for word in known if word.startswith("-")] == [], line


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
