"""`nlk convert`: a checkpoint of any system as weights of ours, or as one of another system."""

import contextlib
import json
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import nn

from nlkernels._spec import check_choice
from nlkernels.models import blobs, files
from nlkernels.models.classes import CLASSIFIER, class_rows, read_names, take_classes
from nlkernels.models.convert import LoadReport, export_foreign, load_foreign
from nlkernels.models.fitting import Fit, closest, fitting, without_values
from nlkernels.models.provenance import Conversion, known, open_kinds
from nlkernels.models.registry import create_model
from nlkernels.models.systems import SYSTEMS
from nlkernels.models.weights import NAME, OPTIONS, is_ours, open_weights, save_weights

REWRITES: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "affine": blobs.bn_to_affine,
    "batch": blobs.affine_to_bn,
    "finetune": blobs.strip_for_finetuning,
}


class Form(NamedTuple):
    """How a system keeps weights in a file."""

    format: str
    entry: str = ""
    prefix: str = ""


# Files of DataParallel have a prefix.
FORMS = {
    "caffe2": Form("caffe2", "blobs"),
    "slowfast": Form("torch", "model_state"),
    "pytorchvideo": Form("torch", "model_state"),
    "mindspore": Form("mindspore"),
    "mmaction": Form("torch", "state_dict"),
    "rnl": Form("torch", "state_dict", "module."),
    "tsm": Form("torch", "state_dict", "module."),
    "inception_nl": Form("torch", "state_dict", "module."),
    "hassony2": Form("torch"),
    "piergiaj": Form("torch"),
    "tushar": Form("torch"),
    "torchvision": Form("torch"),
}


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    system: str = "auto",
    to: str | None = None,
    name: str | None = None,
    options: Mapping[str, Any] | None = None,
    new: Collection[str] = (),
    inflate: bool = False,
    entry: str | None = None,
    rewrite: str | None = None,
    classes: tuple[str | os.PathLike, str | os.PathLike] | None = None,
) -> str:
    """Convert a checkpoint file; nothing is written unless all of it fits.

    Args:
        source: a file that `nlkernels.models.files.read` reads.
        target: the file to write: safetensors with the model's name and options and what is known
            of the weights, or, with `to`, what that system's code reads.
        system: whose checkpoint it is; "auto" decides by names of keys.
        to: the system to write for; None for a file of ours.
        name: the model; None where the weights fit one alone, or the file is ours.
        options: options of the model. Numbers of classes and of blocks are found by themselves.
        new: what may keep fresh values, as in `load_foreign`.
        inflate: repeat convolutions of single frames over time.
        entry: which weights of a file with several.
        rewrite: what to do to the blobs of a Caffe2 checkpoint first: "affine" folds its norms,
            "batch" is the way back, "finetune" strips it. With `to="caffe2"` and without a name,
            the blobs alone are rewritten, as the original's tools do.
        classes: two files, as `nlkernels.models.classes.read_names` reads them: names of the
            checkpoint's classes, and of those that are wanted, in their orders. A file of ours
            keeps the names.

    Returns:
        A report on the keys and on what was written.

    Raises:
        FileNotFoundError: no source.
        ValueError: weights that do not fit the model, or none or several models; the first keys in
            question are listed, and what to do.
        OSError: the target cannot be written.
    """
    source, target = Path(source), Path(target)
    _check(source, target, to, rewrite)
    names = [] if classes is None else [read_names(path) for path in classes]
    file = files.read(source, entry=entry)
    lines = [f"{source.name}: {len(file.state)} tensors, {_spoken(file)}"]
    lines += [f"  other weights in it: {', '.join(file.others)} (--entry)"] if file.others else []
    content: dict[str, Any] = file.state
    beside, numbers = file.extra, file.metadata
    if rewrite is not None:
        content = _rewritten(rewrite, file)
        lines.append(f"  rewritten ({rewrite}): {len(_tensors(content))} blobs")
        numbers = {key: value for key, value in content.items() if key not in _tensors(content)}
        beside = {}  # its tools drop the momenta
        if to == "caffe2" and name is None:
            files.write(target, _tensors(content), numbers, format="caffe2")
            return "\n".join([*lines, f"{target}: blobs of caffe2, flat"])
    if is_ours(file):
        model, fit = _own(source, file, name, options)
        origin = Origin(file, file.metadata)
    else:
        state = _tensors(content)
        fit = _fit(source, state, system, name, dict(options or {}), new, inflate)
        model = _model(fit, state)
        report = load_foreign(model, state, system, new=new, inflate=inflate)
        lines += _report(report)
        made = Conversion(source.name, file.metadata, fit, model, report, rewrite is not None)
        lines += _ambiguity(made)
        beside = {**beside, **{key: state[key] for key in report.ignored if key in state}}
        origin = Origin(file, known(made), report, beside, numbers)
    if names:
        fit, origin = _reorder(model, fit, origin, *names)
        lines.append(f"  classes: {len(names[1])} of {len(names[0])}, in the order of {classes[1]}")
    lines.append(_written(target, model, fit, to, origin))
    return "\n".join(lines)


