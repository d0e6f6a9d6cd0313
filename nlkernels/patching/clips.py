"""Runs of a model on a clip: what its modules get, and whether it answers as before."""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from nlkernels import _rule
from nlkernels._spec import autocasts, describe
from nlkernels._warmup import unchanged
from nlkernels.patching.twins import gradients, twin

# A network multiplies roundings: its outputs may differ by so many times what a change of last
# bits of what its blocks get changes.
_AMPLIFIED = 4.0
# Share of equal positions from which a block's error is no mean any more: of 4 blocks with 8192
# positions and 2048 keys the rule held for all where a tenth was equal, for 2 where a quarter was.
_EQUAL = 0.1
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


class Seen(NamedTuple):
    """What a block gets in a model.

    Attributes:
        x: its input.
        autocast: dtype of the region of autocast that it is called in; None outside of one.
    """

    x: torch.Tensor
    autocast: torch.dtype | None

    @property
    def eps(self) -> float:
        """Of the coarsest dtype that the block computes with."""
        return _coarsest((self.x.dtype, self.autocast or self.x.dtype))


def clip_for(where: str, model: nn.Module, given: Any, sizes: tuple[int, ...] | None) -> Any:
    """A clip: a tensor, or a list or tuple of them for a model that takes that.

    Args:
        where: the caller, for messages.
        model: whose first floating-point parameter says device and dtype.
        given: a tensor; a shape; a list or tuple of tensors or shapes; True for a shape that the
            first layer takes.
        sizes: of the clip (C, *positions) for True, where known.

    Returns:
        Copies of tensors, random ones for shapes, by a generator of its own.
    """
    if given is True:
        given = (2, *sizes) if sizes is not None else guessed_shape(where, model)
    if isinstance(given, torch.Tensor):
        return given.detach().clone()
    if _is_shape(given):
        return _drawn(model, given)
    several = isinstance(given, tuple | list) and len(given) > 0
    if several and all(isinstance(each, torch.Tensor) or _is_shape(each) for each in given):
        found = [clip_for(where, model, each, None) for each in given]
        return found if isinstance(given, list) else tuple(found)
    raise ValueError(
        f"{where}: expected a clip as a tensor, its shape or True, got {described(given)}; pass "
        "the shape of the model's input, such as (2, 3, 8, 112, 112), or a list of shapes or "
        "tensors for a model that takes a list"
    )


def _is_shape(given: Any) -> bool:
    return (
        isinstance(given, tuple | list)
        and len(given) > 0
        and all(isinstance(n, int) and n > 0 for n in given)
    )


def _drawn(model: nn.Module, shape: Iterable[int]) -> torch.Tensor:
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(0), device="cpu")
    return drawn.to(like.device, like.dtype)


def copied(clip: Any) -> Any:
    """A clip for one run: models may change tensors and lists in place."""
    if isinstance(clip, torch.Tensor):
        return clip.clone()
    return type(clip)(each.clone() for each in clip)


def described(clip: Any) -> str:
    """Shapes, dtypes and devices of a clip, for messages; never its numbers."""
    if isinstance(clip, tuple | list):
        inside = ", ".join(map(described, clip))
        return f"[{inside}]" if isinstance(clip, list) else f"({inside})"
    return repr(clip) if isinstance(clip, str | int | float) else describe(clip)


def first_line(error: Exception) -> str:
    """What an error says first; "" for one that says nothing."""
    return next(iter(str(error).splitlines()), "")


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


