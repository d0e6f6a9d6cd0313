"""Measuring on this machine: configurations of kernels, and the backends of the problems met."""

from __future__ import annotations

import contextlib
import itertools
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from nlkernels import _cache, _device, _isolated, _launch, _operations, _select, _trust, _tune
from nlkernels._spec import describe

PASSES = ("forward", "backward")
# Buckets that were measured at their first use, or could not be.
_tried: set[str] = set()


class Entry(NamedTuple):
    """What was found out about one problem.

    Attributes:
        op: name of the operation.
        problem: sizes, dtype and device.
        verdicts: "triton forward" -> "" where it is right, else what is wrong.
        configs: kernel -> its configuration, as text.
        ms: "forward", "backward" or "training" (both) -> backend -> median time.
        note: why nothing was measured, or what was left out.
    """

    op: str
    problem: Any
    verdicts: dict[str, str]
    configs: dict[str, str]
    ms: dict[str, dict[str, float]]
    note: str = ""

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.problem}"]
        lines += [f"  {name}: {wrong or 'verified'}" for name, wrong in self.verdicts.items()]
        lines += [f"  {kernel}: {config}" for kernel, config in self.configs.items()]
        lines += [f"  {name}: {_times(times)}" for name, times in self.ms.items()]
        return "\n".join([*lines, f"  {self.note}"] if self.note else lines)


class Report(NamedTuple):
    """What `warmup` met and measured; `print` shows it."""

    device: str
    entries: tuple[Entry, ...]

    def __str__(self) -> str:
        found = [str(entry) for entry in self.entries]
        return "\n".join([self.device, *(found or ["the model met no non-local operation"])])


def warmup(
    model: nn.Module,
    sample_shape: Sequence[int],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    backward: bool = True,
) -> Report:
    """Compile, verify and measure what a model needs, so that its first step is not the slow one.

    Runs the model once, forward, on random input, and measures on operands of the same sizes and
    strides what each non-local operation in it met: kernels are verified (those of backend "cuda"
    in a process of their own), the configurations of the right ones timed, then the backends. What
    is the fastest is used from then on, in later processes too.

    Args:
        model: on its device; parameters, buffers, gradients, modes and random states stay.
        sample_shape: shape of the model's input, such as (8, 3, 32, 224, 224).
        device: of the input; None is that of the model's first parameter.
        dtype: of the input; None is that of the model's first floating-point parameter.
        backward: measure gradients as well.

    Returns:
        A report; on a CPU it lists the problems, whose choices are shipped.

    Raises:
        TypeError: `model` is no module.
        ValueError: `sample_shape` is no shape.
        RuntimeError: called while torch.compile traces or a CUDA graph is captured.
        What the model raises for such an input.

    Memory:
        That of the model's forward without gradients; then, for one problem at a time, copies of
        the operands, their gradients and what the backends need.

    Example:
        >>> import nlkernels
        >>> block = nlkernels.NonLocalBlock3d(8)
        >>> report = nlkernels.warmup(block, (1, 8, 2, 6, 6))
        >>> [str(entry.problem) for entry in report.entries if entry.op == "softmax"]
        ['B=1 N=72 M=18 D=4 V=4 float32 on cpu']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"warmup: expected a module, got {describe(model)}; pass the model itself")
    if not all(isinstance(n, int) and n >= 1 for n in sample_shape):
        raise ValueError(
            f"warmup: expected sample_shape to be positive sizes, got {sample_shape!r}; pass the "
            "shape of the model's input"
        )
    first = next(model.parameters(), torch.empty(0, device="cpu"))
    floating = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    device = torch.device(first.device if device is None else device)
    if _launch.capturing(device):
        raise RuntimeError(
            "warmup: expected to run by itself, got a call while work is traced or captured; call "
            "it before, when the model is on its device"
        )
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(*sample_shape, generator=generator, device="cpu")
    sample = sample.to(device, floating if dtype is None else dtype)
    entries = []
    for op, problem, operands in _met(model, sample):
        entries.append(_measure(op, problem, operands, PASSES if backward else PASSES[:1]))
    return Report(_device.name(device), tuple(entries))


def at_first_use(op: str, problem: Any, operands: tuple[Any, ...]) -> None:
    """Measure a problem whose bucket was not, outside of tracing and capture."""
    seen = ("seen", op, problem)
    if seen in _cache.memo or _launch.capturing(operands[0].device):
        return
    _cache.remember(seen, True)
    name = _bucket(op, "any", problem)
    if name in _tried:
        return
    _tried.add(name)
    if _select.measured(op, problem, "forward") is None:
        _measure(op, problem, _Layout.of(operands), PASSES)


class _Form(NamedTuple):
    """Shape and strides of a tensor."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Layout(NamedTuple):
    """How operands lay in memory, to make others like them; sizes among them are kept as such."""

    forms: tuple[Any, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, operands: tuple[Any, ...]) -> _Layout:
        """Describe operands, the first of which is a tensor."""
        forms = []
        for operand in operands:
            if isinstance(operand, torch.Tensor):
                forms.append(_Form(tuple(operand.shape), operand.stride()))
            else:
                forms.append(tuple(operand) if isinstance(operand, list) else operand)
        return cls(tuple(forms), operands[0].dtype, operands[0].device)

    def drawn(self) -> tuple[Any, ...]:
        """Random tensors of these shapes and, but for overlapping elements, these strides."""
        return tuple(self._drawn(f) if isinstance(f, _Form) else f for f in self.forms)

    def _drawn(self, form: _Form) -> torch.Tensor:
        shape, stride = form
        order = sorted(range(len(shape)), key=stride.__getitem__, reverse=True)
        dense = torch.empty([shape[i] for i in order], dtype=self.dtype, device=self.device)
        return _draw(dense).permute([order.index(i) for i in range(len(shape))])


