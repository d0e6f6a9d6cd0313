"""New blocks behind named modules of a model that has none."""

import difflib
import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from nlkernels._spec import describe
from nlkernels.modules import NonLocalBlock1d, NonLocalBlock2d, NonLocalBlock3d
from nlkernels.modules.base import NonLocalBlock
from nlkernels.modules.layers import is_identity
from nlkernels.modules.presets import preset_options
from nlkernels.patching import clips, probe
from nlkernels.patching.classes import (
    PLACE,
    Extended,
    exchange,
    exchanged_class,
    give_back,
    is_exchanged,
)
from nlkernels.patching.report import Report, row_of

_WHERE = "insert_nonlocal"
_BLOCKS = {1: NonLocalBlock1d, 2: NonLocalBlock2d, 3: NonLocalBlock3d}
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_UNCALLED = (nn.ModuleList, nn.ModuleDict)
_ALL_CHILDREN = {"children", "named_children", "modules", "named_modules", "_modules"}


class FramesBlock(NonLocalBlock3d):
    """A block for clips between layers for frames, which follow one another.

    Args:
        dim: channels C.
        segments: T, frames of a clip.
        **options: as for `NonLocalBlock3d`.

    Shape:
        (N T, C, H, W) -> the same; `attention_map`, `explain` and `footprint` take clips.

    Raises:
        ValueError: frames that are no multiple of segments; what `NonLocalBlock3d` raises.

    Example:
        >>> import torch
        >>> from nlkernels.patching import FramesBlock
        >>> FramesBlock(8, segments=4)(torch.zeros(8, 8, 6, 6)).shape
        torch.Size([8, 8, 6, 6])
    """

    def __init__(self, dim: int, *, segments: int, **options: Any) -> None:
        super().__init__(dim, **options)
        self.segments = segments

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() != 4 or x.shape[0] % self.segments:
            raise ValueError(
                f"FramesBlock: expected frames (N T, C, H, W) with N T a multiple of "
                f"segments={self.segments}, got {describe(x)}; every clip has so many frames"
            )
        clips_of = x.unflatten(0, (-1, self.segments)).transpose(1, 2)
        return super().forward(clips_of).transpose(1, 2).flatten(0, 1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, segments={self.segments}"


def insert_nonlocal(
    model: nn.Module,
    at: str | Sequence[str],
    *,
    preset: str = "caffe2",
    channels: int | Sequence[int] | None = None,
    clip: torch.Tensor | Sequence | None = None,
    segments: int | None = None,
    name: str = "nl",
    backend: str | None = None,
    **options: Any,
) -> Report:
    """Put new non-local blocks behind modules of a model, which it leaves as it is at the start.

    The block behind "layer2.1" becomes its child "layer2.1.nl", in keys of the state dict as well:
    all keys that there were stay, and weights of the model without blocks load with strict=False.
    The output of "layer2.1" passes through it. New blocks start as the identity. They belong to the
    optimiser that is made afterwards, or are added to one:
    `optimizer.add_param_group({"params": [p for b in report.blocks.values() for p in
    b.parameters()]})`.

    Args:
        model: any module; not yet in DistributedDataParallel, which would not see new parameters.
            A compiled one is compiled again.
        at: names of the modules, as in `model.named_modules()`. Each returns one tensor: (B, C, T,
            H, W), (B, C, H, W) or (B, C, L).
        preset: options of a published system, as for `NonLocalBlock3d.from_preset`.
        channels: C of all these outputs, or of each; the report has no sizes then. None finds
            them out: a copy of the model, without its hooks, runs without data on the device
            "meta", or where it cannot, in evaluation mode on random numbers.
        clip: for that run, the model's input or its shape, or a list of these; None takes
            (2, C, 16, 224, 224) or (2, C, 224, 224), with C of the model's first convolution.
        segments: T where the model works on frames (N T, C, H, W), as TSM does: a block for clips
            then. None gives such a model a block for images.
        name: of the new child.
        backend: as for `nonlocal_attention`.
        **options: of the block, such as kind="dot_product", which replace the preset's. A preset
            whose blocks are no identity at the start gets zero_init "gamma" ("weight" without
            norm).

    Returns:
        A `Report`: print it for where, kind, N x M and MiB saved; its `blocks` are the new ones, by
        the names of their keys. `restore()`, or the end of a with statement, takes them out again.

    Raises:
        ValueError: an unknown name; one that returns no such tensor, that has a child of this name
            already, that was replaced or extended before, or that cannot be extended: a
            ScriptModule, an instance with a forward of its own, a forward that goes through all
            children; two names of one module; a model in DistributedDataParallel, a lazy one, or
            one that cannot be copied for the run; a clip that the model does not take; what the
            block's constructor raises.
        TypeError: no module; an unknown option.

    Memory:
        Parameters of the blocks. The run needs none on "meta"; elsewhere the copy has the model's
        own parameters.

    Example:
        >>> import torch, nlkernels
        >>> model = torch.nn.Sequential()
        >>> model.add_module("stem", torch.nn.Conv3d(3, 8, 3))
        >>> model.add_module("head", torch.nn.Conv3d(8, 4, 1))
        >>> report = nlkernels.insert_nonlocal(model, at=["stem"], kind="dot_product")
        >>> list(report.blocks), [key for key in model.state_dict() if "theta" in key]
        (['stem.nl'], ['stem.nl.theta.weight', 'stem.nl.theta.bias'])
        >>> report.restore()
        >>> list(model.state_dict())
        ['stem.weight', 'stem.bias', 'head.weight', 'head.bias']

    Source:
        "Non-local Neural Networks" (CVPR 2018), table 2: blocks behind residual blocks of res3 and
        res4.
    """
    names, modules = _places(model, at, name)
    options = {"backend": backend, **options}
    shapes: dict[str, Any] = dict.fromkeys(modules)
    if channels is None:
        shapes = probe.shapes(_WHERE, clips.inner(model), modules, clip, name)
        made = {place: (shape[1], len(shape) - 2) for place, shape in shapes.items()}
    else:
        made = _given(model, modules, channels)
    blocks = {
        place: _block(place, *made[place], segments, preset, options) for place in modules
    }  # fmt: skip
    rows = []
    for place, block in blocks.items():
        _move(block, modules[place], model)
        shape = _clips_of(shapes[place], segments)
        where = f"{names[place]}.{name}" if names[place] else name
        rows.append(row_of(where, preset, block, shape, block.training))
    report = Report(
        rows, {row.where: block for row, block in zip(rows, blocks.values(), strict=True)}
    )
    report.on_restore(partial(_take_out, modules, blocks, name))
    try:
        for place, module in modules.items():
            _extend(module, name, blocks[place])
    except BaseException:
        report.restore()
        raise
    return report


def _places(
    model: nn.Module, at: str | Sequence[str], name: str
) -> tuple[dict[str, str], dict[str, nn.Module]]:
    """The names in the model of the modules to extend, and these; by what the caller calls them."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{_WHERE}: expected a module, got {type(model).__name__}; pass the model that is to "
            "have blocks"
        )
    if any(isinstance(m, nn.parallel.DistributedDataParallel) for m in model.modules()):
        raise ValueError(
            f"{_WHERE}: expected a model before it is distributed, got DistributedDataParallel, "
            "which would not average the gradients of new blocks; insert them, then wrap the model"
        )
    listed = [at] if isinstance(at, str) else list(at)
    if not listed or len(set(listed)) != len(listed):
        raise ValueError(
            f"{_WHERE}: expected names of modules, each once, got {at!r}; such as 'layer2.1'"
        )
    inner = clips.inner(model)
    names = {id(module): where for where, module in model.named_modules()}
    modules: dict[str, nn.Module] = {}
    for place in listed:
        # Names inside of a compiled model serve without its prefix.
        found = (_submodule(inner, place), _submodule(model, place))
        module = next((each for each in found if id(each) in names), None)
        if module is None:
            near = difflib.get_close_matches(str(place), names.values(), n=3, cutoff=0.3)
            raise ValueError(
                f"{_WHERE}: expected names of modules, got {place!r}; "
                + (f"near ones are {', '.join(near)}" if near else "print(model) shows them")
            )
        other = next((name for name, m in modules.items() if m is module), None)
        if other is not None:
            raise ValueError(
                f"{_WHERE}: expected names of different modules, got {other!r} and {place!r} of "
                "one module; leave one of them out"
            )
        if all(module is not each for each in inner.modules()):
            raise ValueError(
                f"{_WHERE}: expected {place} to be a module of the model itself, got a "
                f"{type(module).__name__}, its wrapper; name the module inside"
            )
        _check_place(place, module, name)
        modules[place] = module
    return {place: names[id(module)] for place, module in modules.items()}, modules


def _submodule(model: nn.Module, place: str) -> nn.Module | None:
    """As of `model.named_modules()`, under every name of a module that has several."""
    try:
        return model.get_submodule(place)
    except AttributeError:
        return None


def _check_place(place: str, module: nn.Module, name: str) -> None:
    """That a module can have a block of this name.

    Raises:
        ValueError: it cannot.
    """
    place = place or "the model"
    if is_exchanged(module):
        raise ValueError(
            f"{_WHERE}: expected {place} as its package made it, got one that was replaced or "
            "extended; call restore() of that report first"
        )
    if isinstance(module, torch.jit.ScriptModule):
        raise ValueError(
            f"{_WHERE}: expected {place} to be a module in Python, got a ScriptModule, whose "
            "forward is compiled; insert blocks before torch.jit.script"
        )
    if "forward" in vars(module):
        raise ValueError(
            f"{_WHERE}: expected {place} to have the forward of its class, got an instance with a "
            "forward of its own, which would not call the block; delete that attribute, or name "
            "another module"
        )
    if parametrize.is_parametrized(module):
        # Taking a parametrization off changes the class that the parametrization made.
        raise ValueError(
            f"{_WHERE}: expected {place} without parametrizations, got "
            f"{', '.join(module.parametrizations)} with some; insert blocks first, or name the "
            "module that holds it"
        )
    if isinstance(module, _UNCALLED) or _hides_its_children(module):
        raise ValueError(
            f"{_WHERE}: expected {place} to be a layer or a plain sequence, got a "
            f"{type(module).__name__}, which may call its children or not; name its last child"
        )
    if hasattr(module, name) or "." in name or not name:
        raise ValueError(
            f"{_WHERE}: expected a name that {place} does not have, got {name!r}; pass another"
        )
    if _calls_children(module):
        return
    try:
        exchanged_class(Extended, type(module))
    except Exception as error:
        raise ValueError(
            f"{_WHERE}: expected {place} to be of a class that can be derived from, got a "
            f"{type(module).__name__} ({error}); name another module"
        ) from error


def _given(
    model: nn.Module, modules: dict[str, nn.Module], channels: int | Sequence[int]
) -> dict[str, tuple[int, int]]:
    """Channels as the caller named them, and dimensions as of the first convolution."""
    for place, module in modules.items():
        if not _calls_children(module) and _names_children(type(module)):
            raise ValueError(
                f"{_WHERE}: expected {place} to call its children by their names, got a "
                f"{type(module).__name__}, whose forward may go through its children and call the "
                "block as well; name its last child, or leave channels out: a run tells"
            )
    counts = [channels] * len(modules) if isinstance(channels, int) else list(channels)
    if len(counts) != len(modules):
        raise ValueError(
            f"{_WHERE}: expected channels for each of {len(modules)} modules, got {channels!r}; "
            "pass one number for all, or leave it out"
        )
    made = {}
    for (place, module), count in zip(modules.items(), counts, strict=True):
        layers = (*module.modules(), *model.modules())
        found = next((each for each in layers if isinstance(each, _CONVOLUTIONS)), None)
        if found is None:
            raise ValueError(
                f"{_WHERE}: expected a model with a convolution, which says how many dimensions "
                "there are, got one without; leave channels out and pass a clip"
            )
        made[place] = (count, found.weight.dim() - 2)
    return made


def _clips_of(shape: tuple[int, ...] | None, segments: int | None) -> tuple[int, ...] | None:
    """The shape of the clips that frames belong to."""
    if shape is None or segments is None:
        return shape
    return (max(shape[0] // segments, 1), shape[1], segments, *shape[2:])


def _block(
    place: str,
    channels: int,
    dims: int,
    segments: int | None,
    preset: str,
    options: dict[str, Any],
) -> NonLocalBlock:
    """A new block, which is the identity.

    Raises:
        ValueError: it is not; segments without frames.
    """
    if segments is not None and (dims != 2 or not isinstance(segments, int) or segments < 1):
        raise ValueError(
            f"{_WHERE}: expected frames (N T, C, H, W) from {place} and segments of 1 or more, got "
            f"{dims} dimensions and segments={segments!r}; leave segments out for clips"
        )
    make = _BLOCKS[dims] if segments is None else partial(FramesBlock, segments=segments)
    settings = preset_options(preset, dims if segments is None else 3, options)
    if settings.get("zero_init") is None and "zero_init" not in options:
        settings["zero_init"] = "weight" if settings.get("norm", "batch") is None else "gamma"
    block = make(channels, **settings)
    if is_identity(block.out, block.norm) is False:
        raise ValueError(
            f"{_WHERE}: expected blocks that are the identity at the start, got "
            f"zero_init={settings['zero_init']!r}; leave it out, or use NonLocalBlock3d itself"
        )
    return block


def _move(block: nn.Module, module: nn.Module, model: nn.Module) -> None:
    """To the device, the dtype and the mode of a block's surroundings."""
    tensors = (*module.parameters(), *model.parameters())
    like = next((each for each in tensors if each.is_floating_point()), None)
    if like is not None:
        block.to(like.device, like.dtype)
    block.train(module.training)


def _extend(module: nn.Module, name: str, block: nn.Module) -> None:
    """Let a module's output pass through a block, its child of that name.

    A sequence calls its children itself, the last one last.
    """
    if _calls_children(module):
        module.add_module(name, block)
        return
    exchange(module, Extended)
    module.__dict__[PLACE] = name
    module.add_module(name, block)


def _calls_children(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential)


def _names_children(cls: type[nn.Module]) -> bool:
    """Whether the forward of a class mentions all children at once."""
    code = getattr(inspect.unwrap(cls.forward), "__code__", None)
    return code is not None and not _ALL_CHILDREN.isdisjoint(code.co_names)


def _hides_its_children(module: nn.Module) -> bool:
    """Whether a sequence has a forward of its own."""
    return _calls_children(module) and type(module).forward is not nn.Sequential.forward


def _take_out(modules: dict[str, nn.Module], blocks: dict[str, nn.Module], name: str) -> None:
    give_back({place: m for place, m in modules.items() if isinstance(m, Extended)})
    for place, module in modules.items():
        child = module._modules.get(name)
        # It may be wrapped by now, or be gone for another.
        if child is not None and any(part is blocks[place] for part in child.modules()):
            del module._modules[name]
