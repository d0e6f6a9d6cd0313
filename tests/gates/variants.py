"""Which launches are compiled: every shipped configuration of every kernel, on every architecture.

The modules' own host code is called with tensors without memory and its launches are collected. Not
the full product of configurations, dtypes, sizes and layouts is, but

- a kernel's first configuration at all channels, in bfloat16 and float32;
- each other configuration at the widest channels that it is shipped for, in both dtypes;
- float16, channel-first operands, keys that no descriptor can read, negative and zero scales,
  64-bit offsets, plain TF32 and split keys with the first configuration.

Sizes alternate between whole tiles and tails.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import nlkernels.ops
from nlkernels import _launch, _tune
from nlkernels._launch import Config
from tests.gates import (
    concat_problems,
    gate_problems,
    norm_problems,
    pointwise_problems,
    pool_problems,
)
from tests.gates.compiling import Launch, specialisation

ARCHITECTURES = (80, 89, 90, 120)
HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
# (N, M): whole tiles, and tails that descriptors can read.
SIZES = ((2048, 1024), (3136, 784))
# 392 bytes a channel in 16 bit: channel-first keys without descriptors.
UNALIGNED = (784, 196)
# All keys in one key tile; the second's rows take no 16 bytes.
ONE_TILE, FEW_KEYS = (784, 128), (784, 49)
# Few query tiles: keys are split over programs.
SHORT = (196, 3136)


class Attention(NamedTuple):
    """One problem of softmax attention."""

    dtype: torch.dtype
    channels: tuple[int, int]
    size: tuple[int, int] = SIZES[0]
    batch: int = 2
    channel_first: bool = False
    scale: float = 0.0625
    wide: bool | None = None
    tf32: bool = False

    def operands(self) -> dict[str, torch.Tensor]:
        """query, key, value, out and the gradient of out; tensors without memory."""
        (queries, keys), (depth, value_depth) = self.size, self.channels
        return {
            "query": self._operand(queries, depth),
            "key": self._operand(keys, depth),
            "value": self._operand(keys, value_depth),
            "grad": self._operand(queries, value_depth),
            "out": torch.empty(self.batch, queries, value_depth, dtype=self.dtype, device="meta"),
        }

    def is_common(self) -> bool:
        """Whether the widest instructions have room, and operands can be read as they are meant."""
        return min(self.channels) >= 64 and self.size not in (UNALIGNED, FEW_KEYS)

    def _operand(self, positions: int, channels: int) -> torch.Tensor:
        shape = (channels, positions) if self.channel_first else (positions, channels)
        tensor = torch.empty(self.batch, *shape, dtype=self.dtype, device="meta")
        return tensor.mT if self.channel_first else tensor


class Region(NamedTuple):
    """One problem of region aggregation."""

    dtype: torch.dtype
    kernel: tuple[int, int, int]
    shape: tuple[int, int, int, int, int] = (2, 256, 8, 28, 28)
    channels_last: bool = False
    wide: bool | None = None
    tf32: bool = False

    def operands(self) -> dict[str, torch.Tensor]:
        """x, weight and the gradient of the output; tensors without memory."""
        x = torch.empty(self.shape, dtype=self.dtype, device="meta")
        if self.channels_last:
            x = x.to(memory_format=torch.channels_last_3d)
        weight = torch.empty(self.shape[1], *self.kernel, dtype=self.dtype, device="meta")
        return {"x": x, "weight": weight, "grad": torch.empty_like(x)}

    def is_common(self) -> bool:
        """Whether the widest instructions have room, and operands can be read as they are meant."""
        return self.shape[1] >= 64


class Family(NamedTuple):
    """A module with kernels: how its host code is called, and with what.

    Attributes:
        module: its name in nlkernels.ops.
        call: runs all of its kernels on one problem.
        describe: the problem as the module's lists of configurations take it.
        first: problems for the first configuration of each kernel.
        others: problems at which other configurations are looked for, widest last.
    """

    module: str
    call: Callable[[ModuleType, Attention | Region], object]
    describe: Callable[[Attention | Region], tuple]
    first: Sequence[Attention | Region]
    others: Sequence[Attention | Region]


CHANNELS = ((40, 24), (64, 64), (128, 128), (256, 256), (512, 256), (512, 512), (1024, 512))
_WIDTHS = [
    Attention(dtype, channels, SIZES[(index + offset) % 2])
    for offset, dtype in enumerate((BRAIN, SINGLE))
    for index, channels in enumerate(CHANNELS)
]
_CORNERS = [
    Attention(HALF, (256, 256)),
    Attention(HALF, (512, 512), SIZES[1]),
    *(Attention(BRAIN, each, SIZES[1], channel_first=True) for each in ((64, 64), (256, 256))),
    Attention(BRAIN, (512, 512), channel_first=True),
    Attention(SINGLE, (256, 256), SIZES[1], channel_first=True),
    Attention(BRAIN, (256, 256), UNALIGNED, channel_first=True),
    Attention(BRAIN, (256, 256), scale=-1.0),
    Attention(BRAIN, (256, 256), scale=0.0),
    Attention(BRAIN, (256, 256), wide=True),
    Attention(SINGLE, (256, 256), tf32=True),
    Attention(BRAIN, (256, 256), SHORT, batch=1),
    *(Attention(dtype, (256, 256), ONE_TILE) for dtype in (BRAIN, SINGLE)),
    Attention(BRAIN, (512, 512), FEW_KEYS, channel_first=True),
]


def _attention_problem(case: Attention) -> tuple:
    from nlkernels._spec import Problem

    tensors = case.operands()
    return Problem.of(tensors["query"], tensors["key"], tensors["value"])


def _region_problem(case: Region) -> tuple:
    from nlkernels.ops.region.problem import RegionProblem

    tensors = case.operands()
    return RegionProblem.of(tensors["x"], tensors["weight"])


def _forward(module: ModuleType, case: Attention) -> object:
    tensors = case.operands()
    return module.forward(tensors["query"], tensors["key"], tensors["value"], case.scale)


def _backward(module: ModuleType, case: Attention) -> object:
    tensors = case.operands()
    stats = torch.empty(2, case.batch, case.size[0], device="meta")
    operands = (tensors[name] for name in ("grad", "query", "key", "value", "out"))
    return module.backward(*operands, stats, case.scale)


def _region(module: ModuleType, case: Region) -> object:
    tensors = case.operands()
    module.forward(tensors["x"], tensors["weight"])
    return module.backward(tensors["grad"], tensors["x"], tensors["weight"])


# Every pair of dtype, size of the kernel and layout.
_REGIONS = [
    Region(BRAIN, (3, 7, 7)),
    Region(BRAIN, (3, 3, 3), channels_last=True),
    Region(SINGLE, (3, 7, 7), channels_last=True),
    Region(SINGLE, (3, 3, 3)),
]


def _both_passes(module: ModuleType, case: Attention) -> object:
    tensors = case.operands()
    query, key, value, grad = (tensors[name] for name in ("query", "key", "value", "grad"))
    found = module.forward(query, key, value, case.scale)
    state = found[1:] if isinstance(found, tuple) else ()
    return module.backward(grad, query, key, value, *state, case.scale)


# Both kinds share their kernels, of which one leaves out a step.
_QUADRATIC = [
    *(Attention(BRAIN, channels) for channels in ((64, 64), (256, 256), (512, 512))),
    Attention(SINGLE, (512, 512), SIZES[1]),
]
_QUADRATIC_CORNERS = [
    Attention(HALF, (512, 512), UNALIGNED, channel_first=True),
    Attention(HALF, (256, 256), SIZES[1], channel_first=True, wide=True),
]
FAMILIES = (
    Family("softmax.triton_fused", _forward, _attention_problem, _WIDTHS + _CORNERS, _WIDTHS),
    Family("softmax.triton_staged", _forward, _attention_problem, _WIDTHS + _CORNERS, _WIDTHS),
    Family("softmax.triton_backward", _backward, _attention_problem, _WIDTHS + _CORNERS, _WIDTHS),
    Family(
        "relu.triton",
        _both_passes,
        _attention_problem,
        _QUADRATIC + _QUADRATIC_CORNERS,
        _QUADRATIC,
    ),
    Family("dot_product.triton", _both_passes, _attention_problem, _QUADRATIC[1:2], []),
    Family(
        "region.triton",
        _region,
        _region_problem,
        [
            *_REGIONS,
            Region(HALF, (3, 7, 7)),
            Region(BRAIN, (3, 7, 7), wide=True),
            Region(BRAIN, (1, 5, 5), (1, 20, 3, 9, 11)),
        ],
        _REGIONS,
    ),
    Family(
        "concat.triton",
        concat_problems.run,
        concat_problems.described,
        concat_problems.FIRST,
        concat_problems.FIRST,
    ),
    Family("gate.triton", gate_problems.run, gate_problems.described, gate_problems.FIRST, []),
    Family(
        "pointwise.triton",
        pointwise_problems.run,
        pointwise_problems.described,
        pointwise_problems.FIRST,
        pointwise_problems.OTHERS,
    ),
    Family("norm.triton", norm_problems.run, norm_problems.described, norm_problems.FIRST, []),
    Family("pool.triton", pool_problems.run, pool_problems.described, pool_problems.FIRST, []),
)


def launched() -> set[str]:
    """Names of all kernels that host code launches, read from its source."""
    found = set()
    for file in Path(nlkernels.ops.__path__[0]).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "_launch.launch":
                found.add(ast.unparse(node.args[0]))
    return found


def modules_with_kernels() -> list[str]:
    """Names, in nlkernels.ops, of all modules that ship configurations."""
    root = nlkernels.ops.__name__ + "."
    found = []
    for module in pkgutil.walk_packages(nlkernels.ops.__path__, root):
        if "triton" in module.name and hasattr(importlib.import_module(module.name), "KERNELS"):
            found.append(module.name.removeprefix(root))
    return sorted(found)


def launches() -> list[Launch]:
    """Everything that is compiled, each specialisation once, always in the same order."""
    found: dict[tuple, Launch] = {}
    for architecture in ARCHITECTURES:
        for family in FAMILIES:
            module = importlib.import_module(f"nlkernels.ops.{family.module}")
            for case, configs, default in _plan(family, module, architecture):
                collected = _collect(family, module, architecture, case, configs)
                if not default:  # one launch of each kernel tells how its configuration fits
                    collected = {launch.kernel: launch for launch in reversed(collected)}.values()
                for launch in collected:
                    key = (launch.kernel.__name__, architecture, specialisation(launch)["key"])
                    found.setdefault(key, launch._replace(default=default and case.is_common()))
    return list(found.values())


def _plan(
    family: Family, module: ModuleType, architecture: int
) -> Iterator[tuple[Attention | Region, dict[str, Config], bool]]:
    """Problems, the configurations forced upon kernels by name, and whether they are defaults."""
    for case in family.first:
        problem = family.describe(case)
        # Forced as well: what a machine has measured and kept must not decide.
        shipped = {
            name: candidates(problem, architecture)[0]
            for name, candidates in module.KERNELS.items()
        }
        yield case, shipped, True
    for name, candidates in module.KERNELS.items():
        widest: dict[tuple, Attention | Region] = {}
        for case in family.others:
            for config in candidates(family.describe(case), architecture)[1:]:
                widest[case.dtype, config] = case
        for (_, config), case in widest.items():
            yield case, {name: config}, False


def _collect(
    family: Family,
    module: ModuleType,
    architecture: int,
    case: Attention | Region,
    configs: dict[str, Config],
) -> list[Launch]:
    collected: list[Launch] = []

    def collect(kernel, grid, arguments, options) -> None:
        if 0 not in grid:
            collected.append(Launch(architecture, kernel, arguments, options, default=False))

    with (
        _launch.pretend(architecture=architecture, wide=case.wide, launcher=collect),
        _tune.forced(configs),
        _tf32(case.tf32),
        _NoProducts(),
    ):
        family.call(module, case)
    return collected


class _NoProducts(TorchDispatchMode):
    """Leaves out torch's matrix products, some of which tensors without memory do not know."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if operator.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.baddbmm):
            return kwargs.get("out", args[0])
        return operator(*args, **kwargs)


@contextlib.contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    was = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(was)
