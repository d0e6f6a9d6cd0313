"""Reading a configuration: one YAML file, dotted overrides, conversion to the dataclasses.

``section.key=value`` on the command line overrides the file. Unknown keys and wrong types are
one-line errors that say where the value came from and name the nearest key; a value that ends up
without effect is a ``ConfigWarning``.
"""

import dataclasses
import types
import typing
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from . import config_optim, config_run
from .config import Config, check_values, known_keys, suggestion, value_of
from .config_data import IGNORED_WHEN as IGNORED_WHEN_DATA
from .config_data import check_training_data

CONFIG_FOLDER = Path(__file__).parent / "configs"

# (key that is ignored, key that decides, does the resolved value of that key ignore it?)
_IGNORED_WHEN = (
    *IGNORED_WHEN_DATA,
    ("model.block", "model.blocks", lambda blocks: blocks == 0),
    *config_optim.IGNORED_WHEN,
    *config_run.IGNORED_WHEN,
)

# Keys, or beginnings of keys, that a command does not look at.
_IGNORED_BY = {
    "train": ("compare",),
    "compare": ("run.seed", "run.colour_check"),
    "test": ("model", "compare", "run.colour_check", "run.resume", "run.test_every"),
}


class ConfigWarning(UserWarning):
    """A configured value has no effect."""


def load_config(
    source: str | Path,
    overrides: Sequence[str] = (),
    *,
    command: Literal["train", "compare", "test"] | None = None,
) -> Config:
    """Read a YAML file, apply overrides, check everything.

    Args:
        source: Path of a YAML file, or the bare name of a packaged one (``demo``).
        overrides: ``section.key=value`` texts; the value is read as YAML.
        command: Who will use it; overrides that it does not look at are warned about.

    Returns:
        The complete configuration; ``run.out`` is set.

    Raises:
        FileNotFoundError: No such file or packaged name.
        ValueError: Unknown key, impossible value, or a text that is no YAML mapping.
        TypeError: A value of the wrong type.

    Example:
        >>> load_config("demo", ["optim.steps=10"]).optim.steps
        10
    """
    path = find_config(source)
    tree = _read_yaml(path)
    origins = dict.fromkeys(_keys(tree), path.name)
    for text in overrides:
        key, value = _parse_override(text)
        _insert(tree, key, value)
        origins |= dict.fromkeys([key, *_keys(value, f"{key}.")], "the command line")
        parents = key.split(".")[:-1]
        for depth in range(len(parents)):
            origins.setdefault(".".join(parents[: depth + 1]), "the command line")
    config = from_dict(tree, origins=origins)
    if command != "test":
        check_training_data(config.data)
    if config.run.out is None:
        run = dataclasses.replace(config.run, out=str(Path("runs") / path.stem))
        config = dataclasses.replace(config, run=run)
    typed = [_parse_override(text)[0] for text in overrides]
    _warn_ignored(config, origins, typed, command)
    return config


def find_config(source: str | Path) -> Path:
    """Path of a YAML file, given as a path or as the bare name of a packaged one."""
    path = Path(source)
    if path.is_file():
        return path
    packaged = CONFIG_FOLDER / f"{source}.yaml"
    if path.name == str(source) and packaged.is_file():
        return packaged
    names = packaged_configs()
    raise FileNotFoundError(
        f"config: expected a YAML file or one of {', '.join(names)}, got {str(source)!r}; "
        f"{suggestion(str(source), names, otherwise='check the path')}"
    )


def packaged_configs() -> list[str]:
    """Bare names that ``nlk train`` and ``nlk compare`` accept."""
    return sorted(path.stem for path in CONFIG_FOLDER.glob("*.yaml"))


def from_dict(tree: Mapping[str, Any], *, origins: Mapping[str, str] | None = None) -> Config:
    """Build and check a configuration from nested plain values (``config.to_dict`` inverted).

    Args:
        tree: Sections and keys; missing ones take their defaults.
        origins: Where each dotted key comes from, for error messages.

    Raises:
        ValueError: Unknown key or impossible value.
        TypeError: A value of the wrong type.
    """
    config = _build(Config, tree, "", {} if origins is None else origins)
    check_values(config)
    return config


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        problem = " ".join(str(error).split())
        raise ValueError(
            f"config: expected valid YAML in {path}, got: {problem}; correct the file"
        ) from error
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise ValueError(
            f"config: expected sections (model, data, ...) in {path}, got {_kind(tree)}; "
            "write for example 'optim: {steps: 10}'"
        )
    return tree


def _parse_override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ValueError(
            f"config: expected overrides of the form section.key=value, got {text!r}; "
            "write for example optim.steps=10"
        )
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(
            f"config: expected a YAML value after '=', got {text!r}; put texts in quotes"
        ) from error