def first_run(
    where: str, model: nn.Module, blocks: Mapping[str, nn.Module], clip: Any
) -> tuple[list[torch.Tensor], dict[str, Seen]]:
    """What a model returns for a clip, and what each of its blocks gets at its first call.

    Raises:
        ValueError: the model does not take the clip.
        RuntimeError: a check could not fail: a block is not called, or there is no number to
            compare.
    """
    seen: dict[str, Seen] = {}

    def record(name: str, x: torch.Tensor) -> torch.Tensor:
        kind = x.device.type
        autocast = torch.get_autocast_dtype(kind) if autocasts(kind) else None
        seen.setdefault(name, Seen(x.detach().clone(), autocast))
        return x

    try:
        with _inputs(blocks, record):
            returned = _run_model(model, clip)
    except Exception as error:
        raise ValueError(
            f"{where}: expected a clip that the model takes, got {described(clip)} "
            f"({type(error).__name__}: {first_line(error)}); pass its input or the shape of that, "
            "as a list of them for a model that takes a list, such as pathways"
        ) from error
    idle = [name for name in blocks if name not in seen]
    if idle:
        called = [name for name in blocks if name in seen]
        raise RuntimeError(
            f"{where}: expected a model that calls every block for the clip, got no call of "
            f"{', '.join(idle)}; "
            + (f"check the others with only={called!r}, and " if called else "")
            + "replace these without check, or pass a clip that reaches them"
        )
    found = _floating(returned)
    if not any(t.isfinite().any() for t in found):
        kinds = [describe(leaf) for leaf in tree_leaves(returned)]
        raise RuntimeError(
            f"{where}: expected a model that returns floating-point tensors with finite numbers, "
            f"alone or in tuples, lists and dictionaries, got {kinds}; check a part of it that "
            "does, or replace without check"
        )
    return found, seen


def outputs(model: nn.Module, clip: Any) -> list[torch.Tensor]:
    """The floating-point tensors that a model returns; clip, buffers and random states stay."""
    return _floating(_run_model(model, clip))


def nudged_outputs(
    model: nn.Module, blocks: Mapping[str, nn.Module], clip: Any, eps: float
) -> list[torch.Tensor]:
    """What a model returns where last bits of what its blocks get are others."""
    with _inputs(blocks, lambda name, x: nudged(x, eps)):
        return outputs(model, clip)


def _run_model(model: nn.Module, clip: Any) -> Any:
    # Compiled parts would be compiled again for the hooks of each run.
    compiles = "torch._dynamo" in sys.modules  # importing it takes seconds
    stance = torch.compiler.set_stance("force_eager") if compiles else contextlib.nullcontext()
    with unchanged(model), stance, torch.no_grad():
        return model(copied(clip))


def _floating(returned: Any) -> list[torch.Tensor]:
    found = tree_leaves(returned)
    return [t for t in found if isinstance(t, torch.Tensor) and t.is_floating_point()]


