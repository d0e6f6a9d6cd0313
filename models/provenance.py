"""What is known of converted weights: where they are from, and which results may be theirs.

Names of keys tell whose code saved weights, and no more: who trained them, and on what, stands in
no checkpoint. A published result is claimed only where nothing speaks against it.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from nlkernels._systems import SYSTEMS as BLOCKS
from nlkernels.models.classes import CLASSIFIER, ORDERS
from nlkernels.models.convert import LoadReport
from nlkernels.models.fitting import Fit
from nlkernels.models.registry import registered
from nlkernels.models.systems import SYSTEMS
from nlkernels.models.zoo import IMAGES, RESULTS, SOURCES, WEIGHTS, Result, Source
from nlkernels.modules.base import NonLocalBlock

# Of Kinetics-400, on which all published results are.
_CLASSES = 400
# Options of blocks that leave their weights what they are.
_BLOCK_OPTIONS = {"kind", "backend"}
# Kinds whose weights are alike.
_ALIKE = ("softmax", "dot_product")


class Conversion(NamedTuple):
    """Weights on their way.

    Attributes:
        file: name of the checkpoint.
        metadata: what stood beside its weights.
        fit: the network that they became.
        model: that network.
        report: how they were loaded.
        rewritten: whether they were changed first.
    """

    file: str
    metadata: Mapping[str, Any]
    fit: Fit
    model: nn.Module
    report: LoadReport
    rewritten: bool


def known(conversion: Conversion) -> dict[str, Any]:
    """What is known of weights, to be kept in their metadata.

    Returns:
        "system", "file", "source", "licence", "protocol" and, as "source.<name>", what stood beside
        the weights. "published" is their accuracy if they are the published weights, which alone
        were tested so; "candidates" are all accuracies that may be theirs, where keys and shapes do
        not tell which. "class_order" is there where classes are not numbered by the alphabet.
    """
    report = conversion.report
    results, source = _results(conversion), _source(conversion)
    protocols = dict.fromkeys(result.protocol for result in results)
    found = {
        "system": report.system,
        "file": conversion.file,
        "source": source.repository,
        "licence": source.licences(source.weights if _is_published(conversion) else "not stated"),
        "protocol": "none published for these weights",
    }
    if results:
        found["protocol"] = f"Kinetics-400: {'; '.join(protocols)}"
        certain = len(results) == 1 and len(open_kinds(conversion)) < 2
        found["published" if certain else "candidates"] = " | ".join(map(_spoken, results))
    if report.system in ORDERS and f"{CLASSIFIER}.weight" not in report.new:
        found["class_order"] = ORDERS[report.system]
    return found | {f"source.{key}": value for key, value in conversion.metadata.items()}


def open_kinds(conversion: Conversion) -> list[str]:
    """Kinds that the blocks may have as far as weights and options tell; first the one taken."""
    blocks = (each for each in conversion.model.modules() if isinstance(each, NonLocalBlock))
    kinds = list(dict.fromkeys(block.kind for block in blocks))
    preset = SYSTEMS[conversion.report.system].preset
    named = "kind" in (conversion.fit.options.get("block") or {})
    if named or preset is None or kinds[:1] not in ([kind] for kind in _ALIKE):
        return kinds
    return [
        *kinds,
        *(kind for kind in _ALIKE if kind not in kinds and kind in BLOCKS[preset].kinds),
    ]


def _results(conversion: Conversion) -> list[Result]:
    """Published results that may be those of the weights."""
    if not _as_published(conversion):
        return []
    kinds = open_kinds(conversion) or [None]
    blocks = conversion.fit.options.get("blocks", 0)
    results = RESULTS.get(conversion.fit.name, ())
    return [each for each in results if each.blocks == blocks and each.kind in kinds]


def _is_published(conversion: Conversion) -> bool:
    """Whether weights may be published ones, be there a result for them or not."""
    name = conversion.fit.name
    if name in RESULTS:
        return bool(_results(conversion))
    return name in WEIGHTS and _as_published(conversion)


def _as_published(conversion: Conversion) -> bool:
    """Whether nothing that was done, and no option, makes other weights of published ones."""
    fit, report, options = conversion.fit, conversion.report, conversion.fit.options
    network = registered(fit.name)
    return (
        network.system == report.system
        and conversion.model.design == network.design
        and options.get("width", 1.0) == 1.0
        and options["num_classes"] == _CLASSES
        and set(options.get("block") or {}) <= _BLOCK_OPTIONS
        and not (report.new or report.inflated or conversion.rewritten)
    )


def _source(conversion: Conversion) -> Source:
    """The repository that weights are from, as far as names of keys tell."""
    system = conversion.report.system
    if system == "caffe2" and registered(conversion.fit.name).system != system:
        # PySlowFast publishes pickles with these names, too.
        return Source("unknown (Caffe2 names)", "unknown")
    return SOURCES.get(system, IMAGES)


def _spoken(result: Result) -> str:
    top5 = "" if result.top5 is None else f", top-5 {result.top5}"
    told = ", ".join(filter(None, (result.kind, result.recipe)))
    return f"top-1 {result.top1}{top5}" + (f" ({told})" if told else "")
