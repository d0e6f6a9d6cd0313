"""What modules of a model return, found out on a copy: the model's own state and hooks are left."""

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from nlkernels._warmup import unchanged
from nlkernels.patching import clips
from nlkernels.patching.twins import HOOKS

# Pixels of a clip that only shapes are made of: what the heads of most networks ask for.
_EDGE = 224


class _Stand(nn.Module):
    """Stands for a block that only its place's new class calls."""

    def __init__(self) -> None:
        super().__init__()
        self.called = False

    def forward(self, x: Any) -> Any:
        self.called = True
        return x


def shapes(
    where: str, model: nn.Module, modules: dict[str, nn.Module], clip: Any, name: str
) -> dict[str, tuple[int, ...]]:
    """What each module returns, (B, C, *positions).

    A copy of the model runs without data on the device "meta", or where it cannot, in evaluation
    mode on random numbers; then it shares the model's parameters.

    Args:
        where: the caller, for messages.
        model: it, without wrappers.
        modules: of the model, by what the caller calls them.
        clip: the model's input or its shape, or a list of these; None guesses one.
        name: of the block that each of them, but sequences, is to have as a child.

    Raises:
        ValueError: a clip that the model does not take; a module that returns no such tensor, or
            goes through its children; a model that is lazy or cannot be copied.
    """
    if any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        raise ValueError(
            f"{where}: expected the shapes of all parameters, got lazy ones; run the model once "
            "first"
        )
    if clip is None:
        clip = clips.guessed_shape(where, model, _EDGE)
    # Functions that a copied forward holds may call modules of the model itself.
    with unchanged(model):
        try:
            seen, through = _run_on_meta(model, modules, clip, name)
        except Exception:  # it makes tensors elsewhere, or asks for their values
            sample = clips.clip_for(where, model, clip, None)
            seen, through = _run(where, model, modules, sample, name)
    if through:
        raise ValueError(
            f"{where}: expected {through[0] or 'the model'} to call its children by their names, "
            f"got a {type(modules[through[0]]).__name__}, whose forward goes through its children "
            "and would call the block as well; name its last child"
        )
    for place in modules:
        shape = seen.get(place, "nothing: it was not called")
        if not isinstance(shape, tuple) or not 3 <= len(shape) <= 5:
            raise ValueError(
                f"{where}: expected {place or 'the model'} to return one tensor (B, C, T, H, W), "
                f"(B, C, H, W) or (B, C, L), got {shape}; name a module that does"
            )
    return seen


def _run_on_meta(
    model: nn.Module, modules: dict[str, nn.Module], clip: Any, name: str
) -> tuple[dict[str, Any], list[str]]:
    shape = tuple(clip.shape) if isinstance(clip, torch.Tensor) else tuple(clip)
    first = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    copied, places = _copy(model, modules, _without_data)
    with torch.no_grad():
        return _watched(copied, places, torch.empty(shape, dtype=first, device="meta"), name)


def _run(
    where: str, model: nn.Module, modules: dict[str, nn.Module], clip: Any, name: str
) -> tuple[dict[str, Any], list[str]]:
    try:
        copied, places = _copy(model, modules, _own)
    except Exception as error:
        raise ValueError(
            f"{where}: expected a model that can be copied for a run, got {_said(error)}; pass "
            "channels="
        ) from error
    try:
        with torch.no_grad():
            return _watched(copied.eval(), places, clip, name)
    except Exception as error:
        raise ValueError(
            f"{where}: expected a clip that the model takes, got {clips.described(clip)} "
            f"({_said(error)}); pass clip=, its input or the shape of that"
        ) from error


def _without_data(tensor: torch.Tensor) -> torch.Tensor:
    made = tensor.detach().to("meta")
    return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """A parameter itself, which no forward changes, and a copy of any other tensor."""
    return tensor if isinstance(tensor, nn.Parameter) else tensor.detach().clone()


def _said(error: Exception) -> str:
    return clips.first_line(error) or type(error).__name__


def _copy(
    model: nn.Module, modules: dict[str, nn.Module], of: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[nn.Module, dict[str, nn.Module]]:
    """A copy of a model without hooks, and the copies of these modules."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        kept = vars(module)
        memo.update((id(kept[hooks]), OrderedDict()) for hooks in HOOKS if hooks in kept)
        for leaf in tree_leaves(list(kept.values())):
            if isinstance(leaf, torch.Tensor) and id(leaf) not in memo:
                memo[id(leaf)] = of(leaf)
    copied = copy.deepcopy(model, memo)
    return copied, {place: memo[id(module)] for place, module in modules.items()}


def _watched(
    model: nn.Module, modules: dict[str, nn.Module], clip: Any, name: str
) -> tuple[dict[str, Any], list[str]]:
    """Shapes of what modules return, or types of what is no tensor; and who calls new children."""
    seen: dict[str, Any] = {}

    def watch(place: str) -> Callable[..., None]:
        def record(module: nn.Module, args: Any, output: Any) -> None:
            tensor = isinstance(output, torch.Tensor)
            seen[place] = tuple(output.shape) if tensor else f"a {type(output).__name__}"

        return record

    stands = {}
    for place, module in modules.items():
        module.register_forward_hook(watch(place))
        if not isinstance(module, nn.Sequential):
            stands[place] = _Stand()
            module.add_module(name, stands[place])
    model(clip)
    return seen, [place for place, stand in stands.items() if stand.called]
