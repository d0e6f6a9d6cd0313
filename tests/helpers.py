"""Problems, and the rule by which their results are judged."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

KINDS = ("softmax", "gaussian", "dot_product")
# (kind, backend) pairs that are held to the 2x/3x rule; "reference" is the definition.
SERVED = [(kind, backend) for kind in KINDS for backend in ("chunked", "auto")]
SHORT = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}


@dataclass(frozen=True)
class Case:
    """Sizes of one attention problem."""

    batch: int
    queries: int
    keys: int
    depth: int
    value_depth: int

    def __str__(self) -> str:
        return f"B{self.batch}-N{self.queries}-M{self.keys}-D{self.depth}-V{self.value_depth}"


def operands(
    case: Case,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    *,
    requires_grad: bool = False,
    seed: int = 0,
) -> list[torch.Tensor]:
    """Random query, key, value and a gradient for the output."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (
        (case.queries, case.depth),
        (case.keys, case.depth),
        (case.keys, case.value_depth),
        (case.queries, case.value_depth),
    )
    tensors = [
        torch.randn(case.batch, *size, generator=generator, dtype=torch.float64)
        .to(dtype)
        .to(device)
        for size in sizes
    ]
    for tensor in tensors[:3]:
        tensor.requires_grad_(requires_grad)
    return tensors


def results(attention: Callable, tensors: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Output and gradients of attention(query, key, value) for the given output gradient."""
    *inputs, grad = (t.detach() for t in tensors)
    inputs = [t.requires_grad_() for t in inputs]
    out = attention(*inputs)
    grads = torch.autograd.grad(out, inputs, grad)
    names = ("d_query", "d_key", "d_value")
    return {"out": out.detach(), **dict(zip(names, grads, strict=True))}


def assert_not_worse(
    name: str,
    got: torch.Tensor,
    same_dtype: torch.Tensor,
    truth: torch.Tensor,
    factor: float,
) -> None:
    """Fail unless `got` is at most `factor` times as wrong as `same_dtype`, truth being float64.

    Both the largest error and the root-mean-square error are compared; the largest has a floor of
    twice the rounding of (r + 0.3) - 0.3 - r, with r the truth in the dtype under test. In float64,
    where both are the truth's equals, the limit is 1e-11 of the largest truth plus 1e-13.
    """
    assert got.shape == truth.shape, f"{name}: shape {tuple(got.shape)}, not {tuple(truth.shape)}"
    assert got.dtype == same_dtype.dtype, f"{name}: {got.dtype}, not {same_dtype.dtype}"
    if truth.numel() == 0:
        return
    truth = truth.double().cpu()
    if got.dtype == torch.float64:
        limit = 1e-11 * truth.abs().max().item() + 1e-13
        torch.testing.assert_close(got.cpu(), truth, rtol=0, atol=limit)
        return
    rounded = truth.to(got.dtype)
    slack = ((rounded + 0.3) - 0.3 - rounded).double()
    error = (got.double().cpu() - truth).abs()
    allowed = (same_dtype.double().cpu() - truth).abs()
    for measure, reduce in (("max", torch.amax), ("rms", _rms)):
        limit = factor * reduce(allowed)
        if measure == "max":
            limit += 2 * slack.abs().amax()
        if not reduce(error) <= limit:
            raise AssertionError(
                f"{name}: {measure} error {reduce(error):.3e} > {limit:.3e} "
                f"(same-dtype PyTorch {reduce(allowed):.3e}), shape {tuple(got.shape)}"
                + _worst(got, truth, error)
            )


def _rms(error: torch.Tensor) -> torch.Tensor:
    return error.square().mean().sqrt()


def _worst(got: torch.Tensor, truth: torch.Tensor, error: torch.Tensor) -> str:
    order = error.nan_to_num(nan=float("inf")).flatten().argsort(descending=True)[:5]
    lines = []
    for flat in order.tolist():
        index = tuple(i.item() for i in torch.unravel_index(torch.tensor(flat), error.shape))
        lines.append(f"\n  {index}: got {got[index].item():.6g}, truth {truth[index].item():.6g}")
    return "".join(lines)
