"""What pointwise products are asked to do, and the layout of what they return."""

from typing import NamedTuple

import torch

Sources = list[tuple[torch.Tensor, torch.Tensor]]


class PointwiseProblem(NamedTuple):
    """Sizes, dtype and device of one call, as backends and dispatch see it.

    `depth` is that of all sources together, `channels` are those of the result. Sums of products
    are the gradient of such a weight: `depth` is the right one's channels, `channels` the left's.
    """

    batch: int
    positions: int
    depth: int
    channels: int
    dtype: torch.dtype
    device: str
    index: int | None = None

    @classmethod
    def of(cls, features: torch.Tensor, depth: int, channels: int) -> "PointwiseProblem":
        """Describe a call by features (B,N,...) of it, and its two numbers of channels."""
        device = features.device
        sizes = (*features.shape[:2], depth, channels)
        return cls(*sizes, features.dtype, device.type, device.index)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        return (
            f"B={self.batch} N={self.positions} C={self.depth} P={self.channels} "
            f"{self.dtype_name} on {self.device}"
        )


def like(features: torch.Tensor, channels: int, maps: bool) -> torch.Tensor:
    """An uninitialised (B,N,P): a map (B,P,N) for each channel where `maps`, else rows."""
    batch, positions, _ = features.shape
    if maps:
        return features.new_empty(batch, channels, positions).mT
    return features.new_empty(batch, positions, channels)
