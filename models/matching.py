"""What of another system's checkpoint goes where in a model, and what does not."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from nlkernels._systems import COUNT_KEY, dense_mask
from nlkernels.models.classes import CLASSIFIER, ORDERS
from nlkernels.models.differences import design_differences
from nlkernels.models.systems.layout import Layout, Pair, fits, inflated, native

# What may be missing, and keeps its fresh values.
NEW = ("blocks", "classifier", "statistics")
# How many keys of a kind a report lists.
_LISTED = 8
_STATISTICS = ("running_mean", "running_var")
_THEIR_STATISTICS = (*_STATISTICS, "_rm", "_riv", "moving_mean", "moving_variance")


@dataclass(frozen=True)
class LoadReport:
    """What `load_foreign` did.

    Attributes:
        system: whose checkpoint it is.
        prefix: what stood before all keys, such as "module.".
        matched: keys that were loaded.
        new: entries of the model that keep their fresh values, as asked for.
        ignored: keys that are no weights of such a model, such as momenta, and those of `idle`.
        unexpected: keys that fit nothing; empty unless nothing was to be loaded.
        missing: keys that the model needs; empty unless nothing was to be loaded.
        wrong_shape: keys of another shape, with both; empty unless nothing was to be loaded.
        inflated: keys of convolutions that were repeated over time.
        notes: how a model of another system differs from the checkpoint's networks, and in what
            order its classes are unless that is the alphabet's.
        forms: (shape, dtype) of every key of the source, for `export_foreign`.
        idle: factors behind blocks, which the original's converter writes into affine checkpoints
            and its affine networks ignore; `export_foreign` writes them again.
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
    idle: Mapping[str, torch.Tensor] = field(default_factory=dict, repr=False, compare=False)

    def __str__(self) -> str:
        lines = [f"{self.system}: {len(self.matched)} keys matched"]
        for name in ("new", "inflated", "ignored", "unexpected", "missing", "wrong_shape"):
            keys = getattr(self, name)
            if keys:
                lines.append(f"  {name.replace('_', ' ')} ({len(keys)}): {listed(keys)}")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def match(
    model: nn.Module, state: Mapping[str, Any], layout: Layout, new: frozenset[str], inflate: bool
) -> tuple[LoadReport, dict[str, torch.Tensor]]:
    """A report on what would be loaded, and the entries by their names in the model.

    Args:
        model: a registered model.
        state: arrays or tensors by the system's keys.
        layout: the system's.
        new: what may be missing, of `NEW`.
        inflate: repeat convolutions of one frame over those of several.
    """
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
    idle = {key: given[key] for key in extra if _is_idle(model, layout, key)}
    # Weights of images are where a network starts from, not one that it could equal.
    notes = [] if layout.name == "torchvision" else design_differences(model, layout.name)
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
        forms={
            key: (tuple(given[key].shape), given[key].dtype)
            for key in given
            if key in known or key in idle
        },
        idle=idle,
    )
    return report, entries


def _fresh(
    pairs: list[Pair],
    ours: Mapping[str, torch.Tensor],
    given: Mapping[str, torch.Tensor],
    new: frozenset[str],
) -> set[str]:
    """Entries that keep their fresh values.

    They are those of blocks without any key, of a classifier that differs, and all statistics of
    norms where the checkpoint has none at all.
    """
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
    if "statistics" in new:
        statistics = [entry for entry in keys if entry.endswith(_STATISTICS)]
        if not any(keys[entry].key in given for entry in statistics):
            fresh |= set(statistics)
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


def listed(keys: Collection[str]) -> str:
    """The first of many keys."""
    shown = list(keys)[:_LISTED]
    more = len(keys) - len(shown)
    return ", ".join(map(str, shown)) + (f" and {more} more" if more else "")


def remedy(model: nn.Module, report: LoadReport) -> str:
    """What to do about a checkpoint that does not fit."""
    statistics = [key for key in report.missing if key.endswith(_THEIR_STATISTICS)]
    if any(key.endswith(_THEIR_STATISTICS) for key in report.matched):
        statistics = []  # those of some blocks alone
    if statistics and not report.unexpected and not report.wrong_shape:
        rest = "" if len(statistics) == len(report.missing) else "; the others may be new as well"
        return (
            "it has no running statistics: create the model with norm='affine' if its norms were "
            "folded into factors; if they were stripped, new=('statistics',) (--new statistics) "
            f"starts fresh ones, which training has to measure before any test{rest}"
        )
    normed = (*_THEIR_STATISTICS, COUNT_KEY)
    folded = getattr(model.design, "norm", "batch") == "affine"
    if folded and report.unexpected and all(key.endswith(normed) for key in report.unexpected):
        return (
            "it has batch norms where the model has factors: fold them first (nlk convert "
            "--rewrite affine, or nlkernels.models.blobs.bn_to_affine), or create the model with "
            "norm='batch'"
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
