"""Is a provider right? Its results are judged against a float64 truth before any time is reported.

Rule ("2x/3x"), for output (factor 2) and gradients (factor 3): with `truth` in float64 and `same`
the eager formula in the provider's own dtype, the largest error may be `factor * max|same - truth|
+ 2 * max|(r + 0.3) - 0.3 - r|`, r being the truth rounded to that dtype, and the relative RMS error
at most `factor` times that of `same`.

Truth is computed on a sample: some query rows of the first and last batch item (output, query
gradient) and some keys of the last item (key and value gradients, which need all its query rows).
What the sample leaves out is compared between providers: every row of a provider's result has to
lie near that row of the first provider that passed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .registry import Case

SAMPLE = 96
"""Query rows, and keys, that are compared with the truth."""

ROWS_PER_CHUNK = 2048
"""Query rows of the float64 score matrix that are alive at a time."""

AGREEMENT = 8.0
"""How far the worst row of a result may differ, in allowed RMS errors: two results differ by both
their errors, and the worst of many rows errs several times more than the average one."""

FACTORS = {"out": 2.0, "grad_query": 3.0, "grad_key": 3.0, "grad_value": 3.0}


class WrongResult(Exception):
    """A provider computes something else than the operation, or returns it in another form."""


def eager(query: Tensor, key: Tensor, value: Tensor, scale: float, *, kind: str) -> Tensor:
    """bmm, normalise, bmm: the definition as published blocks write it, (B,N,1) scores of concat
    added up rather than multiplied.
    """
    if kind == "concat":
        return torch.bmm(torch.relu(query + key.transpose(1, 2)), value) / key.shape[1]
    scores = torch.bmm(query, key.transpose(1, 2)) * scale
    if kind == "relu":
        weights = torch.relu(scores) / key.shape[1]
    else:
        weights = scores / key.shape[1] if kind == "dot_product" else torch.softmax(scores, dim=-1)
    return torch.bmm(weights, value)


@dataclass(frozen=True)
class Sample:
    """Rows and keys at which results are compared with the truth."""

    items: tuple[int, ...]
    rows: Tensor
    keys: Tensor

    def take(self, name: str, tensor: Tensor) -> Tensor:
        """The sampled part of a result or gradient, in float64."""
        if name in ("out", "grad_query"):
            return tensor[list(self.items)][:, self.rows].double()
        return tensor[self.items[-1], self.keys].double()


def draw_sample(case: Case, device: torch.device, seed: int) -> Sample:
    """First, last and random rows and keys; first and last batch item."""
    generator = torch.Generator().manual_seed(seed)

    def choose(count: int) -> Tensor:
        inner = torch.randperm(count, generator=generator)[: max(SAMPLE - 2, 0)]
        return torch.unique(torch.cat([inner, torch.tensor([0, count - 1])])).to(device)

    items = tuple(sorted({0, case.batch - 1}))
    return Sample(items, choose(case.n), choose(case.m))


def truth_of(
    case: Case, operands: tuple[Tensor, ...], sample: Sample, passes: str
) -> dict[str, Tensor]:
    """The sampled results in float64, by the closed formulas."""
    query, key, value, grad_out = (operand.double() for operand in _items(operands, sample))
    rows = sample.rows
    weights = _weights(case, query[:, rows], key)
    truth = {"out": weights @ value}
    if passes == "forward":
        return truth
    grad_scores = _grad_scores(case, weights, grad_out[:, rows] @ value.transpose(1, 2))
    truth["grad_query"] = grad_scores @ _factor(case, key)
    query, key, value, grad_out = query[-1], key[-1], value[-1], grad_out[-1]
    grad_key = torch.zeros(len(sample.keys), case.d, dtype=torch.float64, device=key.device)
    grad_value = torch.zeros(len(sample.keys), case.v, dtype=torch.float64, device=key.device)
    for part, grad_part in zip(
        query.split(ROWS_PER_CHUNK), grad_out.split(ROWS_PER_CHUNK), strict=True
    ):
        weights = _weights(case, part, key)
        grad_scores = _grad_scores(case, weights, grad_part @ value.T)
        grad_value += weights[:, sample.keys].T @ grad_part
        grad_key += grad_scores[:, sample.keys].T @ _factor(case, part)
    return truth | {"grad_key": grad_key, "grad_value": grad_value}


def _items(operands: tuple[Tensor, ...], sample: Sample) -> list[Tensor]:
    return [operand[list(sample.items)] for operand in operands]


def _weights(case: Case, query: Tensor, key: Tensor) -> Tensor:
    if case.kind == "concat":
        return (query + key.transpose(-1, -2)).relu() / case.m
    scores = query @ key.transpose(-1, -2) * case.scale
    if case.kind == "relu":
        return scores.relu() / case.m
    return scores / case.m if case.kind == "dot_product" else torch.softmax(scores, dim=-1)


def _factor(case: Case, other: Tensor) -> Tensor:
    """What a score's derivative by query, or by key, is: scaled key, scaled query; 1 for concat."""
    return torch.ones_like(other) if case.kind == "concat" else other * case.scale


