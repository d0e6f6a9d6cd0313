"""What a norm is asked to do, and which layout its results have."""

from typing import NamedTuple

import torch

from nlkernels.ops.pointwise import problem as pointwise


class NormProblem(NamedTuple):
    """Sizes, dtype, device and layout of one call, as backends and dispatch see it."""

    batch: int
    positions: int
    channels: int
    dtype: torch.dtype
    device: str
    index: int | None = None
    maps: bool = False

    @classmethod
    def of(cls, rows: torch.Tensor, channels: int, maps: bool) -> "NormProblem":
        """Describe a call by a tensor (B,N,...) of it, its channels, and whether it is of maps."""
        device = rows.device
        sizes = (*rows.shape[:2], channels)
        return cls(*sizes, rows.dtype, device.type, device.index, maps)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        layout = "maps" if self.maps else "rows"
        return (
            f"B={self.batch} N={self.positions} C={self.channels} {self.dtype_name} {layout} "
            f"on {self.device}"
        )


def are_maps(z: torch.Tensor) -> bool:
    """Whether positions of z (B,N,C) lie together, not channels."""
    return z.stride(2) != 1 and z.stride(1) == 1


def like(z: torch.Tensor) -> torch.Tensor:
    """An uninitialised (B,N,C), laid out like z."""
    return pointwise.like(z, z.shape[2], are_maps(z))
