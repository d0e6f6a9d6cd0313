"""Are kernels right on this machine? Verdicts of verification, and verification itself.

A backend of `_operations.VERIFIED` runs by itself on a GPU only where its kernels are known to be
right: by a committed result (`verified.json`), by a verdict of this machine in the cache, or by
one made at the first use, outside of tracing and capture. A verdict holds for an operation,
backend, pass, dtype (and precision of float32), head size and compiler; a kernel that fails
switches itself off: `auto` takes the next backend, and a call that names it is refused with the
reason. Kernels of `_operations.ISOLATED` are verified in a process of their own.

Verification: the operation's suite of small problems, with memory poisoned by NaN, every result
against float64 by the rule of `_rule`, and once more bitwise; on GPUs some in every configuration,
as larger problems run in others. A backward gets by turns what plain PyTorch and what the kernels'
own forward keep: where the two do not fit together, it is the backward that is switched off. A
forward that is known to be wrong keeps nothing for it, as it never runs.
"""

from __future__ import annotations

import contextlib
import functools
import json
import subprocess
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from nlkernels import _cache, _cuda, _device, _launch, _operations, _paths, _rule, _tune
from nlkernels._spec import autocasts, describe

UNVERIFIED = "unverified on this GPU: nlk verify"
SHIPPED = "verified.json"

_lock = threading.RLock()
_held = 0
# Verdicts that could not be found; not asked for again in this process.
_postponed: set[tuple[str, str]] = set()
_POISONED = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
# What may come of a full disk, a full memory or a missing compiler says nothing about a kernel.
_ENVIRONMENT = (torch.OutOfMemoryError, OSError, ImportError, subprocess.SubprocessError)
_MISSING = ("out of memory", "C compiler")
# Another thread's verification is not waited for longer: autograd may make it wait for this one.
_PATIENCE_S = 60


class CannotJudge(Exception):
    """Verification itself broke off, by want of memory for example: no word about the kernel."""


def verdict(op: str, backend: str, problem: Any, direction: str) -> str:
    """What verification found wrong with a kernel; "" where it is right or was never verified."""
    row = _row(op, backend, problem, direction)
    return "" if row is None else row["reason"]


def is_right(op: str, backend: str, problem: Any) -> bool:
    """Whether both passes are known to be right."""
    return all(_is_known_right(op, backend, problem, d) for d in ("forward", "backward"))