def parse_options(texts: Collection[str]) -> dict[str, Any]:
    """Options of a model out of texts such as "blocks=5" or "block.kind=concat".

    Raises:
        ValueError: a text without "=".
    """
    options: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(
                f"convert: expected option=value, got {text!r}; write for example blocks=5"
            )
        owner, _, inner = key.partition(".")
        with contextlib.suppress(json.JSONDecodeError):  # a word stands for itself
            value = json.loads(value)
        if inner:
            options.setdefault(owner, {})[inner] = value
        else:
            options[key] = value
    return options


def _check(source: Path, target: Path, to: str | None, rewrite: str | None) -> None:
    if to is not None:
        check_choice("convert", "to", to, tuple(SYSTEMS))
    if rewrite is not None:
        check_choice("convert", "rewrite", rewrite, tuple(REWRITES))
    if target.exists() and source.exists() and target.samefile(source):
        raise ValueError(
            f"convert: expected another file to write to, got {target} twice; name a new one"
        )
    if not target.parent.is_dir():
        raise ValueError(
            f"convert: expected a folder for {target}, got none at {target.parent}; make it first"
        )


def _spoken(file: files.File) -> str:
    where = f" in {file.entry!r}" if file.entry else ""
    return f"{file.format} format{where}"


def _tensors(content: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in content.items() if isinstance(value, torch.Tensor)}


def _rewritten(rewrite: str, file: files.File) -> dict[str, Any]:
    if file.format != "caffe2":
        raise ValueError(
            f"convert: expected a pickle of Caffe2 to rewrite, got a {file.format} file; "
            "convert it with --to caffe2 first"
        )
    return REWRITES[rewrite]({**file.state, **file.extra, **file.metadata})


def _reorder(
    model: nn.Module, fit: Fit, origin: "Origin", theirs: list[str], ours: list[str]
) -> tuple[Fit, "Origin"]:
    """Give the model our classes in our order; its options and what is known of it say so."""
    if model.fc.out_features != len(theirs):
        raise ValueError(
            f"convert: expected the names of all {model.fc.out_features} classes of the "
            f"checkpoint, got {len(theirs)}; pass the list that it was trained with"
        )
    beside = {} if origin.report is None else _of_no_class(model, origin)
    take_classes(model, class_rows(theirs, ours))
    fit = fit._replace(options={**fit.options, "num_classes": len(ours)})
    metadata = {**origin.metadata, "classes": json.dumps(ours)}
    metadata.pop("class_order", None)
    # Rows of another number are no longer what was read.
    report = origin.report if len(ours) == len(theirs) else None
    return fit, origin._replace(metadata=metadata, report=report, beside=beside)


def _of_no_class(model: nn.Module, origin: "Origin") -> dict[str, torch.Tensor]:
    """What stands beside weights but for the classifier's, whose rows are still in their order."""
    pairs = SYSTEMS[origin.report.system].pairs(model, partial=True)
    keys = [pair.key for pair in pairs if pair.entry.startswith(f"{CLASSIFIER}.")]
    return {
        name: tensor
        for name, tensor in origin.beside.items()
        if not any(key in name for key in keys)
    }