@contextlib.contextmanager
def _inputs(
    blocks: Mapping[str, nn.Module], change: Callable[[str, torch.Tensor], torch.Tensor]
) -> Iterator[None]:
    """Let blocks get what a function of their names and inputs returns."""

    def watch(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (change(name, args[0]), *args[1:]), kwargs
            first, *_ = kwargs
            return args, {**kwargs, first: change(name, kwargs[first])}

        return hook

    handles = [
        block.register_forward_pre_hook(watch(name), with_kwargs=True)
        for name, block in blocks.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def eps_of(model: nn.Module, seen: Mapping[str, Seen], found: list[torch.Tensor]) -> float:
    """Of the coarsest dtype that blocks, parameters or outputs of a model have.

    A change of finer bits would vanish where they meet that dtype.
    """
    tensors = [*(p for p in model.parameters() if p.is_floating_point()), *found]
    return max([_coarsest(t.dtype for t in tensors), *(each.eps for each in seen.values())])


def _coarsest(dtypes: Iterable[torch.dtype]) -> float:
    return max(torch.finfo(dtype).eps for dtype in dtypes)


def nudged(x: torch.Tensor, eps: float) -> torch.Tensor:
    """A tensor whose every number differs by eps of its size, and of the usual size at least.

    So zeros and the rows of a constant tensor differ as well: what is computed of equal rows may be
    exact by luck, which says nothing about roundings.
    """
    generator = torch.Generator().manual_seed(1)
    up = torch.rand(x.shape, generator=generator, device="cpu").to(x.device) < 0.5
    size = torch.linalg.vector_norm(x.flatten(), dtype=torch.promote_types(x.dtype, torch.float32))
    rms = size.item() / max(x.numel(), 1) ** 0.5
    step = eps * x.abs().clamp(min=rms or 1.0)
    return torch.where(up, x + step, x - step)


def apart(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """Largest difference relative to the largest finite number.

    NaN where numbers that are not finite are others, or at other places.

    Raises:
        ValueError: other numbers of tensors, or other shapes.
    """
    if [t.shape for t in one] != [t.shape for t in other]:
        raise ValueError(
            f"check: expected outputs {[describe(t) for t in one]} as before, got "
            f"{[describe(t) for t in other]}; the model is not the same"
        )
    found = [_apart(a.double(), b.double()) for a, b in zip(one, other, strict=True)]
    return next((value for value in found if value != value), max(found, default=0.0))


def _apart(a: torch.Tensor, b: torch.Tensor) -> float:
    finite = a.isfinite() & b.isfinite()
    if not torch.equal(a[~finite].nan_to_num(1, 2, 3), b[~finite].nan_to_num(1, 2, 3)):
        return float("nan")
    a, b = a[finite], b[finite]
    if not a.numel():
        return 0.0
    return (a - b).abs().max().item() / (a.abs().max().item() or 1.0)


def same_outputs(before: float, after: float, eps: float) -> bool:
    """Whether outputs differ no more than by rounding.

    Args:
        before: what a change of last bits of what blocks get changed.
        after: what the replacement changed.
        eps: of the coarsest dtype, `eps_of`.
    """
    return after <= _AMPLIFIED * (before + eps)


def excess_of(block: nn.Module, seen: Seen) -> str:
    """By how much a replaced block breaks the rule for an input; "" where it holds.

    Outputs and, in training mode, gradients of the input and of all parameters together. Of two
    inputs that differ in last bits both have to break it: a plain result may be near the truth by
    luck. Where many positions are equal, their roundings are, too, and the error of a plain result
    is one draw instead of a mean of many: the answer says so.
    """
    kind = seen.x.device.type
    region = (
        torch.autocast(kind, seen.autocast, enabled=seen.autocast is not None)
        if torch.amp.is_autocast_available(kind)
        else contextlib.nullcontext()
    )
    # No gradient is computed in inference mode, nor of its tensors.
    with torch.inference_mode(False), region:
        found = _excess(block, seen.x)
        if not found or not _excess(block, nudged(seen.x, seen.eps)):
            return ""
    return found + equality_of(seen)


def equality_of(seen: Seen) -> str:
    """What to say of a block's input whose positions are equal too often; "" of others."""
    share = _equal_share(seen)
    if share < _EQUAL:
        return ""
    return (
        f"; {share:.0%} of its input's positions are equal, which says too little about "
        "roundings: pass a clip of different numbers, or its shape"
    )


def _equal_share(seen: Seen) -> float:
    """Of the positions of an input's first clip, the share that has the most frequent values."""
    rows = seen.x[:1].flatten(2).double()
    if not rows.numel() or not rows.isfinite().all():
        return 0.0
    # Convolutions give equal positions values that differ in last bits.
    step = 64 * seen.eps * (rows.square().mean().sqrt().item() or 1.0)
    counts = (rows[0] / step).round().unique(dim=1, return_counts=True)[1]
    return counts.max().item() / rows.shape[2]


def _excess(block: nn.Module, x: torch.Tensor) -> str:
    original = twin(block)
    original.__class__ = block.nonlocal_original
    ours = twin(block)
    # Batch statistics of several processes would wait for processes that check other clips.
    training = block.training
    same, got = _run(original, x, training), _run(ours, x, training)
    truth = _run(twin(original, torch.float64), x.double(), training)
    for name, expected in truth.items():
        if name not in got:
            return f"{name}: none, where the block has one"
        factor = _rule.OUTPUT if name == "output" else _rule.GRADIENT
        if wrong := _rule.excess(got[name], same[name], expected, factor):
            return f"{name}: {wrong}"
    return ""


def _run(block: nn.Module, x: torch.Tensor, training: bool) -> dict[str, torch.Tensor]:
    """Random layers draw the same in every run, and nothing of the program's states."""
    with unchanged(block):
        return _results(block, x, training)


def _results(block: nn.Module, x: torch.Tensor, training: bool) -> dict[str, torch.Tensor]:
    x = x.clone()
    if not training:
        with torch.no_grad():
            return {"output": block(x)}
    wanted = [x.requires_grad_(), *(p for p in block.parameters() if p.requires_grad)]
    with torch.enable_grad():
        out = block(x)
        grads = gradients(out, wanted)
    found = {"output": out.detach()}
    if grads:
        first, *others = (
            torch.zeros_like(t) if g is None else g for t, g in zip(wanted, grads, strict=True)
        )
        found["gradient of x"] = first
        if others:
            found["gradients of parameters"] = torch.cat([g.flatten() for g in others])
    return found
