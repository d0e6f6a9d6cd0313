"""`nlk info` or `python -m nlkernels.info`: everything a bug report needs, as plain text or JSON.

Versions, devices, which backend serves a typical layer and why the others do not, which kernels
were verified here, compiled modules and compilers, caches, environment variables and paths. A part
that cannot be found out says so instead of raising.
"""

import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

import nlkernels

from . import (
    _build,
    _build_cuda,
    _cache,
    _cuda,
    _device,
    _env,
    _ext,
    _launch,
    _paths,
    _store,
    _trust,
)
from ._spec import KINDS

MIB = 2**20


class Choice(NamedTuple):
    """Which backend serves a problem, and why each other one does not."""

    backend: str
    others: dict[str, str]

    def __str__(self) -> str:
        others = (f"not {name}: {reason}" for name, reason in self.others.items())
        return "\n".join([self.backend, *others])


class Setting(NamedTuple):
    """An environment variable: its value, whether it was set, and what it means."""

    value: str
    origin: str
    meaning: str

    def __str__(self) -> str:
        return f"{self.value or 'empty'} ({self.origin}): {self.meaning}"


class Folder(NamedTuple):
    """A file or folder of caches: how many files, and how large together."""

    path: str
    files: int
    size_bytes: int

    def __str__(self) -> str:
        if not self.files:
            return f"{self.path}: nothing yet"
        return f"{self.path}: {self.files} files, {self.size_bytes / MIB:.1f} MiB"


Rows = list[tuple[str, str | Choice | Setting | Folder]]

# Distribution, and the extra that installs it ("" where a plain installation does).
_DISTRIBUTIONS = (
    ("torch", ""),
    ("triton", "comes with torch builds for GPUs"),
    ("numpy", ""),
    ("ninja", ""),
    ("pybind11", ""),
    ("decord", "pip install nlkernels[video]"),
    ("av", "pip install nlkernels[video]"),
    ("pyyaml", "pip install nlkernels[train]"),
    ("matplotlib", "pip install nlkernels[train]"),
    ("pillow", "pip install nlkernels[train]"),
)

# res3 of a ResNet-50 on 8 frames of 224 x 224 pixels: N = 8*28*28, keys pooled by 2 x 2.
_TYPICAL_BATCH, _TYPICAL_N, _TYPICAL_M, _TYPICAL_D = 1, 6272, 1568, 256
_TYPICAL_POSITIONS, _TYPICAL_REGION = (8, 28, 28), (3, 7, 7)
# Kinds of attention, and the operations beside it.
_LISTED = (*KINDS, "nonlocal_concat", "region_aggregate", "channel_gate")


def report() -> str:
    """Returns the whole report as text that ends with a newline.

    Example:
        >>> print(report().splitlines()[0])
        versions
    """
    return "\n".join(_section(title, found) for title, found in _found())


