"""Problems, and the rule by which their results are judged."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from nlkernels._rule import excess

KINDS = ("softmax", "gaussian", "dot_product", "relu")
# (kind, backend) pairs that are held to the 2x/3x rule; "reference" is the definition.
SERVED = [(kind, backend) for kind in KINDS for backend in ("chunked", "auto")]
SHORT = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}


# Where kernels run: on a GPU, else in Triton's interpreter.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def runnable(*architectures: int) -> list[int]:
    """Those as which this machine can run kernels: a GPU without copy engine has no descriptors."""
    if DEVICE == "cpu" or torch.cuda.get_device_capability() >= (9, 0):
        return list(architectures)
    return [architecture for architecture in architectures if architecture < 90]


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
    """Fail unless `got` passes the rule of `nlkernels._rule` against `same_dtype` and `truth`."""
    assert got.shape == truth.shape, f"{name}: shape {tuple(got.shape)}, not {tuple(truth.shape)}"
    assert got.dtype == same_dtype.dtype, f"{name}: {got.dtype}, not {same_dtype.dtype}"
    found = excess(got, same_dtype, truth, factor)
    if found is not None:
        truth = truth.double().cpu()
        error = (got.double().cpu() - truth).abs()
        raise AssertionError(
            f"{name}: {found}, shape {tuple(got.shape)}" + _worst(got, truth, error)
        )


def _worst(got: torch.Tensor, truth: torch.Tensor, error: torch.Tensor) -> str:
    order = error.nan_to_num(nan=float("inf")).flatten().argsort(descending=True)[:5]
    lines = []
    for flat in order.tolist():
        index = tuple(i.item() for i in torch.unravel_index(torch.tensor(flat), error.shape))
        lines.append(f"\n  {index}: got {got[index].item():.6g}, truth {truth[index].item():.6g}")
    return "".join(lines)
