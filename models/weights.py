"""Weights of our models in files of our own: safetensors with the model's name and options.

Everything that is needed to build the network again stands in the metadata, beside what is known
of the weights: source, licence, and the protocol that their accuracy was measured with.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import nlkernels
from nlkernels.models import files
from nlkernels.models.registry import create_model, registered

# Names in the metadata, beside which anything may stand.
VERSION, NAME, OPTIONS = "nlkernels", "model", "options"


def save_weights(
    path: str | os.PathLike,
    model: nn.Module,
    name: str,
    options: Mapping[str, Any],
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write a model's weights, so that `load_weights` builds the model again.

    Args:
        path: the file; it appears complete or not at all.
        model: what `create_model(name, **options)` built.
        name: its name in the registry.
        options: its options, `num_classes` among them: numbers, texts, lists and dictionaries.
        metadata: what else to keep, as texts: "source", "licence", "protocol" and such.

    Raises:
        ValueError: the weights are not those of a model of this name and these options.
        TypeError: an option that JSON cannot hold.

    Example:
        >>> import pathlib, tempfile
        >>> from nlkernels.models import create_model
        >>> from nlkernels.models.weights import load_weights, save_weights
        >>> options = {"num_classes": 3, "width": 0.25}
        >>> path = pathlib.Path(tempfile.mkdtemp(), "model.safetensors")
        >>> save_weights(path, create_model("c2d_tiny", **options), "c2d_tiny", options)
        >>> load_weights(path).fc.out_features
        3
    """
    registered(name, "save_weights")
    state, text = model.state_dict(), json.dumps(dict(options))
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    _check("save_weights", name, json.loads(text), shapes)
    own = {
        "format": "pt",  # what other readers of safetensors look for
        VERSION: nlkernels.__version__,
        NAME: name,
        OPTIONS: text,
    }
    files.write(path, state, {**(metadata or {}), **own})


def load_weights(path: str | os.PathLike) -> nn.Module:
    """Build the model that `save_weights` or `nlk convert` wrote, with its weights.

    Args:
        path: a safetensors file of ours.

    Returns:
        The model in training mode, in the dtypes of the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file of another origin, or one whose weights do not fit its own description.
    """
    return open_weights("load_weights", Path(path), files.read(path))


def is_ours(file: files.File) -> bool:
    """Whether a file says which of our models it holds."""
    return file.format == "safetensors" and NAME in file.metadata and OPTIONS in file.metadata


def open_weights(where: str, path: Path, file: files.File) -> nn.Module:
    """The model of a file that has been read."""
    if not is_ours(file):
        raise ValueError(
            f"{where}: expected weights of ours in {path}, got a {file.format} file without the "
            "name of a model; convert it first: nlk convert SRC DST, or load_foreign"
        )
    name, options = file.metadata[NAME], _options(f"{where}: {path}", file.metadata[OPTIONS])
    shapes = {key: tuple(value.shape) for key, value in file.state.items()}
    _check(f"{where}: {path}", name, options, shapes)
    with torch.random.fork_rng(devices=[]):  # what is drawn is replaced
        model = create_model(name, **options)
    model.load_state_dict(file.state, assign=True)
    return model


def _options(where: str, text: str) -> dict[str, Any]:
    """The options that a file names."""
    try:
        options = json.loads(text)
    except json.JSONDecodeError:
        options = None
    if not isinstance(options, dict):
        raise ValueError(
            f"{where}: expected options of a model as JSON in the metadata, got {text[:60]!r}; "
            "the file was changed after it was saved: convert the weights again"
        )
    return options


def _check(
    where: str, name: str, options: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise ValueError unless weights are those of a model."""
    with torch.device("meta"):
        model = create_model(name, **options)
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    if expected == shapes:
        return
    differing = [key for key in {**expected, **shapes} if expected.get(key) != shapes.get(key)]
    listed = ", ".join(f"{key} {shapes.get(key, 'missing')}" for key in differing[:8])
    raise ValueError(
        f"{where}: expected the weights of {name} with {json.dumps(dict(options))}, got {listed} "
        f"and {len(differing)} differences in all; name the model and options that saved them"
    )
