"""Runs of a model on a clip: what its modules get, and whether it answers as before."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from nlkernels import _rule
from nlkernels._spec import describe
from nlkernels.patching.twins import twin

# A network multiplies roundings: its outputs may differ by so many times what a change of the
# clip's last bits changes.
_AMPLIFIED = 4.0
_CLIPS = {2: (2, 112, 112), 3: (2, 8, 112, 112)}


def inner(model: nn.Module) -> nn.Module:
    """The model inside of DistributedDataParallel, DataParallel and torch.compile.

    Gradients that DistributedDataParallel waits for are none of a check's business, and a graph
    that is compiled for one run costs a minute.
    """
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        if isinstance(model, wrappers):
            model = model.module
        elif type(model).__name__ == "OptimizedModule":  # importing its module takes seconds
            model = model._orig_mod
        else:
            return model


def clip_for(where: str, model: nn.Module, given: Any, sizes: tuple[int, ...] | None) -> Any:
    """A tensor, the shape of one or True as a clip: random, by a generator of its own.

    Args:
        where: the caller, for messages.
        model: whose first parameter says device and dtype.
        given: a tensor, which is returned as it is; a shape; True for one like the first layer's.
        sizes: of the clip (C, *positions) for True, where known.
    """
    if isinstance(given, torch.Tensor):
        return given
    if given is True:
        shape = (2, *sizes) if sizes is not None else guessed_shape(where, model)
    elif isinstance(given, tuple | list) and all(isinstance(n, int) and n > 0 for n in given):
        shape = tuple(given)
    else:
        raise ValueError(
            f"{where}: expected a clip as a tensor, its shape or True, got {given!r}; pass the "
            "shape of the model's input, such as (2, 3, 8, 112, 112)"
        )
    first = next(model.parameters(), torch.empty(0))
    dtype = first.dtype if first.is_floating_point() else torch.float32
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(0), device="cpu")
    return drawn.to(first.device, dtype)


def guessed_shape(where: str, model: nn.Module, edge: int | None = None) -> tuple[int, ...]:
    """A shape that the first convolution of a model takes."""
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Conv3d):
            batch, *sizes = _CLIPS[layer.weight.dim() - 2]
            if edge is not None:
                sizes[-2:] = edge, edge
                sizes = [16, *sizes[1:]] if len(sizes) == 3 else sizes
            return (batch, layer.in_channels, *sizes)
    raise ValueError(
        f"{where}: expected a model with a convolution, got {type(model).__name__}, whose input is "
        "unknown; pass the shape of its input"
    )


@contextlib.contextmanager
def inputs_of(blocks: Mapping[str, nn.Module]) -> Iterator[dict[str, torch.Tensor]]:
    """What each block gets at its first call inside of the context."""
    seen: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            seen.setdefault(name, x.detach().clone())

        return record

    handles = [
        block.register_forward_pre_hook(watch(name), with_kwargs=True)
        for name, block in blocks.items()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def outputs(model: nn.Module, clip: torch.Tensor) -> list[torch.Tensor]:
    """The floating-point tensors that a model returns."""
    with torch.no_grad():
        found = tree_leaves(model(clip))
    return [t for t in found if isinstance(t, torch.Tensor) and t.is_floating_point()]


def nudged(clip: torch.Tensor) -> torch.Tensor:
    """A clip whose every number differs in its last bit."""
    generator = torch.Generator().manual_seed(1)
    up = torch.rand(clip.shape, generator=generator, device="cpu").to(clip.device) < 0.5
    step = torch.finfo(clip.dtype).eps * clip.abs()
    return torch.where(up, clip + step, clip - step)


def apart(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """Largest difference relative to the largest number; NaN stays NaN.

    Raises:
        ValueError: other numbers of tensors, or other shapes.
    """
    if [t.shape for t in one] != [t.shape for t in other]:
        raise ValueError(
            f"check: expected outputs {[describe(t) for t in one]} as before, got "
            f"{[describe(t) for t in other]}; the model is not the same"
        )
    found = [
        (a.double() - b.double()).abs().max().item() / (a.double().abs().max().item() or 1.0)
        for a, b in zip(one, other, strict=True)
        if a.numel()
    ]
    return next((value for value in found if value != value), max(found, default=0.0))


def same_outputs(before: float, after: float, dtype: torch.dtype) -> bool:
    """Whether outputs differ no more than by rounding.

    Args:
        before: what a change of the clip's last bits changed.
        after: what the replacement changed.
        dtype: of the clip.
    """
    return after <= _AMPLIFIED * (before + torch.finfo(dtype).eps)


def excess_of(block: nn.Module, x: torch.Tensor) -> str:
    """By how much a replaced block breaks the rule for an input; "" where it holds.

    Outputs and, in training mode, gradients of the input and of all parameters together. Of two
    inputs that differ in last bits both have to break it: a plain result may be near the truth by
    luck.
    """
    found = [_excess(block, each) for each in (x, nudged(x))]
    return found[0] if all(found) else ""


def _excess(block: nn.Module, x: torch.Tensor) -> str:
    original = twin(block)
    original.__class__ = block.nonlocal_original
    ours = twin(block)
    # Batch statistics of several processes would wait for processes that check other clips.
    training = block.training
    same, got = _run(original, x, training), _run(ours, x, training)
    truth = _run(twin(original, torch.float64), x.double(), training)
    for name, expected in truth.items():
        factor = _rule.OUTPUT if name == "output" else _rule.GRADIENT
        if wrong := _rule.excess(got[name], same[name], expected, factor):
            return f"{name}: {wrong}"
    return ""


def _run(block: nn.Module, x: torch.Tensor, training: bool) -> dict[str, torch.Tensor]:
    if not training:
        with torch.no_grad():
            return {"output": block(x)}
    with torch.enable_grad():
        x = x.clone().requires_grad_()
        wanted = [p for p in block.parameters() if p.requires_grad]
        out = block(x)
        cotangent = torch.linspace(-1, 2, out.numel(), device=x.device).view_as(out).cos()
        found = {"output": out.detach()}
        try:
            grads = torch.autograd.grad(
                out, [x, *wanted], cotangent.to(out.dtype), allow_unused=True
            )
        except RuntimeError:  # mmcv's concatenation cannot
            return found
    found["gradient of x"] = grads[0]
    flat = [g.flatten() for g in grads[1:] if g is not None]
    if flat:
        found["gradients of parameters"] = torch.cat(flat)
    return found
