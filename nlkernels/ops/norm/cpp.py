"""Batch norms in C++, for CPUs: z is read where it lies, and once in each pass.

product   the statistics of a block of positions are taken when it was just written, and is in the
          cache; those of all blocks are put together in float64
forward   norm and residual in one pass
backward  what gradients of z need is added, in float64 where many numbers come together; z's
          gradient is another pass: of maps channel by channel, whose numbers are then in the cache

Statistics are those of z as it is rounded to its dtype. Sums do not depend on the number of
threads; statistics do, by their rounding, as the product's blocks do.

Memory beyond inputs and outputs, A bytes a sum, T threads:
  product  : what `pointwise` states;
  others   : 4 A C; for sums of rows 16 C for each of at most 64 parts, and 2 A C T;
             C numbers are copied where gamma or beta have another dtype.

Source: `csrc/cpu/norm.cpp`, `csrc/cpu/moments.h`.
"""

import torch

from nlkernels import _ext
from nlkernels.ops.norm.problem import like
from nlkernels.ops.pointwise import cpp

# Below, a further thread costs more than it saves: some 20 us of one core's work.
_NUMBERS_OF_THREAD = 2**16


def product(
    features: torch.Tensor, weight: torch.Tensor, shift: torch.Tensor | None, maps: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (B,N,K), weight (C,K), shift (C,) -> z (B,N,C), moments (2,C)."""
    return cpp.product_and_moments([(features, weight)], shift, None, maps)


def forward(
    z: torch.Tensor,
    moments: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    base: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """z, base (B,N,C), moments (2,C), gamma, beta (C,) -> (B,N,C), laid out like z."""
    out = like(z)
    _run("norm_forward", z, moments, eps, gamma=gamma, beta=beta, base=base, out=out)
    return out


def sums(grad: torch.Tensor, z: torch.Tensor, moments: torch.Tensor, eps: float) -> torch.Tensor:
    """Grad, z (B,N,C) -> sums (2,C) of grad times the standardised z, and of grad."""
    found = torch.zeros_like(moments)
    _run("norm_sums", z, moments, eps, grad=grad, sums=found)
    return found


def gradient(
    grad: torch.Tensor,
    z: torch.Tensor,
    gamma: torch.Tensor,
    moments: torch.Tensor,
    means: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """The gradient of z, for the means (2,C) of what `sums` adds up; laid out like z."""
    d_z = like(z)
    _run("norm_backward", z, moments, eps, grad=grad, gamma=gamma, means=means, out=d_z)
    return d_z


def backward(
    grad: torch.Tensor, z: torch.Tensor, gamma: torch.Tensor, moments: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of z, laid out like z, and the sums (2,C), where all of the batch is here."""
    d_z, found = like(z), torch.zeros_like(moments)
    _run("norm_backward", z, moments, eps, grad=grad, gamma=gamma, out=d_z, sums=found)
    return d_z, found


def _run(kernel: str, z: torch.Tensor, moments: torch.Tensor, eps: float, **given) -> None:
    """Run a kernel for z and what is given of the other operands; for no numbers, nothing."""
    if z.numel() == 0:
        return
    native, isa = _ext.native()
    worth = 1 + z.numel() // _NUMBERS_OF_THREAD
    kept, arguments = [], {}
    for name, tensor in given.items():
        if tensor is None:
            continue
        if name in ("base", "grad", "out"):
            arguments[name] = (tensor.data_ptr(), *tensor.stride())
            continue
        # Alive until the kernel has run.
        kept.append(tensor.to(moments.dtype).contiguous())
        arguments[name] = kept[-1].data_ptr()
    call = native.NormArguments(
        dtype=_ext.DTYPES[z.dtype],
        threads=min(torch.get_num_threads(), worth),
        sizes=tuple(z.shape),
        eps=eps,
        z=(z.data_ptr(), *z.stride()),
        moments=moments.data_ptr(),
        **arguments,
    )
    workspace = torch.empty(native.norm_workspace(isa, call), dtype=torch.uint8)
    getattr(native, kernel)(isa, call, workspace.data_ptr())