def as_json() -> dict[str, dict[str, Any]]:
    """Returns the report as nested dictionaries, by section and label.

    Most values are text. A choice of backend holds `backend` and `others` (name -> reason), an
    environment variable `value`, `origin` and `meaning`, a cache `path`, `files` and `size_bytes`.

    Example:
        >>> as_json()["backends"]["cpu float32 softmax"].keys()
        dict_keys(['backend', 'others'])
    """
    return {
        title: {label: one if isinstance(one, str) else one._asdict() for label, one in rows}
        for title, rows in _found()
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the report; arguments are ["--json"] or none, those of the process if None."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if "--json" in arguments:
        print(json.dumps(as_json(), indent=1))
    else:
        sys.stdout.write(report())


def _found() -> list[tuple[str, Rows]]:
    sections: tuple[tuple[str, Callable[[], Rows]], ...] = (
        ("versions", _versions),
        ("devices", _devices),
        ("backends", _backends),
        ("kernels", _kernels),
        ("native code", _native),
        ("caches", _caches),
        ("environment variables", _environment),
        ("paths", _locations),
    )
    return [(title, _tried(rows)) for title, rows in sections]


def _tried(rows: Callable[[], Rows]) -> Rows:
    # Whoever runs this already has a problem: one failing part must not hide the others.
    try:
        return rows()
    except Exception as error:
        return [("unavailable", f"{type(error).__name__}: {error}")]


def _section(title: str, rows: Rows) -> str:
    width = max((len(label) for label, _ in rows), default=0)
    lines = [title]
    for label, value in rows:
        first, *rest = str(value).splitlines() or [""]
        lines.append(f"  {label:<{width}}  {first}".rstrip())
        lines += [f"  {'':<{width}}  {line}".rstrip() for line in rest]
    return "\n".join(lines) + "\n"


def _versions() -> Rows:
    rows = [("nlkernels", nlkernels.__version__), ("python", platform.python_version())]
    for name, remedy in _DISTRIBUTIONS:
        try:
            rows.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            rows.append((name, f"not installed ({remedy})" if remedy else "not installed"))
    rows.append(("system", platform.platform()))
    return rows


def _devices() -> Rows:
    if hasattr(os, "sched_getaffinity"):
        usable = len(os.sched_getaffinity(0))
    else:
        usable = os.cpu_count()
    rows = [
        ("cpu", f"{_cpu_model()}, {usable} of {os.cpu_count()} cores usable"),
        ("cpu instructions", f"{torch.backends.cpu.get_cpu_capability()} (as torch uses them)"),
        ("torch threads", str(torch.get_num_threads())),
    ]
    if not torch.cuda.is_available():
        build = "torch is built without CUDA" if torch.version.cuda is None else "no usable device"
        return [*rows, ("gpu", f"none ({build})")]
    rows.append(("cuda of torch", str(torch.version.cuda)))
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory_mib = properties.total_memory // 2**20
        rows.append(
            (
                f"cuda:{index}",
                f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
                f"{properties.multi_processor_count} multiprocessors, {memory_mib} MiB",
            )
        )
    return rows


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _backends() -> Rows:
    rows = []
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    for device in devices:
        for dtype in (torch.float32, torch.bfloat16):
            rows += [
                (f"{device} {_short(dtype)} {what}", _explain(what, device, dtype))
                for what in _LISTED
            ]
    shape = f"batch {_TYPICAL_BATCH}, N {_TYPICAL_N}, M {_TYPICAL_M}, D = V = {_TYPICAL_D}"
    features = "x".join(map(str, _TYPICAL_POSITIONS))
    region = "x".join(map(str, _TYPICAL_REGION))
    others = f"region and gate: {_TYPICAL_D} channels of {features}, regions {region}"
    return [("problem", f"{shape}; {others}; with gradients"), *rows]


def _explain(what: str, device: str, dtype: torch.dtype) -> Choice | str:
    operands, options = _typical(what, device, dtype)
    op = "nonlocal_attention" if what in KINDS else what
    try:
        with _trust.held():
            explanation = nlkernels.explain(op, *operands, **options)
    except (NotImplementedError, ValueError) as error:
        return f"error: {error}"
    others = {
        name: reason or "able, not chosen"
        for name, reason in explanation.reasons.items()
        if name != explanation.backend
    }
    return Choice(explanation.backend, others)


def _typical(
    what: str, device: str, dtype: torch.dtype
) -> tuple[list[torch.Tensor], dict[str, str]]:
    """Operands and options of a typical call of an operation, or of a kind of attention."""
    batch, queries, keys, depth = _TYPICAL_BATCH, _TYPICAL_N, _TYPICAL_M, _TYPICAL_D
    sizes = {
        "nonlocal_concat": [(batch, queries), (batch, keys), (batch, keys, depth)],
        "region_aggregate": [(batch, depth, *_TYPICAL_POSITIONS), (depth, *_TYPICAL_REGION)],
        "channel_gate": [(batch, depth, *_TYPICAL_POSITIONS), (depth,)],
    }
    attention = [(batch, queries, depth), (batch, keys, depth), (batch, keys, depth)]
    options = {"device": device, "dtype": dtype, "requires_grad": True}
    operands = [torch.empty(size, **options) for size in sizes.get(what, attention)]
    return operands, {"kind": what} if what in KINDS else {}


def _kernels() -> Rows:
    how = "in Triton's interpreter, on CPU tensors" if _launch.interpreting() else "compiled"
    parts = ", ".join(f"sm_{part}" for part in sorted(_launch.SHARED_MEMORY))
    rows = [
        ("triton", f"{how}, version {_device.triton_version()}"),
        ("architectures", f"{parts}; unverified where nothing below or shipped says otherwise"),
    ]
    devices = [torch.device("cpu")] if _launch.interpreting() else []
    devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    for device in devices:
        verdicts = _cache.section(device)["verdicts"]
        lines = [f"{name}: {row['reason'] or 'verified'}" for name, row in sorted(verdicts.items())]
        rows.append((str(device), "\n".join(lines) or "nothing verified yet: nlk verify"))
    return rows


def _native() -> Rows:
    missing, module = _ext.missing(), _ext.CPU.loaded()
    if module is None:
        where = f"missing: {missing}" if missing else "not compiled yet: its first use does that"
        used = "none yet"
    else:
        prebuilt = str(Path(module.__file__).parent) in nlkernels.__path__
        where = f"{'installed' if prebuilt else 'compiled here'}: {module.__file__}"
        level = _ext.isa()
        used = next(name for name, each in module.isas.items() if each == level)
    try:
        compiler = _build.Compiler.find(_env.compiler())
        found = f"{compiler.version}, {' '.join(compiler.command)}"
    except _build.BuildError as error:
        found = f"missing: {error}"
    runtime = _ext.openmp_runtime() or "none of GCC's in torch: std::thread"
    host = _build.host_isa(_build.Sources.read(_paths.csrc_dir()).isas())
    return [
        ("module", where),
        ("instruction set", f"{used} (this machine: {host})"),
        ("threads", runtime if module is None else f"{module.threads}, {runtime}"),
        ("compiler", found),
        *_cuda_rows(),
        ("compiled into", str(_store.homes()[-1])),
    ]


def _cuda_rows() -> Rows:
    module, missing = _cuda.CUDA.loaded(), _cuda.CUDA.missing()
    if module is not None:
        where = f"loaded: {module.__file__}"
    else:
        where = f"missing: {missing}" if missing else "not compiled yet: its first use does that"
    try:
        compiler = _build_cuda.find_nvcc(_env.cuda_homes(), _env.compiler())
        found = f"{compiler.version}, {' '.join(compiler.command)}"
    except _build.BuildError as error:
        found = f"missing: {error}"
    return [("cuda module", where), ("cuda compiler", found)]


def _caches() -> Rows:
    rows: Rows = []
    for folder in _paths.cache_dirs():
        rows += [
            ("compiled modules", _folder(folder / "ext")),
            ("verified, measured", _folder(folder / _cache.FILE)),
        ]
    triton = Path(os.path.expanduser(_env.triton_cache()))
    return [*rows, ("kernels of Triton", _folder(triton))]


def _folder(path: Path) -> Folder:
    files = [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]
    return Folder(str(path), len(files), sum(one.stat().st_size for one in files))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _environment() -> Rows:
    rows = []
    for name, variable in _env.VARIABLES.items():
        origin = "set" if os.environ.get(name) else "default"
        rows.append((name, Setting(_env.read(name), origin, variable.doc)))
    for name, meaning in _env.OTHERS.items():
        value = os.environ.get(name, "")
        rows.append((name, Setting(value, "set" if value else "not set", meaning)))
    return rows


def _locations() -> Rows:
    root = _paths.checkout_root()
    return [
        ("package", str(_paths.PACKAGE)),
        ("csrc", str(_paths.csrc_dir())),
        ("cache folder", str(_paths.cache_dirs()[-1])),
        ("installed as", "a copy" if root is None else f"a source checkout in {root}"),
        ("python", sys.executable),
    ]


if __name__ == "__main__":
    main()
