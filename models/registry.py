"""Registry of models: builders by name, with options checked before anything is built."""

import fnmatch
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import nn

from nlkernels._spec import check_choice, nearest

FAMILIES = ("c2d", "i3d", "slowonly", "tsm", "inception")


class Registered(NamedTuple):
    """What the registry knows of a model.

    Attributes:
        builder: keyword arguments -> module.
        options: names of the options that the builder takes besides `num_classes` and `width`.
        family: the architecture, one of `FAMILIES`.
        design: what distinguishes a published network; None for our own.
    """

    builder: Callable[..., nn.Module]
    options: tuple[str, ...]
    family: str
    design: Any = None

    @property
    def system(self) -> str | None:
        """Whose network it is, a key layout of `nlkernels.models.systems`; None for our own."""
        return None if self.design is None else self.design.system


_MODELS: dict[str, Registered] = {}

# Parameters of every builder that `create_model` takes by name.
_COMMON = ("num_classes", "width")


def register_model(
    builder: Callable[..., nn.Module],
    *,
    name: str | None = None,
    options: Sequence[str] | None = None,
    family: str = "c2d",
    design: Any = None,
) -> Callable[..., nn.Module]:
    """Register a builder under a name; as a decorator, under its function name.

    Args:
        builder: function whose parameters are all keyword-only, `num_classes` and `width` among
            them. Every other parameter is an option of the model and has a default.
        name: None for the function's own.
        options: names of its options; None for those in its signature.
        family: the architecture, one of `FAMILIES`.
        design: what distinguishes a published network, `system` among it.

    Returns:
        The builder, unchanged.

    Raises:
        ValueError: another builder has this name already, or an unknown family.
    """
    name = builder.__name__ if name is None else name
    check_choice("register_model", "family", family, FAMILIES)
    if name in _MODELS:
        raise ValueError(
            f"register_model: expected a new name, got {name!r} again; rename one of the builders"
        )
    if options is None:
        options = [key for key in inspect.signature(builder).parameters if key not in _COMMON]
    _MODELS[name] = Registered(builder, tuple(options), family, design)
    return builder


def list_models(
    pattern: str = "*", *, family: str | None = None, system: str | None = None
) -> list[str]:
    """Names of the registered models that match all filters, sorted.

    Args:
        pattern: shell-style pattern, such as "i3d*".
        family: "c2d", "i3d", "slowonly", "tsm" or "inception"; None for any.
        system: whose network, such as "caffe2" or "mmaction"; None for any.

    Returns:
        Sorted names; empty when nothing matches.

    Raises:
        ValueError: unknown family or system.

    Example:
        >>> from nlkernels.models import list_models
        >>> list_models("*_8x8", system="caffe2", family="i3d")
        ['i3d_r101_8x8', 'i3d_r50_8x8']
    """
    if family is not None:
        check_choice("list_models", "family", family, FAMILIES)
    if system is not None:
        systems = dict.fromkeys(model.system for model in _MODELS.values() if model.system)
        check_choice("list_models", "system", system, tuple(systems))
    return sorted(
        name
        for name in fnmatch.filter(_MODELS, pattern)
        if family in (None, _MODELS[name].family) and system in (None, _MODELS[name].system)
    )


def registered(name: str, where: str = "registered") -> Registered:
    """What the registry knows of a model.

    Raises:
        TypeError: name is no str.
        ValueError: unknown name.
    """
    if not isinstance(name, str):
        raise TypeError(
            f"{where}: expected the name of a model, got {name!r}; pass one of list_models()"
        )
    if name not in _MODELS:
        raise ValueError(
            f"{where}: expected one of the {len(_MODELS)} names of list_models(), "
            f"got {name!r}{nearest(name, _MODELS, 'nlk models lists them')}"
        )
    return _MODELS[name]


def create_model(name: str, *, num_classes: int, width: float = 1.0, **options: Any) -> nn.Module:
    """Build a registered model with fresh weights.

    The backbone draws its weights before any block does: with the same seed, a model with blocks
    and one without start from the same backbone.

    Args:
        name: one of `list_models()`.
        num_classes: number of classes, the length of a row of logits.
        width: multiplier of every channel count; the products are rounded to multiples of 8.
        **options: options of that model, the keyword arguments of its builder. All models have
            `blocks` (how many), `block` (options of `NonLocalBlock3d`, "variant", "preset"),
            `dropout` (probability in front of the classifier) and `checkpointing` (compute
            activations again in the backward instead of keeping them). What tells a system's
            network from another's, as `pool1_padding`, is an option as well.

    Returns:
        Module in training mode: float clips (B, 3, T, H, W) -> logits (B, num_classes).

    Raises:
        ValueError: unknown name, or a value that the model cannot take.
        TypeError: unknown option, or a value of the wrong type.

    Example:
        >>> import torch
        >>> from nlkernels.models import create_model
        >>> model = create_model("c2d_tiny", num_classes=2, width=0.5, blocks=2)
        >>> model(torch.zeros(1, 3, 8, 48, 48)).shape
        torch.Size([1, 2])
    """
    model = registered(name, "create_model")
    if isinstance(num_classes, bool) or not isinstance(num_classes, int):
        raise TypeError(
            f"create_model: expected num_classes to be an int, got {num_classes!r}; "
            "pass the number of classes"
        )
    if num_classes < 1:
        raise ValueError(
            f"create_model: expected num_classes >= 1, got {num_classes}; "
            "pass the number of classes"
        )
    for option in options:
        if option not in model.options:
            raise TypeError(
                f"create_model: expected options of {name} among {', '.join(model.options)}, "
                f"got {option!r}{nearest(option, model.options)}"
            )
    dropout = options.get("dropout", 0.0)
    if not isinstance(dropout, int | float) or not 0 <= dropout <= 1:
        raise ValueError(
            f"create_model: expected dropout to be a number from 0 to 1, got {dropout!r}; "
            "it is the probability of dropping a feature"
        )
    return model.builder(num_classes=num_classes, width=width, **options)
