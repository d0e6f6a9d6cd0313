"""Norms of a network in another form that computes the same in evaluation mode."""

import copy
import dataclasses

import torch
from torch import nn

from nlkernels.models.differences import designs_of
from nlkernels.models.systems.layout import inside_block
from nlkernels.modules.layers import Affine


def norm_forms(system: str) -> tuple[str, ...]:
    """Forms of the norms that networks of a system have, "batch" and "affine"."""
    return tuple(dict.fromkeys(getattr(each, "norm", "batch") for each in designs_of(system)))


def with_norms(model: nn.Module, norm: str, eps: float) -> nn.Module:
    """A copy of a ResNet with the other form of norm outside of its blocks and gates.

    Factors become batch norms of mean 0 and variance 1 - eps, which leave their input alone; batch
    norms are folded into factors as the original's converter folds them.

    Args:
        model: a ResNet of ours.
        norm: "batch" or "affine".
        eps: epsilon of new batch norms.

    Returns:
        The copy, whose design says so. In evaluation mode it computes what the model does.

    Memory:
        A second set of weights.

    Example:
        >>> from nlkernels.models import create_model
        >>> from nlkernels.models.norms import with_norms
        >>> model = create_model("i3d_r50_32x4", num_classes=2, width=0.125)
        >>> with_norms(model, "batch", 1e-5).bn1.running_var[:2]
        tensor([1.0000, 1.0000])
    """
    twin = copy.deepcopy(model)
    for path, module in list(twin.named_modules()):
        if inside_block(twin, path) or not isinstance(module, Affine | nn.BatchNorm3d):
            continue
        owner, _, name = path.rpartition(".")
        made = _batch(module, eps) if norm == "batch" else _affine(module)
        setattr(twin.get_submodule(owner), name, made.train(module.training))
    twin.design = dataclasses.replace(twin.design, norm=norm, norm_eps=eps)
    return twin


def _batch(affine: Affine, eps: float) -> nn.BatchNorm3d:
    norm = nn.BatchNorm3d(affine.weight.numel(), eps=eps).to(affine.weight)
    with torch.no_grad():
        norm.weight.copy_(affine.weight)
        norm.bias.copy_(affine.bias)
        norm.running_var.fill_(1.0 - eps)
    return norm


def _affine(norm: nn.BatchNorm3d) -> Affine:
    affine = Affine(norm.num_features).to(norm.weight).requires_grad_(False)
    factor = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    with torch.no_grad():
        affine.weight.copy_(factor)
        affine.bias.copy_(norm.bias.double() - norm.running_mean.double() * factor)
    return affine
