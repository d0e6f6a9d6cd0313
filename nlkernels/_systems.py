"""How other systems name, shape and restrict the parameters of a non-local block.

Layouts only, no weights: `nlkernels.state_dict` reads and writes with them. An *entry* is a key of
our block's `state_dict()`, such as "theta.weight"; a *key* is what another system calls it.
Sources: the block classes of facebookresearch/video-nonlocal-net, Tushar-N/pytorch-resnet3d,
seominseok0429/inception-I3D-NON-LOCAL, facebookresearch/SlowFast and pytorchvideo,
AlexHex7/Non-local_pytorch, mit-han-lab/temporal-shift-module, open-mmlab/mmcv,
ZJUT-ERCISS/nonlocal_mindspore and guoxih/region-based-non-local-network.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch

# Forms of the norm after `out`: batch norm, factors per channel, another module, or none (None).
BATCH, AFFINE, MODULE = "batch", "affine", "module"

_WEIGHTS = MappingProxyType({"weight": "weight", "bias": "bias"})
_TORCH_NORM = MappingProxyType({})  # as torch names them


@dataclass(frozen=True)
class Form:
    """What decides the keys of one block within its system's layout."""

    dims: int
    pooled: bool
    norm: str | None
    norm_name: str = "bn"


@dataclass(frozen=True)
class System:
    """One system's block.

    Attributes:
        modules: key of each module. "{pool}" is ".0" where a pooling follows it in a Sequential,
            "{norm}" is ".0" where a norm does, "{name}" is the norm's own name.
        kinds: affinities that the system has.
        norms: forms of the norm that the system has, the usual one first.
        pools: which pooling it has: "fixed", "optional" (that or none) or "any".
        pool_order: where it pools.
        out_bias: whether `out` has a bias; None for either, "unnormed" for only without a norm.
        qkv_bias: whether theta, phi and g have a bias; None for either.
        groups: whether the system splits clips into temporal groups.
        separator: between module and parameter.
        layer_names: name of each parameter of a convolution.
        norm_names: name of each parameter of the norm where it is not torch's.
        counts: whether batch norms count their batches.
        ignored: endings of keys beside the parameters that mean nothing to the block.
        pooled_gaussian: whether the gaussian kind works with its pooling.
    """

    modules: Mapping[str, str]
    kinds: tuple[str, ...]
    norms: tuple[str | None, ...] = (BATCH, None)
    pools: str = "optional"
    pool_order: str = "after"
    out_bias: bool | str | None = True
    qkv_bias: bool | None = True
    groups: bool = False
    separator: str = "."
    layer_names: Mapping[str, str] = field(default_factory=lambda: _WEIGHTS)
    norm_names: Mapping[str, str] = field(default_factory=lambda: _TORCH_NORM)
    counts: bool = True
    ignored: tuple[str, ...] = ()
    pooled_gaussian: bool = True

    @property
    def regional(self) -> bool:
        """Whether keys and values are theta's features, aggregated over regions."""
        return "region" in self.modules

    @property
    def pool_in_keys(self) -> bool:
        return any("{pool}" in name for name in self.modules.values())

    def key(self, entry: str, form: Form) -> str | None:
        """The key of an entry in this form of the block; None if the system stores none."""
        module, parameter = _split(entry)
        if parameter == COUNT_KEY and not self.counts:
            return None
        names = self.norm_names if module == "norm" else self.layer_names
        return self.module(module, form) + self.separator + names.get(parameter, parameter)

    def module(self, module: str, form: Form) -> str:
        """The name of a module in this form of the block."""
        return self.modules[module].format(
            pool=".0" if form.pooled else "",
            norm=".0" if form.norm is not None else "",
            name=form.norm_name,
        )


def _split(entry: str) -> tuple[str, str]:
    """Module and parameter of an entry; the concatenation's weight is a layer elsewhere."""
    if entry == "concat_weight":
        return "concat", "weight"
    module, _, parameter = entry.partition(".")
    return module, parameter


_FOUR = ("softmax", "gaussian", "dot_product", "concat")
_TWO = ("softmax", "dot_product")

