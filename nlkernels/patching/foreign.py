"""Where each system's block keeps its parts, and what it does with them."""

from typing import ClassVar

import torch
from torch import nn

from nlkernels import functional
from nlkernels._select import Explanation
from nlkernels._systems import depthwise_from_dense
from nlkernels.modules import fast
from nlkernels.patching.view import (
    View,
    convolution,
    first,
    is_bare,
    own_class,
    pair,
    path_of,
)

# The end of its path: it lies beside the block's file.
_REGION_LAYER = "depthwise_conv.DiagonalwiseRefactorization"


class PoolFirst(View):
    """PySlowFast's and pytorchvideo's block: a pooled x makes key and value."""

    __slots__ = ()

    pool_order = "before"
    theta = property(lambda self: self.module.conv_theta)
    phi = property(lambda self: self.module.conv_phi)
    g = property(lambda self: self.module.conv_g)
    out = property(lambda self: self.module.conv_out)
    # Releases of PySlowFast call it either way, and some have none.
    norm = property(lambda self: first(self.module, "bn", "norm"))
    kind = property(lambda self: self.module.instantiation)

    @property
    def pool(self) -> nn.Module | None:
        return (
            getattr(self.module, "pool", None) if getattr(self.module, "use_pool", True) else None
        )

    def refuses(self) -> str:
        return "" if self.kind in ("softmax", "dot_product") else f"instantiation {self.kind!r}"

    def maps(self, x):
        query = self.theta(x)
        source = x if self.pool is None else self.pool(x)
        return query, self.phi(source), self.g(source)

    def ending(self, y):
        out = self.out(y)
        return out if self.norm is None else self.norm(out)


class Timm(View):
    """timm's block for images: no pooling, scores scaled by the width of the input."""

    __slots__ = ()

    kind, dims, pool = "softmax", 2, None
    theta = property(lambda self: self.module.t)
    phi = property(lambda self: self.module.p)
    g = property(lambda self: self.module.g)
    out = property(lambda self: self.module.z)
    norm = property(lambda self: self.module.norm)
    scale = property(lambda self: float(self.module.scale))

    def maps(self, x):
        return self.theta(x), self.phi(x), self.g(x)

    def ending(self, y):
        return self.norm(self.out(y))


class PoolAfter(View):
    """The block of Non-local_pytorch, TSM's and mmcv's: key and value are pooled separately."""

    __slots__ = ()

    theta = property(lambda self: None if self._bare else convolution(self.module.theta))
    phi = property(lambda self: None if self._bare else convolution(pair(self.module.phi)[0]))
    g = property(lambda self: convolution(pair(self.module.g)[0]))
    _bare = property(lambda self: self.kind == "gaussian")

    @property
    def pool(self) -> nn.Module | None:
        """The key's; see `wrapped` for the value's."""
        if self._bare:
            return self.module.phi if self.module.sub_sample else None
        return pair(self.module.phi)[1]

    @property
    def concat_weight(self) -> torch.Tensor:
        layer = self.module.concat_project
        convolves = layer[0] if isinstance(layer, nn.Sequential) else layer.conv
        return convolves.weight.view(2, -1)

    def strange(self) -> str:
        if self.kind == "concat":
            if nn.modules.module._has_any_global_hook():
                return "hooks of all modules, which see a concatenation's scores"
            for name, part in self.module.concat_project.named_modules(prefix="concat_project"):
                if why := fast.added(part):
                    return f"{name}, which has {why}"
        return super().strange()

    def maps(self, x):
        value = self.module.g(x)
        if not self._bare:
            return self.module.theta(x), self.module.phi(x), value
        return x, x if self.pool is None else self.module.phi(x), value

    def wrapped(self) -> list[str]:
        alike = repr(self.pool) == repr(pair(self.module.g)[1])
        return [] if alike else ["key and value are pooled differently"]


class EndsInW(View):
    """Blocks whose output projection is W, or W's first layer before a norm."""

    __slots__ = ()

    out = property(lambda self: pair(self.module.W)[0])
    norm = property(lambda self: pair(self.module.W)[1])

    def ending(self, y):
        return self.module.W(y)


