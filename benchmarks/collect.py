"""Makes the result file of a GPU out of what the stages of on_gpu.sh left behind.

`python -m benchmarks.collect DIR` reads DIR/{correct,sanitize,bench,train,ablate}.jsonl and writes
`benchmarks/results/<device>/<date>.json`. What is unfit to be committed (failed or missing tests, a
bench without an end, a changed checkout) is refused with the reasons; `--out FILE` writes it
elsewhere all the same, for a look.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .results import RESULTS, ResultFile, validate
from .stage import read_rows

STAGES = ("correct", "sanitize", "bench", "train", "ablate")
_OWN = ("event", "at_s", "section", "job")

Rows = list[dict[str, Any]]


def collect(folder: Path) -> tuple[dict[str, Any], Rows, list[str]]:
    """What a folder of stages amounts to.

    Returns:
        The fields of the result file other than its rows, the rows, and why it is unfit; an empty
        list if it is fit.

    Raises:
        ValueError: There is no measurement at all.
    """
    stages = {name: read_rows(folder / f"{name}.jsonl") for name in STAGES}
    bench = stages["bench"]
    if not any(row["event"] == "row" for row in bench):
        raise ValueError(
            f"collect: expected measurements in {folder / 'bench.jsonl'}, got none; "
            "run benchmarks/on_gpu.sh bench first"
        )
    start = bench[0]
    ceilings = next(row for row in bench if row["event"] == "ceilings")
    end = next((row for row in bench if row["event"] == "end"), None)
    measured = [row for row in bench if row["event"] == "row"]
    rows = _rows(measured)
    samples = [len(row["samples_ms"]) for row in rows if "samples_ms" in row]
    header = {
        "date": datetime.fromtimestamp(start["begun"], UTC).isoformat(timespec="seconds"),
        "command": start["command"],
        "environment": start["environment"],
        "tests": _tests(stages["correct"]),
        "settings": {
            "rounds": max(samples, default=0),
            "seed": 0,
            "gemm_tflops": ceilings["gemm_tflops"],
            "copy_gb_s": ceilings["copy_gb_s"],
        },
        "missing": None if end is None else end["missing"],
        "lost": None if end is None else end["lost"],
        "floors": [_plain(row) for row in bench if row["event"] == "floor"],
        "kernels": [_plain(row) for row in measured if row["section"] == "kernels"],
        "configurations": [_plain(row) for row in measured if row["section"] == "configurations"],
        "sanitizer": [_plain(row) for row in stages["sanitize"] if row["event"] == "tool"],
        "training": [
            {**_plain(row), "what": row["event"]}
            for row in stages["train"]
            if row["event"] in ("cost", "training")
        ],
        "ablation": [_plain(row) for row in stages["ablate"] if row["event"] == "plan"],
    }
    return header, rows, _unfit(stages, header, end)


def _rows(measured: Rows) -> Rows:
    """One row for each problem and provider: `auto` was measured again beside compiled peers."""
    found: dict[tuple, dict[str, Any]] = {}
    for row in measured:
        if row["section"] in ("attention", "region", "gate") and "provider" in row:
            key = tuple(row[name] for name in ("case", "kind", "dtype", "pass", "provider"))
            found.setdefault(key, _plain(row))
    return list(found.values())


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in _OWN}


def _tests(rows: Rows) -> dict[str, Any]:
    if not rows:
        return {"command": None, "outcome": "not run", "summary": ""}
    counts = Counter(row["outcome"] for row in rows if row["event"] == "test")
    finished = any(row["event"] == "finished" and row["code"] == 0 for row in rows)
    passed = finished and counts["passed"] > 0 and not set(counts) - {"passed", "skipped"}
    # Exact products, and TF32.
    passed = passed and {row["tf32"] for row in rows if row["event"] == "end"} == {False, True}
    passed = passed and not any(row.get("verdict") == "failed" for row in rows)
    return {
        "command": rows[0]["command"],
        "outcome": "passed" if passed else "failed",
        "summary": ", ".join(f"{count} {outcome}" for outcome, count in counts.items()),
    }


def _unfit(
    stages: dict[str, Rows], header: dict[str, Any], end: dict[str, Any] | None
) -> list[str]:
    reasons = []
    if header["environment"]["device"] != "cuda":
        reasons.append("it is a dry run: its times are those of an interpreter")
    if header["tests"]["outcome"] != "passed":
        said = header["tests"]["summary"] or "no correct.jsonl"
        reasons.append(f"the tests {header['tests']['outcome']}: {said}")
    if end is None:
        reasons.append("bench did not come to its end")
    found = [row for row in header["sanitizer"] if row["status"] in ("findings", "failed")]
    reasons += [f"sanitizer {row['tool']}: {row['status']}" for row in found]
    starts = [rows[0]["environment"] for rows in stages.values() if rows]
    for field in ("git_hash", "versions", "slug"):
        values = {str(environment[field]) for environment in starts}
        if len(values) > 1:
            reasons.append(f"the stages differ in {field}: {', '.join(sorted(values))}")
    if any(environment["git_dirty"] for environment in starts):
        reasons.append("the checkout had changes")
    if any(environment["git_hash"] is None for environment in starts):
        reasons.append("the commit is unknown; give on_gpu.sh --commit")
    return reasons


def main(arguments: list[str] | None = None) -> int:
    """Returns 0, or 1 if the results are unfit to be committed, or 2 if there are none."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.collect")
    parser.add_argument("folder", type=Path, help="where the stages wrote")
    parser.add_argument("--out", type=Path, default=None, help="write here, fit or not")
    options = parser.parse_args(arguments)
    try:
        header, rows, unfit = collect(options.folder)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for reason in unfit:
        print(f"collect: unfit to be committed: {reason}", file=sys.stderr)
    if unfit and options.out is None:
        return 1
    path = options.out or RESULTS / header["environment"]["slug"] / f"{header['date'][:10]}.json"
    file = ResultFile(path, header)
    file.add(rows)
    if header["missing"] is not None:
        file.close()
    validate(file.report)
    print(f"collect: {len(rows)} rows in {path}")
    return int(bool(unfit))


if __name__ == "__main__":
    raise SystemExit(main())