def _draw(tensor: torch.Tensor) -> torch.Tensor:
    """Normal numbers, by a generator of its own: the program's stays as it is."""
    return tensor.normal_(generator=torch.Generator(tensor.device).manual_seed(0))


def _met(model: nn.Module, sample: torch.Tensor) -> list[tuple[str, Any, _Layout]]:
    """The distinct problems that dispatch sees while the model runs."""
    met = {}

    def record(op: str, problem: Any, operands: tuple[Any, ...]) -> None:
        layout = _Layout.of(operands)
        met.setdefault((op, problem, layout), (op, problem, layout))

    with unchanged(model), torch.no_grad():
        before, _select.recorder = _select.recorder, record
        try:
            model(sample)
        finally:
            _select.recorder = before
    return list(met.values())


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Give back buffers and random states as they were."""
    kept = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    numpy = sys.modules.get("numpy")
    states: list[tuple[Callable, Any]] = [(random.setstate, random.getstate())]
    if numpy is not None:
        states.append((numpy.random.set_state, numpy.random.get_state()))
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        for restore, state in states:
            restore(state)
        with torch.no_grad():
            for module, name, buffer, content in kept:
                module._buffers[name] = buffer
                buffer.copy_(content)


def _measure(op: str, problem: Any, layout: _Layout, passes: tuple[str, ...]) -> Entry:
    operation, device = _operations.OPERATIONS[op], layout.device
    if device.type not in _device.MEASURED:
        return Entry(op, problem, {}, {}, {}, f"nothing to tune on a {device.type}")
    if operation.suite is None or 0 in operation.sizes(problem):
        return Entry(op, problem, {}, {}, {}, "nothing to choose")
    verdicts, right = {}, []
    served = [b for b in _operations.VERIFIED if b in operation.backends]
    served = [b for b in served if not operation.supports(b, problem)]
    with _isolated.kept():
        for backend, direction in itertools.product(served, passes):
            wrong = _trust.distrust(op, backend, problem, direction)
            verdicts[f"{backend} {direction}"] = wrong
            right += [] if wrong else [(backend, direction)]
    if _cache.mode() == "off":
        return Entry(op, problem, verdicts, {}, {}, "NLKERNELS_AUTOTUNE=off: nothing is timed")
    note, configs, times = "", {}, {}
    try:
        with _trust.undisturbed(device), torch.no_grad():
            trial, operands = _alike(op, layout)
            configs = _configure(op, trial, operands, right)
            times = _time(op, problem, trial, operands, passes, right)
    except Exception as error:
        # The model has run: it also does where this cannot be measured, for want of memory.
        note = f"measured in part, or not at all: {_trust.one_line(error)}"
    _store(op, problem, device, configs, times)
    return Entry(op, problem, verdicts, configs, times, note)


def _alike(op: str, layout: _Layout) -> tuple[Any, tuple[torch.Tensor, ...]]:
    """A trial of the suite like the problem that dispatch saw, and its operands.

    Where sizes stood for tensors, the suite draws them all.
    """
    suite = _operations.loaded(_operations.OPERATIONS[op].suite)
    seen = layout.drawn()
    trial = suite.like(seen)
    if all(isinstance(operand, torch.Tensor) for operand in seen):
        return trial, seen
    *operands, _ = suite.operands(trial, layout.dtype, layout.device)
    return trial, tuple(operands)


def _configure(op, trial, operands, right) -> dict[str, str]:
    """Time the configurations of all kernels that are right, keep and name the fastest."""
    suite, found = _operations.loaded(_operations.OPERATIONS[op].suite), {}
    for backend, direction in right:
        run = _pass(suite, trial, _operations.implementation(op, backend), direction, operands)
        with _tune.tuning() as tuned:
            run()
        found.update(tuned)
    _tune.keep(operands[0].device, found)
    return {t.kernel: _text(t) for t in found.values()}


def _pass(suite, trial, module, direction, operands) -> Callable[[], object]:
    """One pass of a backend that runs inside the operator."""
    if direction == "forward":
        return lambda: suite.forward(module, trial, *operands)
    kept = suite.forward(module, trial, *operands)
    grad = _draw(torch.empty_like(kept[0]))
    return lambda: suite.backward(module, trial, grad, operands, kept)


def _time(op, problem, trial, operands, passes, right) -> dict[str, dict[str, float]]:
    """Median times of every backend that may run, fastest first."""
    operation, device = _operations.OPERATIONS[op], operands[0].device
    suite = _operations.loaded(operation.suite)
    times: dict[str, dict[str, float]] = {direction: {} for direction in passes}
    outside = [b for b in operation.backends if b == "sdpa" and not operation.supports(b, problem)]
    inside = [b for b in _select.inside(op, device.type) if b != "sdpa"]
    inside = [b for b in inside if not operation.supports(b, problem)]
    for direction in passes:
        for backend in inside:
            if backend in _operations.VERIFIED and (backend, direction) not in right:
                continue
            run = _pass(suite, trial, _operations.implementation(op, backend), direction, operands)
            times[direction][backend] = _device.median_ms(run, device)
    for backend in outside:
        call = lambda b=backend: suite.call(b, *operands)  # noqa: E731
        times["forward"][backend] = _device.median_ms(call, device)
    if "backward" in passes:
        own = {b: times["forward"][b] + times["backward"][b] for b in times["backward"]}
        best = min(times["forward"][b] for b in inside if b in times["forward"])
        times["training"] = {min(own, key=own.__getitem__): best + min(times["backward"].values())}
        for backend in outside:
            run = _training(suite, backend, operands)
            times["training"][backend] = _device.median_ms(run, device)
    return {n: dict(sorted(t.items(), key=lambda pair: pair[1])) for n, t in times.items()}


def _training(suite, backend: str, operands) -> Callable[[], object]:
    inputs = [t.detach().requires_grad_() for t in operands]

    def run() -> None:
        with torch.enable_grad():
            out = suite.call(backend, *inputs)
            torch.autograd.grad(out, inputs, torch.ones_like(out))

    return run


def _store(op, problem, device, configs, times) -> None:
    operation = _operations.OPERATIONS[op]
    rows = {}
    for direction, backends in times.items():
        if backends:
            rows[_bucket(op, direction, problem)] = {
                "op": op,
                "pass": direction,
                "dtype": _device.label(problem.dtype),
                "head": list(operation.head(problem)),
                "sizes": [list(_range(n)) for n in operation.sizes(problem)],
                "order": list(backends),
                "because": f"measured on this GPU: {_times(backends)}",
                "ms": backends,
                "configs": configs,
            }
    if rows:
        _cache.update(device, "timings", rows)


def _bucket(op: str, direction: str, problem: Any) -> str:
    operation = _operations.OPERATIONS[op]
    head = "x".join(map(str, operation.head(problem)))
    sizes = " ".join(str(_range(n)[1]) for n in operation.sizes(problem))
    return f"{op} {direction} {_device.label(problem.dtype)} {head} up to {sizes}"


def _range(size: int) -> tuple[int, int]:
    """The powers of two around a size, as a closed range."""
    high = 1 << (size - 1).bit_length() if size > 0 else 0
    return high // 2 + 1 if high > 1 else high, high


def _times(backends: dict[str, float]) -> str:
    return ", ".join(f"{backend} {ms:.3g} ms" for backend, ms in backends.items())


def _text(tuned: _tune.Tuned) -> str:
    changed = tuned.config != tuned.default
    fields = " ".join(f"{k}={v}" for k, v in tuned.config._asdict().items() if v)
    return f"{fields} ({'measured' if changed else 'the default'}, {tuned.ms:.3g} ms)"
