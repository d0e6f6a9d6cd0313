"""What context pooling is asked to do, and how its features lie in memory."""

import math
from typing import NamedTuple

import torch

from nlkernels._spec import DTYPES, describe
from nlkernels.ops._positions import position_stride
from nlkernels.ops.region.problem import is_channels_last

# All channels of a position lie in the registers of one program of the Triton kernels.
WIDEST = 2048


class GateProblem(NamedTuple):
    """Sizes, dtype, device and layout of one call, as backends and dispatch see it."""

    batch: int
    channels: int
    positions: int
    dtype: torch.dtype
    device: str
    index: int | None = None
    channels_last: bool = False

    @classmethod
    def of(cls, x: torch.Tensor, weight: torch.Tensor) -> "GateProblem":
        """Describe operands that `check_operands` has accepted."""
        batch, channels, *positions = x.shape
        device, last = x.device, is_channels_last(x)
        sizes = (batch, channels, math.prod(positions))
        return cls(*sizes, x.dtype, device.type, device.index, last)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        layout = " channels last" if self.channels_last else ""
        return (
            f"B={self.batch} C={self.channels} positions={self.positions} "
            f"{self.dtype_name}{layout} on {self.device}"
        )


class Frames(NamedTuple):
    """Positions as equal runs ("frames"), each of which lies at one distance from the next.

    Attributes:
        count: how many runs.
        positions: of one run.
        frame_stride: distance between runs.
        position_stride: distance between neighbours in a run.
    """

    count: int
    positions: int
    frame_stride: int
    position_stride: int


def frames_of(x: torch.Tensor) -> Frames | None:
    """All positions of x (B,C,*positions) as one run, else a run for each frame, else None.

    One run: NCDHW and channels_last. A run for each frame: frames (B T, C, H, W) seen as a clip.
    """
    positions = math.prod(x.shape[2:])
    step = position_stride(x)
    if step is not None:
        return Frames(1, positions, 0, step)
    step = position_stride(x[:, :, 0])
    if step is not None:
        return Frames(x.shape[2], positions // x.shape[2], x.stride(2), step)
    return None


def like(x: torch.Tensor) -> torch.Tensor:
    """An uninitialised result for x, whose positions `frames_of` describes.

    Channels last where x or its base is, frame by frame where x is exactly that, else contiguous.
    """
    batch, channels, *positions = x.shape
    if is_channels_last(x):
        return x.new_empty(batch, *positions, channels).movedim(-1, 1)
    if x.dim() > 3 and not x.is_contiguous() and x.transpose(1, 2).is_contiguous():
        return x.new_empty(batch, positions[0], channels, *positions[1:]).transpose(1, 2)
    return x.new_empty(x.shape)


def axes(x: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes and strides of (B,C,T,H,W), where axes that x lacks have size 1."""
    missing = 5 - x.dim()
    sizes, strides = tuple(x.shape), x.stride()
    return (
        (*sizes[:2], *[1] * missing, *sizes[2:]),
        (*strides[:2], *[0] * missing, *strides[2:]),
    )


def unit_of(positions: int) -> float:
    """A power of two by which so many shares of at most 1 sum to less than 1."""
    return 2.0 ** -positions.bit_length()


def check_operands(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Raise TypeError or ValueError unless x (B,C,*positions), weight (C,) and bias (1,) fit.

    Expected are 1 to 3 axes of positions, one floating dtype, one device, C >= 1 and at least one
    position. B may be zero; bias may be None.
    """
    operands = {"x": x, "weight": weight} | ({} if bias is None else {"bias": bias})
    for name, tensor in operands.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(
                f"channel_gate: expected {name} to be a tensor, got {type(tensor).__name__}; "
                "convert it with torch.as_tensor"
            )
        if tensor.layout != torch.strided:
            raise TypeError(
                f"channel_gate: expected {name} to be a dense tensor, got {tensor.layout}; "
                "convert it with .to_dense()"
            )
    if not 3 <= x.dim() <= 5:
        raise ValueError(
            "channel_gate: expected x (batch, channels, positions), with 1 to 3 axes of "
            f"positions, got {describe(x)}; add or flatten dimensions"
        )
    if weight.shape != x.shape[1:2] or x.shape[1] == 0 or (bias is not None and bias.shape != (1,)):
        raise ValueError(
            "channel_gate: expected x (B,C,...), weight (C,) and bias (1,) or None, with C of at "
            f"least 1, got {_all(operands)}; a convolution's weight is (1, C, 1, ...): flatten it"
        )
    if x.dtype not in DTYPES or any(t.dtype != x.dtype for t in operands.values()):
        raise TypeError(
            "channel_gate: expected operands of one dtype out of float16, bfloat16, float32 and "
            f"float64, got {_all(operands)}; cast them, or use autocast"
        )
    if any(t.device != x.device for t in operands.values()):
        raise ValueError(
            f"channel_gate: expected operands on one device, got {_all(operands)}; "
            "move them with .to(device)"
        )
    if 0 in x.shape[2:]:
        raise ValueError(
            f"channel_gate: expected at least one position, got {_all(operands)}; a softmax over "
            "nothing is undefined, drop the call"
        )


def _all(operands: dict[str, torch.Tensor]) -> str:
    return ", ".join(f"{name} {describe(tensor)}" for name, tensor in operands.items())
