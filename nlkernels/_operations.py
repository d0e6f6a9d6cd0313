"""The operations that dispatch knows, and what it knows of each."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from nlkernels._spec import Problem

# Backends that `auto` takes on a GPU only where they were verified; see `nlkernels.verify`.
VERIFIED = ("triton", "cuda")
# Of these, what a process of its own verifies (`_isolated`): no compiler checks how such kernels
# wait for each other and where they write.
ISOLATED = ("cuda",)
# Channels are rounded up to whole steps of a tensor core: one verdict, one bucket for each.
_CHANNELS = 16


def attention_head(problem: Problem) -> tuple[int, ...]:
    """D and V, rounded up to multiples of 16: what decides about an attention's kernel."""
    depths = (problem.depth, problem.value_depth)
    return tuple((n + _CHANNELS - 1) // _CHANNELS * _CHANNELS for n in depths)


def attention_sizes(problem: Problem) -> tuple[int, ...]:
    """The other sizes, of which only the magnitude matters."""
    return problem.batch, problem.queries, problem.keys


class Operation(NamedTuple):
    """What dispatch knows of an operation; its `op` module registers it in `OPERATIONS`.

    Attributes:
        backends: names of all of them.
        supports: (backend, problem) -> why it cannot serve the problem.
        inside: backends that run inside the opaque operator: module, or its name, which is
            imported at the first use.
        table: device type -> rows, the first of which that fits gives the order of `auto`.
        describe: operands -> problem: dtype, dtype_name, device (type), index, and sizes.
        head: problem -> the sizes that decide which kernel code runs, bucketed.
        sizes: problem -> the sizes of which only the magnitude matters.
        suite: module, or its name, with the problems that verify the operation's kernels.
        drawback: why `auto` never takes the definition.
        function: the public function of it, as messages name it; None is the operation's name.
    """

    backends: tuple[str, ...]
    supports: Callable[[str, Any], list[str]]
    inside: Mapping[str, Any]
    table: Mapping[str, tuple[Mapping[str, Any], ...]]
    describe: Callable[..., Any] = Problem.of
    head: Callable[[Any], tuple[int, ...]] = attention_head
    sizes: Callable[[Any], tuple[int, ...]] = attention_sizes
    suite: Any = None
    drawback: str = "materialises the B x N x M scores"
    function: str | None = None


OPERATIONS: dict[str, Operation] = {}


def implementation(op: str, backend: str) -> Any:
    """The module of a backend that runs inside the operator."""
    return loaded(OPERATIONS[op].inside[backend])


def loaded(module: Any) -> Any:
    """A module that is given by itself or by its name."""
    return importlib.import_module(module) if isinstance(module, str) else module
