"""Small problems that show whether a norm's kernels are right; see `nlkernels._trust`.

Tails in every tile, rows and maps, one item and many, means that are large beside the spread. z
comes of a product by the identity, which gives back its numbers: statistics are taken as they are
in a block. Both ways to a gradient: at once, and in two halves.
"""

from typing import Any, NamedTuple

import torch

from nlkernels.ops.norm import op, reference
from nlkernels.ops.norm.problem import NormProblem

# Channels, and whether z is of maps, that `nlk verify` checks when none is named.
HEADS = ((512, 0), (512, 1), (1024, 0), (1024, 1))
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
GRADIENTS = ("d_z", "d_gamma", "d_beta", "d_base")
EPS = 1e-5


class Trial(NamedTuple):
    """One problem: sizes, and how operands lie.

    `maps`: z and the result are maps; `others`: base and the gradient are; `halves`: the gradient
    is that of several processes.
    """

    batch: int
    positions: int
    channels: int
    maps: bool = False
    others: bool = False
    halves: bool = False

    def __str__(self) -> str:
        z, others = ("maps" if lies else "rows" for lies in (self.maps, self.others))
        sizes = f"B={self.batch} N={self.positions} C={self.channels}"
        return f"{sizes} {z}, others {others}" + " in halves" * self.halves


def large(head: tuple[int, ...]) -> tuple[Trial, ...]:
    """Problems of so many channels, for every configuration of a kernel."""
    channels, maps = head[0], bool(head[1])
    return (
        Trial(3, 1571, channels, maps, maps),
        Trial(70, 49, channels - 1, maps, not maps, True),
        Trial(1, 4096, channels, maps, not maps),
    )


def trials(head: tuple[int, ...]) -> tuple[Trial, ...]:
    """Problems of fewer positions, for Triton's interpreter too."""
    channels, maps = head[0] - 5, bool(head[1])
    return Trial(2, 136, channels, maps, maps), Trial(3, 51, channels, maps, not maps, True)


def problem(head: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> NormProblem:
    """A problem of that kind, to ask who serves it."""
    sizes = (2, 136, head[0])
    return NormProblem(*sizes, dtype, device.type, device.index, bool(head[1]))


def operands(trial: Trial, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Random z, gamma, beta, base, and a gradient of the output."""
    generator = torch.Generator(device).manual_seed(0)
    size = (trial.batch, trial.positions, trial.channels)

    def drawn(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device)

    def laid_out(x: torch.Tensor, maps: bool) -> torch.Tensor:
        return x.to(dtype).mT.contiguous().mT if maps else x.to(dtype)

    z = laid_out(drawn(*size) + 3 * drawn(trial.channels), trial.maps)
    base, grad = (laid_out(drawn(*size), trial.others) for _ in range(2))
    return z, drawn(trial.channels).to(dtype), drawn(trial.channels).to(dtype), base, grad


def definition(trial: Trial, *tensors: torch.Tensor) -> torch.Tensor:
    """The output in plain PyTorch, differentiable."""
    z, gamma, beta, base = tensors
    return reference.norm(z, gamma, beta, EPS) + base


def forward(module: Any, trial: Trial, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Output of a backend, and what its backward reads."""
    z, gamma, beta, base = tensors
    identity = torch.eye(trial.channels, dtype=z.dtype, device=z.device)
    z, moments = op.product_of(module, z, identity, None, trial.maps, "chunked")
    return module.forward(z, moments, gamma, beta, base, EPS), z, moments


def backward(
    module: Any,
    trial: Trial,
    grad: torch.Tensor,
    tensors: tuple[torch.Tensor, ...],
    kept: tuple[torch.Tensor, ...],
) -> tuple[torch.Tensor, ...]:
    """Gradients of a backend."""
    gamma, (_, z, moments) = tensors[1], kept
    if trial.halves:
        sums = module.sums(grad, z, moments, EPS)
        means = sums / (trial.batch * trial.positions)
        d_z = module.gradient(grad, z, gamma, moments, means, EPS)
    else:
        d_z, sums = module.backward(grad, z, gamma, moments, EPS)
    return d_z, *sums.to(grad.dtype).unbind(), grad


def like(seen: tuple[Any, ...]) -> Trial:
    """The trial that describes a tensor of a norm, its channels and layout, as a model brought."""
    rows, channels, maps = seen
    return Trial(*rows.shape[:2], channels, maps, maps)
