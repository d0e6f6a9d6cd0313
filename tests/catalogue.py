"""The results in the table of tests/README.md: how many cases of each named test passed, and where.

`python -m tests.catalogue build/tests/*.xml` reads what pytest wrote (`make test` and `make gates`
leave it there), keeps it in tests/results.json with the machine and the commit, in place of what it
had from reports of these names, and writes the column. Without files it writes the column from what
is kept.
"""

import argparse
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from datetime import datetime
from pathlib import Path

import torch

from benchmarks import results

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "tests/README.md"
KEPT = ROOT / "tests/results.json"
ROW = re.compile(r"^\| (\d+) \| (.*?) \| (.*) \| (.*?) \| (.*?) \|$", re.M)
OUTCOMES = ("passed", "failed", "skipped")


def named(where: str) -> list[str]:
    """path::test of every test that a row names."""
    return re.findall(r"`([\w/]+\.py::test_\w+)`", where)


def outcomes(report: ET.ElementTree) -> dict[str, Counter]:
    """path::test -> how many of its cases passed, failed, were skipped, in a report of pytest."""
    found: dict[str, Counter] = {}
    for case in report.iter("testcase"):
        path = case.get("classname", "").removeprefix("tests.").replace(".", "/")
        test = f"{path}.py::{case.get('name', '').partition('[')[0]}"
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "passed"
        outcome = "skipped" if "skipped" in kinds else outcome
        found.setdefault(test, Counter())[outcome] += 1
    return found


def add(kept: dict, report: Path, wanted: set[str], committed: datetime, here: dict) -> None:
    """Put what a report says of the wanted tests in place of what was kept of it.

    Args:
        kept: what tests/results.json holds.
        report: an XML report of pytest.
        wanted: path::test of what the table names.
        committed: when what is checked out was.
        here: `results.environment` of this machine.

    Raises:
        ValueError: The report is older than the commit that is checked out.
    """
    parsed = ET.parse(report)
    date = datetime.fromisoformat(parsed.find("testsuite").get("timestamp")).astimezone()
    if date < committed:
        raise ValueError(
            f"{report}: expected tests of the commit that is checked out, got a run of {date}, "
            f"before that of {committed}; run them again"
        )
    chosen = ("cpu_model", "cores", "gpu", "git_hash", "git_dirty")
    kept["reports"][report.stem] = {
        "date": date.isoformat(timespec="seconds"),
        **{name: here[name] for name in chosen},
        "versions": {name: here["versions"][name] for name in ("python", "torch")},
    }
    found = outcomes(parsed)
    for test in wanted:
        counts = kept["tests"].setdefault(test, {})
        counts.pop(report.stem, None)
        if test in found:
            counts[report.stem] = dict(sorted(found[test].items()))


def total_of(tests: list[str], kept: dict) -> Counter:
    """Cases of these tests in all reports, by outcome."""
    total: Counter = Counter()
    for test in tests:
        for counts in kept["tests"].get(test, {}).values():
            total.update(counts)
    return total


def cell(tests: list[str], kept: dict) -> str:
    """As `3 passed, 1 skipped`."""
    total = total_of(tests, kept)
    return ", ".join(f"{total[name]} {name}" for name in OUTCOMES if total[name]) or "not run"


def written(text: str, kept: dict) -> str:
    """The table with its last column, and the line that says where that is from."""
    text = ROW.sub(
        lambda row: f"| {' | '.join(row.groups()[:4])} | {cell(named(row[3]), kept)} |", text
    )
    places: dict[str, list[str]] = {}
    for name, report in sorted(kept["reports"].items()):
        device = report["gpu"]["name"] if report["gpu"] else "no GPU"
        changed = " with changes" if report["git_dirty"] else ""
        place = (
            f"{report['cpu_model']}, {report['cores']} cores, {device}, Python "
            f"{report['versions']['python']}, torch {report['versions']['torch']}, commit "
            f"{(report['git_hash'] or 'unknown')[:7]}{changed}"
        )
        places.setdefault(place, []).append(name)
    line = "; ".join(f"{', '.join(names)}: {place}" for place, names in places.items())
    return re.sub(r"^Results of .*$", f"Results of {line}.", text, flags=re.M)


def main(arguments: list[str] | None = None) -> int:
    """Returns 0, or 2 for a report that is none or too old."""
    parser = argparse.ArgumentParser(prog="python -m tests.catalogue")
    parser.add_argument("reports", nargs="*", type=Path, help="XML reports of pytest")
    reports = parser.parse_args(arguments).reports
    text = TABLE.read_text()
    wanted = {test for row in ROW.findall(text) for test in named(row[2])}
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {"reports": {}, "tests": {}}
    kept["tests"] = {test: counts for test, counts in kept["tests"].items() if test in wanted}
    try:
        if reports:
            committed, here = commit_date(), results.environment(torch.device("cpu"))
        for report in reports:
            add(kept, report, wanted, committed, here)
    except (OSError, ValueError, ET.ParseError) as error:
        print(f"tests.catalogue: {error}", file=sys.stderr)
        return 2
    if reports:
        KEPT.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
    TABLE.write_text(written(text, kept))
    return 0


def commit_date() -> datetime:
    command = ["git", "-C", str(ROOT), "log", "-1", "--format=%cI"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return datetime.fromisoformat(done.stdout.strip())


if __name__ == "__main__":
    sys.exit(main())