class AlexHex7(EndsInW, PoolAfter):
    """Non-local_pytorch: a file for each kind, and the same classes in all of them."""

    __slots__ = ()

    scale = 1.0
    dims = property(lambda self: self.module.dimension)
    _KINDS: ClassVar = {
        "non_local_gaussian": "gaussian",
        "non_local_embedded_gaussian": "softmax",
        "non_local_dot_product": "dot_product",
        "non_local_concatenation": "concat",
    }

    @property
    def kind(self) -> str:
        return self._KINDS.get(own_class(self.module).__module__.rpartition(".")[2], "softmax")

    def strange(self) -> str:
        if getattr(self.module, "store_last_batch_nl_map", False):
            return "a request to store the map"
        return super().strange()


class Mmcv(PoolAfter):
    """mmcv's block, which mmaction2 uses: layers inside of ConvModules, scaled on demand."""

    __slots__ = ()

    _KINDS: ClassVar = {
        "gaussian": "gaussian",
        "embedded_gaussian": "softmax",
        "dot_product": "dot_product",
        "concatenation": "concat",
    }
    kind = property(lambda self: self._KINDS[self.module.mode])
    out = property(lambda self: convolution(self.module.conv_out, with_norm=True))

    @property
    def norm(self) -> nn.Module | None:
        layer = self.module.conv_out
        return layer.norm if is_bare(layer, with_norm=True) else None

    @property
    def dims(self) -> int:
        return int(own_class(self.module).__name__[-2])

    @property
    def scale(self) -> float | None:
        scaled = self.kind == "softmax" and self.module.use_scale
        return None if scaled else 1.0

    def ending(self, y):
        return self.module.conv_out(y)


class Region(EndsInW):
    """Region-based: query and key are theta's aggregated map, the value is theta's own."""

    __slots__ = ()

    constants = ("penta.mask",)
    stored = ("attention_maps", "feature_maps", "attention_size")
    phi = g = None
    scale = 1.0
    theta = property(lambda self: self.module.theta)
    region_l2norm = property(lambda self: bool(self.module.use_norm))

    @property
    def kind(self) -> str:
        return f"region_{self.module.activation}"

    @property
    def pool(self) -> nn.Module | None:
        return self.module.pooling if self.module.sub_sample else None

    @property
    def region(self) -> "Aggregation | None":
        penta = getattr(self.module, "penta", None)
        return None if penta is None else Aggregation(penta)

    def refuses(self) -> str:
        if self.kind not in ("region_softmax", "region_relu"):
            return f"activation {self.kind.removeprefix('region_')!r}"
        return self._other_relu()

    def strange(self) -> str:
        if self.kind != "region_relu":
            return super().strange()
        if nn.modules.module._has_any_global_hook():
            return "hooks of all modules, which see the scores"
        if why := fast.added(self.module.relu):
            return f"relu, which has {why}"
        return self._other_relu() or super().strange()

    def _other_relu(self) -> str:
        relu = getattr(self.module, "relu", None)
        known = self.kind == "region_softmax" or type(relu) is nn.ReLU
        return "" if known else f"relu, a {type(relu).__name__} of its own kind"

    def maps(self, x):
        value = self.theta(x)
        penta = getattr(self.module, "penta", None)
        query = value if penta is None else penta(value)
        if self.region_l2norm:
            query = nn.functional.normalize(query, dim=1)
        if self.pool is None:
            return query, query, value
        return query, self.pool(query), self.pool(value)

    def wrapped(self) -> list[str]:
        penta = getattr(self.module, "penta", None)
        if penta is not None and not path_of(type(penta)).endswith(_REGION_LAYER):
            return [f"penta is a {type(penta).__name__} of its own kind"]
        return super().wrapped()


class Aggregation:
    """A region's dense, masked layer as the depthwise operation that it is."""

    __slots__ = ("penta",)

    def __init__(self, penta: nn.Module) -> None:
        self.penta = penta

    def __call__(self, x: torch.Tensor, backend: str = "auto") -> torch.Tensor:
        return functional.region_aggregate(x, self._weight(), backend=backend)

    def explain(self, x: torch.Tensor, backend: str = "auto") -> Explanation:
        return functional.explain("region_aggregate", x, self._weight(), backend=backend)

    def _weight(self) -> torch.Tensor:
        return depthwise_from_dense(self.penta.weight)
