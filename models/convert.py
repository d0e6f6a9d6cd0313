"""Checkpoints of other systems in and out of our models.

model = create_model("i3d_r50_8x8", num_classes=400, blocks=5)
report = load_foreign(model, "i3d_nonlocal_8x8_IN_pretrain_400k.pkl")
blobs = export_foreign(model, like=report)
"""

import os
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from nlkernels._conversion import shape_of
from nlkernels._spec import check_choice
from nlkernels._systems import AFFINE, BATCH
from nlkernels._systems import SYSTEMS as BLOCKS
from nlkernels.models.differences import (
    block_differences,
    design_differences,
    designs_of,
    free_options,
    is_own,
    nearest_preset,
)
from nlkernels.models.matching import NEW, LoadReport, listed, match, remedy
from nlkernels.models.norms import norm_forms, with_norms
from nlkernels.models.systems import SYSTEMS, detect
from nlkernels.models.systems.layout import Layout
from nlkernels.modules.base import NonLocalBlock
from nlkernels.modules.options import REGION_KINDS


def load_foreign(
    model: nn.Module,
    source: Mapping[str, Any] | str | os.PathLike,
    system: str = "auto",
    *,
    new: Collection[str] = (),
    inflate: bool = False,
) -> LoadReport:
    """Load another system's checkpoint into a model; all of it, or nothing.

    Args:
        model: a registered model.
        source: arrays or tensors by that system's keys, or a file that `nlkernels.models.files`
            reads. Any prefix before all keys is understood.
        system: a key of `nlkernels.models.systems.SYSTEMS`; "auto" decides by names of keys.
        new: what may keep its fresh values where the checkpoint has nothing for it: "blocks" (and
            gates), as when blocks are added to a trained network, "classifier", for other classes,
            "statistics" of norms, which the original strips for fine-tuning and which training
            measures again. Weights of images ("torchvision") need not be asked for.
        inflate: repeat convolutions of one frame over those of several. Weights of two dimensions
            are repeated without asking in the systems that do so, "torchvision" and "caffe2".

    Returns:
        A `LoadReport`; the model computes what the checkpoint's does, but for its `notes`.

    Raises:
        ValueError: keys that are missing, unexpected or of a wrong shape, the first of them listed
            with a remedy; keys of no known system; blocks that compute something else with the same
            weights. The model is as it was.
        TypeError: no model of ours; a value that is no array of floating-point numbers.

    Example:
        >>> from nlkernels.models import create_model
        >>> from nlkernels.models.convert import export_foreign, load_foreign
        >>> model = create_model("tsm_r50", num_classes=5, width=0.125, blocks=5)
        >>> report = load_foreign(model, export_foreign(model))
        >>> report.system, len(report.matched), report.missing
        ('tsm', 385, ())
    """
    where = "load_foreign"
    _check_model(where, model)
    for group in new:
        check_choice(where, "new", group, NEW)
    if not isinstance(source, Mapping):
        from nlkernels.models import files

        source = files.read(source).state
    layout = _layout(where, model, source, system)
    if layout.name == "torchvision":
        new = (*new, "blocks", "classifier")
    report, entries = match(model, source, layout, frozenset(new), inflate)
    faults = [
        f"\n  {fault} ({len(keys)}): {listed(keys)}"
        for fault, keys in (
            ("missing", report.missing),
            ("unexpected", report.unexpected),
            ("wrong shape", report.wrong_shape),
        )
        if keys
    ]
    if faults:
        raise ValueError(
            f"{where}: expected the keys of {model.name} in the layout of {layout.name}, got "
            f"others; nothing was loaded{''.join(faults)}\n{remedy(model, report)}"
        )
    loaded = {entry.partition(".nl.")[0] + ".nl" for entry in entries if ".nl." in entry}
    differing = block_differences(model, layout.name, layout.preset, paths=loaded)
    if differing:
        raise ValueError(
            f"{where}: expected blocks that compute what those of {layout.name} do, got "
            f"{'; '.join(differing)}; create the model with block={{'preset': "
            f"{layout.preset!r}}}"
        )
    model.load_state_dict({**model.state_dict(), **entries})
    return report


