"""Optimisers, and the parameter groups of every recipe: whose rate is multiplied, what decays.

Every group carries ``lr_mult``: the engine sets its rate to that of the step times this factor.
Momentum in the Caffe2 original holds ``V = mu * V + lr * g`` and is rescaled when the rate changes.
That is torch's ``buffer = mu * buffer + g`` with ``V = lr * buffer``, so nothing is done for it.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from nlkernels.modules.layers import Affine, RegionAggregation

from .config_optim import OptimConfig

NORMS = (_BatchNorm, nn.GroupNorm, nn.LayerNorm, Affine)

# Inputs that are no optical flow.
_RGB = 3


class Named(NamedTuple):
    """A parameter and where it is."""

    name: str
    """Its name in the network, such as ``layer2.1.nl.theta.weight``."""
    leaf: str
    """Its name in its module, such as ``weight``."""
    value: nn.Parameter
    """The parameter."""
    module: nn.Module
    """The module that holds it."""


def make_optimiser(model: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """The configured optimiser over the parameters that are trained.

    Args:
        model: Its parameters with ``requires_grad`` are grouped by ``optim.decay``.
        optim: Optimiser, decay, momentum.

    Raises:
        ValueError: No parameter is trained.
    """
    groups = parameter_groups(model, optim)
    if not groups:
        raise ValueError(
            "optim: expected parameters that are trained, got none; freeze fewer of them"
        )
    if optim.name == "sgd":
        return torch.optim.SGD(
            groups,
            lr=optim.lr,
            momentum=optim.momentum,
            dampening=optim.dampening,
            nesterov=optim.nesterov,
            weight_decay=optim.weight_decay,
        )
    kind = torch.optim.AdamW if optim.name == "adamw" else torch.optim.Adam
    return kind(groups, lr=optim.lr, weight_decay=optim.weight_decay)


def parameter_groups(model: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """Groups for an optimiser: ``params``, ``weight_decay``, ``lr_mult`` and a ``name``.

    Rates and decays of the recipes, as factors of ``lr`` and ``weight_decay``:

    - ``all``: 1 and 1 (mmaction2, MindSpore, inception_nl).
    - ``weights``: tensors of one dimension do not decay.
    - ``caffe2``: norms do not decay, biases do (Caffe2, PySlowFast).
    - ``tsm`` (TSM, mmaction2's TSM) and ``rnl``: weights 1 and 1, biases 2 and 0, norms 1 and 0;
      with ``fc_lr5`` the classifier 5 and 1, its bias 10 and 0; of networks of optical flow the
      first convolution as well. In blocks of ``rnl`` a norm's weight has 1 and 1, its bias and the
      depthwise weight have 2 and 0: the published code takes that weight for a bias.

    Args:
        model: The network.
        optim: ``decay``, ``fc_lr5``, ``weight_decay``.

    Returns:
        Groups that are not empty, each parameter in one of them.

    Source:
        semantics of the published trainers: lib/models/model_builder_video.py of the original,
        ops/models.py of TSM and of region-based-non-local-network.
    """
    factors = _RULES[optim.decay]
    first = next((m for m in model.modules() if isinstance(m, _ConvNd)), None)
    groups: dict[tuple[str, float, float], list[nn.Parameter]] = {}
    for one in _named(model):
        if one.value.requires_grad:
            key = factors(one, one.module is first, optim)
            groups.setdefault(key, []).append(one.value)
    return [
        {
            "params": values,
            "weight_decay": optim.weight_decay * decay_mult,
            "lr_mult": lr_mult,
            "name": name,
        }
        for (name, lr_mult, decay_mult), values in sorted(
            groups.items(), key=lambda group: -group[0][2]
        )
    ]


def _named(model: nn.Module) -> Iterator[Named]:
    seen = set()
    for path, module in model.named_modules():
        for leaf, value in module.named_parameters(recurse=False):
            if id(value) not in seen:
                seen.add(id(value))
                yield Named(f"{path}.{leaf}" if path else leaf, leaf, value, module)


# Each rule: a parameter, whether it is of the first convolution, the section -> group name, factor
# of the rate, factor of the decay.
def _all(one: Named, first: bool, optim: OptimConfig) -> tuple[str, float, float]:
    return "all", 1, 1


def _weights(one: Named, first: bool, optim: OptimConfig) -> tuple[str, float, float]:
    return ("weights", 1, 1) if one.value.ndim > 1 else ("others", 1, 0)


def _caffe2(one: Named, first: bool, optim: OptimConfig) -> tuple[str, float, float]:
    return ("norms", 1, 0) if isinstance(one.module, NORMS) else ("weights and biases", 1, 1)


def _tsm(one: Named, first: bool, optim: OptimConfig) -> tuple[str, float, float]:
    if isinstance(one.module, NORMS):
        return "norms", 1, 0
    bias = one.leaf == "bias"
    flow = first and one.module.in_channels != _RGB
    if (one.name.startswith("fc.") and optim.fc_lr5) or flow:
        return ("fast biases", 10, 0) if bias else ("fast weights", 5, 1)
    return ("biases", 2, 0) if bias else ("weights", 1, 1)


def _rnl(one: Named, first: bool, optim: OptimConfig) -> tuple[str, float, float]:
    if "nl" not in one.name.split("."):
        return _tsm(one, first, optim)
    if one.leaf == "bias" or isinstance(one.module, RegionAggregation):
        return "block biases", 2, 0
    return "block weights", 1, 1


_RULES = {"all": _all, "weights": _weights, "caffe2": _caffe2, "tsm": _tsm, "rnl": _rnl}
