"""The table of compiled CUDA kernels: `python -m tests.gates.cuda_table` compiles and rewrites it.

    python -m tests.gates.cuda_table [UNIT ...]    cuda/region.cu: only the rows of these units

One file per release of nvcc: what every kernel of csrc/sources.json takes on every architecture
that its unit is compiled for.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from nlkernels import _build_cuda, _env, _paths
from nlkernels._build import Sources
from nlkernels._build_cuda import CudaRecipe
from tests.gates import table
from tests.gates.table import Rows

WORKERS = 2
MOST_SECONDS = 60
# setmaxnreg ignored; products of warp groups serialised; waits injected between them.
WARNINGS = ("C7508", "C7510", "C7513", "C7514", "C7515", "C7519")
_KERNEL = re.compile(
    r"Compiling entry function '(\w+)'.*?"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
    r"Used (\d+) registers([^\n]*)",
    re.DOTALL,
)


class Compiled(NamedTuple):
    """A unit for one architecture: rows of its kernels, warnings, and seconds of the processor."""

    unit: str
    architecture: str
    rows: Rows
    warnings: tuple[str, ...]
    seconds: float


def path() -> Path:
    """Where the rows of this release of nvcc are committed."""
    return Path(__file__).with_name(f"cuda-{release()}.json")


def release() -> str:
    """The release of nvcc, "13.0".

    Raises:
        BuildError: there is no nvcc.
    """
    return _build_cuda.find_nvcc(_env.cuda_homes()).version.split()[1].rstrip(",")


def jobs(units: list[str]) -> list[tuple[str, str]]:
    """Units and the architectures that they are compiled for."""
    listed = _sources().listed
    return [
        (unit, architecture)
        for unit, only in listed["units"].items()
        if not units or unit in units
        for architecture in only or listed["architectures"]
    ]


def limits() -> dict[str, int]:
    """Shared memory of a block in bytes, by architecture."""
    return {name: part["shared"] for name, part in _sources().listed["architectures"].items()}


def measure(units: list[str]) -> list[Compiled]:
    """Compile units, all without a name, for every architecture."""
    with ThreadPoolExecutor(WORKERS) as pool:
        return list(pool.map(lambda job: _compile(*job), jobs(units)))


def _sources() -> Sources:
    return Sources.read(_paths.csrc_dir(), _build_cuda.PART)


def _compile(unit: str, architecture: str) -> Compiled:
    compiler = _build_cuda.find_nvcc(_env.cuda_homes())
    steps = CudaRecipe(_sources(), (architecture,), compiler, "").units()
    (step,) = (s for s in steps if s.source == _paths.csrc_dir() / unit)
    with tempfile.TemporaryDirectory() as folder:
        command = [word for word in step.command if word not in ("-c", "-o", step.output)]
        command += ["-cubin", "-Xptxas=-v", "-o", f"{folder}/unit.cubin"]
        with open(f"{folder}/log", "w+") as printed:
            process = subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT)
            # Of the processor: a machine under load compiles for minutes.
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            printed.seek(0)
            log = printed.read()
    if process.returncode != 0:
        raise RuntimeError(f"{unit} for {architecture}: {log[-2000:]}")
    seconds = used.ru_utime + used.ru_stime
    warned = tuple(word for word in WARNINGS if word in log)
    return Compiled(unit, architecture, rows(unit, architecture, log), warned, seconds)


def rows(unit: str, architecture: str, log: str) -> Rows:
    """What ptxas says of every kernel, in its words; numbers that are 0 are left out."""
    found: Rows = {}
    for name, stack, stores, loads, registers, rest in _KERNEL.findall(log):
        shared = re.search(r"(\d+) bytes smem", rest)
        facts: dict[str, Any] = {
            "registers": int(registers),
            "stack": int(stack),
            "spilled": int(stores) + int(loads),
            "shared": int(shared[1]) if shared else 0,
        }
        row = f"{unit} {_demangled(name)} {architecture}"
        found[row] = {fact: number for fact, number in facts.items() if number}
    return found


def _demangled(name: str) -> str:
    shown = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout
    # Without the result, the arguments, and whose namespaces these are.
    shown = re.sub(r"\(anonymous namespace\)::|nlk::cuda::|^void ", "", shown.strip())
    return re.sub(r"\(.*", "", re.sub(r"\((?:int|bool|unsigned int)\)", "", shown))


def faults(compiled: Compiled, limit: int) -> list[str]:
    """Why kernels could not run on their architecture, or not as fast as they are meant to."""
    where = f"{compiled.unit} for {compiled.architecture}"
    found = [f"{where}: ptxas warns of {warning}" for warning in compiled.warnings]
    if not compiled.rows and not compiled.unit.endswith("device.cu"):
        found.append(f"{where}: no kernel")
    if compiled.seconds > MOST_SECONDS:
        found.append(f"{where}: compiles in {compiled.seconds:.0f} s > {MOST_SECONDS} s")
    for name, row in compiled.rows.items():
        if row.get("spilled"):
            found.append(f"{name}: {row['spilled']} B of registers spilled by a thread")
        if row.get("shared", 0) > limit:
            found.append(f"{name}: shared memory {row['shared']} B > {limit} B")
    return found


def merged(compiled: list[Compiled]) -> Rows:
    """The rows of all units."""
    return {name: row for each in compiled for name, row in each.rows.items()}


def main() -> None:
    units = sys.argv[1:]
    compiled = measure(units)
    new, file = merged(compiled), path()
    kept = table.read(file) if units and file.is_file() else {}
    kept = {name: row for name, row in kept.items() if name.split()[0] not in units}
    table.write(file, {"nvcc": release()}, kept | new)
    for each in compiled:
        for fault in faults(each, limits()[each.architecture]):
            print(fault)
    seconds = sum(each.seconds for each in compiled)
    print(f"{len(compiled)} compilations in {seconds:.0f} s, {len(new)} rows of {file}")


if __name__ == "__main__":
    main()