def _own(
    source: Path, file: files.File, name: str | None, options: Mapping[str, Any] | None
) -> tuple[nn.Module, Fit]:
    """The model of a file of ours, which nobody else may name otherwise."""
    own = file.metadata[NAME]
    if name not in (None, own) or options:
        raise ValueError(
            f"convert: expected no other model than that of {source}, which is {own} with "
            f"{file.metadata[OPTIONS]}, got {name or own} with {json.dumps(dict(options or {}))}; "
            "leave out --model and its options"
        )
    model = open_weights("convert", source, file)
    return model, Fit(own, json.loads(file.metadata[OPTIONS]))


def _fit(
    source: Path,
    state: Mapping[str, torch.Tensor],
    system: str,
    name: str | None,
    options: dict[str, Any],
    new: Collection[str],
    inflate: bool,
) -> Fit:
    """The one network that the weights are of; where a named one is not, loading says why."""
    found = fitting(state, system, name=name, new=new, inflate=inflate, **options)
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(
            f"convert: expected the model that {source.name} is of, got none; weights do not show "
            f"strides, padding and clips, so choose: {_choices(found)}"
        )
    if name is None:
        raise ValueError(
            f"convert: expected weights of a registered model in {source.name}, got keys such as "
            f"{', '.join(list(state)[:4])} that fit none; pass --model NAME to see what differs"
        )
    nearest = closest(state, name, system, **options)
    try:
        with torch.device("meta"):
            model = create_model(name, **nearest.options)
        load_foreign(model, without_values(state), system, new=new, inflate=inflate)
    except ValueError as error:
        width = {key: options[key] for key in ("width",) if key in options}
        others = fitting(state, system, new=new, inflate=inflate, **width)
        fits = f"\nthe weights fit {_choices(others)}" if others else ""
        raise ValueError(f"{error}{fits}") from error
    return nearest


def _choices(found: list[Fit]) -> str:
    names = [f"--model {fit.name}" for fit in found]
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def _model(fit: Fit, state: Mapping[str, torch.Tensor]) -> nn.Module:
    """A fresh model in the widest dtype of the weights."""
    dtypes = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    return create_model(fit.name, **fit.options).to(dtype)


def _report(report: LoadReport) -> list[str]:
    counts = (("matched", report.matched), ("expected new", report.new))
    counts += (("unexpected", report.unexpected), ("missing", report.missing))
    _, *details = str(report).splitlines()
    spoken = ", ".join(f"{len(keys)} {name}" for name, keys in counts)
    return [f"keys of {report.system}: {spoken}", *details]


def _ambiguity(made: Conversion) -> list[str]:
    """What the weights leave open about blocks."""
    kinds = open_kinds(made)
    if len(kinds) < 2:
        return []
    kind, other = kinds
    return [
        f"  note: weights are the same for softmax and dot_product; taken as {kind}, "
        f"--option block.kind={other} takes the other"
    ]


class Origin(NamedTuple):
    """Where weights are from.

    Attributes:
        file: as it was read.
        metadata: what is known of the weights.
        report: how they were loaded; None for those of ours.
        beside: tensors that are no weights, which go back into a file of the same system.
        numbers: the same of numbers and texts.
    """

    file: files.File
    metadata: dict[str, Any]
    report: LoadReport | None = None
    beside: Mapping[str, torch.Tensor] = MappingProxyType({})
    numbers: Mapping[str, Any] = MappingProxyType({})


def _written(target: Path, model: nn.Module, fit: Fit, to: str | None, origin: Origin) -> str:
    """Write a model as a file of ours or of another system; what was done, in one line."""
    spoken = f"{fit.name} with {json.dumps(fit.options)}"
    if to is None:
        save_weights(target, model, fit.name, fit.options, origin.metadata)
        return f"{target}: weights of {spoken}"
    form, report, file = FORMS[to], origin.report, origin.file
    # A checkpoint that goes back to where it came from is what it was.
    same = report is not None and report.system == to
    state = export_foreign(model, to, like=report if same else None)
    entry: str = form.entry
    numbers: Mapping[str, Any] = {}
    if same and file.format == form.format:
        state = {**state, **origin.beside}
    if same and file.format == form.format == "caffe2":
        entry, numbers = file.entry, origin.numbers
    state = {form.prefix + key: tensor for key, tensor in state.items()}
    files.write(target, state, numbers, format=form.format, entry=entry)
    return f"{target}: {len(state)} tensors of {spoken}, as {to} keeps them"