_CAFFE2 = System(
    modules={"theta": "theta", "phi": "phi", "g": "g", "out": "out", "norm": "bn"},
    kinds=_TWO,
    norms=(BATCH, AFFINE, None),
    pool_order="before",
    out_bias=None,
    qkv_bias=None,
    groups=True,
    separator="_",
    layer_names={"weight": "w", "bias": "b"},
    norm_names={"weight": "s", "bias": "b", "running_mean": "rm", "running_var": "riv"},
    counts=False,
    ignored=("_momentum",),
)
_TUSHAR = System(
    modules={"theta": "theta", "phi": "phi", "g": "g", "out": "out", "norm": "bn"},
    kinds=("softmax",),
    norms=(BATCH,),
    pools="fixed",
    pool_order="before",
)
_SLOWFAST = System(
    modules={
        "theta": "conv_theta",
        "phi": "conv_phi",
        "g": "conv_g",
        "out": "conv_out",
        "norm": "bn",
    },
    kinds=_TWO,
    norms=(BATCH,),
    pools="any",
    pool_order="before",
    groups=True,
)
_ALEXHEX7 = System(
    modules={
        "theta": "theta",
        "phi": "phi{pool}",
        "g": "g{pool}",
        "out": "W{norm}",
        "norm": "W.1",
        "concat": "concat_project.0",
    },
    kinds=_FOUR,
)
_MMCV = System(
    modules={
        "theta": "theta.conv",
        "phi": "phi{pool}.conv",
        "g": "g{pool}.conv",
        "out": "conv_out.conv",
        "norm": "conv_out.{name}",
        "concat": "concat_project.conv",
    },
    kinds=_FOUR,
    norms=(BATCH, None, MODULE),
    out_bias="unnormed",
)
_MINDSPORE = System(
    modules={
        "theta": "theta",
        "phi": "phi{pool}",
        "g": "g{pool}",
        "out": "w{norm}",
        "norm": "w.1.bn2d",
        "concat": "concat_project.0",
    },
    kinds=_FOUR,
    out_bias=False,
    norm_names={
        "weight": "gamma",
        "bias": "beta",
        "running_mean": "moving_mean",
        "running_var": "moving_variance",
    },
    counts=False,
    pooled_gaussian=False,
)
_RNL = System(
    modules={"theta": "theta", "out": "W{norm}", "norm": "W.1", "region": "penta"},
    kinds=("region_softmax", "region_relu"),
)

# By preset.
SYSTEMS: dict[str, System] = {
    "caffe2": _CAFFE2,
    "caffe2_dot": _CAFFE2,
    "caffe2_affine": replace(_CAFFE2, norms=(None, AFFINE)),
    "tushar": _TUSHAR,
    "inception_nl": _TUSHAR,
    "slowfast": _SLOWFAST,
    "pytorchvideo": replace(
        _SLOWFAST,
        modules={**_SLOWFAST.modules, "norm": "norm"},
        norms=(BATCH, None, MODULE),
        groups=False,
    ),
    "alexhex7": _ALEXHEX7,
    "tsm": replace(_ALEXHEX7, kinds=("softmax",)),
    "mmaction_i3d": _MMCV,
    "mmaction_slowonly": _MMCV,
    "mindspore": _MINDSPORE,
    "rnl": _RNL,
}

# The region system's constant: which entries of its dense weight count.
MASK_KEY = "penta.mask"
# How torch's batch norms end the key of their count, which checkpoints of old releases lack.
COUNT_KEY = "num_batches_tracked"


def norm_abbreviation(norm: torch.nn.Module) -> str:
    """mmcv's name of a norm, made from its class."""
    if isinstance(norm, torch.nn.modules.instancenorm._InstanceNorm):
        return "in"
    if isinstance(norm, torch.nn.modules.batchnorm._BatchNorm):
        return "bn"
    if isinstance(norm, torch.nn.GroupNorm):
        return "gn"
    if isinstance(norm, torch.nn.LayerNorm):
        return "ln"
    name = type(norm).__name__.lower()
    known = (("batch", "bn"), ("group", "gn"), ("layer", "ln"), ("instance", "in"))
    return next((short for word, short in known if word in name), "norm_layer")


def group_width(channels: int) -> int | None:
    """Channels of a group in the region system's dense weight; None if it has no such weight."""
    groups = max(channels // 32, 1)
    return None if channels % groups else channels // groups


def dense_mask(channels: int, kernel: tuple[int, ...]) -> torch.Tensor:
    """(D, D / groups, *kernel) with 1 where the entry acts on its own channel."""
    width = group_width(channels)
    own = torch.eye(width).repeat(channels // width, 1)
    return own.view(channels, width, *(1,) * len(kernel)).expand(-1, -1, *kernel).contiguous()


def dense_from_depthwise(weight: torch.Tensor) -> torch.Tensor:
    """The depthwise (D, *kernel) as the dense, grouped (D, D / groups, *kernel)."""
    mask = dense_mask(weight.shape[0], tuple(weight.shape[1:]))
    zero = torch.zeros((), dtype=weight.dtype, device=weight.device)
    # Chosen, not multiplied: 0 * inf would be NaN.
    return torch.where(mask.to(weight.device).bool(), weight.unsqueeze(1), zero)


def depthwise_from_dense(dense: torch.Tensor) -> torch.Tensor:
    """What counts of a dense weight: (D, *kernel)."""
    channels = torch.arange(dense.shape[0], device=dense.device)
    return dense[channels, channels % dense.shape[1]]
