"""The operations that blocks are made of, alone: pooling, projections, and norms.

`naive` is what torch does with the definition. A pointwise convolution's gradients are another
product and an outer product; a norm follows a product, whose gradient it gives back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nlkernels.ops.norm import op as norm
from nlkernels.ops.pointwise import op as pointwise
from nlkernels.ops.pool import op as pool

from .features import FeatureJudge
from .measure import Call, compare, derive
from .peak import state_shares

EPS = 1e-5
LETTERS = {"pool": "BCTHW", "pointwise": "BNCP", "norm": "BNCP"}
_OPS = {"pool": pool, "pointwise": pointwise, "norm": norm}
BACKENDS = {
    kind: ("naive", *(name for name in module.BACKENDS if name != "reference"), "auto")
    for kind, module in _OPS.items()
}

Results = dict[str, Tensor]
Form = Callable[[Mapping[str, Tensor], bool], Results]


@dataclass(frozen=True)
class PartCase:
    """One problem: its sizes by `LETTERS`, and the window of pooling."""

    kind: str
    sizes: tuple[int, ...]
    window: tuple[int, ...] = (1, 2, 2)
    name: str = "asked"

    @property
    def shape(self) -> dict[str, int]:
        """Sizes by letter, as rows hold them."""
        found = dict(zip(LETTERS[self.kind], self.sizes, strict=True))
        window = dict(zip(("KT", "KH", "KW"), self.window, strict=True))
        return found | (window if self.kind == "pool" else {})

    def operands(self, dtype: torch.dtype, device: torch.device, seed: int) -> dict[str, Tensor]:
        """Standard normal operands, and the gradient of the output."""
        generator = torch.Generator().manual_seed(seed)
        if self.kind == "pool":
            pooled = (n // k for n, k in zip(self.sizes[2:], self.window, strict=True))
            shapes = {"x": self.sizes, "grad": (*self.sizes[:2], *pooled)}
        else:
            b, n, c, p = self.sizes
            shapes = {"x": (b, n, c), "weight": (p, c), "grad": (b, n, p)}
            shapes |= (
                {"gamma": (p,), "beta": (p,), "base": (b, n, p)} if self.kind == "norm" else {}
            )
        drawn = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        if "weight" in drawn:
            drawn["weight"] /= self.sizes[2] ** 0.5
        return {name: one.to(device, dtype) for name, one in drawn.items()}

    def flop(self, passes: str) -> int:
        """Operations of products, one for each number that is compared."""
        forward = math.prod(self.sizes) * (1 if self.kind == "pool" else 2)
        return forward if passes == "forward" or self.kind != "pointwise" else 3 * forward


def _pool(window: Sequence[int], backend: str) -> Form:
    def run(given: Mapping[str, Tensor], backward: bool) -> Results:
        x = given["x"].detach().requires_grad_(backward)
        if backend == "naive":
            out = F.max_pool3d(x, tuple(window))
        else:
            out = pool.pool(x, list(window), backend)
        if not backward:
            return {"out": out}
        return {"out": out.detach(), "grad_x": torch.autograd.grad(out, x, given["grad"])[0]}

    return run


def _pointwise(backend: str) -> Form:
    def run(given: Mapping[str, Tensor], backward: bool) -> Results:
        x, weight, grad = given["x"], given["weight"], given["grad"]
        if backend == "naive":
            found = {"out": F.linear(x, weight)}
            if backward:
                found["grad_x"] = F.linear(grad, weight.mT)
                found["grad_weight"] = grad.flatten(0, 1).mT @ x.flatten(0, 1)
            return found
        ops = torch.ops.nlkernels
        found = {"out": ops.pointwise(x, weight, None, None, False, backend)}
        if backward:
            found["grad_x"] = ops.pointwise(grad, weight.mT, None, None, False, backend)
            found["grad_weight"] = ops.pointwise_outer(grad, x, backend)[0].to(x.dtype)
        return found

    return run


def _norm(backend: str) -> Form:
    def run(given: Mapping[str, Tensor], backward: bool) -> Results:
        x, weight, gamma, beta, base, grad = (
            given[name] for name in ("x", "weight", "gamma", "beta", "base", "grad")
        )
        if backend == "naive":
            z = F.linear(x, weight).detach().requires_grad_(backward)
            moved = F.batch_norm(z.mT, None, None, gamma, beta, training=True, eps=EPS)
            out = moved.mT + base
            if not backward:
                return {"out": out}
            return {"out": out.detach(), "grad_z": torch.autograd.grad(out, z, grad)[0]}
        ops = torch.ops.nlkernels
        z, moments = ops.norm_product(x, weight, None, False, backend)
        found = {"out": ops.norm_forward(z, moments, gamma, beta, base, EPS, backend)}
        if backward:
            found["grad_z"] = ops.norm_backward(grad, z, gamma, moments, EPS, backend)[0]
        return found

    return run


def _form(case: PartCase, backend: str) -> Form:
    if case.kind == "pool":
        return _pool(case.window, backend)
    return (_pointwise if case.kind == "pointwise" else _norm)(backend)


def _reason(case: PartCase, backend: str, x: Tensor) -> str:
    if backend in ("naive", "auto"):
        return ""
    return "; ".join(_OPS[case.kind].supports(backend, _problem(case, x)))


def _problem(case: PartCase, x: Tensor) -> Any:
    if case.kind == "pool":
        return pool.PoolProblem.of(x, list(case.window))
    if case.kind == "norm":
        return norm.NormProblem.of(x, case.sizes[3], False)
    return pointwise.PointwiseProblem.of(x, case.sizes[2], case.sizes[3])


def measure(
    case: PartCase,
    names: Sequence[str],
    dtype_name: str,
    passes: str,
    device: torch.device,
    ceilings: Mapping[str, Any],
    *,
    rounds: int,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Rows of some of `BACKENDS`; arguments as those of `benchmarks.measure.measure`."""
    dtype, backward = getattr(torch, dtype_name), passes != "forward"
    given = case.operands(dtype, device, seed)
    wide = {name: one.double() for name, one in given.items()}
    naive = _form(case, "naive")
    judge = FeatureJudge(naive(wide, backward), naive(given, backward), dtype)
    calls = {}
    for name in names:
        form = _form(case, name)

        def run(form: Form = form) -> Results:
            with torch.set_grad_enabled(backward):
                return form(given, backward)

        calls[name] = Call(run, _reason(case, name, given["x"]))
    head = {
        "case": case.name,
        "kind": case.kind,
        "dtype": dtype_name,
        "pass": passes,
        "shape": case.shape,
    }
    rows = compare(head, calls, judge, device, rounds=rounds)
    results = naive(given, backward)
    # A product's own result is written and read by the norm; the rest once.
    least = sum(one.numel() * one.element_size() for one in (*given.values(), *results.values()))
    derive(rows, case.flop(passes), None, {"least_flop": case.flop(passes), "least_bytes": least})
    state_shares(rows, ceilings)
    return rows