def _insert(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    for parent in parents:
        inner = tree.get(parent)
        if inner is None:
            inner = tree[parent] = {}
        elif not isinstance(inner, dict):
            raise ValueError(
                f"config: expected {parent!r} to be a section, as {key!r} says, got {inner!r}; "
                f"override {parent!r} itself"
            )
        tree = inner
    tree[leaf] = value


def _keys(tree: Any, prefix: str = "") -> list[str]:
    """Every dotted key of nested dictionaries, inner ones included."""
    if not isinstance(tree, dict):
        return []
    keys = []
    for name, value in tree.items():
        keys += [f"{prefix}{name}", *_keys(value, f"{prefix}{name}.")]
    return keys


def _build(cls: type, tree: Any, prefix: str, origins: Mapping[str, str]) -> Any:
    if not isinstance(tree, Mapping):
        section = prefix.rstrip(".")
        raise TypeError(
            f"config: expected {section} to be a section with keys, got {tree!r}"
            f"{_source(section, origins)}; write its keys one level below it"
        )
    hints = typing.get_type_hints(cls)
    values = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if name not in hints:
            remedy = suggestion(key, known_keys(), otherwise=f"known here: {', '.join(hints)}")
            raise ValueError(
                f"config: expected a known key, got {key!r}{_source(key, origins)}; {remedy}"
            )
        values[name] = _convert(hints[name], value, key, origins)
    return cls(**values)


def _convert(hint: Any, value: Any, key: str, origins: Mapping[str, str]) -> Any:
    """``value`` as the annotated type, or an error that names the key."""
    if dataclasses.is_dataclass(hint):
        return _build(hint, {} if value is None else value, f"{key}.", origins)
    if typing.get_origin(hint) is types.UnionType:
        if value is None:
            return None
        (hint,) = (option for option in typing.get_args(hint) if option is not types.NoneType)
    outer, inner = typing.get_origin(hint), typing.get_args(hint)
    if outer is Literal:
        if value in inner:
            return value
        options = [str(option) for option in inner]
        raise ValueError(
            f"config: expected {key} to be one of {', '.join(options)}, got {value!r}"
            f"{_source(key, origins)}; "
            f"{suggestion(str(value), options, otherwise='choose one of them')}"
        )
    if outer is tuple:
        if isinstance(value, list | tuple) and (inner[-1] is Ellipsis or len(value) == len(inner)):
            return tuple(_convert(inner[0], item, key, origins) for item in value)
    elif outer is dict:
        if isinstance(value, Mapping):
            return dict(value)
    elif isinstance(value, bool):
        if hint is bool:
            return value
    elif hint is float:
        # A text too: YAML 1.1 reads 1e-3, which has no dot, as one.
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    elif isinstance(value, hint):
        return value
    wanted, example = _describe(hint)
    raise TypeError(
        f"config: expected {key} to be {wanted}, got {value!r} ({_kind(value)})"
        f"{_source(key, origins)}; write for example {key}={example}"
    )


def _describe(hint: Any) -> tuple[str, str]:
    """What a type is called in an error message, and an example for the command line."""
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)
        item = "name" if inner[0] is str else "1"
        length = "" if inner[-1] is Ellipsis else f" of {len(inner)}"
        return f"a list{length}", f"'[{item}]'" if not length else f"'[{item}, {item}]'"
    if typing.get_origin(hint) is dict:
        return "a section with keys", "'{kind: softmax}'"
    return {
        int: ("an integer", "10"),
        float: ("a number", "0.1"),
        bool: ("true or false", "true"),
        str: ("a text", "name"),
    }[hint]


def _kind(value: Any) -> str:
    names = {dict: "a section", list: "a list", str: "a text", int: "an integer", float: "a number"}
    return names.get(type(value), "nothing" if value is None else type(value).__name__)


def _source(key: str, origins: Mapping[str, str]) -> str:
    return f" in {origins[key]}" if key in origins else ""


def _warn_ignored(
    config: Config, origins: Mapping[str, str], typed: Sequence[str], command: str | None
) -> None:
    reasons = {}
    for key, because, ignores in _IGNORED_WHEN:
        value = value_of(config, because)
        if key in origins and ignores(value):
            reasons[key] = f"while {because} is {value}"
    # A file may serve both commands; what is typed for one of them should count.
    for start in _IGNORED_BY.get(command, ()):
        for key in typed:
            if key == start or key.startswith(f"{start}."):
                reasons[key] = f"in nlk {command}"
    for key, reason in reasons.items():
        warnings.warn(f"config: {key} has no effect {reason}", ConfigWarning, stacklevel=3)
