"""What max pooling is asked to do, how its results lie in memory, and the format of its winners.

A winner is the number of a window's maximum within the window, in (T, H, W) order. Winners are
packed: 2 bits each where a window has at most 4 numbers, 4 up to 16, 8 up to 256, the first in the
lowest bits. What is packed together are the channels of a position where channels are neighbours
in memory, else the positions of a line of W:

  channels last   (B, T', H', W', bytes of C winners)
  otherwise       (B, C, T', H', bytes of W' winners)
"""

from typing import NamedTuple

import torch

from nlkernels.ops.region.problem import is_channels_last

# Numbers of the largest window whose winners are bytes.
LARGEST = 256


class PoolProblem(NamedTuple):
    """Sizes, dtype, device and layout of one call, as backends and dispatch see it."""

    batch: int
    channels: int
    frames: int
    height: int
    width: int
    window: tuple[int, int, int]
    dtype: torch.dtype
    device: str
    index: int | None = None
    channels_last: bool = False

    @classmethod
    def of(cls, x: torch.Tensor, window: list[int]) -> "PoolProblem":
        """Describe x (B,C,T,H,W), or a gradient of that size, and the window."""
        device, last = x.device, is_channels_last(x)
        return cls(*x.shape, tuple(window), x.dtype, device.type, device.index, last)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        layout = " channels_last_3d" if self.channels_last else ""
        return (
            f"B={self.batch} C={self.channels} T={self.frames} H={self.height} W={self.width} "
            f"window {'x'.join(map(str, self.window))} {self.dtype_name}{layout} on {self.device}"
        )


def taps(window: list[int]) -> int:
    """How many numbers a window has."""
    return window[0] * window[1] * window[2]


def bits(window: list[int]) -> int:
    """Bits of a winner."""
    return 2 if taps(window) <= 4 else 4 if taps(window) <= 16 else 8


def pooled_sizes(x: torch.Tensor, window: list[int]) -> list[int]:
    """(B, C, T', H', W'): what a last window would lack is left out."""
    return [*x.shape[:2], *(n // k for n, k in zip(x.shape[2:], window, strict=True))]


def like(x: torch.Tensor, window: list[int]) -> torch.Tensor:
    """An uninitialised result for x: channels_last_3d where x or its base is, else NCDHW."""
    sizes = pooled_sizes(x, window)
    if is_channels_last(x):
        return x.new_empty(sizes[0], *sizes[2:], sizes[1]).movedim(-1, 1)
    return x.new_empty(sizes)


def winners_like(x: torch.Tensor, window: list[int]) -> torch.Tensor:
    """Uninitialised winners for x."""
    batch, channels, *positions = pooled_sizes(x, window)
    rows = [*positions, channels] if is_channels_last(x) else [channels, *positions]
    rows[-1] = (rows[-1] * bits(window) + 7) // 8
    return x.new_empty(batch, *rows, dtype=torch.uint8)


def packed(numbers: torch.Tensor, last: bool, window: list[int]) -> torch.Tensor:
    """Winners of the numbers (B,C,T',H',W') of maxima within their windows."""
    width = bits(window)
    each = 8 // width
    rows = numbers.movedim(1, -1) if last else numbers
    rows = torch.nn.functional.pad(rows, (0, -rows.shape[-1] % each)).unflatten(-1, (-1, each))
    shifts = torch.arange(0, 8, width, device=rows.device)
    return (rows << shifts).sum(-1, dtype=torch.uint8)


def unpacked(winners: torch.Tensor, count: int, last: bool, window: list[int]) -> torch.Tensor:
    """The numbers (B,C,T',H',W') of maxima within their windows, `count` of them in each row."""
    width = bits(window)
    shifts = torch.arange(0, 8, width, device=winners.device, dtype=torch.uint8)
    numbers = (winners[..., None] >> shifts & (1 << width) - 1).flatten(-2)[..., :count]
    return numbers.movedim(-1, 1) if last else numbers
