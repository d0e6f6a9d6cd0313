"""Checkpoints of other systems in and out of our models.

model = create_model("i3d_r50_8x8", num_classes=400, blocks=5)
report = load_foreign(model, "i3d_nonlocal_8x8_IN_pretrain_400k.pkl")
blobs = export_foreign(model, like=report)
"""

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from nlkernels._spec import check_choice
from nlkernels._systems import COUNT_KEY, dense_mask
from nlkernels.models.classes import CLASSIFIER, ORDERS
from nlkernels.models.differences import block_differences, design_differences
from nlkernels.models.systems import SYSTEMS, detect
from nlkernels.models.systems.layout import Layout, Pair, fits, inflated, native

NEW = ("blocks", "classifier")
# How many keys of a kind an error lists.
_LISTED = 8


@dataclass(frozen=True)
class LoadReport:
    """What `load_foreign` did.

    Attributes:
        system: whose checkpoint it is.
        prefix: what stood before all keys, such as "module.".
        matched: keys that were loaded.
        new: entries of the model that keep their fresh values, as asked for.
        ignored: keys that are no weights of such a model, such as momenta.
        unexpected: keys that fit nothing; empty unless nothing was to be loaded.
        missing: keys that the model needs; empty unless nothing was to be loaded.
        wrong_shape: keys of another shape, with both; empty unless nothing was to be loaded.
        inflated: keys of convolutions that were repeated over time.
        notes: how a model of another system differs from the checkpoint's networks, and in what
            order its classes are unless that is the alphabet's.
        forms: (shape, dtype) of every key of the source, for `export_foreign`.
    """

    system: str
    prefix: str = ""
    matched: tuple[str, ...] = ()
    new: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    wrong_shape: tuple[str, ...] = ()
    inflated: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    forms: Mapping[str, tuple[tuple[int, ...], torch.dtype]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.system}: {len(self.matched)} keys matched"]
        for name in ("new", "inflated", "ignored", "unexpected", "missing", "wrong_shape"):
            keys = getattr(self, name)
            if keys:
                lines.append(f"  {name.replace('_', ' ')} ({len(keys)}): {_listed(keys)}")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


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
            gates), as when blocks are added to a trained network, "classifier", for other classes.
            Weights of images ("torchvision") need not be asked for both.
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
    if layout.preset is None and layout.name == "torchvision":
        new = NEW
    report, entries = _matched(model, source, layout, frozenset(new), inflate)
    faults = [
        f"\n  {fault} ({len(keys)}): {_listed(keys)}"
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
            f"others; nothing was loaded{''.join(faults)}\n{_remedy(model, report)}"
        )
    differing = block_differences(model, layout.preset)
    if differing and layout.name != model.design.system:
        raise ValueError(
            f"{where}: expected blocks that compute what those of {layout.name} do, got "
            f"{'; '.join(differing)}; create the model with block={{'preset': "
            f"{layout.preset!r}}}"
        )
    model.load_state_dict({**model.state_dict(), **entries})
    return report


