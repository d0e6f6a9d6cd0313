"""Which registered networks the weights of a checkpoint are of."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from nlkernels._systems import COUNT_KEY, MASK_KEY
from nlkernels.models.convert import load_foreign
from nlkernels.models.i3d_inception import BLOCK_PLACES
from nlkernels.models.registry import create_model, list_models, registered
from nlkernels.models.systems import SYSTEMS, detect
from nlkernels.models.systems.layout import Layout, fits

_CLASSIFIER = "fc."
# Systems whose networks without blocks have the same keys, and other padding and epsilons.
_SAME_KEYS = ("hassony2", "inception_nl")


class Fit(NamedTuple):
    """A network that weights fit: the arguments of `create_model`."""

    name: str
    options: dict[str, Any]


def fitting(
    state: Mapping[str, torch.Tensor],
    system: str = "auto",
    *,
    name: str | None = None,
    new: Collection[str] = (),
    inflate: bool = False,
    **options: Any,
) -> list[Fit]:
    """Networks that a checkpoint holds all weights of: names and shapes decide.

    Weights tell neither settings apart that differ in strides or lengths of clips alone, nor ports
    that differ in padding and epsilon, nor blocks of softmax from those of a dot product: several
    networks may fit.

    Args:
        state: tensors by the keys of a system.
        system: a key of `nlkernels.models.systems.SYSTEMS`; "auto" decides by names of keys.
        name: the one network to try; None for all of that system.
        new: what may be missing, as in `load_foreign`.
        inflate: as in `load_foreign`.
        **options: options of the network that are known. `num_classes` and `blocks` are found where
            they are not among them, and the kind of gaussian or concatenating blocks.

    Returns:
        Each network with its options; empty if none fits.

    Raises:
        ValueError: an unknown name or option's value.
        TypeError: an unknown option.

    Memory:
        None to speak of: networks are built without values.

    Example:
        >>> from nlkernels.models import create_model
        >>> from nlkernels.models.convert import export_foreign
        >>> from nlkernels.models.fitting import fitting
        >>> state = export_foreign(create_model("tsm_r50", num_classes=9, width=0.125, blocks=5))
        >>> fitting(state, width=0.125)
        [Fit(name='tsm_r50', options={'num_classes': 9, 'width': 0.125, 'blocks': 5})]
    """
    shapes = without_values(state)
    if name is None:
        systems = _systems(shapes) if system == "auto" else [system]
        own = {each: registered(each).system for each in list_models()}
        names = [each for each in own if own[each] in systems]
    else:
        names = [name]
    found = []
    for each in names:
        if not _covers(each, shapes, system, inflate, options):
            continue
        for options_ in _variants(each, shapes, system, options):
            if _loads(each, options_, shapes, system, new, inflate):
                found.append(Fit(each, options_))
                break
    return found


def _systems(keys: Collection[str]) -> list[str]:
    """The surest system of keys, and those that only more than keys could tell from it."""
    surest, *others = list(detect(keys)) or [""]
    alike = _SAME_KEYS if surest in _SAME_KEYS else ()
    return [surest, *(each for each in others if each in alike)]


def without_values(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors on the device "meta" but for masks, whose values are compared."""
    return {
        key: tensor if key.endswith(MASK_KEY) else tensor.to("meta")
        for key, tensor in state.items()
    }


def closest(
    state: Mapping[str, torch.Tensor], name: str, system: str = "auto", **options: Any
) -> Fit:
    """The form of one network whose keys differ least from those of a checkpoint.

    Args:
        state: tensors by the keys of a system.
        name: the network.
        system: a key of `nlkernels.models.systems.SYSTEMS`; "auto" decides by names of keys.
        **options: options of the network that are known.

    Returns:
        The network with its options, which says what differs when the weights are loaded into it.

    Raises:
        ValueError: an unknown name or option's value.
        TypeError: an unknown option.

    Example:
        >>> from nlkernels.models import create_model
        >>> from nlkernels.models.convert import export_foreign
        >>> from nlkernels.models.fitting import closest
        >>> state = export_foreign(create_model("tsm_r50", num_classes=9, width=0.125, blocks=5))
        >>> del state["base_model.layer2.0.nl.g.0.weight"]
        >>> closest(state, "tsm_r50").options["blocks"]
        5
    """
    layout = _layout(state, system)
    best, least = None, None
    for variant in _variants(name, state, system, options):
        if layout is None:
            return Fit(name, variant)
        model = _built(name, variant)
        keys = {pair.key for pair in layout.pairs(model, partial=True)}
        prefix = layout.prefix(state.keys()) or ""
        differing = len(keys ^ {key.removeprefix(prefix) for key in state})
        if least is None or differing < least:
            best, least = Fit(name, variant), differing
    assert best is not None  # every network has a form
    return best


