"""When is a result right? It may be a few times as wrong as plain PyTorch in the same dtype.

With `truth` in float64, `same` from plain PyTorch in the dtype under test and r the truth rounded
to it, a result passes when

  max |got - truth| <= factor max |same - truth| + 2 max |(r + 0.3) - 0.3 - r|   and
  rms (got - truth) <= factor rms (same - truth)

with factor 2 for outputs and 3 for gradients. In float64, where both are the truth's equals, the
largest error may be 1e-11 of the largest truth plus 1e-13.
"""

from typing import NamedTuple

import torch

OUTPUT, GRADIENT = 2.0, 3.0


class Excess(NamedTuple):
    """An error beyond its limit.

    Attributes:
        measure: "max" or "rms".
        error: of the result.
        limit: what it may be.
        allowed: error of plain PyTorch in the same dtype.
    """

    measure: str
    error: float
    limit: float
    allowed: float

    def __str__(self) -> str:
        return (
            f"{self.measure} error {self.error:.3e} > {self.limit:.3e} "
            f"(same-dtype PyTorch {self.allowed:.3e})"
        )


def excess(
    got: torch.Tensor, same: torch.Tensor, truth: torch.Tensor, factor: float
) -> Excess | None:
    """Return the first error of `got` that the rule forbids; None when it is right.

    Args:
        got: the result under test.
        same: plain PyTorch's, in the same dtype.
        truth: float64, of the same shape.
        factor: OUTPUT or GRADIENT.
    """
    if truth.numel() == 0:
        return None
    truth = truth.double().cpu()
    error = (got.double().cpu() - truth).abs()
    if got.dtype == torch.float64:
        largest, limit = error.max().item(), 1e-11 * truth.abs().max().item() + 1e-13
        return None if largest <= limit else Excess("max", largest, limit, 0.0)
    rounded = truth.to(got.dtype)
    slack = ((rounded + 0.3) - 0.3 - rounded).double().abs().max().item()
    allowed = (same.double().cpu() - truth).abs()
    for measure, reduce, floor in (("max", torch.amax, 2 * slack), ("rms", _rms, 0.0)):
        limit = factor * reduce(allowed).item() + floor
        # Not error > limit: neither holds for a NaN.
        if not reduce(error).item() <= limit:
            return Excess(measure, reduce(error).item(), limit, reduce(allowed).item())
    return None


def _rms(error: torch.Tensor) -> torch.Tensor:
    return error.square().mean().sqrt()
