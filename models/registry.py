"""Registry of models: builders by name, with options checked before anything is built."""

import fnmatch
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from nlkernels._spec import nearest

_BUILDERS: dict[str, Callable[..., nn.Module]] = {}

# Parameters of every builder that `create_model` takes by name.
_COMMON = ("num_classes", "width")


def register_model(builder: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Register a builder under its function name; meant as a decorator.

    Args:
        builder: function whose parameters are all keyword-only, `num_classes` and `width` among
            them. Every other parameter is an option of the model and has a default.

    Returns:
        The builder, unchanged.

    Raises:
        ValueError: another builder has this name already.
    """
    name = builder.__name__
    if name in _BUILDERS:
        raise ValueError(
            f"register_model: expected a new name, got {name!r} again; rename one of the builders"
        )
    _BUILDERS[name] = builder
    return builder


def list_models(pattern: str = "*") -> list[str]:
    """Names of the registered models that match a shell pattern, sorted.

    Args:
        pattern: shell-style pattern, such as "i3d*".

    Returns:
        Sorted names; empty when nothing matches.

    Example:
        >>> from nlkernels.models import list_models
        >>> list_models("*_r50_8x8")
        ['c2d_r50_8x8', 'i3d_r50_8x8']
    """
    return sorted(fnmatch.filter(_BUILDERS, pattern))


def create_model(name: str, *, num_classes: int, width: float = 1.0, **options: Any) -> nn.Module:
    """Build a registered model with fresh weights.

    The backbone draws its weights before any block does: with the same seed, a model with blocks
    and one without start from the same backbone.

    Args:
        name: one of `list_models()`.
        num_classes: number of classes, the length of a row of logits.
        width: multiplier of every channel count; the products are rounded to multiples of 8.
        **options: options of that model, the keyword arguments of its builder. All models have
            `blocks` (how many), `block` (options of `NonLocalBlock3d`, "variant", "preset") and
            `dropout` (probability in front of the classifier).

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
    if not isinstance(name, str):
        raise TypeError(
            f"create_model: expected the name of a model, got {name!r}; "
            f"pass one of {', '.join(list_models())}"
        )
    if name not in _BUILDERS:
        raise ValueError(
            f"create_model: expected one of {', '.join(list_models())}, got {name!r}"
            f"{nearest(name, _BUILDERS)}"
        )
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
    builder = _BUILDERS[name]
    known = [key for key in inspect.signature(builder).parameters if key not in _COMMON]
    for option in options:
        if option not in known:
            raise TypeError(
                f"create_model: expected options of {name} among {', '.join(known)}, "
                f"got {option!r}{nearest(option, known)}"
            )
    dropout = options.get("dropout", 0.0)
    if not isinstance(dropout, int | float) or not 0 <= dropout <= 1:
        raise ValueError(
            f"create_model: expected dropout to be a number from 0 to 1, got {dropout!r}; "
            "it is the probability of dropping a feature"
        )
    return builder(num_classes=num_classes, width=width, **options)
