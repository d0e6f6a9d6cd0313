"""Which backend runs a problem, and why the others do not."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch

from nlkernels._spec import Problem


class Operation(NamedTuple):
    """What dispatch knows of an operation; its `op` module registers it in `OPERATIONS`."""

    backends: tuple[str, ...]
    supports: Callable[[str, Problem], list[str]]
    inside: Mapping[str, Any]
    table: Mapping[str, tuple[Mapping[str, Any], ...]]


OPERATIONS: dict[str, Operation] = {}


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


def module(op: str, backend: str, direction: str, *operands: torch.Tensor) -> Any:
    """The backend module that runs one pass inside the opaque operator.

    Raises:
        NotImplementedError: `backend` is named and does not serve the operands.
    """
    problem = Problem.of(*operands)
    operation = OPERATIONS[op]
    if backend == "auto":
        # On GPUs torch's attention keeps tensors of its own: it is no backend inside the operator.
        inside = [b for b in operation.inside if b != "sdpa" or problem.device == "cpu"]
        backend = choose(op, problem, inside, direction)
    elif reasons := operation.supports(backend, problem):
        raise NotImplementedError(refusal(op, backend, problem, reasons))
    return operation.inside[backend]


def refusal(op: str, backend: str, problem: Problem, reasons: list[str]) -> str:
    """The message of a backend that was asked for and cannot run."""
    return (
        f"nonlocal_attention: expected a problem that backend {backend!r} of {op} serves, got "
        f"{problem}: {'; '.join(reasons)}; use backend='auto'"
    )


def choose(
    op: str,
    problem: Problem,
    inside: Collection[str] | None = None,
    direction: str = "forward",
) -> str:
    """The fastest backend for `problem` by the shipped measurements.

    Args:
        op: name of the operation.
        problem: what is to be computed.
        inside: only these backends, those that run inside the opaque operator.
        direction: "forward" or "backward"; the two passes are chosen for separately.
    """
    supports = OPERATIONS[op].supports
    for backend, _ in preference(op, problem, direction):
        if (inside is None or backend in inside) and not supports(backend, problem):
            return backend
    return "chunked"


def preference(op: str, problem: Problem, direction: str = "forward") -> list[tuple[str, str]]:
    """Backends from the fastest on, each with the measurement that says so."""
    scores = problem.queries * problem.keys
    for row in OPERATIONS[op].table.get(problem.device, ()):
        fits = problem.dtype_name in row["dtypes"] and row.get("pass", direction) == direction
        if fits and "scores_up_to" in row:
            fits = scores <= row["scores_up_to"]
        if fits and "deterministic" in row:
            fits = row["deterministic"] == torch.are_deterministic_algorithms_enabled()
        if fits:
            return [(backend, row["because"]) for backend in row["order"]]
    return [("chunked", "serves every device; nothing was measured on this one")]


def explain(op: str, problem: Problem, requested: str) -> Explanation:
    """Say for every backend of `op` why it runs `problem` or why not."""
    operation = OPERATIONS[op]
    order = dict(preference(op, problem))
    chosen = choose(op, problem) if requested == "auto" else requested
    reasons = {}
    for backend in operation.backends:
        against = operation.supports(backend, problem)
        if against:
            reasons[backend] = "; ".join(against)
        elif requested != "auto":
            reasons[backend] = "asked for" if backend == chosen else "available, not asked for"
        elif backend == chosen:
            reasons[backend] = order.get(backend, "nothing faster serves this problem")
        elif backend == "reference":
            reasons[backend] = "materialises the B x N x M scores; runs only when asked for"
        elif backend in order:
            reasons[backend] = f"slower than {chosen}: {order[chosen]}"
        else:
            reasons[backend] = f"not measured to be faster than {chosen} here"
    backward = choose(op, problem, direction="backward")
    if requested == "auto" and problem.device == "cpu" and backward != chosen:
        why = dict(preference(op, problem, "backward")).get(backward, "nothing faster serves it")
        reasons[chosen] += f"; the backward runs in {backward}: {why}"
    if requested != "auto" and operation.supports(requested, problem):
        raise NotImplementedError(
            refusal(op, requested, problem, operation.supports(requested, problem))
        )
    return Explanation(f"{op}: {problem}", chosen, reasons)
