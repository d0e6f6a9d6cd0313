"""Peak memory of a step without running it, reckoned from the sizes of its tensors.

Under `FakeTensorMode` a step runs without data: no memory is taken and nothing is computed, so that
networks and clips of any size can be asked about. `ReckonedMemory` follows every tensor of such a
run from the operation that makes it to its release. Inside of this package's attention, what a
backend needs beyond operands and results comes from its formula; scratch that other operations
allocate for themselves is not seen, nor is what a library allocates outside of torch.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nlkernels import _select, _trust
from nlkernels._memory import MIB
from nlkernels._operations import OPERATIONS
from nlkernels.ops import _footprint

# Operators of this package -> operation, number of leading gradients, pass.
_ATTENTION = {
    f"nlkernels::{op}_{direction}": (op, int(direction == "backward"), direction)
    for op in ("softmax", "relu", "dot_product", "concat")
    for direction in ("forward", "backward")
}


class ReckonedMemory(TorchDispatchMode):
    """Context manager inside `FakeTensorMode`: as `PeakMemory`, of a run without data.

    Attributes:
        live_mib: peak of live tensor bytes above the start, in MiB.
        kept_mib: live tensor bytes at the end above the start, in MiB.

    Example:
        >>> import torch
        >>> from torch._subclasses import FakeTensorMode
        >>> from benchmarks.reckoned import ReckonedMemory
        >>> with FakeTensorMode(), ReckonedMemory() as peak:
        ...     x = torch.ones(256, 1024)
        >>> peak.live_mib
        1.0
    """

    def __init__(self) -> None:
        super().__init__()
        self.live_mib = self.kept_mib = float("nan")
        self._storages: dict[int, weakref.ref] = {}
        self._live = self._peak = 0

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self.live_mib, self.kept_mib = self._peak / MIB, self._live / MIB

    def __torch_dispatch__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = {} if kwargs is None else kwargs
        # What no operation of this run made was there before it.
        for tensor in _tensors((args, kwargs)):
            self._follow(tensor, 0)
        result = function(*args, **kwargs)
        for tensor in _tensors(result):
            self._follow(tensor, tensor.untyped_storage().nbytes())
        self._peak = max(self._peak, self._live + _workspace(function, args))
        return result

    def _follow(self, tensor: Tensor, size: int) -> None:
        """Counts a storage that is not known yet, until it is released."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if key not in self._storages:
            self._storages[key] = weakref.ref(storage, partial(self._release, key, size))
            self._live += size

    def _release(self, key: int, size: int, _: weakref.ref) -> None:
        del self._storages[key]
        self._live -= size


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _workspace(function: Any, args: tuple[Any, ...]) -> int:
    """Bytes that an attention of this package needs beyond operands and results; 0 for others."""
    found = _ATTENTION.get(getattr(function, "name", str)())
    if found is None:
        return 0
    op, gradients, direction = found
    operands = args[gradients : gradients + 3]
    problem = OPERATIONS[op].describe(*operands)
    (backend,) = (argument for argument in args if isinstance(argument, str))
    if backend == "auto":
        # Nothing is verified, as nothing may run.
        with _trust.held():
            backend = _select.choose(op, problem, _select.inside(op, problem.device), direction)
    return _footprint.workspace(op, backend, direction, problem) or 0
