"""Result files: what the machine was, what was run, and one row per measurement.

A file is rewritten atomically after every row, so an interrupted run leaves a valid file with
`"complete": false`. `benchmarks/README.md` explains each field.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

import nlkernels
from nlkernels import _paths

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SCHEMA = "nlkernels.bench_ops/1"
MODELS_SCHEMA = "nlkernels.bench_models/1"
BLOCKS_SCHEMA = "nlkernels.bench_blocks/1"

STATUSES = ("ok", "reckoned", "unserved", "refused", "failed")
"""ok: judged right and timed. reckoned: memory only, nothing ran. unserved: not offered.
refused: result is wrong. failed: raised."""

_INSTRUCTION_SETS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "asimd")

_TOP = {
    "schema": str,
    "complete": bool,
    "date": str,
    "command": str,
    "environment": dict,
    "tests": dict,
    "settings": dict,
    "rows": list,
}
_ENVIRONMENT = (
    "device",
    "slug",
    "cpu_model",
    "cores",
    "threads",
    "instruction_set",
    "gpu",
    "versions",
    "git_hash",
    "git_dirty",
)
_ROW = (
    "case",
    "kind",
    "dtype",
    "pass",
    "shape",
    "provider",
    "backend",
    "status",
    "reason",
)
# What a row holds beside `_ROW` when it was measured, by schema.
_MEASURED = {
    SCHEMA: (
        "time_ms",
        "samples_ms",
        "foreign_cores",
        "speedup_over",
        "nominal_tflops",
        "share_of_gemm",
        "peak_mib",
        "output_mib",
        "device_peak_mib",
        "error",
    ),
    MODELS_SCHEMA: (
        "time_ms",
        "samples_ms",
        "foreign_cores",
        "over_none",
        "speedup_over",
        "peak_mib",
        "device_peak_mib",
        "executed_gflop",
        "error",
    ),
    BLOCKS_SCHEMA: (
        "time_ms",
        "samples_ms",
        "foreign_cores",
        "speedup_over",
        "peak_mib",
        "kept_mib",
        "device_peak_mib",
        "error",
    ),
}


def environment(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """Describes this machine and software.

    Args:
        device: Where the measurements run.
        commit: Commit to record where there is no git repository to ask.
    """
    cpu = _cpu_info()
    flags = cpu.get("flags", cpu.get("Features", "")).split()
    instruction_set = next((name for name in _INSTRUCTION_SETS if name in flags), "generic")
    cores = len(os.sched_getaffinity(0))
    gpu = _gpu_info(device)
    changes = _git("status", "--porcelain", "--", "nlkernels", "csrc", "benchmarks/*.py")
    name = gpu["name"] if gpu else f"cpu {_cpu_label(cpu)} {instruction_set} {cores}c"
    return {
        "device": device.type,
        "slug": re.sub(r"[^a-z0-9_]+", "-", name.lower()).strip("-"),
        "cpu_model": cpu.get("model name", platform.processor()),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "instruction_set": instruction_set,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": gpu,
        "versions": versions(),
        "git_hash": commit if commit is not None else _git("rev-parse", "HEAD"),
        "git_dirty": None if changes is None else bool(changes),
    }


def versions() -> dict[str, str | None]:
    """Versions of everything that can change a number; None where it is absent."""
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": None,
        "numpy": np.__version__,
        "nlkernels": nlkernels.__version__,
    }
    if importlib.util.find_spec("triton") is not None:
        import triton

        found["triton"] = triton.__version__
    return found


def _cpu_info() -> dict[str, str]:
    info: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        info.setdefault(key.strip(), value.strip())
    return info


def _cpu_label(cpu: Mapping[str, str]) -> str:
    """Maker and model: CPUs with the same instructions execute them at different widths."""
    vendor = cpu.get("vendor_id", "")
    maker = {"AuthenticAMD": "amd", "GenuineIntel": "intel"}.get(vendor, vendor)
    numbers = [cpu[key] for key in ("cpu family", "model") if key in cpu]
    if not numbers:
        maker, keys = "arm", ("CPU implementer", "CPU part")
        numbers = [cpu[key].removeprefix("0x") for key in keys if key in cpu]
    return "-".join([maker, *numbers]) if numbers else platform.machine()


def _gpu_info(device: torch.device) -> dict[str, Any] | None:
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit"
    command = [
        "nvidia-smi",
        f"--id={device.index or 0}",
        f"--query-gpu={query}",
        "--format=csv,noheader",
    ]
    said = _output(command)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_mib": properties.total_memory >> 20,
        "multiprocessors": properties.multi_processor_count,
        "nvidia_smi": dict(zip(query.split(","), said.split(", "), strict=False)) if said else None,
    }


def _git(*arguments: str) -> str | None:
    # An installation may lie within somebody else's repository.
    root = _paths.checkout_root()
    return None if root is None else _output(["git", "-C", str(root), *arguments])


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def command_line(module: str, arguments: list[str]) -> str:
    """The command that a result file tells; of a path outside the repository, its last name.

    Example:
        >>> command_line("benchmarks.bench_ops", ["--cases", "quick", "--out", "/home/me/a.json"])
        'python -m benchmarks.bench_ops --cases quick --out a.json'
    """
    said = [Path(word).name if Path(word).is_absolute() else word for word in arguments]
    return shlex.join(["python", "-m", module, *said])


def run_tests(paths: list[str]) -> dict[str, Any]:
    """Runs the tests of the measured code; a speed of wrong code is worth nothing.

    Returns:
        {"command", "outcome": "passed" | "failed" | "not run", "summary": pytest's closing line}.
    """
    if not paths:
        return {"command": None, "outcome": "not run", "summary": ""}
    options = ["-q", "-x", "-p", "no:cacheprovider", "-m", "not gate"]
    arguments = ["-m", "pytest", *options, *paths]
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    return {
        "command": shlex.join(["python", *arguments]),
        "outcome": "passed" if done.returncode == 0 else "failed",
        "summary": lines[-1].strip("= ") if lines else done.stderr.strip()[-400:],
    }


class ResultFile:
    """A result file under construction; every `add` leaves it complete and readable on disk.

    Args:
        path: File to write; its folder is created.
        header: Top-level fields other than schema, complete, date and rows.
        schema: What the rows hold, a key of `_MEASURED`.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], schema: str = SCHEMA) -> None:
        self.path = path
        self.report: dict[str, Any] = {
            "schema": schema,
            "complete": False,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            **header,
            "rows": [],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        self._write()

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Appends rows and flushes."""
        self.report["rows"] += rows
        self._write()

    def close(self) -> None:
        """Marks the run as complete."""
        self.report["complete"] = True
        validate(self.report)
        self._write()

    def _write(self) -> None:
        text = json.dumps(rounded(self.report), indent=1, allow_nan=False)
        # One line per row: diffs of committed results stay readable.
        text = re.sub(r"\n {3,}", " ", text)
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text(text + "\n")
        os.replace(partial, self.path)


def rounded(value: Any) -> Any:
    """Floats to 6 significant digits: more would be noise in the file."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


def validate(report: Mapping[str, Any]) -> None:
    """Checks a report against the schema.

    Raises:
        ValueError: The first field that is missing, of the wrong type or inconsistent.
    """
    for key, kind in _TOP.items():
        if not isinstance(report.get(key), kind):
            raise ValueError(
                f"report: expected {key} of type {kind.__name__}, got {report.get(key)!r}"
            )
    if report["schema"] not in _MEASURED:
        known = " or ".join(_MEASURED)
        raise ValueError(f"report: expected schema {known}, got {report['schema']}")
    _require("environment", report["environment"], _ENVIRONMENT)
    _require("tests", report["tests"], ("command", "outcome", "summary"))
    for index, row in enumerate(report["rows"]):
        where = f"row {index} ({row.get('case')}, {row.get('provider')})"
        _require(where, row, _ROW)
        if row["status"] not in STATUSES:
            raise ValueError(f"{where}: expected status in {STATUSES}, got {row['status']!r}")
        if row["status"] == "reckoned":
            _require(where, row, ("peak_mib",))
        if row["status"] != "ok":
            if not row["reason"]:
                raise ValueError(f"{where}: a row that is {row['status']} needs a reason")
            continue
        _require(where, row, _MEASURED[report["schema"]])
        times = row["time_ms"]
        if not 0 < times["p20"] <= times["p50"] <= times["p80"]:
            raise ValueError(f"{where}: expected 0 < p20 <= p50 <= p80, got {times}")


def _require(where: str, fields: Mapping[str, Any], names: tuple[str, ...]) -> None:
    missing = [name for name in names if name not in fields]
    if missing:
        raise ValueError(f"{where}: missing {', '.join(missing)}")


def newest(
    found: Iterable[tuple[Path, dict[str, Any]]], place: Callable[[dict[str, Any]], str]
) -> list[tuple[Path, dict[str, Any]]]:
    """Of files and their reports the newest of each place, such as `cpu_or_gpu`."""
    chosen = {}
    for path, report in sorted(found, key=lambda each: each[1]["date"]):
        chosen[place(report)] = path, report
    return list(chosen.values())


def cpu_or_gpu(report: Mapping[str, Any]) -> str:
    """The kind of device that a report is of."""
    return "gpu" if report["environment"]["gpu"] else "cpu"


def load(path: Path) -> dict[str, Any]:
    """Reads and validates a result file.

    Raises:
        ValueError: Not JSON, or not of this schema.
    """
    try:
        report = json.loads(path.read_text())
        validate(report)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return report


def default_path(slug: str, ending: str = "") -> Path:
    """`benchmarks/results/<device>/<date><ending>.json`, today."""
    return RESULTS / slug / f"{datetime.now(UTC).date().isoformat()}{ending}.json"
