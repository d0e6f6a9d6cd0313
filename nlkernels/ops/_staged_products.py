"""Matrix products of the staged backward, by torch's library, added in float32."""

import torch

from nlkernels.ops._tiles import Buffer


class Sum:
    """Sum of the matrix products of one batch item's tiles, in float32."""

    def __init__(self, device: torch.device) -> None:
        self._total = Buffer(torch.float32, device)

    def add(
        self, out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, first: bool, last: bool
    ) -> None:
        """Add a @ b; after the tile that is `last`, `out` holds the sum."""
        if first and last:
            multiply(out, a, b)
            return
        total = out if out.dtype == torch.float32 else self._total.block(*out.shape)
        if first:
            multiply(total, a, b)
        elif a.dtype == torch.float32:
            total.baddbmm_(a, b)
        elif a.device.type == "cpu":
            total.baddbmm_(a.float(), b.float())
        else:
            torch.baddbmm(total, a, b, out_dtype=torch.float32, out=total)
        if last and total is not out:
            out.copy_(total)


def multiply(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Write a @ b, added in float32 and rounded once; CPUs lack such products of 16 bits."""
    if a.device.type == "cpu" and a.dtype != torch.float32:
        out.copy_(torch.bmm(a.float(), b.float()))
    elif a.dtype == out.dtype:
        torch.bmm(a, b, out=out)
    else:
        torch.bmm(a, b, out_dtype=out.dtype, out=out)
