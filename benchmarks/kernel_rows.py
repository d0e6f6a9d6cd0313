"""Each kernel alone: the launches of an operation are recorded while it runs, then repeated.

One row per kernel and pass: the median over repetitions of the time of all its launches, in their
order, and its rate by the products it computes. Beside them the whole pass, and the library's
matrix product of the same sizes as the second one.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nlkernels import _launch, _tune
from nlkernels._spec import Problem

from . import features, region
from .checks import Judge, step
from .gate import GateCase
from .measure import Call, Judging, compare, derive, make_operands
from .peers import GPU_PROVIDERS
from .region import RegionCase
from .registry import Case
from .timing import Timer, interleave, quantiles

LIBRARY_MIB = 4096
"""The library's product is measured where its matrix of weights is at most this large."""

# Products that a kernel computes, in units of 2 B N M: by D and V.
_PRODUCTS: dict[str, Callable[[Case], int]] = {
    "_scores_kernel": lambda case: case.d,
    "_values_kernel": lambda case: case.v,
    "_d_scores_kernel": lambda case: case.d + case.v,
    "attend": lambda case: case.d + case.v,
    "_weights_kernel": lambda case: case.d,
    "_fused_kernel": lambda case: case.d + case.v,
}


@dataclass
class Recorder:
    """Launches as `_launch.launch` does, and keeps every launch for repetition.

    Attributes:
        launches: Kernel name -> its launches, in order.
        options: Kernel name -> grid and compile-time options of its first launch.
    """

    launches: dict[str, list[Callable[[], object]]] = field(default_factory=dict)
    options: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __call__(self, kernel: Any, grid: tuple, arguments: tuple, options: dict) -> None:
        if 0 in grid:
            return
        name = getattr(kernel, "__name__", None) or kernel.fn.__name__

        def run() -> object:
            return kernel[grid](*arguments, **options)

        if torch.cuda.is_available():
            _launch._set_allocator()
        run()
        self.launches.setdefault(name, []).append(run)
        shown = {key: value for key, value in options.items() if isinstance(value, int | str)}
        self.options.setdefault(name, {"grid": list(grid), **shown})


@contextmanager
def recorded() -> Iterator[Recorder]:
    """Records what is launched in the context; it runs all the same."""
    recorder = Recorder()
    with _launch.pretend(launcher=recorder):
        yield recorder


