"""Which backend runs a problem, and why the others do not."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch

from nlkernels import _cache, _device, _ext
from nlkernels._operations import OPERATIONS, VERIFIED, implementation
from nlkernels._spec import Problem

# Called as recorder(op, problem, operands) for every problem that reaches dispatch.
recorder: Callable[[str, Any, tuple[torch.Tensor, ...]], None] | None = None

# What runs on CPUs once the native module is loaded, by all that decides: a block asks sixteen
# times a step. Each with the operation as it was, which tests and users may register again.
_answers: dict[tuple, tuple[Any, Any]] = {}
_MOST_ANSWERS = 2**12


class Explanation(NamedTuple):
    """Backend that runs a problem, with the reason for it and against each other one.

    Attributes:
        problem: sizes, dtype and device, as text.
        backend: the one that runs; where the backward has another, its reason says so.
        reasons: backend name -> why it runs, or why it does not.
    """

    problem: str
    backend: str
    reasons: dict[str, str]

    def __str__(self) -> str:
        width = max(map(len, self.reasons))
        lines = [
            f"{'->' if name == self.backend else '  '} {name:<{width}}  {reason}"
            for name, reason in self.reasons.items()
        ]
        return "\n".join([self.problem, *lines])


def outside(op: str, *operands: torch.Tensor) -> str:
    """What runs a call of backend "auto": "sdpa" as a composite, or the operator's own "auto".

    Only on GPUs does torch's attention run outside the operator.
    """
    operation = OPERATIONS[op]
    problem = operation.describe(*operands)
    if problem.device not in _device.MEASURED or "sdpa" not in operation.backends:
        return "auto"
    _record(op, problem, operands)
    trains = torch.is_grad_enabled() and any(t.requires_grad for t in operands)
    chosen = choose(op, problem, direction="training" if trains else "forward")
    return "sdpa" if chosen == "sdpa" else "auto"


def module(op: str, backend: str, direction: str, *operands: torch.Tensor) -> Any:
    """The backend module that runs one pass inside the opaque operator.

    Raises:
        NotImplementedError: `backend` is named and does not serve the operands.
    """
    operation = OPERATIONS[op]
    problem = operation.describe(*operands)
    _record(op, problem, operands)
    is_native = problem.device == "cpu" and "cpu" not in _device.MEASURED
    asked = _ext.loaded_for() if is_native else None
    if asked is None:
        return _module(op, backend, direction, problem)
    repeatable = torch.are_deterministic_algorithms_enabled()
    key = (op, backend, direction, problem, asked, repeatable)
    known, found = _answers.get(key, (None, None))
    if known is not operation:
        found = _module(op, backend, direction, problem)
        if len(_answers) >= _MOST_ANSWERS:
            _answers.clear()
        _answers[key] = operation, found
    return found


def _module(op: str, backend: str, direction: str, problem: Any) -> Any:
    if backend == "auto":
        backend = choose(op, problem, inside(op, problem.device), direction)
        if backend == "cpp" and _ext.prepare():
            # From now on `missing` gives the reason.
            backend = choose(op, problem, inside(op, problem.device), direction)
    elif reasons := against(op, backend, problem, direction):
        raise NotImplementedError(refusal(op, backend, problem, reasons))
    return implementation(op, backend)


def inside(op: str, device: str) -> list[str]:
    """Backends that run inside the operator on a type of device.

    On GPUs torch's attention is none of them: it keeps tensors of its own for its backward.
    """
    return [b for b in OPERATIONS[op].inside if b != "sdpa" or device == "cpu"]


def _record(op: str, problem: Any, operands: tuple[torch.Tensor, ...]) -> None:
    if torch.compiler.is_compiling():
        return
    if recorder is not None:
        recorder(op, problem, operands)
    elif problem.device in _device.MEASURED and _cache.mode() == "full":
        from nlkernels import _warmup

        _warmup.at_first_use(op, problem, operands)


def refusal(op: str, backend: str, problem: Any, reasons: list[str]) -> str:
    """The message of a backend that was asked for and cannot run."""
    default = "nonlocal_attention" if isinstance(problem, Problem) else op
    function = OPERATIONS[op].function or default
    return (
        f"{function}: expected a problem that backend {backend!r} of {op} serves, got "
        f"{problem}: {'; '.join(reasons)}; use backend='auto'"
    )


def against(op: str, backend: str, problem: Any, direction: str = "forward") -> list[str]:
    """Why a backend that is named cannot run a problem; empty when it can."""
    reasons = OPERATIONS[op].supports(backend, problem)
    if not reasons and backend in VERIFIED:
        from nlkernels import _trust

        passes = ("forward", "backward") if direction == "training" else (direction,)
        verdicts = (_trust.verdict(op, backend, problem, each) for each in passes)
        return [reason for reason in verdicts if reason]
    return reasons


def choose(
    op: str,
    problem: Any,
    among: Collection[str] | None = None,
    direction: str = "forward",
) -> str:
    """The fastest backend for `problem` by the measurements of this machine, else the shipped.

    Args:
        op: name of the operation.
        problem: what is to be computed.
        among: only these backends, those that run inside the opaque operator.
        direction: "forward", "backward", or "training" for both together; inside the operator the
            two passes are chosen for separately.
    """
    order, _ = _order(op, problem, direction)
    for backend in order:
        if (among is None or backend in among) and _runs(op, backend, problem, direction):
            return backend
    return "chunked"


def _runs(op: str, backend: str, problem: Any, direction: str) -> bool:
    if backend not in VERIFIED:
        return not OPERATIONS[op].supports(backend, problem)
    passes = ("forward", "backward") if direction == "training" else (direction,)
    if torch.compiler.is_compiling():
        # A verdict says that the kernel ran: nothing else may be asked while tracing.
        return all(_traced_verdict(op, backend, problem, each) for each in passes)
    if OPERATIONS[op].supports(backend, problem):
        return False
    from nlkernels import _trust

    return all(not _trust.distrust(op, backend, problem, each) for each in passes)


def preference(op: str, problem: Any, direction: str = "forward") -> list[tuple[str, str]]:
    """Backends from the fastest on, each with the reason to take it.

    A measurement speaks for the first: the others run where those before them cannot.
    """
    order, because = _order(op, problem, direction)
    later = f"next after {order[0]}, which comes first here but cannot run ({because})"
    return [(backend, later if number else because) for number, backend in enumerate(order)]


def _order(op: str, problem: Any, direction: str) -> tuple[list[str], str]:
    """Backends from the fastest on, and the measurement that says so."""
    repeatable = torch.are_deterministic_algorithms_enabled()
    row = measured(op, problem, direction)
    if row is not None:
        # Torch's kernels need not repeat bitwise.
        order = [b for b in row["order"] if not (b == "sdpa" and repeatable)]
        return order, row["because"]
    single = "forward" if direction == "training" else direction
    for row in OPERATIONS[op].table.get(problem.device, ()):
        fits = problem.dtype_name in row["dtypes"] and row.get("pass", single) == single
        if fits and "scores_up_to" in row:
            fits = problem.queries * problem.keys <= row["scores_up_to"]
        if fits and "depth_from" in row:
            fits = problem.depth >= row["depth_from"]
        if fits and "isas" in row:
            # Nothing is traced on CPUs, whose operators are opaque.
            fits = not torch.compiler.is_compiling() and _ext.isa_name() in row["isas"]
        if fits and "deterministic" in row:
            fits = row["deterministic"] == repeatable
        if fits:
            return list(row["order"]), row["because"]
    return ["chunked"], "serves every device; nothing was measured on this one"


def measured(op: str, problem: Any, direction: str) -> Mapping[str, Any] | None:
    """What `warmup` measured on this machine for problems like this one, None without."""
    if problem.device not in _device.MEASURED:
        return None
    found = _section(problem)
    if found is None:
        return None
    operation = OPERATIONS[op]
    head, sizes = operation.head(problem), operation.sizes(problem)
    for row in found["timings"].values():
        fits = (row["op"], row["pass"]) == (op, direction) and _has_dtype(row, problem)
        if fits and _equal(row["head"], head) and _inside(row["sizes"], sizes):
            return row
    return None


def _section(problem: Any) -> Any:
    if torch.compiler.is_compiling():
        return _cache.known(problem.device, problem.index)
    device = _device.present(problem.device, problem.index)
    return None if device is None else _cache.section(device)


def _traced_verdict(op: str, backend: str, problem: Any, direction: str) -> bool:
    """Whether a backend is known to be right, from memory alone."""
    found = _cache.known(problem.device, problem.index)
    if found is None:
        return False
    head, right = OPERATIONS[op].head(problem), False
    for row in found["verdicts"].values():
        fits = (row["op"], row["backend"], row["pass"]) == (op, backend, direction)
        if fits and _has_dtype(row, problem) and _equal(row["head"], head):
            if row["reason"]:
                return False
            right = True
    return right


def _has_dtype(row: Mapping[str, Any], problem: Any) -> bool:
    if torch.compiler.is_compiling():
        # How float32 is multiplied cannot be asked while tracing: every verdict has to be good.
        return row["dtype"].split(" ")[0] == problem.dtype_name
    return row["dtype"] == _device.label(problem.dtype)


def _equal(wanted: Collection[int], sizes: Collection[int]) -> bool:
    return all(a == b for a, b in zip(wanted, sizes, strict=True))


def _inside(ranges: Collection[tuple[int, int]], sizes: Collection[int]) -> bool:
    return all(low <= size <= high for (low, high), size in zip(ranges, sizes, strict=True))


def explain(op: str, problem: Any, requested: str) -> Explanation:
    """Say for every backend of `op` why it runs `problem` or why not."""
    operation = OPERATIONS[op]
    if requested != "auto" and (against_it := against(op, requested, problem)):
        raise NotImplementedError(refusal(op, requested, problem, against_it))
    order = dict(preference(op, problem))
    chosen = choose(op, problem) if requested == "auto" else requested
    # First, as it may verify: what is known about the kernels is said below.
    passes = _other_passes(op, problem, chosen) if requested == "auto" else ""
    refused = {backend: _refused(op, backend, problem) for backend in operation.backends}
    reasons = {}
    for backend, reason in refused.items():
        if reason:
            reasons[backend] = reason
        elif requested != "auto":
            reasons[backend] = "asked for" if backend == chosen else "available, not asked for"
        elif backend == chosen:
            reasons[backend] = order.get(backend, "nothing faster serves this problem")
        elif backend == "reference":
            reasons[backend] = f"{operation.drawback}; runs only when asked for"
        elif backend in order:
            reasons[backend] = _compared(backend, chosen, order)
        else:
            reasons[backend] = f"not measured to be faster than {chosen} here"
        if backend in VERIFIED and not reason:
            reasons[backend] += _standing(op, backend, problem)
    reasons[chosen] += passes
    return Explanation(f"{op}: {problem}", chosen, reasons)


def _compared(backend: str, chosen: str, order: Mapping[str, str]) -> str:
    """Why a backend of an order does not run, but another one."""
    places = list(order)
    if chosen not in order or places.index(backend) < places.index(chosen):
        return f"would come before {chosen}"
    if chosen != places[0]:
        return f"comes after {chosen}"
    # An order that nobody measured says so.
    behind = "comes after" if "unverified" in order[chosen] else "slower than"
    return f"{behind} {chosen}: {order[chosen]}"


def _refused(op: str, backend: str, problem: Any) -> str:
    """Why neither pass, or one of them, cannot run in a backend."""
    forward, backward = (against(op, backend, problem, d) for d in ("forward", "backward"))
    return "; ".join(dict.fromkeys([*forward, *backward]))


def _standing(op: str, backend: str, problem: Any) -> str:
    """What is known about kernels that serve a problem on this machine."""
    from nlkernels import _trust

    if problem.device not in _device.MEASURED:
        return ""
    if not _trust.is_right(op, backend, problem):
        return f"; serves this problem; unverified on this GPU: nlk verify --backend {backend}"
    row = measured(op, problem, "forward")
    if row is None or not row["configs"]:
        return "; configurations: shipped defaults, not measured here (nlkernels.warmup)"
    time = f", {row['ms'][backend]:.3g} ms" if backend in row["ms"] else ""
    tuned = ", ".join(f"{kernel} {text}" for kernel, text in row["configs"].items())
    return f"; configurations: measured by warmup ({tuned}{time})"


def _other_passes(op: str, problem: Any, chosen: str) -> str:
    """Where the backward, or a call with gradients, runs in another backend."""
    if chosen == "sdpa" and problem.device != "cpu":
        trained = choose(op, problem, direction="training")
        return "" if trained == "sdpa" else f"; with gradients {trained} runs"
    backward = choose(op, problem, inside(op, problem.device), "backward")
    if backward == chosen:
        return ""
    why = dict(preference(op, problem, "backward")).get(backward, "nothing faster serves it")
    return f"; the backward runs in {backward}: {why}"
