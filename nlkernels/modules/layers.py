"""What a block is made of besides torch's layers, how its weights start, and their state."""

import math
from collections.abc import Callable
from typing import Self

import torch
from torch import nn

from nlkernels import functional
from nlkernels._operations import OPERATIONS
from nlkernels._select import Explanation
from nlkernels.modules.options import BlockOptions
from nlkernels.ops.block.layout import rows_of

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
POOLINGS = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}

_NORMAL_STD = 0.01


class Affine(nn.Module):
    """x * weight + bias for each channel: a batch norm that is frozen into its two factors.

    Args:
        channels: C.

    Shape:
        (B, C, *positions) -> the same, any floating-point dtype.

    Raises:
        RuntimeError: torch's, for another number of channels.

    Example:
        >>> import torch
        >>> from nlkernels.modules.layers import Affine
        >>> torch.equal(Affine(3)(torch.ones(2, 3, 4)), torch.ones(2, 3, 4))
        True
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (-1,) + (1,) * (x.dim() - 2)
        return torch.addcmul(self.bias.view(shape), x, self.weight.view(shape))

    def extra_repr(self) -> str:
        return str(self.weight.shape[0])


class RegionAggregation(nn.Module):
    """`region_aggregate` with a learned weight (C, *kernel), for 1, 2 or 3 dimensions.

    Args:
        channels: C.
        kernel: odd sizes, one for each dimension.

    Shape:
        (B, C, *positions) -> the same.

    Raises:
        What `region_aggregate` raises.

    Example:
        >>> import torch
        >>> from nlkernels.modules.layers import RegionAggregation
        >>> RegionAggregation(8, (3, 3))(torch.zeros(1, 8, 6, 6)).shape
        torch.Size([1, 8, 6, 6])
    """

    def __init__(self, channels: int, kernel: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, *kernel))
        self.initialise("default")

    def initialise(self, init: str | float) -> None:
        """Draw a new weight; see `NonLocalBlock3d` for the values of init."""
        channels, *kernel = self.weight.shape
        taps = math.prod(kernel)
        if init == "default":
            # Xavier's bound for the dense weight of groups of 32 channels, of which the published
            # code keeps a diagonal.
            group = channels // max(channels // 32, 1)
            bound = math.sqrt(6 / ((group + channels) * taps))
            nn.init.uniform_(self.weight, -bound, bound)
        elif init == "kaiming":
            nn.init.normal_(self.weight, std=math.sqrt(2 / taps))
        else:
            nn.init.normal_(self.weight, std=_NORMAL_STD if init == "normal" else init)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Convert the weight as the depthwise kernel that it is.

        `Module.to(memory_format=torch.channels_last_3d)` refuses parameters of four dimensions.
        """
        if self.weight.dim() != 4:
            return super()._apply(fn, recurse)
        return super()._apply(lambda tensor: fn(tensor.unsqueeze(1)).squeeze(1), recurse)

    def forward(self, x: torch.Tensor, backend: str = "auto") -> torch.Tensor:
        out = functional.region_aggregate(*self._lifted(x), backend=backend)
        return lowered(out, x.dim())

    def explain(self, x: torch.Tensor, backend: str = "auto") -> Explanation:
        """Say which backend aggregates `x`."""
        return functional.explain("region_aggregate", *self._lifted(x), backend=backend)

    def _lifted(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Input and weight with the axes of size 1 that they lack, in front of their own."""
        ones = (1,) * (5 - x.dim())
        return lifted(x), self.weight.unflatten(1, (*ones, self.weight.shape[1]))

    def extra_repr(self) -> str:
        channels, *kernel = self.weight.shape
        return f"{channels}, kernel={tuple(kernel)}"


def region_backend(backend: str | None) -> str:
    """The aggregation's backend in a block of this backend: "sdpa", for one, attends only."""
    return backend if backend in OPERATIONS["region_aggregate"].backends else "auto"


def initialise(layer: nn.Module, init: str | float) -> None:
    """Draw the weight of a 1x1 convolution and, except for "default", zero its bias."""
    if init == "default":
        return
    if init == "kaiming":
        nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    else:
        nn.init.normal_(layer.weight, std=_NORMAL_STD if init == "normal" else init)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def initialise_concat(weight: torch.Tensor, init: str | float) -> None:
    """Draw the weight (2, inner) of the concatenation: a 1x1 convolution of 2 inner inputs to 1."""
    if init == "default":
        bound = 1 / math.sqrt(weight.numel())
        nn.init.uniform_(weight, -bound, bound)
    elif init == "kaiming":
        nn.init.kaiming_normal_(weight.view(1, -1), mode="fan_out", nonlinearity="relu")
    else:
        nn.init.normal_(weight, std=_NORMAL_STD if init == "normal" else init)


def norm(where: str, dims: int, dim: int, options: BlockOptions) -> nn.Module | None:
    """The layer behind `out`.

    Raises:
        TypeError: a callable that returns no module.
        ValueError: one without a weight for zero_init="gamma".
    """
    if options.norm is None:
        return None
    if options.norm == "affine":
        return Affine(dim)
    if options.norm == "batch":
        return BATCH_NORMS[dims](dim, eps=options.norm_eps, momentum=options.norm_momentum)
    made = options.norm(dim)
    if not isinstance(made, nn.Module):
        raise TypeError(
            f"{where}: expected norm({dim}) to be a module, got {type(made).__name__}; "
            "pass a function of the channels, such as functools.partial(torch.nn.GroupNorm, 8)"
        )
    if options.zero_init == "gamma" and not isinstance(getattr(made, "weight", None), nn.Parameter):
        raise ValueError(
            f"{where}: expected a norm with a weight for zero_init='gamma', got {made}; "
            "use zero_init='weight' or a norm with affine=True"
        )
    return made


def close(out: nn.Module, norm: nn.Module | None, zero_init: str | None) -> None:
    """Zero what makes a new block the identity."""
    closed = {"gamma": norm, "weight": out, None: None}[zero_init]
    for parameter in () if closed is None else (closed.weight, closed.bias):
        if parameter is not None:
            nn.init.zeros_(parameter)


def is_identity(out: nn.Module, norm: nn.Module | None) -> bool | None:
    """Whether norm(out(...)) is zero whatever comes in; None where values cannot be read."""
    try:
        return _is_silent(out, norm)
    except (RuntimeError, AssertionError):  # meta and fake tensors, real ones in a fake mode
        return None


def _is_silent(out: nn.Module, norm: nn.Module | None) -> bool:
    silent = _is_zero(out.weight) and (out.bias is None or _is_zero(out.bias))
    if norm is None:
        return silent
    bias, mean = getattr(norm, "bias", None), getattr(norm, "running_mean", None)
    if bias is not None and not _is_zero(bias):
        return False
    scaled = getattr(norm, "weight", None)
    if scaled is not None and _is_zero(scaled):
        return True
    return silent and (mean is None or _is_zero(mean))


def _is_zero(tensor: torch.Tensor) -> bool:
    return not tensor.detach().any()


def lifted(features: torch.Tensor) -> torch.Tensor:
    """(B, C, *positions) as (B, C, T, H, W), with axes of size 1 in front of its own: a view."""
    return features.unflatten(2, (*[1] * (5 - features.dim()), features.shape[2]))


def lowered(features: torch.Tensor, dims: int) -> torch.Tensor:
    """What was lifted, with so many axes again."""
    return features.flatten(2, features.dim() - dims + 2)


def rows(*features: torch.Tensor) -> list[torch.Tensor]:
    """Maps (B, C, *positions) as rows (B, N, C): views, of one map one."""
    if torch.compiler.is_compiling():  # Dynamo takes no tensor for two of an operator's inputs
        return [rows_of(feature) for feature in features]
    once = {id(feature): rows_of(feature) for feature in features}
    return [once[id(feature)] for feature in features]


def memory_format(x: torch.Tensor) -> torch.memory_format:
    """The channels-last format of a tensor that has it, else the contiguous one."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if x.is_contiguous() or last is None or not x.is_contiguous(memory_format=last):
        return torch.contiguous_format
    return last
