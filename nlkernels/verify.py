"""`nlk verify`: are the kernels right on this machine?

Runs the verification of `nlkernels._trust` whether or not there is a verdict already, and keeps
the new one.
"""

from __future__ import annotations

import sys
import time
import types
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, NamedTuple

import torch

# These register every operation, those too that only blocks use.
import nlkernels.functional
import nlkernels.ops.norm.op
import nlkernels.ops.pointwise.op
import nlkernels.ops.pool.op  # noqa: F401
from nlkernels import _device, _isolated, _launch, _operations, _select, _trust
from nlkernels._spec import check_choice


class Check(NamedTuple):
    """Verdict on one pass of a backend.

    Attributes:
        op, backend, direction, dtype: what was verified.
        head: sizes that decide which kernel runs, as `depths` of `verify`.
        verdict: "ok", "failed" or "not checked".
        detail: what is wrong, or why it was not checked.
        seconds: how long it took.
    """

    op: str
    backend: str
    direction: str
    dtype: str
    head: tuple[int, ...]
    verdict: str
    detail: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        name = f"{self.op} {self.backend} {self.direction} {'x'.join(map(str, self.head))}"
        detail = f": {self.detail}" if self.detail else ""
        return f"{self.verdict:<11} {name} {self.dtype} ({self.seconds:.1f} s){detail}"


class Report(NamedTuple):
    """Verdicts of a device; `print` shows them."""

    device: str
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether something was checked and nothing failed."""
        verdicts = {check.verdict for check in self.checks}
        return "ok" in verdicts and "failed" not in verdicts

    def __str__(self) -> str:
        return "\n".join([self.device, *map(str, self.checks)])

    def as_json(self) -> dict[str, Any]:
        """The report as plain data."""
        return {"device": self.device, "checks": [check._asdict() for check in self.checks]}


def verify(
    op: str | None = None,
    backend: str = "triton",
    *,
    device: torch.device | str | None = None,
    dtypes: Iterable[torch.dtype] | None = None,
    depths: Iterable[tuple[int, ...]] | None = None,
    progress: Callable[[str], object] | None = None,
) -> Report:
    """Check kernels against float64 on this machine, and let `auto` use those that are right.

    Small problems of odd sizes, forward and backward, may be twice (output) or three times
    (gradients) as wrong as plain PyTorch in the same dtype, and have to repeat bitwise. A kernel
    that fails is switched off on this machine, in later processes too. Those of backend "cuda" run
    in a process of its own, where one that hangs or crashes has failed like any other.

    Args:
        op: "softmax", "dot_product", "relu", "concat", "gate", "region", "pointwise",
            "norm" or "pool"; None is all.
        backend: the one that is checked.
        device: None is the GPU, else the CPU.
        dtypes: None is float16, bfloat16 and float32; on a CPU, where Triton's interpreter has no
            product of bfloat16, the other two.
        depths: (D, V) pairs, rounded up to multiples of 16; for "concat" (V,), for "gate" (C,), for
            "region" and "pool" (kt, kh, kw, whether channels_last_3d), for "pointwise" channels of
            features and results, rounded up to powers of two, for "norm" (C, whether maps). None is
            those of the published blocks, on a CPU the first of them.
        progress: called with a line for the device and for each check as soon as it is done.

    Returns:
        A report: `ok`, and one `Check` for each operation, pass, dtype and head size.

    Raises:
        ValueError: unknown operation or device.
        RuntimeError: called while torch.compile traces or a CUDA graph is captured.

    Example:
        >>> import nlkernels
        >>> nlkernels.verify("softmax", backend="chunked", depths=[(16, 16)]).ok
        True
    """
    ops = {name: o for name, o in _operations.OPERATIONS.items() if o.suite is not None}
    if op is not None:
        # region_aggregate lies in ops/region.
        op = {_trust.folder(name).rpartition("/")[2]: name for name in ops}.get(op, op)
        check_choice("verify", "op", op, tuple(ops))
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    present = _present(device)
    if _launch.capturing(present):
        raise RuntimeError(
            "verify: expected to run by itself, got a call while work is traced or captured; call "
            "it before"
        )
    checks, progress = [], progress or (lambda line: None)
    progress(_device.identity(present))
    with _isolated.kept():
        for name, head, dtype in _cases(ops if op is None else [op], depths, dtypes, present.type):
            for direction in ("forward", "backward"):
                checks.append(_check(name, backend, head, dtype, direction, present))
                progress(str(checks[-1]))
    return Report(_device.identity(present), tuple(checks))


def _cases(
    ops: Collection[str],
    depths: Iterable[tuple[int, ...]] | None,
    dtypes: Iterable[torch.dtype] | None,
    kind: str,
) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
    """Operation, head size and dtype of all that is verified on a kind of device."""
    given, asked = (None if n is None else list(n) for n in (depths, dtypes))
    for name in ops:
        suite = _operations.loaded(_operations.OPERATIONS[name].suite)
        heads = given if given is not None else suite.HEADS[: 1 if kind == "cpu" else None]
        if given is not None and len(ops) > 1:
            heads = [head for head in given if len(head) == len(suite.HEADS[0])]
        for head in heads:
            smallest = [min(1, *sizes) for sizes in zip(*suite.HEADS, strict=True)]
            if len(head) != len(smallest) or any(map(int.__lt__, head, smallest)):
                raise ValueError(
                    f"verify: expected {len(suite.HEADS[0])} positive sizes for {name}, got "
                    f"{tuple(head)}; for example {suite.HEADS[0]}"
                )
            # Triton's interpreter has no product of bfloat16: it is no judge of it.
            usual = [d for d in suite.DTYPES if kind != "cpu" or d != torch.bfloat16]
            yield from ((name, tuple(head), dtype) for dtype in (usual if asked is None else asked))


def _present(device: torch.device | str) -> torch.device:
    try:
        asked = torch.device(device)
        present = _device.present(asked.type, asked.index)
    except RuntimeError:
        present = None
    if present is None:
        raise ValueError(f"verify: expected a device of this machine, got {device}; see nlk info")
    return present


def _check(op, backend, head, dtype, direction, device) -> Check:
    operation = _operations.OPERATIONS[op]
    suite = _operations.loaded(operation.suite)
    problem = suite.problem(head, dtype, device)
    head = operation.head(problem)
    named = (op, backend, direction, _device.label(dtype), head)
    reasons = operation.supports(backend, problem)
    if not reasons and backend not in _select.inside(op, device.type):
        reasons = ["it is not one of this project's kernels"]
    if reasons:
        return Check(*named, "not checked", "; ".join(reasons))
    start = time.perf_counter()
    try:
        wrong = _trust.verify(op, backend, head, dtype, direction, device, again=True)
    except _trust.CannotJudge as error:
        return Check(*named, "not checked", str(error))
    seconds = time.perf_counter() - start
    return Check(*named, "failed" if wrong else "ok", wrong, seconds)


class _Callable(types.ModuleType):
    """Importing this module makes it the attribute nlkernels.verify, which is a function too."""

    def __call__(self, *arguments: Any, **options: Any) -> Report:
        return verify(*arguments, **options)


sys.modules[__name__].__class__ = _Callable
