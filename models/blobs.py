"""Checkpoints of the Caffe2 original rewritten as its own tools do: norms folded, stripped.

A blob's value is a tensor or an array, a scalar (lr, model_iter, epoch) a number. Everything here
works on names: `<norm>_bn_s` and `_b` are factor and shift, `_rm` the mean and `_riv` the variance.

Source: facebookresearch/video-nonlocal-net: process_data/convert_models/modify_caffe2_ftvideo.py,
convert_to_finetune.py and modify_blob_rm.py.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from nlkernels.models.design import CAFFE2_EPS
from nlkernels.models.files._arrays import to_tensor

# The learning rates that the original's two tools leave behind, and the epsilon of one of them.
AFFINE_LR, STRIPPED_LR = 0.00125, 0.01
FOLDED_EPS = 1e-5

_COUNTERS = ("model_iter", "epoch", "lr")
_STATISTICS = ("_rm", "_riv")


def bn_to_affine(blobs: Mapping[str, Any], *, lr: float = AFFINE_LR) -> dict[str, Any]:
    """Fold the running statistics of all batch norms into factors and shifts, for frozen norms.

    s' = s / sqrt(riv + 1e-5) and b' = b - rm s'. Momenta, the classifier (every name with "pred"),
    model_iter and epoch are dropped, all else stays. Norms behind blocks are folded as well: the
    affine models of the original have none and ignore them.

    Args:
        blobs: values by name, as of training, inside {"blobs": ...} or not.
        lr: the learning rate to leave behind.

    Returns:
        A flat dictionary of tensors, in their dtypes, and lr.

    Raises:
        ValueError: there is no batch norm, or one without its statistics.

    Example:
        >>> import torch
        >>> from nlkernels.models.blobs import bn_to_affine
        >>> norm = {"s": 2.0, "b": 1.0, "rm": 3.0, "riv": 4.0 - 1e-5}
        >>> bn_to_affine({f"res_conv1_bn_{k}": torch.tensor([v]) for k, v in norm.items()})
        {'res_conv1_bn_s': tensor([1.]), 'res_conv1_bn_b': tensor([-2.]), 'lr': 0.00125}
    """
    blobs = _flat("bn_to_affine", blobs)
    norms = [name.removesuffix("_rm") for name in blobs if name.endswith("_bn_rm")]
    lost = sorted(
        f"{norm}_{end}"
        for norm in norms
        for end in ("s", "b", "riv")
        if f"{norm}_{end}" not in blobs
    )
    if lost or not norms:
        raise ValueError(
            "bn_to_affine: expected batch norms with their running statistics, got "
            f"{'none of ' + ', '.join(lost[:8]) if lost else 'no name that ends in _bn_rm'}; "
            "an affine checkpoint needs no conversion, a stripped one has lost its statistics"
        )
    kept = {
        name: value
        for name, value in blobs.items()
        if name not in _COUNTERS
        and not name.endswith(("_momentum", *_STATISTICS))
        and "pred" not in name
    }
    for norm in norms:
        scale, shift, mean, variance = (blobs[f"{norm}_{end}"] for end in ("s", "b", "rm", "riv"))
        factor = scale.double() / (variance.double() + FOLDED_EPS).sqrt()
        kept[f"{norm}_s"] = factor.to(scale.dtype)
        kept[f"{norm}_b"] = (shift.double() - mean.double() * factor).to(shift.dtype)
    return {**kept, "lr": lr}


def affine_to_bn(blobs: Mapping[str, Any], *, eps: float = CAFFE2_EPS) -> dict[str, Any]:
    """Give frozen factors the statistics that leave their input alone: a mean of 0, 1 - eps.

    In evaluation mode a batch norm of that epsilon then computes what the factors do.

    Args:
        blobs: values by name, as `bn_to_affine` returns them, inside {"blobs": ...} or not.
        eps: epsilon of the batch norms that the statistics are for.

    Returns:
        A flat dictionary; all given values are in it as they were.

    Raises:
        ValueError: no factors, or running statistics beside them.

    Example:
        >>> import torch
        >>> from nlkernels.models.blobs import affine_to_bn
        >>> factors = {"res_conv1_bn_s": torch.ones(2), "res_conv1_bn_b": torch.zeros(2)}
        >>> list(affine_to_bn(factors))
        ['res_conv1_bn_s', 'res_conv1_bn_b', 'res_conv1_bn_rm', 'res_conv1_bn_riv']
    """
    blobs = _flat("affine_to_bn", blobs)
    norms = [name.removesuffix("_s") for name in blobs if name.endswith("_bn_s")]
    there = [name for name in blobs if name.endswith(tuple(f"_bn{end}" for end in _STATISTICS))]
    if there or not norms:
        raise ValueError(
            "affine_to_bn: expected factors without running statistics, got "
            f"{', '.join(there[:8]) if there else 'no name that ends in _bn_s'}; "
            "a checkpoint with statistics has batch norms already"
        )
    for norm in norms:
        blobs[f"{norm}_rm"] = torch.zeros_like(blobs[f"{norm}_s"])
        blobs[f"{norm}_riv"] = torch.full_like(blobs[f"{norm}_s"], 1.0 - eps)
    return blobs


def strip_for_finetuning(blobs: Mapping[str, Any], *, lr: float = STRIPPED_LR) -> dict[str, Any]:
    """Drop what a new task does not start from: classifier, momenta and running statistics.

    The statistics are lost: the original measures them again while it trains.

    Args:
        blobs: values by name, inside {"blobs": ...} or not.
        lr: the learning rate to leave behind.

    Returns:
        A flat dictionary: names without "_riv", "_rm", "_momentum" and "pred" as they were, without
        model_iter, and lr.

    Example:
        >>> from nlkernels.models.blobs import strip_for_finetuning
        >>> strip_for_finetuning({"blobs": {"epoch": 12, "model_iter": 9, "lr": 0.1}})
        {'epoch': 12, 'lr': 0.01}
    """
    dropped = ("_riv", "_rm", "_momentum", "pred")
    kept = {
        name: value
        for name, value in _flat("strip_for_finetuning", blobs).items()
        if name not in ("model_iter", "lr") and not any(part in name for part in dropped)
    }
    return {**kept, "lr": lr}


def _flat(where: str, blobs: Mapping[str, Any]) -> dict[str, Any]:
    """The blobs of either form, arrays as tensors."""
    if isinstance(blobs, Mapping) and isinstance(blobs.get("blobs"), Mapping):
        blobs = blobs["blobs"]
    if not isinstance(blobs, Mapping) or not all(isinstance(name, str) for name in blobs):
        raise TypeError(
            f"{where}: expected values by name of blob, got {type(blobs).__name__}; "
            "read a checkpoint with nlkernels.models.files.read"
        )
    return {
        name: to_tensor(value) if isinstance(value, np.ndarray) else value
        for name, value in blobs.items()
    }
