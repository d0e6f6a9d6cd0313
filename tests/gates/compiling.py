"""Compiling kernels ahead of time, specialised as a launch would, and reading what came out.

Triton's own launch path is asked to stop before the launch (`warmup`), with a driver that names the
architecture. Nothing here needs a GPU; TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget

from nlkernels import _launch

WARP = 32
MOST_REGISTERS = 255
# 65536 registers over 12 warps: more per thread cannot be launched.
MOST_REGISTERS_OF_12_WARPS = 168
WGMMA = r"wgmma\.mma_async\.sync\.aligned\.(m\d+n\d+k\d+)"


class Launch(NamedTuple):
    """One call of a kernel, as `_launch.launch` was asked for it.

    `default` is true for a kernel's first configuration at 64 channels and more, of operands that
    descriptors can read.
    """

    architecture: int
    kernel: Any
    arguments: tuple
    options: dict[str, Any]
    default: bool


class Driver:
    """Stands in for the CUDA driver: answers what is asked before anything is loaded."""

    architecture = 90

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, WARP)

    def get_current_device(self) -> int:
        return self.architecture  # Triton keeps its kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_launch(launch: Launch) -> Any:
    """What Triton would load for this launch."""
    driver = Driver()
    driver.architecture = launch.architecture
    triton.runtime.driver.set_active(driver)
    launch.kernel.device_caches.clear()  # what was compiled before would come back unseen
    return launch.kernel.warmup(*launch.arguments, grid=(1,), **launch.options)


def specialisation(launch: Launch) -> dict[str, Any]:
    """How Triton would specialise this launch, without compiling it.

    Returns `signature` (name to type), `constants` (name to value; arguments equal to 1 are among
    them) and `key`, equal for launches that share one compiled kernel.
    """
    seen = []

    def stop(**described) -> bool:
        seen.append(described["compile"])
        return True

    before, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, stop
    try:
        compile_launch(launch)
    finally:
        knobs.runtime.jit_cache_hook = before
    (asked,) = seen
    names = list(asked["signature"])
    return {
        "signature": asked["signature"],
        "constants": {names[path[0]]: value for path, value in asked["constants"].items()},
        "divisible": [names[path[0]] for path, found in asked["configs"][0].items() if found],
        "key": asked["key"],
    }


def row_name(launch: Launch) -> str:
    """Kernel, architecture, dtype, constants, warps and stages: the name of a row of the table.

    Constants that are 0 or False are left out. Launches that differ only in which addresses and
    integers are multiples of 16 share a row.
    """
    found = specialisation(launch)
    types = [kind for kind in found["signature"].values() if kind[0] == "*" or "desc<" in kind]
    dtype = re.search(r"[a-z]+\d+(?=\[|$)", types[0]).group()
    own = {parameter.name for parameter in launch.kernel.params if parameter.is_constexpr}
    constants = [f"{k}={_short(v)}" for k, v in found["constants"].items() if k in own and v]
    ones = [k for k in found["constants"] if k not in own]
    words = [launch.kernel.__name__, f"sm{launch.architecture}", dtype, *constants]
    words += [f"one={','.join(ones)}"] * bool(ones)
    return " ".join([*words, f"w{launch.options['num_warps']}", f"s{launch.options['num_stages']}"])


def _short(value: Any) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)


def measure(launch: Launch) -> dict[str, Any]:
    """Compile and read shared memory, registers, stack and the instructions that matter.

    `stack` is the frame in bytes of a thread, `spilled` the bytes of its spill stores and loads:
    ptxas keeps some bytes of its own in the frame even where nothing is spilled.
    """
    log = io.StringIO()
    try:
        with _verbose(), contextlib.redirect_stdout(log):
            kernel = compile_launch(launch)
    except Exception as error:  # whatever the compiler raises becomes a row that fails its test
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}"}
    ptx = kernel.asm["ptx"]
    stack, *spilled = _numbers(r"(\d+) bytes stack frame, (\d+) .* stores, (\d+) ", log.getvalue())
    (registers,) = _numbers(r"Used (\d+) registers", log.getvalue())
    (threads,) = _numbers(r"\.(?:reqntid|maxntid) (\d+)", ptx)
    row = {
        "shared": kernel.metadata.shared,
        "registers": registers,
        "stack": stack,
        "spilled": sum(spilled),
        "warps": threads // WARP,
        "wgmma": dict(sorted(Counter(re.findall(WGMMA, ptx)).items())),
        "mma": len(re.findall(r"\bmma\.sync", ptx)),
        "setmaxnreg": sorted({int(n) for n in re.findall(r"setmaxnreg\S*\s+(\d+)", ptx)}),
        "hot": "tt.dot " in kernel.asm["ttir"],
        "default": launch.default,
        "specialised": bool(launch.options.get("SPECIALISED")),
    }
    return {name: fact for name, fact in row.items() if fact}


def _numbers(pattern: str, text: str) -> list[int]:
    return [int(n) for n in re.search(pattern, text).groups()]


@contextlib.contextmanager
def _verbose() -> Iterator[None]:
    """Compile even what is cached, and print what ptxas says."""
    was = knobs.compilation.always_compile, knobs.nvidia.dump_ptxas_log
    knobs.compilation.always_compile = knobs.nvidia.dump_ptxas_log = True
    try:
        yield
    finally:
        knobs.compilation.always_compile, knobs.nvidia.dump_ptxas_log = was


def faults(name: str, row: dict[str, Any]) -> list[str]:
    """Why a compiled kernel could not run on its architecture, or not as fast as it is meant to."""
    if "error" in row:
        return [row["error"]]
    _, architecture, dtype, *_ = name.split()
    limit = _launch.SHARED_MEMORY[int(architecture.removeprefix("sm"))]
    most = MOST_REGISTERS_OF_12_WARPS if row["warps"] == 12 else MOST_REGISTERS
    found = []
    if row.get("shared", 0) > limit:
        found.append(f"shared memory {row['shared']} B > {limit} B")
    if row.get("spilled"):
        found.append(f"{row['spilled']} B of registers spilled by a thread")
    if row["registers"] > most:
        found.append(f"{row['registers']} registers > {most}")
    if row.get("specialised") and not row.get("setmaxnreg"):
        found.append("warps are not specialised: no setmaxnreg")
    if architecture == "sm90" and dtype in ("bf16", "fp16") and row.get("hot"):
        shapes = row.get("wgmma", {})
        if not shapes or "mma" in row:
            found.append(f"matrix products by {row.get('mma', 0)} mma.sync, wgmma {shapes}")
        narrow = [shape for shape in shapes if int(shape.split("n")[1].split("k")[0]) < 64]
        if narrow and row.get("default"):
            found.append(f"narrow matrix products {narrow} in a default configuration")
    return found