def kernel_rows(
    case: Case | GateCase,
    dtype_name: str,
    device: torch.device,
    *,
    rounds: int,
    gemm: float | None,
    begin: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Rows of every kernel of the forward and of the backward of one problem, by the kernels' own
    module: those of dot_product are measured where `auto` has two library products, too.
    """
    dtype = getattr(torch, dtype_name)
    begin("recording")
    run_forward, prepared = _whole_passes(case, dtype, device)
    with recorded() as forward:
        result = run_forward()
    run_backward = prepared(result)
    with recorded() as backward:
        run_backward()
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    for passes, recorder in (("forward", forward), ("backward", backward)):
        for name, launches in recorder.launches.items():
            calls[passes, name] = _in_order(launches)
    calls["forward", "whole pass"] = run_forward
    calls["backward", "whole pass"] = run_backward
    library = _library_products(case, dtype, device)
    calls |= {("forward", f"library {name}"): call for name, call in library.items()}
    begin("timing")
    rows = []
    for (passes, name), samples in interleave(calls, Timer(device), rounds).items():
        recorder = forward if passes == "forward" else backward
        rows.append(
            {
                "case": case.name,
                "kind": case.kind,
                "dtype": dtype_name,
                "pass": passes,
                "kernel": name,
                "launches": len(recorder.launches.get(name, ())),
                "options": recorder.options.get(name, {}),
                "time_ms": quantiles(samples),
            }
        )
        flop = _flop(case, name, passes)
        if flop is not None:
            rate = flop / rows[-1]["time_ms"]["p50"] / 1e9
            rows[-1] |= {"tflops": rate, "share_of_gemm": rate / gemm if gemm else None}
    return rows


def _whole_passes(
    case: Case | GateCase, dtype: torch.dtype, device: torch.device
) -> tuple[Callable[[], Any], Callable[[Any], Callable[[], Any]]]:
    """The forward of the backend triton, and what makes the backward of its result."""
    if isinstance(case, GateCase):
        from nlkernels.ops.gate import triton as backend

        x, weight, grad = features.make_operands(case, dtype, device)
        d_context = grad.flatten(2).sum(-1)
        return (
            lambda: backend.forward(x, weight),
            lambda context: lambda: backend.backward(d_context, x, weight, context),
        )
    query, key, value, grad = make_operands(case, dtype, device, seed=0)
    backend, scale = _backend(case.kind), (case.scale,)
    if case.kind == "concat":
        query, key, scale = query.squeeze(2), key.squeeze(2), ()
    operands = (query, key, value)

    def prepared(result: Any) -> Callable[[], Any]:
        kept = result if isinstance(result, tuple) else ()
        # The backward of a softmax wants the output, too.
        kept = kept[1:] if case.kind == "dot_product" else kept
        return lambda: backend.backward(grad, *operands, *kept, *scale)

    return lambda: backend.forward(*operands, *scale), prepared


def _backend(kind: str) -> Any:
    op = "softmax" if kind == "gaussian" else kind
    return importlib.import_module(f"nlkernels.ops.{op}.triton")


def _library_products(
    case: Case | GateCase, dtype: torch.dtype, device: torch.device
) -> dict[str, Callable[[], Tensor]]:
    """What a library's products of the same sizes take: the second one; dot_product by two."""
    if isinstance(case, GateCase):
        return {}
    query, key, value, _ = make_operands(case, dtype, device, seed=0)
    found = {}
    if case.batch * case.n * case.m * dtype.itemsize <= LIBRARY_MIB << 20:
        scores = torch.randn(case.batch, case.n, case.m, device=device)
        weights = torch.softmax(scores, -1).to(dtype)
        found["product of weights and value"] = lambda: weights @ value
    if case.kind == "dot_product":
        found["products in the linear order"] = lambda: query @ (key.mT @ value)
        found["products in the quadratic order"] = lambda: (query @ key.mT) @ value
    return found


def _in_order(launches: list[Callable[[], object]]) -> Callable[[], object]:
    def run() -> None:
        for launch in launches:
            launch()

    return run


def _flop(case: Case | GateCase, name: str, passes: str) -> int | None:
    """Products that a row computes; None where it reads and writes, or computes fewer."""
    if isinstance(case, GateCase) or case.kind == "concat":
        return None
    pair = 2 * case.batch * case.n * case.m
    if name == "whole pass":
        forward = case.flop("forward")
        return forward if passes == "forward" else case.flop("forward_backward") - forward
    if name.startswith("library product of"):
        return pair * case.v
    return pair * _PRODUCTS[name](case) if name in _PRODUCTS else None


def configuration_rows(
    case: Case | RegionCase,
    dtype_name: str,
    device: torch.device,
    *,
    rounds: int,
    gemm: float | None,
    begin: Callable[[str], None],
    lost: Mapping[str, str],
) -> list[dict[str, Any]]:
    """Rows of the backend triton with every candidate of every kernel that the case uses."""
    dtype = getattr(torch, dtype_name)
    found = []
    for passes in ("forward", "forward_backward"):
        problem, call, judge, shape = _prepared(case, dtype, device, passes)
        calls = {}
        for kernel, candidates in _kernels(case, passes):
            for config in candidates(problem, _launch.architecture(device)):
                name = f"{kernel}: {_short(config)}"
                reason = lost.get(name, "")
                calls[name] = Call(_forced(call, kernel, config), reason, status="failed")
        head = {
            "case": case.name,
            "kind": case.kind,
            "dtype": dtype_name,
            "pass": passes,
            "shape": shape,
        }
        rows = compare(head, calls, judge, device, rounds=rounds, begin=begin)
        derive(rows, case.flop(passes), gemm if isinstance(case, Case) else None)
        found += rows
    return found


def _prepared(
    case: Case | RegionCase, dtype: torch.dtype, device: torch.device, passes: str
) -> tuple[Any, Callable[[], Any], Judging, dict[str, int]]:
    """Problem as kernels see it, the call, its judge, and the sizes."""
    if isinstance(case, RegionCase):
        from nlkernels.ops.region.problem import RegionProblem

        operands = features.make_operands(case, dtype, device)
        call = features.step(region.FUNCTIONS["triton"], operands, passes)
        problem = RegionProblem.of(*operands[:2])
        return problem, call, region.RegionJudge(operands, passes), case.shape
    operands = make_operands(case, dtype, device, seed=0)
    call = step(GPU_PROVIDERS["triton"].function(case.kind), case, operands, passes)
    shape = {"B": case.batch, "N": case.n, "M": case.m, "D": case.d, "V": case.v}
    return Problem.of(*operands[:3]), call, Judge(case, operands, passes), shape


def _kernels(case: Case | RegionCase, passes: str) -> list[tuple[str, Any]]:
    from nlkernels.ops.softmax import triton, triton_backward, triton_fused, triton_staged

    if isinstance(case, RegionCase):
        from nlkernels.ops.region.triton import KERNELS

        # The forward's kernel computes the gradient of x too.
        backward = passes == "forward_backward"
        return [item for item in KERNELS.items() if backward == (item[0] != "region_forward")]
    narrow = max(case.d, case.v) <= triton.FUSED_DEPTH
    if case.kind in ("relu", "dot_product"):
        forward = "quadratic_fused" if narrow else "quadratic_weights"
        name = forward if passes == "forward" else "quadratic_d_scores"
        return [(name, _backend(case.kind).KERNELS[name])]
    if case.kind == "concat":
        return list(_backend("concat").KERNELS.items())
    if passes == "forward_backward":
        return list(triton_backward.KERNELS.items())
    return list((triton_fused if narrow else triton_staged).KERNELS.items())


def _forced(call: Callable[[], Any], kernel: str, config: Any) -> Callable[[], Any]:
    def run() -> Any:
        with _tune.forced({kernel: config}):
            return call()

    return run


def _short(config: Any) -> str:
    return " ".join(f"{name}={value}" for name, value in config._asdict().items() if value)