def export_foreign(
    model: nn.Module, system: str | None = None, *, like: LoadReport | None = None
) -> dict[str, torch.Tensor]:
    """A model's weights under the keys and in the shapes of another system.

    Args:
        model: a registered model.
        system: a key of `nlkernels.models.systems.SYSTEMS`; None is that of `like`, else the
            model's own.
        like: the report of an import: the result then has exactly its prefix, keys, shapes and
            dtypes. Convolutions that were inflated do not become flat again.

    Returns:
        Copies on the model's device. A network of that system computes the same.

    Raises:
        ValueError: the system has no such network, or one that would compute something else.
        TypeError: no model of ours.

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
    layout = SYSTEMS[system]
    if system not in (model.design.system, "torchvision"):
        differing = [*block_differences(model, layout.preset), *design_differences(model, system)]
        if differing:
            raise ValueError(
                f"{where}: expected a network that {system} has, got {model.name} with "
                f"{'; '.join(differing)}; the same weights would compute something else there"
            )
    exported = layout.from_ours(model, model.state_dict())
    if like is None:
        return exported
    result = {}
    for key, (shape, dtype) in like.forms.items():
        result[like.prefix + key] = exported[key].reshape(shape).to(dtype)
    return result


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
            f"{where}: expected keys of one of {', '.join(SYSTEMS)}, got {_listed(keys)}; "
            "pass the weights alone, or the system if its keys were renamed"
        )
    surest = max(found.values())
    best = [name for name, score in found.items() if score == surest]
    if best == ["tushar", "torchvision"]:  # the same names, for clips and for images
        anchor = next(state[key] for key in keys if key.endswith("conv1.weight"))
        best = ["torchvision" if anchor.ndim == 4 else "tushar"]
    own = model.design.system
    return SYSTEMS[own if own in found and "inception_nl" in found else best[0]]


def _matched(
    model: nn.Module, state: Mapping[str, Any], layout: Layout, new: frozenset[str], inflate: bool
) -> tuple[LoadReport, dict[str, torch.Tensor]]:
    """A report on what would be loaded, and the entries."""
    prefix, given = layout.strip(state)
    ours = model.state_dict()
    pairs = layout.pairs(model, partial=True)
    fresh = _fresh(pairs, ours, given, new)
    entries: dict[str, torch.Tensor] = {}
    missing, wrong, repeated, matched = [], [], [], []
    for pair in pairs:
        if pair.entry in fresh:
            continue
        if pair.key not in given:
            if not pair.key.endswith(COUNT_KEY):
                missing.append(pair.key)
            continue
        tensor, own = given[pair.key], ours[pair.entry]
        flat = layout.inflates and tensor.dim() == 4
        over_time = inflated(tensor, own) if inflate or flat else None
        if pair.part == "mask":
            if fits(pair, tensor, own) and torch.equal(tensor.cpu(), _mask(own).to(tensor.dtype)):
                matched.append(pair.key)
            else:
                wrong.append(f"{pair.key} is not the mask of a depthwise aggregation")
        elif over_time is not None:
            repeated.append(pair.key)
            matched.append(pair.key)
            entries[pair.entry] = over_time
        elif fits(pair, tensor, own):
            matched.append(pair.key)
            entries[pair.entry] = native(pair, tensor, own)
        else:
            wrong.append(f"{pair.key} {tuple(tensor.shape)}, not {pair.shape}")
    missing += _absent(ours, {pair.entry for pair in pairs} | fresh)
    entries |= _counts(ours, entries)
    known = {pair.key for pair in pairs}
    extra = [key for key in given if key not in known]
    idle = [key for key in extra if _is_idle(model, layout, key)]
    own = layout.name in (model.design.system, "torchvision")
    notes = [] if own else design_differences(model, layout.name)
    if idle:
        notes = [*notes, "factors behind blocks were left out, as the original leaves them out"]
    if layout.name in ORDERS and f"{CLASSIFIER}.weight" not in fresh:
        order = f"classes are numbered {ORDERS[layout.name]}"
        notes = [*notes, f"{order}; nlkernels.models.classes puts them in another order"]
    report = LoadReport(
        system=layout.name,
        prefix=prefix,
        matched=tuple(matched),
        new=tuple(sorted(fresh)),
        ignored=(*(key for key in state if isinstance(key, str) and layout.is_ignored(key)), *idle),
        unexpected=tuple(key for key in extra if key not in idle),
        missing=tuple(missing),
        wrong_shape=tuple(wrong),
        inflated=tuple(repeated),
        notes=tuple(notes),
        forms={key: (tuple(given[key].shape), given[key].dtype) for key in given if key in known},
    )
    return report, entries


def _fresh(
    pairs: list[Pair],
    ours: Mapping[str, torch.Tensor],
    given: Mapping[str, torch.Tensor],
    new: frozenset[str],
) -> set[str]:
    """Entries that keep their fresh values: blocks without any key, a classifier that differs."""
    fresh: set[str] = set()
    keys = {pair.entry: pair for pair in pairs}
    if "blocks" in new:
        owners = {_owner(entry) for entry in ours} - {None}
        for owner in owners:
            entries = [entry for entry in ours if _owner(entry) == owner]
            if not any(entry in keys and keys[entry].key in given for entry in entries):
                fresh |= set(entries)
    if "classifier" in new:
        classifier = [entry for entry in ours if entry.startswith("fc.")]
        if not all(
            entry in keys
            and keys[entry].key in given
            and fits(keys[entry], given[keys[entry].key], ours[entry])
            for entry in classifier
        ):
            fresh |= set(classifier)
    return fresh


def _owner(entry: str) -> str | None:
    """The block or gate that an entry belongs to."""
    for name in (".nl.", ".gate."):
        if name in entry:
            return entry.partition(name)[0] + name
    return None


def _absent(ours: Mapping[str, torch.Tensor], covered: Collection[str]) -> list[str]:
    """Entries that the system has no keys for."""
    return [entry for entry in ours if entry not in covered and not entry.endswith(COUNT_KEY)]


def _counts(
    ours: Mapping[str, torch.Tensor], entries: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Counts of batches start again where the checkpoint has statistics without them."""
    counts = {}
    for entry in ours:
        statistics = entry.removesuffix(COUNT_KEY) + "running_mean"
        if entry.endswith(COUNT_KEY) and entry not in entries and statistics in entries:
            counts[entry] = torch.zeros_like(ours[entry])
    return counts


def _mask(weight: torch.Tensor) -> torch.Tensor:
    return dense_mask(weight.shape[0], tuple(weight.shape[1:]))


def _is_idle(model: nn.Module, layout: Layout, key: str) -> bool:
    """Whether a key is of a factor that the original's converter writes and its model ignores."""
    converted = layout.name == "caffe2" and getattr(model.design, "norm", "") == "affine"
    return converted and key.startswith("nonlocal_") and key.endswith(("_bn_s", "_bn_b"))


def _listed(keys: Collection[str]) -> str:
    shown = list(keys)[:_LISTED]
    more = len(keys) - len(shown)
    return ", ".join(map(str, shown)) + (f" and {more} more" if more else "")


def _remedy(model: nn.Module, report: LoadReport) -> str:
    """What to do about a checkpoint that does not fit."""
    ends = ("running_mean", "running_var", "_rm", "_riv", "moving_mean", "moving_variance")
    if report.missing and all(key.endswith(ends) for key in report.missing):
        return (
            "it has no running statistics: create the model with norm='affine' if its norms were "
            "folded into factors, else the statistics were lost when it was saved"
        )
    if not report.unexpected and not report.wrong_shape:
        return (
            "a checkpoint without blocks or classifier goes into a model with fresh ones by "
            "new=('blocks', 'classifier'); else it is of a smaller network or incomplete"
        )
    if report.wrong_shape and not report.missing and not report.unexpected:
        return (
            "create the model with the checkpoint's num_classes, or pass new=('classifier',); "
            "temporal kernels of another size belong to another network (C2D, I3D), for which "
            "there is inflate=True"
        )
    return (
        "create the network that saved it: its depth, its blocks (blocks=..., block={...}) and "
        "its system, one of list_models(); or name the system if auto took the wrong one"
    )
