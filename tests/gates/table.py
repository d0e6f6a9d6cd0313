"""The table of compiled kernels: `python -m tests.gates.table` compiles them all and rewrites it.

One file per version of Triton, one line per row: what every shipped configuration takes on every
architecture. `--measure FILE` writes what this checkout gives to another file and changes nothing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib import metadata
from pathlib import Path
from typing import Any

Rows = dict[str, dict[str, Any]]
# What may only shrink from one version of the table to the next; 0 is not written.
RATCHETED = ("shared", "registers", "stack", "spilled")
WORKERS = 2
_launches: list = []


def path(version: str) -> Path:
    """Where the rows of one version of Triton are committed."""
    return Path(__file__).with_name(f"table-{version}.json")


def command(version: str) -> str:
    """What a reader types to rewrite the table of this environment."""
    return f"python -m tests.gates.table    (with triton {version})"


def read(file: Path) -> Rows:
    return json.loads(file.read_text())["rows"]


def write(file: Path, versions: dict[str, Any], rows: Rows) -> None:
    lines = [
        f"{json.dumps(name)}: {json.dumps(row, sort_keys=True)}"
        for name, row in sorted(rows.items())
    ]
    head = json.dumps(versions)
    body = ",\n".join(lines)
    file.write_text(f'{{"versions": {head},\n"rows": {{\n{body}\n}}}}\n')


def merged(rows: list[tuple[str, dict[str, Any]]]) -> Rows:
    """One row per name; where launches share a name, the most of every number."""
    table: Rows = {}
    for name, row in rows:
        known = table.setdefault(name, row)
        if "error" in row or "error" in known:
            table[name] = row if "error" in row else known
            continue
        for fact in RATCHETED:
            if row.get(fact, 0) > known.get(fact, 0):
                known[fact] = row[fact]
        if not row.get("default"):
            known.pop("default", None)
    return table


def regressions(committed: Rows, measured: Rows) -> list[str]:
    """What grew, vanished or is new; an empty list when the tables agree or numbers fell."""
    found = [f"{name}: no longer compiled" for name in committed.keys() - measured.keys()]
    found += [f"{name}: not in the table" for name in measured.keys() - committed.keys()]
    for name in committed.keys() & measured.keys():
        for fact in RATCHETED:
            before, now = committed[name].get(fact, 0), measured[name].get(fact, 0)
            if now > before:
                found.append(f"{name}: {fact} grew from {before} to {now}")
    return sorted(found)


def _start(cache: str) -> None:
    """Of a worker: every worker finds the same launches in the same order."""
    os.environ["TRITON_CACHE_DIR"] = cache
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 2)  # what the compiler prints when it fails runs to pages
    from tests.gates import variants

    _launches[:] = variants.launches()


def _measure(index: int) -> tuple[str, dict[str, Any]]:
    from tests.gates import compiling

    return compiling.row_name(_launches[index]), compiling.measure(_launches[index])


def measure(workers: int = WORKERS) -> tuple[Rows, int]:
    """Compile every shipped configuration, in processes of their own; rows, and compilations."""
    from tests.gates import compiling, variants

    names = [compiling.row_name(launch) for launch in variants.launches()]
    rows: list[tuple[str, dict[str, Any]]] = []
    spawn = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as cache,
        ProcessPoolExecutor(workers, spawn, _start, (cache,)) as pool,
    ):
        jobs = [pool.submit(_measure, index) for index in range(len(names))]
        for name, job in zip(names, jobs, strict=True):
            try:
                rows.append(job.result())
            except BrokenProcessPool as error:
                raise RuntimeError(f"the compiler ended its process at or near {name}") from error
    return merged(rows), len(names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", type=Path, metavar="FILE", help="write the rows there instead")
    asked = parser.parse_args()
    if os.environ.pop("TRITON_INTERPRET", "0") not in ("", "0"):
        print("TRITON_INTERPRET is ignored: kernels are compiled", file=sys.stderr)
    version = metadata.version("triton")
    file = asked.measure or path(version)
    rows, count = measure()
    write(file, {"triton": version, "variants": count}, rows)
    print(f"{count} variants in {len(rows)} rows of {file}")


if __name__ == "__main__":
    main()
