"""Blocks of other systems as ours compute them: views of their modules, with no state of their own.

A view reads its module's layers and options at every call, so that layers which are replaced, moved
or given hooks later are seen. Nothing of the other package is imported.
"""

import math
from typing import Any

import torch
from torch import nn

from nlkernels._arguments import requested_backend
from nlkernels._select import Explanation
from nlkernels.modules import fast, inputs, layers, plain
from nlkernels.modules.base import NonLocalBlock
from nlkernels.modules.options import factor
from nlkernels.ops.pool.problem import LARGEST

_PROJECTIONS = ("theta", "phi", "g", "out")
# Scores (B N M) up to which theirs is the faster forward and backward on a CPU, by kind: ours took
# 1.05 to 1.95 times theirs at 14,112 to 153,664 (softmax), 40,000 (dot_product) and 307,328
# (gaussian) scores, on one thread with AVX-512-BF16.
FEW_SCORES = {"softmax": 2**18, "gaussian": 2**19, "dot_product": 2**17}
# What mmcv builds for torch's layers; they differ for empty inputs of torch before 1.5 only.
_WRAPPERS = "mmcv.cnn.bricks.wrappers"
CONV_MODULE = "mmcv.cnn.bricks.conv_module.ConvModule"


class View:
    """A block of another system, behind the names that `nlkernels.modules` computes with.

    Attributes:
        module: the other system's block.
        pool_order: where it pools.
        constants: names of parameters whose values are part of its function.
        stored: attributes in which it keeps maps of its last forward, which are not made here.
    """

    __slots__ = ("module",)

    pool_order = "after"
    constants: tuple[str, ...] = ()
    stored: tuple[str, ...] = ()
    temporal_group = None
    region = None
    region_l2norm = False

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    # Parts, of which each system says where they are; None for one that a block does not have.

    kind: str
    dims: int = 3
    theta: nn.Module | None
    phi: nn.Module | None
    g: nn.Module | None
    out: nn.Module
    norm: nn.Module | None
    pool: nn.Module | None
    scale: float | None = None

    def maps(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Maps of query, key and value, by the system's own layers in its own order."""
        raise NotImplementedError

    def ending(self, y: torch.Tensor) -> torch.Tensor:
        """What is added to x, by the system's own layers."""
        raise NotImplementedError

    def strange(self) -> str:
        """Why only the system's own forward will do; "" where ours does."""
        return self.unknown()

    def unknown(self) -> str:
        """The layer whose width is nowhere to be read; "" if there is none."""
        unknown = (each for each in (self._value, self.out) if width(each) is None)
        return next((f"a layer of {type(each).__name__}, of unknown width" for each in unknown), "")

    def refuses(self) -> str:
        """What the system's block has that ours does not; "" if nothing."""
        return ""

    # What a block of ours has.

    @property
    def dim(self) -> int | None:
        return width(self._value)

    @property
    def inner(self) -> int | None:
        return width(self.out)

    @property
    def _value(self) -> nn.Module:
        return self.theta if self.g is None else self.g

    @property
    def pool_size(self) -> tuple[int, ...] | None:
        pool = self.pool
        known = pool is not None and _is_pooling(pool, self.dims)
        return _sizes(pool.kernel_size, self.dims) if known else None

    @property
    def backend(self) -> str | None:
        return getattr(self.module, "backend", None)

    @property
    def fused(self) -> bool | None:
        return getattr(self.module, "fused", None)

    @property
    def recompute(self) -> bool:
        return getattr(self.module, "recompute", False)

    @property
    def _name(self) -> str:
        return type(self.module).__name__

    @property
    def _factor(self) -> float:
        return factor(self.kind, self.scale, self.inner)

    _backend = NonLocalBlock._backend
    _options = NonLocalBlock._options
    _attend = NonLocalBlock._attend
    _apart = NonLocalBlock._apart
    footprint = NonLocalBlock.footprint
    attention_map = NonLocalBlock.attention_map

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, dim, *positions) -> the same: in few passes, or layer after layer."""
        inputs.check(self, x)
        if not self._apart(x):
            return fast.forward(self, x)[0]
        rows = plain.as_operands(self, *self.maps(x))
        y = self._attend(*rows).mT.unflatten(2, x.shape[2:])
        return x + self.ending(y.contiguous(memory_format=layers.memory_format(x)))

    def few(self, x: torch.Tensor) -> bool:
        """Whether so few scores are asked for that the system's own forward is the faster one."""
        measured = isinstance(x, torch.Tensor) and x.device.type == "cpu"
        if not measured or torch.compiler.is_compiling():
            return False
        if self.fused is not None or self.recompute:
            return False
        if requested_backend(self._backend, None, self._name) != "auto":
            return False
        queries = math.prod(x.shape[2:])
        keys = queries // math.prod(self.pool_size or (1,))
        return x.shape[0] * queries * keys <= FEW_SCORES.get(self.kind, 0)

    def explain(self, x: torch.Tensor) -> Explanation:
        """See `NonLocalBlock3d.explain`."""
        if why := self.strange():
            raise NotImplementedError(f"{self._name}: expected our computation, got {why}")
        found = NonLocalBlock.explain(self, x)
        if not self.few(x):
            return found
        note = "so few scores are left to the block's own forward, unless a backend is named"
        return found._replace(problem=f"{found.problem}; {note}")

    def _operands(self, x: torch.Tensor, apart: bool) -> tuple[torch.Tensor, ...]:
        if apart:
            return plain.as_operands(self, *self.maps(x))
        return fast.operands(self, x)

    def _obstacles(self) -> list[str]:
        """Why the system's own layers run one after another."""
        if self.fused is False:
            return ["its attribute fused is False"]
        if requested_backend(self._backend, None, self._name) == "reference":
            return ["the backend reference is the definition"]
        if nn.modules.module._has_any_global_hook():
            return ["hooks of all modules see what passes"]
        for name, part in self.module.named_modules():
            if part is not self.module and (why := fast.added(part)):
                return [f"{name} has {why}"]
        for name in _PROJECTIONS:
            part = getattr(self, name)
            if part is not None and not _is_pointwise(part, self.dims):
                return [f"{name} is a {type(part).__name__} of its own kind"]
        if self.pool is not None and not _is_pooling(self.pool, self.dims):
            return [f"pool is a {type(self.pool).__name__} of its own kind"]
        return self.wrapped()

    def wrapped(self) -> list[str]:
        """Why what is around the layers has to run."""
        return []


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module as its system has it, whether or not it is patched."""
    return getattr(type(module), "nonlocal_original", type(module))


def path_of(cls: type) -> str:
    """Module and qualified name of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def first(module: nn.Module, *names: str) -> Any:
    """The first of several attributes that there is; None if there is none."""
    return next((getattr(module, name) for name in names if hasattr(module, name)), None)


