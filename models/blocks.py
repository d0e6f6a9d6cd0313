"""Layers that the models share: bottleneck, local control block, and how blocks are inserted.

A model keeps an inserted block in the attribute `nl` of the layer that the block follows, so that
checkpoint keys read `<layer>.nl.<parameter>` in every model.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from nlkernels._spec import nearest
from nlkernels.modules import NonLocalBlock3d
from nlkernels.modules.options import REGION_KINDS, BlockOptions
from nlkernels.modules.presets import preset_options

VARIANTS = ("nonlocal", "local")


def scaled(channels: int, width: float) -> int:
    """`channels * width`, rounded to the nearest multiple of 8 (at least 8).

    Raises:
        TypeError: width is not a number.
        ValueError: width is not positive and finite.
    """
    if isinstance(width, bool) or not isinstance(width, int | float):
        raise TypeError(f"model: expected width to be a number, got {width!r}; pass 1.0 for full")
    if not (math.isfinite(width) and width > 0):
        raise ValueError(f"model: expected width > 0, got {width}; pass 1.0 for the full width")
    return max(8, 8 * math.floor(channels * width / 8 + 0.5))


def check_clip(
    where: str, clip: torch.Tensor, *, min_frames: int, min_size: int, channels: int = 3
) -> None:
    """Raise before any work if the clip is not a float (B, C, T, H, W) that is large enough.

    Raises:
        TypeError: not a tensor, or not of a floating-point dtype.
        ValueError: wrong rank or channel count, too few frames or pixels.
    """
    if not isinstance(clip, torch.Tensor) or not clip.is_floating_point():
        got = clip.dtype if isinstance(clip, torch.Tensor) else type(clip).__name__
        raise TypeError(
            f"{where}: expected a floating-point clip, got {got}; normalise the frames first"
        )
    if clip.dim() != 5 or clip.shape[1] != channels:
        raise ValueError(
            f"{where}: expected a clip of shape (B, {channels}, T, H, W), "
            f"got {tuple(clip.shape)}; "
            "put the colour channels second and the frames third"
        )
    if clip.shape[2] < min_frames or min(clip.shape[3:]) < min_size:
        raise ValueError(
            f"{where}: expected at least {min_frames} frames of {min_size} x {min_size} pixels, "
            f"got {tuple(clip.shape)}; sample more frames or resize them"
        )


class Bottleneck(nn.Module):
    """Residual bottleneck of a video ResNet, with room for a gate and a block behind it.

    `conv1` (kt x 1 x 1), `conv2` (1 x 3 x 3, which has the spatial stride) and `conv3` (1 x 1 x 1),
    each with a norm; ReLU after the sum with the shortcut; then `gate` and `nl` where present.

    Args:
        in_channels: channels of the input.
        inner: channels between the 1 x 1 x 1 convolutions.
        out_channels: channels of the output.
        kernel_t: temporal kernel of `conv1`, odd; 1 looks at single frames.
        stride: spatial stride.
        norm: makes the norm of a number of channels.
        shift: channels of the input that come from the next frame, and as many from the one before;
            0 shifts nothing.
        shift_shortcut: the shortcut sees the shifted input, too.
    """

    def __init__(
        self,
        in_channels: int,
        inner: int,
        out_channels: int,
        *,
        kernel_t: int,
        stride: int,
        norm: Callable[[int], nn.Module],
        shift: int = 0,
        shift_shortcut: bool = False,
    ) -> None:
        super().__init__()
        self.shift, self.shift_shortcut = shift, shift_shortcut
        self.conv1 = nn.Conv3d(
            in_channels, inner, (kernel_t, 1, 1), padding=(kernel_t // 2, 0, 0), bias=False
        )
        self.bn1 = norm(inner)
        self.conv2 = nn.Conv3d(
            inner, inner, (1, 3, 3), stride=(1, stride, stride), padding=(0, 1, 1), bias=False
        )
        self.bn2 = norm(inner)
        self.conv3 = nn.Conv3d(inner, out_channels, 1, bias=False)
        self.bn3 = norm(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv3d(in_channels, out_channels, 1, stride=(1, stride, stride), bias=False),
                norm(out_channels),
            )
        self.gate: nn.Module | None = None
        self.nl: nn.Module | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shifted = temporal_shift(x, self.shift) if self.shift else x
        shortcut = shifted if self.shift_shortcut else x
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        y = self.relu(self.bn1(self.conv1(shifted)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.relu(self.bn3(self.conv3(y)) + shortcut)
        y = y if self.gate is None else self.gate(y)
        return y if self.nl is None else self.nl(y)

    def extra_repr(self) -> str:
        return f"shift={self.shift}" if self.shift else ""


def temporal_shift(x: torch.Tensor, fold: int) -> torch.Tensor:
    """Exchange channels between neighbouring frames.

    Args:
        x: (B, C, T, H, W), any dtype.
        fold: the first `fold` channels come from the next frame, the second `fold` from the frame
            before; at the ends of the clip they are 0. At most C // 2.

    Returns:
        A new tensor of the shape of x.

    Example:
        >>> import torch
        >>> from nlkernels.models.blocks import temporal_shift
        >>> temporal_shift(torch.tensor([1.0, 2, 3]).view(1, 1, 3, 1, 1).expand(1, 3, 3, 1, 1), 1)[
        ...     0, :, :, 0, 0
        ... ]
        tensor([[2., 3., 0.],
                [0., 1., 2.],
                [1., 2., 3.]])

    Source:
        mit-han-lab/temporal-shift-module: ops/temporal_shift.py.
    """
    following = F.pad(x[:, :fold, 1:], (0, 0, 0, 0, 0, 1))
    previous = F.pad(x[:, fold : 2 * fold, :-1], (0, 0, 0, 0, 1, 0))
    return torch.cat((following, previous, x[:, 2 * fold :]), dim=1)


class LocalBlock3d(nn.Module):
    """Local control for a non-local block: as many parameters, but a 3 x 3 x 3 neighbourhood.

    x + BN(expand(ReLU(BN(conv(ReLU(BN(reduce(x)))))))) with 1 x 1 x 1 `reduce` and `expand` and a
    3 x 3 x 3 `conv`, all without bias. The last batch norm starts at zero, so the block starts as
    the identity, as a non-local block does. A model in which it replaces `NonLocalBlock3d` shows
    what the extra parameters alone are worth.

    Args:
        dim: channels C of input and output.
        parameters: number of parameters to come close to. The widths behind `reduce` and `conv`
            may differ by a factor of up to 2: one common width would miss small counts by 7 %.

    Shapes:
        (B, C, T, H, W) -> (B, C, T, H, W), any floating-point dtype.

    Raises:
        ValueError: dim or parameters below 1.

    Example:
        >>> import torch
        >>> from nlkernels.models import LocalBlock3d
        >>> block = LocalBlock3d(64, parameters=8480)
        >>> sum(p.numel() for p in block.parameters())
        8492
        >>> x = torch.ones(1, 64, 2, 4, 4)
        >>> torch.equal(block(x), x)
        True
    """

    def __init__(self, dim: int, *, parameters: int) -> None:
        super().__init__()
        if dim < 1 or parameters < 1:
            raise ValueError(
                f"LocalBlock3d: expected dim and parameters >= 1, got {dim} and {parameters}; "
                "pass the channels and the parameter count of the block to match"
            )
        reduced, width = _local_widths(dim, parameters)
        self.reduce = nn.Conv3d(dim, reduced, 1, bias=False)
        self.reduce_norm = nn.BatchNorm3d(reduced)
        self.conv = nn.Conv3d(reduced, width, 3, padding=1, bias=False)
        self.conv_norm = nn.BatchNorm3d(width)
        self.expand = nn.Conv3d(width, dim, 1, bias=False)
        self.norm = nn.BatchNorm3d(dim)
        self.relu = nn.ReLU(inplace=True)
        for conv in (self.reduce, self.conv, self.expand):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu(self.reduce_norm(self.reduce(x)))
        y = self.relu(self.conv_norm(self.conv(y)))
        return x + self.norm(self.expand(y))


def _local_widths(dim: int, parameters: int) -> tuple[int, int]:
    """Widths of a local block: the most equal pair within 1 % of the count, else the nearest."""

    def count(reduced: int, width: int) -> int:
        norms = 2 * (reduced + width + dim)
        return dim * (reduced + width) + 27 * reduced * width + norms

    def preference(pair: tuple[int, int]) -> tuple[int, int, int]:
        miss = abs(count(*pair) - parameters)
        return (0 if miss <= 0.01 * parameters else miss, abs(pair[0] - pair[1]), miss)

    pairs = []
    # With width >= reduced / 2, the 3x3x3 weights alone exceed the count beyond this bound.
    for reduced in range(1, math.isqrt(parameters // 13) + 2):
        left = parameters - 2 * dim - reduced * (dim + 2)
        width = max(1, round(left / (27 * reduced + dim + 2)))
        if max(reduced, width) <= 2 * min(reduced, width):
            pairs.append((reduced, width))
    return min(pairs, key=preference)


def check_block_options(
    where: str,
    options: Mapping[str, Any] | None,
    preset: str | None = None,
    kind: str | None = None,
) -> dict[str, Any]:
    """Options of an inserted block as a new dictionary that includes "variant".

    Args:
        where: name for the error messages.
        options: keyword arguments of `NonLocalBlock3d` (without `dim`), "variant", and "preset": a
            published system's options, which the others replace; or None.
        preset: the preset where `options` names none; None for the block's own defaults.
        kind: the kind where `options` names neither one nor a preset; None for the preset's.

    Returns:
        The options, "preset" replaced by what it stands for.

    Raises:
        TypeError: not a mapping, or an unknown option.
        ValueError: unknown variant or preset.
    """
    given = {} if options is None else options
    if not isinstance(given, Mapping):
        raise TypeError(
            f"{where}: expected block to be a dictionary of options, got {options!r}; "
            "pass for example {'kind': 'softmax'}"
        )
    known = ("variant", "preset", *BlockOptions._fields)
    for option in given:
        if option not in known:
            raise TypeError(
                f"{where}: expected block options among {', '.join(known)}, "
                f"got {option!r}{nearest(option, known)}"
            )
    variant = given.get("variant", "nonlocal")
    if variant not in VARIANTS:
        raise ValueError(
            f"{where}: expected block variant to be one of {', '.join(VARIANTS)}, "
            f"got {variant!r}{nearest(variant, VARIANTS)}"
        )
    arguments = {key: given[key] for key in given if key not in ("variant", "preset")}
    if kind is not None and "preset" not in given:
        arguments.setdefault("kind", kind)
    preset = given.get("preset", preset)
    if preset is not None:
        arguments = preset_options(preset, NonLocalBlock3d.dims, arguments)
    return {**arguments, "variant": variant}


def for_layer(
    options: Mapping[str, Any], given: Mapping[str, Any] | None, own: Mapping[str, Any]
) -> dict[str, Any]:
    """Options of a block behind one layer.

    Args:
        options: what `check_block_options` returned.
        given: what the caller asked for, which wins.
        own: what the design has behind this layer; a region's kernel only for kinds with regions.
    """
    regional = options.get("kind") in REGION_KINDS
    added = {
        key: own[key]
        for key in own
        if key not in (given or {}) and (regional or key != "region_kernel")
    }
    return {**options, **added}


def check_block_count(where: str, blocks: int, counts: Collection[int]) -> None:
    """Raise a ValueError if the model has no placement for this number of blocks."""
    if isinstance(blocks, bool) or not isinstance(blocks, int) or blocks not in counts:
        raise ValueError(
            f"{where}: expected blocks to be one of {', '.join(map(str, counts))}, "
            f"got {blocks!r}; pass one of these"
        )


def insert_blocks(layers: Iterable[tuple[nn.Module, int]], options: Mapping[str, Any]) -> None:
    """Put a new block into the attribute `nl` of each layer.

    Args:
        layers: pairs of a layer and its number of output channels.
        options: what `check_block_options` returned. With variant "local", the other options
            describe the non-local block whose parameter count is matched.
    """
    arguments = {key: value for key, value in options.items() if key != "variant"}
    for layer, dim in layers:
        if options["variant"] == "nonlocal":
            layer.nl = NonLocalBlock3d(dim, **arguments)
            continue
        with torch.device("meta"):
            matched = NonLocalBlock3d(dim, **arguments)
        count = sum(parameter.numel() for parameter in matched.parameters())
        layer.nl = LocalBlock3d(dim, parameters=count)
