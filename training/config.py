"""Configuration of training and comparison: frozen dataclasses, one docstring per key.

A YAML file (``config_file.py`` reads it) lists only what differs from the defaults below.
Impossible values and combinations are one-line errors raised before any work starts.
"""

import dataclasses
import difflib
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from . import config_data, config_optim, config_run
from .config_data import DataConfig
from .config_optim import OptimConfig
from .config_run import RunConfig

VARIANTS = ("none", "naive", "fast", "local", "frame")


@dataclass(frozen=True)
class ModelConfig:
    """Which network."""

    name: str = "c2d_tiny"
    """A name of ``nlkernels.models.list_models()``."""
    num_classes: int | None = None
    """Number of classes; unset takes it from the data set, set it must agree with the data set."""
    width: float = 1.0
    """Multiplier of the channel counts."""
    blocks: int = 2
    """Number of non-local blocks."""
    block: dict[str, Any] = field(default_factory=dict)
    """Options of every block, as ``NonLocalBlock3d`` takes them."""
    dropout: float | None = None
    """Dropout probability before the classifier; unset takes the model's own."""
    weights: str | None = None
    """Checkpoint that trainings start from, of a published system or of ours: what it lacks of
    blocks and classifier starts fresh; unset draws all weights."""


@dataclass(frozen=True)
class ProfileConfig:
    """Clip shape and length of the speed and memory measurement."""

    batch: int = 2
    """Clips per measured step."""
    frames: int | None = None
    """Frames of a measured clip; unset is ``data.frames``."""
    size: int | None = None
    """Height and width of a measured clip, in pixels; unset is ``data.size``."""
    rounds: int = 7
    """Measured steps of every variant; the variants take turns, round by round."""


@dataclass(frozen=True)
class CompareConfig:
    """What ``nlk compare`` compares."""

    variants: tuple[str, ...] = ("none", "naive", "fast")
    """Any of none, naive, fast, local (local blocks), frame (keys of the query's frame only)."""
    seeds: tuple[int, ...] = (0,)
    """Every variant is trained once per seed."""
    memory_gib: float | None = None
    """Size of a memory in GiB: the report then says which batch fits; unset leaves that out."""
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    """Clip shape and length of the speed and memory measurement."""


@dataclass(frozen=True)
class Config:
    """Everything that defines a run; ``to_dict`` of it is written beside the logs."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """Which network."""
    data: DataConfig = field(default_factory=DataConfig)
    """Which clips, and how they are read."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """How the parameters move."""
    run: RunConfig = field(default_factory=RunConfig)
    """Where and how the run happens."""
    compare: CompareConfig = field(default_factory=CompareConfig)
    """What ``nlk compare`` compares."""


_MINIMUM = (
    config_data.MINIMUM
    | config_optim.MINIMUM
    | config_run.MINIMUM
    | {
        "model.num_classes": 2,
        "model.blocks": 0,
        "compare.profile.batch": 1,
        "compare.profile.frames": 1,
        "compare.profile.size": 1,
        "compare.profile.rounds": 1,
    }
)
_POSITIVE = (*config_data.POSITIVE, *config_optim.POSITIVE, "model.width", "compare.memory_gib")
_NOT_NEGATIVE = config_optim.NOT_NEGATIVE


def to_dict(config: Config) -> dict[str, Any]:
    """Nested plain values of a configuration, as they are written to JSON."""
    return dataclasses.asdict(config)


def profile_of(config: Config) -> ProfileConfig:
    """Clip shape and length of the measurement, with what is unset taken from ``data``."""
    profile, data = config.compare.profile, config.data
    return dataclasses.replace(
        profile,
        frames=data.frames if profile.frames is None else profile.frames,
        size=data.size if profile.size is None else profile.size,
    )


def known_keys(cls: type = Config, prefix: str = "") -> list[str]:
    """Every dotted key of the configuration, sections included."""
    keys = []
    for name, hint in typing.get_type_hints(cls).items():
        keys.append(f"{prefix}{name}")
        if dataclasses.is_dataclass(hint):
            keys += known_keys(hint, f"{prefix}{name}.")
    return keys


def suggestion(word: str, known: Sequence[str], *, otherwise: str) -> str:
    """The remedy of an unknown word or dotted key: its nearest neighbour, or ``otherwise``."""
    section, _, leaf = word.rpartition(".")
    near = [key for key in known if key.rpartition(".")[2] == leaf]
    if not near:
        siblings = [key for key in known if key.rpartition(".")[0] == section]
        near = difflib.get_close_matches(word, siblings, n=1, cutoff=0.75 if section else 0.6)
    return f"did you mean {near[0]!r}?" if near else otherwise


def value_of(config: Config, key: str) -> Any:
    """The value at a dotted key."""
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def check_values(config: Config) -> None:
    """Raise ValueError for a value, or a combination of values, that cannot work."""
    for key, low in _MINIMUM.items():
        value = value_of(config, key)
        if value is not None and value < low:
            raise ValueError(
                f"config: expected {key} >= {low}, got {value}; write for example {key}={low}"
            )
    for key in _POSITIVE:
        value = value_of(config, key)
        if value is not None and not value > 0:
            raise ValueError(f"config: expected {key} > 0, got {value}; give a positive number")
    for key in _NOT_NEGATIVE:
        value = value_of(config, key)
        if not value >= 0:
            raise ValueError(f"config: expected {key} >= 0, got {value}; give zero or more")
    _check_combinations(config)


def _check_combinations(config: Config) -> None:
    data, compare = config.data, config.compare
    config_optim.check_optim(config.optim)
    config_run.check_run(config.run)
    if config.optim.schedule == "plateau" and config.run.test_every is None:
        raise ValueError(
            "config: expected run.test_every with optim.schedule=plateau, got nothing; write for "
            "example run.unit=epoch run.test_every=1"
        )
    config_data.check_data(data)
    for variant in compare.variants:
        if variant not in VARIANTS:
            hint = suggestion(variant, VARIANTS, otherwise="choose some of them")
            raise ValueError(
                f"config: expected compare.variants from {', '.join(VARIANTS)}, got {variant!r}; "
                f"{hint}"
            )
    for key, values in (("variants", compare.variants), ("seeds", compare.seeds)):
        if not values or len(set(values)) != len(values):
            raise ValueError(
                f"config: expected compare.{key} without repetition and not empty, got "
                f"{list(values)}; list each once"
            )