def _layout(state: Mapping[str, torch.Tensor], system: str) -> Layout | None:
    """The layout of a checkpoint's keys; None for keys of no system."""
    return SYSTEMS.get(next(iter(detect(state)), "") if system == "auto" else system)


def _variants(
    name: str, shapes: Mapping[str, torch.Tensor], system: str, options: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """Options that a network might have, the usual ones first."""
    known = {"num_classes": _classes(name, shapes, system, options), **options}
    if "blocks" in options:
        counts: Sequence[int] = (options["blocks"],)
    else:
        counts = _block_counts(name)
    kind = None if "block" in options else _kind(shapes)
    for blocks in counts:
        yield {**known, "blocks": blocks, **({"block": {"kind": kind}} if kind and blocks else {})}


def _kind(keys: Collection[str]) -> str | None:
    """The kind of blocks where keys tell it; those of a dot product are those of softmax."""
    if any(".concat_project." in key for key in keys):
        return "concat"
    projections = {part for key in keys for part in key.split(".") if part in ("theta", "g")}
    return "gaussian" if projections == {"g"} else None


def _covers(
    name: str,
    shapes: Mapping[str, torch.Tensor],
    system: str,
    inflate: bool,
    options: Mapping[str, Any],
) -> bool:
    """Whether a network without blocks could be part of a checkpoint's."""
    layout = _layout(shapes, system)
    if layout is None:
        return False
    model = _built(name, {"num_classes": 1, **options, "blocks": 0})
    ours, prefix = model.state_dict(), layout.prefix(shapes.keys()) or ""
    pairs = [
        pair
        for pair in layout.pairs(model, partial=True)
        if not pair.entry.startswith(_CLASSIFIER) and not pair.key.endswith(COUNT_KEY)
    ]
    if len(pairs) > sum(not key.endswith(COUNT_KEY) for key in shapes):
        return False
    for pair in pairs:
        given = shapes.get(prefix + pair.key)  # blocks may rename what they follow
        flat = given is not None and (inflate or (layout.inflates and given.dim() == 4))
        if given is not None and not flat and not fits(pair, given, ours[pair.entry]):
            return False
    return True


def _block_counts(name: str) -> list[int]:
    """Numbers of blocks that a network has in print."""
    places = getattr(registered(name).design, "places", BLOCK_PLACES)
    return sorted(places)


def _classes(
    name: str, shapes: Mapping[str, torch.Tensor], system: str, options: Mapping[str, Any]
) -> int:
    """Rows of the classifier; 400 where the checkpoint has none."""
    model = _built(name, {"num_classes": 1, **options})
    layout = _layout(shapes, system)
    if layout is None:
        return 400
    prefix = layout.prefix(shapes.keys()) or ""
    pairs = layout.pairs(model, partial=True)
    keys = [prefix + pair.key for pair in pairs if pair.entry == _CLASSIFIER + "weight"]
    return shapes[keys[0]].shape[0] if keys and keys[0] in shapes else 400


def _built(name: str, options: Mapping[str, Any]) -> nn.Module:
    with torch.device("meta"):
        return create_model(name, **options)


def _loads(
    name: str,
    options: Mapping[str, Any],
    shapes: Mapping[str, torch.Tensor],
    system: str,
    new: Collection[str],
    inflate: bool,
) -> bool:
    model = _built(name, options)
    try:
        load_foreign(model, shapes, system, new=new, inflate=inflate)
    except ValueError:
        return False
    return True
