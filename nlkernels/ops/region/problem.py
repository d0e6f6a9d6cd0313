"""What region aggregation is asked to do, and the layout of what it returns."""

import math
from typing import NamedTuple

import torch

from nlkernels._spec import DTYPES, describe

# A column of the Triton kernels, and its taps, are unrolled.
TALLEST = 15


class RegionProblem(NamedTuple):
    """Sizes, dtype, device and layout of one call, as backends and dispatch see it."""

    batch: int
    channels: int
    frames: int
    height: int
    width: int
    kernel: tuple[int, int, int]
    dtype: torch.dtype
    device: str
    index: int | None = None
    channels_last: bool = False

    @classmethod
    def of(cls, x: torch.Tensor, weight: torch.Tensor) -> "RegionProblem":
        """Describe operands that `check_operands` has accepted."""
        kernel = tuple(weight.shape[1:])
        last = is_channels_last(x)
        return cls(*x.shape, kernel, x.dtype, x.device.type, x.device.index, last)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        layout = " channels_last_3d" if self.channels_last else ""
        return (
            f"B={self.batch} C={self.channels} T={self.frames} H={self.height} W={self.width} "
            f"kernel {'x'.join(map(str, self.kernel))} {self.dtype_name}{layout} on {self.device}"
        )


def is_channels_last(x: torch.Tensor) -> bool:
    """Whether channels are neighbours in memory, and positions are not."""
    if x.shape[1] == 1 or math.prod(x.shape[2:]) == 1:
        return False
    return x.stride(1) == 1 and not x.is_contiguous()


def like(x: torch.Tensor) -> torch.Tensor:
    """An uninitialised result for x: channels_last_3d where x or its base is, else NCDHW."""
    layout = torch.channels_last_3d if is_channels_last(x) else torch.contiguous_format
    return torch.empty_like(x, memory_format=layout)


def check_operands(x: torch.Tensor, weight: torch.Tensor) -> None:
    """Raise TypeError or ValueError unless x (B,C,T,H,W) and weight (C,kt,kh,kw) fit together.

    Expected are one floating dtype, one device, C >= 1 and odd sizes of the kernel. B, T, H and W
    may be zero.
    """
    for name, tensor, rank, sizes in (
        ("x", x, 5, "(batch, channels, frames, height, width)"),
        ("weight", weight, 4, "(channels, frames, height, width)"),
    ):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(
                f"region_aggregate: expected {name} to be a tensor, got {type(tensor).__name__}; "
                "convert it with torch.as_tensor"
            )
        if tensor.layout != torch.strided:
            raise TypeError(
                f"region_aggregate: expected {name} to be a dense tensor, got {tensor.layout}; "
                "convert it with .to_dense()"
            )
        if tensor.dim() != rank:
            raise ValueError(
                f"region_aggregate: expected {name} of {rank} dimensions {sizes}, got "
                f"{describe(tensor)}; "
                + (
                    "a Conv3d's weight is (channels, 1, ...): drop that with squeeze(1)"
                    if name == "weight" and tensor.dim() == 5
                    else "add or flatten dimensions"
                )
            )
    both = f"x {describe(x)}, weight {describe(weight)}"
    if x.dtype not in DTYPES or weight.dtype != x.dtype:
        raise TypeError(
            "region_aggregate: expected x and weight of one dtype out of float16, bfloat16, "
            f"float32 and float64, got {both}; cast them, or use autocast"
        )
    if x.device != weight.device:
        raise ValueError(
            f"region_aggregate: expected x and weight on one device, got {both}; "
            "move them with .to(device)"
        )
    if x.shape[1] != weight.shape[0] or x.shape[1] == 0:
        raise ValueError(
            f"region_aggregate: expected x and weight of the same channels, not 0, got {both}; "
            "each channel has a kernel of its own"
        )
    if any(size % 2 == 0 for size in weight.shape[1:]):
        raise ValueError(
            f"region_aggregate: expected a kernel of odd sizes, got {both}; pad it with a zero at "
            "its end, torch.nn.functional.pad, to keep its positions' neighbours"
        )