def _grad_scores(case: Case, weights: Tensor, grad_weights: Tensor) -> Tensor:
    if case.kind == "dot_product":
        return grad_weights / case.m
    if case.kind in ("relu", "concat"):
        return grad_weights / case.m * (weights > 0)
    return weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True))


def same_dtype_of(
    case: Case, operands: tuple[Tensor, ...], sample: Sample, passes: str
) -> dict[str, Tensor]:
    """The sampled results of the eager formula in the operands' own dtype, item by item."""
    per_item = []
    for item in range(len(sample.items)):
        query, key, value, grad_out = (
            operand[item : item + 1].clone().requires_grad_(passes != "forward")
            for operand in _items(operands, sample)
        )
        results = {"out": eager(query, key, value, case.scale, kind=case.kind)}
        if passes != "forward":
            grads = torch.autograd.grad(results["out"], (query, key, value), grad_out.detach())
            results |= dict(zip(("grad_query", "grad_key", "grad_value"), grads, strict=True))
        per_item.append(results)
    return {
        name: torch.cat([item[name][:, sample.rows].detach().double() for item in per_item])
        if name in ("out", "grad_query")
        else per_item[-1][name][0, sample.keys].detach().double()
        for name in per_item[0]
    }


def _rms(tensor: Tensor) -> float:
    return tensor.square().mean().sqrt().item()


def rounding(truth: Tensor, dtype: torch.dtype) -> float:
    """2 * max|(r + 0.3) - 0.3 - r|, the allowance for a dtype's own rounding."""
    rounded = truth.to(dtype)
    return 2.0 * (rounded + 0.3 - 0.3 - rounded).abs().max().double().item()


@dataclass(frozen=True)
class Limit:
    """What one result may deviate from the truth."""

    truth: Tensor
    scale: float
    max_error: float
    rms_error: float