def pair(layer: nn.Module) -> tuple[nn.Module, nn.Module | None]:
    """A layer and what follows it in a sequence of two; None for one that is no such sequence."""
    is_pair = type(layer) is nn.Sequential and len(layer) == 2
    return (layer[0], layer[1]) if is_pair else (layer, None)


def convolution(layer: nn.Module, *, with_norm: bool = False) -> nn.Module:
    """The convolution inside of mmcv's ConvModule, if that does nothing else; any other layer."""
    return layer.conv if is_bare(layer, with_norm=with_norm) else layer


def width(layer: nn.Module) -> int | None:
    """Channels that a layer takes, where it or a part of it says so."""
    parts = (part for part in layer.modules() if hasattr(part, "in_channels"))
    return next((part.in_channels for part in parts), None)


def _sizes(size: int | tuple[int, ...] | list[int], dims: int) -> tuple[int, ...]:
    return (size,) * dims if isinstance(size, int) else tuple(size)


def _is_torch(part: nn.Module, expected: type[nn.Module]) -> bool:
    wrapper = type(part).__module__ == _WRAPPERS and isinstance(part, expected)
    return type(part) is expected or wrapper


def _is_pointwise(part: nn.Module, dims: int) -> bool:
    """Whether a layer is one product for each position."""
    if not _is_torch(part, layers.CONVOLUTIONS[dims]):
        return False
    ones = set(part.kernel_size) == {1} and set(part.stride) == {1} and part.groups == 1
    return ones and not any(_sizes(part.padding, dims))


def _is_pooling(part: nn.Module, dims: int) -> bool:
    """Whether a layer takes the largest of neighbours that no other window has."""
    if not _is_torch(part, layers.POOLINGS[dims]):
        return False
    window = _sizes(part.kernel_size, dims)
    apart = _sizes(part.stride, dims) == window and not any(_sizes(part.padding, dims))
    plain_ones = set(_sizes(part.dilation, dims)) == {1} and not part.ceil_mode
    small = torch.Size(window).numel() <= LARGEST
    return apart and plain_ones and not part.return_indices and small


def is_bare(layer: nn.Module, *, with_norm: bool) -> bool:
    """Whether a ConvModule convolves, and normalises at most where that is expected."""
    if path_of(type(layer)) != CONV_MODULE or layer.with_activation or layer.with_explicit_padding:
        return False
    if layer.with_norm and not with_norm:
        return False
    order = layer.order.index("conv") < layer.order.index("norm")
    return order and not getattr(layer, "efficient_conv_bn_eval_forward", None)