def distrust(op: str, backend: str, problem: Any, direction: str) -> str:
    """Why `auto` must not take a kernel; "" when it may. Verifies it at the first use.

    While work is being traced or captured, and within `held`, nothing is verified.
    """
    if problem.device not in _device.MEASURED:
        return verdict(op, backend, problem, direction)
    row = _row(op, backend, problem, direction)
    if row is not None:
        return row["reason"]
    if _is_known_right(op, backend, problem, direction):
        return ""
    device = _device.present(problem.device, problem.index)
    if device is None or _held or _launch.capturing(device):
        return UNVERIFIED
    head = _operations.OPERATIONS[op].head(problem)
    return verify(op, backend, head, problem.dtype, direction, device)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Within the context, nothing is verified at its first use."""
    global _held
    _held += 1
    try:
        yield
    finally:
        _held -= 1


def verify(
    op: str,
    backend: str,
    head: tuple[int, ...],
    dtype: torch.dtype,
    direction: str,
    device: torch.device,
    again: bool = False,
) -> str:
    """Verify one pass of a backend on a device, remember and return what is wrong ("": nothing).

    Args:
        op: name of the operation.
        backend: one that runs inside the operator.
        head: sizes that decide which kernel runs, as `Operation.head` buckets them.
        dtype: of the operands.
        direction: "forward" or "backward".
        device: where it shall run.
        again: also where there is a verdict already.

    Raises:
        CannotJudge: with `again`, where no verdict could be found.
    """
    name = _name(op, backend, direction, dtype, head, device)
    if not _lock.acquire(timeout=_PATIENCE_S):
        if again:
            raise CannotJudge("another thread is verifying; try again")
        return UNVERIFIED
    try:
        # Another thread may have done it meanwhile.
        row = _cache.section(device)["verdicts"].get(name)
        if row is not None and not again:
            return row["reason"]
        if (name, str(device)) in _postponed and not again:
            return UNVERIFIED
        try:
            kept = _cache.section(device)["verdicts"].get(
                _name(op, backend, "forward", dtype, head, device), {"reason": ""}
            )
            case = (op, backend, head, dtype, direction, device, not kept["reason"])
            reason = _judge(backend, device)(*case)
        except CannotJudge as error:
            if again:
                raise
            _postponed.add((name, str(device)))
            return f"{UNVERIFIED} ({error})"
        if reason:
            reason = f"failed verification on {_device.name(device)}: {reason}"
        row = {
            "op": op,
            "backend": backend,
            "pass": direction,
            "dtype": _device.label(dtype),
            "head": list(head),
            "reason": reason,
        }
        _cache.update(device, "verdicts", {name: row})
    finally:
        _lock.release()
    if reason:
        warnings.warn(
            f"nlkernels: the {direction} of backend {backend!r} of {op} {reason}; it is switched "
            "off here and other backends run, please report this with the output of nlk info",
            RuntimeWarning,
            stacklevel=2,
        )
    return reason


def _judge(backend: str, device: torch.device) -> Callable[..., str]:
    """`judge`, here or in a process of its own."""
    if backend not in _operations.ISOLATED or device.type not in _device.MEASURED:
        return judge
    from nlkernels import _isolated

    return _isolated.judge


def judge(
    op: str,
    backend: str,
    head: tuple[int, ...],
    dtype: torch.dtype,
    direction: str,
    device: torch.device,
    keeps: bool = True,
) -> str:
    """Run the suite; return what is wrong, "" when all is right.

    `keeps`: the kernels' own forward may run, which keeps tensors for their backward.

    Raises:
        CannotJudge: memory ran out, something is missing on this machine, or plain PyTorch could
            not run the suite either.
    """
    suite = _operations.loaded(_operations.OPERATIONS[op].suite)
    with undisturbed(device):
        try:
            plain, module = (_operations.implementation(op, name) for name in ("chunked", backend))
        except Exception as error:
            raise CannotJudge(one_line(error)) from error
        # Triton's interpreter takes minutes for these.
        large = suite.large(head) if device.type in _device.MEASURED else ()
        for number, trial in enumerate((*large, *suite.trials(head))):
            keeping = (plain, module if keeps else plain)[number % 2]
            modules, thorough = (plain, keeping, module), number < len(large)
            wrong = _try(suite, trial, dtype, direction, device, modules, thorough)
            if wrong:
                return f"{wrong}, {trial} {str(dtype).removeprefix('torch.')}"
    return ""


def _try(suite, trial, dtype, direction, device, modules, thorough) -> str:
    """What is wrong with one pass, in all its configurations if `thorough`.

    `modules` are plain PyTorch, what runs the forward of a backward, and what is judged.
    """
    plain, keeping, module = modules
    try:
        *tensors, grad = suite.operands(trial, dtype, device)
        truth, same = (
            _defined(suite, trial, *(t.to(kind) for t in (*tensors, grad)))
            for kind in (torch.float64, dtype)
        )
    except Exception as error:
        raise CannotJudge(one_line(error)) from error

    def run() -> dict[str, torch.Tensor]:
        if direction == "forward":
            with _Poison():
                return {"out": suite.forward(module, trial, *tensors)[0]}
        kept = _kept(suite, keeping, plain, trial, tensors)
        with _Poison():
            grads = suite.backward(module, trial, grad, tuple(tensors), kept)
        return dict(zip(suite.GRADIENTS, grads, strict=True))

    number = 0
    while True:
        try:
            with torch.no_grad(), _tune.numbered(number) as candidates:
                results, repeated = run(), run()
            _device.synchronize(device)
            wrong = _compare(results, repeated, same, truth, dtype)
        except Exception as error:
            text = one_line(error)
            if isinstance(error, _ENVIRONMENT) or any(word in text for word in _MISSING):
                raise CannotJudge(text) from error
            wrong = text
        if wrong:
            return f"{wrong}, configuration {number}" if number else wrong
        number += 1
        if not thorough or number >= max(candidates.values(), default=0):
            return ""


def _compare(results, repeated, same, truth, dtype) -> str:
    for name, got in results.items():
        expected = (truth[name].shape, dtype)
        if (got.shape, got.dtype) != expected:
            return f"{name} is {describe(got)}, not {tuple(expected[0])} {dtype}"
        factor = _rule.OUTPUT if name == "out" else _rule.GRADIENT
        excess = _rule.excess(got, same[name], truth[name], factor)
        if excess is not None:
            return f"{name} {excess}"
        if not torch.equal(got, repeated[name]):
            return f"{name} differs between two runs"
    return ""


def _kept(suite, module, plain, trial, tensors) -> tuple[torch.Tensor, ...]:
    """What a forward keeps for the backward; plain PyTorch's where that forward breaks off."""
    try:
        return suite.forward(module, trial, *tensors)
    except _ENVIRONMENT:
        raise
    except Exception:
        return suite.forward(plain, trial, *tensors)


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _defined(suite, trial, *tensors: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output and gradients by the definition, in the dtype of the tensors."""
    *inputs, grad = (t.detach() for t in tensors)
    inputs = [t.requires_grad_() for t in inputs]
    with torch.enable_grad():
        out = suite.definition(trial, *inputs)
    grads = torch.autograd.grad(out, inputs, grad)
    return {"out": out.detach(), **dict(zip(suite.GRADIENTS, grads, strict=True))}


class _Poison(TorchDispatchMode):
    """Fills memory that is allocated without a value with NaN, so that reading it shows."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **({} if kwargs is None else kwargs))
        allocates = func.overloadpacket.__name__ in _POISONED
        return result.fill_(float("nan")) if allocates and result.is_floating_point() else result


@contextlib.contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Run outside of the caller's modes: autocast, inference, activation checkpoints and so on."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_disable_current_modes())
        # A checkpoint counts what is saved within it, and again when it recomputes.
        stack.enter_context(saved_tensors_hooks(torch.Tensor.detach, lambda tensor: tensor))
        stack.enter_context(torch.inference_mode(False))
        if autocasts(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        yield


def _row(op: str, backend: str, problem: Any, direction: str) -> Any:
    device = _device.present(problem.device, problem.index)
    if device is None:
        return None
    head = _operations.OPERATIONS[op].head(problem)
    name = _name(op, backend, direction, problem.dtype, head, device)
    return _cache.section(device)["verdicts"].get(name)


def _is_known_right(op: str, backend: str, problem: Any, direction: str) -> bool:
    device = _device.present(problem.device, problem.index)
    if device is None:
        return False
    row = _row(op, backend, problem, direction)
    if row is not None:
        return not row["reason"]
    if not _shipped():
        return False
    here = {
        "architecture": f"sm_{_launch.architecture(device)}",
        "compiler": _compiler(backend, device),
        "sources": _cache.package_hash("." if backend == "cuda" else folder(op)),
        "op": op,
        "backend": backend,
        "pass": direction,
        "dtype": _device.label(problem.dtype),
        "head": list(_operations.OPERATIONS[op].head(problem)),
    }
    return here in _shipped()


def folder(op: str) -> str:
    """Folder of an operation's sources, that of its suite; the package where it has no name."""
    suite = _operations.OPERATIONS[op].suite
    return "/".join(suite.split(".")[1:-1]) if isinstance(suite, str) else "."


@functools.cache
def _shipped() -> list[dict[str, Any]]:
    """Kernels that a committed result of a GPU verified."""
    return json.loads((_paths.PACKAGE / SHIPPED).read_text())


def _compiler(backend: str, device: torch.device) -> str:
    """What makes the machine code of a backend."""
    if backend == "cuda":
        return f"CUDA {_cuda.toolkit(device)}"
    return f"triton {_device.triton_version()}"


def _name(op, backend, direction, dtype, head, device) -> str:
    name = f"{op} {backend} {direction} {_device.label(dtype)} {'x'.join(map(str, head))}"
    # Triton's version is in the section's name.
    return f"{name} {_compiler(backend, device)}" if backend == "cuda" else name