class Judge:
    """Holds the truth of one case, dtype and pass, and judges providers one after the other.

    Args:
        case: The problem.
        operands: query, key, value, gradient of the output, as all providers get them.
        passes: "forward" or "forward_backward".
        seed: Chooses the sample.
    """

    def __init__(
        self, case: Case, operands: tuple[Tensor, ...], passes: str, seed: int = 0
    ) -> None:
        self.case, self.operands, self.passes = case, operands, passes
        self.sample = draw_sample(case, operands[0].device, seed)
        truth = truth_of(case, operands, self.sample, passes)
        same = same_dtype_of(case, operands, self.sample, passes)
        self.limits = {name: self._limit(name, truth[name], same[name]) for name in truth}
        self._first: tuple[str, dict[str, Tensor]] | None = None

    def _limit(self, name: str, truth: Tensor, same: Tensor) -> Limit:
        allowance = rounding(truth, self.operands[0].dtype)
        error = same - truth
        scale = _rms(truth)
        return Limit(
            truth,
            scale,
            FACTORS[name] * error.abs().max().item() + allowance,
            FACTORS[name] * _rms(error) / scale,
        )

    def check(
        self, name: str, results: dict[str, Tensor], slack: float = 1.0
    ) -> dict[str, dict[str, float]]:
        """Errors of one provider, per result.

        Args:
            name: The provider, for messages.
            results: "out" and, with gradients, "grad_query", "grad_key", "grad_value".
            slack: Multiplies what is allowed: others may be less exact, though not wrong.

        Returns:
            result -> {"max", "max_limit", "rms", "rms_limit"}; rms is relative to the truth's RMS.

        Raises:
            WrongResult: Form, finiteness, error or agreement with the other providers is wrong.
        """
        self._check_form(name, results)
        errors = {key: self._errors(key, results[key]) for key in self.limits}
        for key, error in errors.items():
            for measure in ("max", "rms"):
                limit = error[f"{measure}_limit"]
                if not error[measure] <= slack * limit:
                    raise WrongResult(
                        f"{name}: {measure} error of {key} is {error[measure]:.3g}, "
                        f"more than the allowed {limit:.3g}"
                    )
        self._check_agreement(name, results, slack)
        return errors

    def _check_form(self, name: str, results: dict[str, Tensor]) -> None:
        case, like = self.case, self.operands[0]
        shapes = {
            "out": (case.batch, case.n, case.v),
            "grad_query": (case.batch, case.n, case.d),
            "grad_key": (case.batch, case.m, case.d),
            "grad_value": (case.batch, case.m, case.v),
        }
        for key in self.limits:
            result = results[key]
            if tuple(result.shape) != shapes[key] or result.dtype != like.dtype:
                raise WrongResult(
                    f"{name}: {key} has shape {tuple(result.shape)} and {result.dtype}, "
                    f"expected {shapes[key]} and {like.dtype}"
                )
            if not torch.isfinite(result).all():
                raise WrongResult(f"{name}: {key} is not finite everywhere")

    def _errors(self, key: str, result: Tensor) -> dict[str, float]:
        limit = self.limits[key]
        error = self.sample.take(key, result) - limit.truth
        return {
            "max": error.abs().max().item(),
            "max_limit": limit.max_error,
            "rms": _rms(error) / limit.scale,
            "rms_limit": limit.rms_error,
        }

    def _check_agreement(self, name: str, results: dict[str, Tensor], slack: float) -> None:
        if self._first is None:
            self._first = (name, {key: results[key].detach().clone() for key in self.limits})
            return
        other, reference = self._first
        for key, limit in self.limits.items():
            expected = reference[key].float()
            rows = (results[key].float() - expected).square().mean(dim=-1).sqrt()
            size = expected.square().mean(dim=-1).sqrt().clamp(min=limit.scale)
            difference = (rows / size).max().item()
            allowed = slack * AGREEMENT * limit.rms_error
            if not difference <= allowed:
                raise WrongResult(
                    f"{name}: a row of {key} differs from that of {other} by {difference:.3g} "
                    f"of its RMS, more than {allowed:.3g}"
                )


def step(
    function: Callable[[Tensor, Tensor, Tensor, float], Tensor],
    case: Case,
    operands: tuple[Tensor, ...],
    passes: str,
) -> Callable[[], dict[str, Tensor]]:
    """The call that is timed and judged: forward without a graph, or with all three gradients."""
    query, key, value, grad_out = operands

    def forward() -> dict[str, Tensor]:
        with torch.no_grad():
            return {"out": function(query, key, value, case.scale)}

    def forward_backward() -> dict[str, Tensor]:
        leaves = tuple(t.detach().requires_grad_() for t in (query, key, value))
        out = function(*leaves, case.scale)
        grads = torch.autograd.grad(out, leaves, grad_out)
        return {"out": out.detach()} | dict(
            zip(("grad_query", "grad_key", "grad_value"), grads, strict=True)
        )

    return forward if passes == "forward" else forward_backward