def export_foreign(
    model: nn.Module,
    system: str | None = None,
    *,
    like: LoadReport | None = None,
    norm: str | None = None,
) -> dict[str, torch.Tensor]:
    """A model's weights under the keys and in the shapes of another system.

    What that system's networks hold in another form is converted, exactly in evaluation mode:
    factors into batch norms and back, a bias in front of a norm into its mean, an epsilon into its
    weight, a scale into the projection of queries.

    Args:
        model: a registered model.
        system: a key of `nlkernels.models.systems.SYSTEMS`; None is that of `like`, else the
            model's own.
        like: the report of an import: the result then has exactly its prefix, keys, shapes and
            dtypes. Convolutions that were inflated do not become flat again. What its notes say
            about the model is no reason to refuse.
        norm: "batch" or "affine" (factors), where the system has both; None is the model's own
            where the system has it.

    Returns:
        Copies on the model's device. A network of that system computes the same in evaluation mode.

    Raises:
        ValueError: the system has no such network, or one that would compute something else.
        TypeError: no model of ours.

    Memory:
        The copies; where norms change their form, another set of weights meanwhile.

    Example:
        >>> from nlkernels.models import create_model
        >>> from nlkernels.models.convert import export_foreign
        >>> model = create_model("slowfast_c2d_r50_8x8", num_classes=5, width=0.125)
        >>> list(export_foreign(model))[0]
        's1.pathway0_stem.conv.weight'
    """
    where = "export_foreign"
    _check_model(where, model)
    if system is None:
        system = model.design.system if like is None else like.system
    check_choice(where, "system", system, tuple(SYSTEMS))
    layout, given = SYSTEMS[system], model
    own, form = getattr(model.design, "norm", "batch"), _norm_form(where, model, system, norm)
    if form != own:
        eps = (model.design if is_own(model, system) else designs_of(system)[0]).norm_eps
        given = with_norms(model, form, eps)
    differing = [
        *block_differences(given, system, layout.preset, folds=True),
        *design_differences(given, system),
    ]
    differing = [each for each in differing if like is None or each not in like.notes]
    if differing:
        raise ValueError(
            f"{where}: expected a network that {system} has, got {model.name} with "
            f"{'; '.join(differing)}; the same weights would compute something else there"
        )
    blocks = _converted_blocks(given, layout, None if form == own else form)
    exported = layout.from_ours(given, given.state_dict(), blocks)
    if like is None:
        return exported
    exported |= like.idle
    return {
        like.prefix + key: exported[key].reshape(shape).to(dtype)
        for key, (shape, dtype) in like.forms.items()
    }


def _norm_form(where: str, model: nn.Module, system: str, norm: str | None) -> str:
    """The form in which a system gets a model's norms."""
    forms, own = norm_forms(system), getattr(model.design, "norm", "batch")
    if norm is not None:
        check_choice(where, f"norm for {system}", norm, forms)
        return norm
    return own if own in forms else forms[0]


def _converted_blocks(
    model: nn.Module, layout: Layout, norm: str | None
) -> dict[str, dict[str, torch.Tensor]]:
    """Keys and values of a model's blocks in a form that the system has, by their paths.

    Args:
        model: a registered model.
        layout: the system's.
        norm: the form of norms that the model was brought to; None if it was in its own.
    """
    converted = {}
    for path, block in model.named_modules():
        if layout.preset is None or not isinstance(block, NonLocalBlock):
            continue
        prefix = layout.block_prefix(model, path.rpartition(".")[0])
        if prefix is None or block.kind not in BLOCKS[layout.preset].kinds:
            continue  # the layout refuses the network
        preset = nearest_preset(block, layout.preset)
        own, free = shape_of(block), free_options(model, layout.name, preset)
        chosen: dict[str, Any] = {}
        if "scale" in free and block.kind != "concat":
            chosen["scale"] = own.scale
        if "region_l2norm" in free and block.kind in REGION_KINDS:
            chosen["region_l2norm"] = own.l2norm
        if "norm_eps" in free and own.norm == BATCH:
            chosen["norm_eps"] = own.norm_eps
        if norm == AFFINE:  # such networks of the original have no norm behind their blocks
            preset = "caffe2_affine"
        elif norm == BATCH:
            chosen["norm"] = BATCH
        converted[path] = block.to_foreign(preset, prefix=prefix, **chosen)
    return converted


def _check_model(where: str, model: nn.Module) -> None:
    if not isinstance(model, nn.Module) or not hasattr(model, "design"):
        got = type(model).__name__
        raise TypeError(
            f"{where}: expected a model of a published system, got {got}; create one with "
            "create_model, and load blocks alone with NonLocalBlock3d.from_foreign"
        )


def _layout(where: str, model: nn.Module, state: Mapping[str, Any], system: str) -> Layout:
    if system != "auto":
        check_choice(where, "system", system, ("auto", *SYSTEMS))
        return SYSTEMS[system]
    keys = [key for key in state if isinstance(key, str)]
    found = detect(keys)
    if not found:
        raise ValueError(
            f"{where}: expected keys of one of {', '.join(SYSTEMS)}, got {listed(keys)}; "
            "pass the weights alone, or the system if its keys were renamed"
        )
    surest = max(found.values())
    best = [name for name, score in found.items() if score == surest]
    if best == ["tushar", "torchvision"]:  # the same names, for clips and for images
        anchor = next(state[key] for key in keys if key.endswith("conv1.weight"))
        best = ["torchvision" if anchor.ndim == 4 else "tushar"]
    own = model.design.system
    return SYSTEMS[own if own in found and "inception_nl" in found else best[0]]
