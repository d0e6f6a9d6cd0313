"""Weights of non-local blocks in and out of other systems' checkpoints.

`NonLocalBlock3d.from_foreign` and `to_foreign` call `import_block` and `export_block`. Systems and
their presets: video-nonlocal-net (caffe2, caffe2_dot, caffe2_affine), pytorch-resnet3d (tushar),
inception-I3D-NON-LOCAL (inception_nl), PySlowFast (slowfast), pytorchvideo, Non-local_pytorch
(alexhex7), temporal-shift-module (tsm), mmcv and mmaction2 (mmaction_i3d, mmaction_slowonly),
nonlocal_mindspore (mindspore) and region-based-non-local-network (rnl).

Importing and exporting with the same preset and options gives back the same keys and values. With
another preset, the exported block computes the same in evaluation mode; where no block of that
system does, an error says why.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from nlkernels._conversion import Shape, convert, shape_of, target_shape
from nlkernels._deduction import deduce, projection_keys
from nlkernels._reading import check_prefix, read
from nlkernels._spec import check_choice
from nlkernels._systems import (
    COUNT_KEY,
    MASK_KEY,
    MODULE,
    SYSTEMS,
    Form,
    System,
    dense_from_depthwise,
    dense_mask,
    depthwise_from_dense,
    group_width,
    norm_abbreviation,
)
from nlkernels.modules.block import NonLocalBlock
from nlkernels.modules.presets import preset_options

_COUNT = f"norm.{COUNT_KEY}"
# Options that the block's own sizes decide, and those that show nowhere in an export.
_SHAPES = ("inner", "region_kernel")
_IDLE = ("zero_init", "init", "out_init", "input_size", "backend")
# How many keys of a kind an error lists.
_LISTED = 12


def import_block(
    cls: type[NonLocalBlock],
    state_dict: Mapping[str, Any],
    preset: str,
    *,
    prefix: str = "",
    **options: Any,
) -> NonLocalBlock:
    """Build the block that a state dict of another system belongs to, with its weights.

    The keys and shapes decide `dim`, `inner`, whether there is a norm, biases, a pooling (where the
    system's keys show one), the region's kernel and, for concat and gaussian, the kind. All else
    comes from the preset and `options`.

    Args:
        cls: NonLocalBlock1d, NonLocalBlock2d or NonLocalBlock3d.
        state_dict: arrays or tensors of any floating-point dtype, which the block keeps; RNL's mask
            may be of integers. Keys that do not start with `prefix` are ignored.
        preset: the system, by the name of its preset.
        prefix: what stands before the block's keys, such as "module.layer2.1.nl." or
            "nonlocal_conv3_1_".
        **options: options of the block that the keys do not show and that differ from the preset's.
            With "slowfast" also `groups` and `frames`: NONLOCAL.GROUP and the clip's frames, which
            become temporal_group = frames / groups.

    Returns:
        A new block in training mode, on the device of the tensors; it shares no memory with them.

    Raises:
        ValueError: unknown preset; keys that are missing, unexpected or of a wrong shape, all of
            them listed; options that contradict the keys; a batch norm that lost its statistics,
            which keys alone do not tell from an affine one: pass norm="affine" for that.
        TypeError: a value that is no floating-point array; a key or a prefix that is no str; an
            unknown option.

    Memory:
        A copy of the weights.

    Example:
        >>> import nlkernels
        >>> theirs = nlkernels.NonLocalBlock3d.from_preset("tsm", 8).to_foreign("tsm")
        >>> sorted(theirs)[:4]
        ['W.0.bias', 'W.0.weight', 'W.1.bias', 'W.1.num_batches_tracked']
        >>> nlkernels.NonLocalBlock3d.from_foreign(theirs, "tsm").pool_order
        'after'
    """
    where = f"{cls.__name__}.from_foreign({preset!r})"
    system = _system(where, preset)
    options = _with_groups(where, preset, options)
    given = read(where, state_dict, prefix, system.ignored)
    _check_projection(where, system, cls.dims, given, state_dict, prefix)
    # The values that a new block draws are replaced: no random number of the caller's is spent.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        dim, settings, form = deduce(where, cls.dims, preset, system, given, options)
        block = cls(dim, **settings)
    block.load_state_dict(_entries(where, block, system, form, given, prefix), assign=True)
    return block


def export_block(
    block: NonLocalBlock, preset: str, *, prefix: str = "", **options: Any
) -> dict[str, torch.Tensor]:
    """A block's weights under the keys and in the shapes of another system.

    In evaluation mode that system's block computes what `block` computes. To that end a scale is
    folded into theta, a bias of `out` into or out of the running mean, another epsilon into gamma,
    a norm into `out` where the target has none; a target that must have a batch norm gets one that
    changes nothing. Training is another matter: batch statistics replace the running ones.

    Args:
        block: any non-local block.
        preset: the system, by the name of its preset.
        prefix: put before every key.
        **options: options of the target's block that differ from the preset's, as in
            `import_block`; with those of the import, the result is what was imported. Options that
            say nothing about its function, as how it starts, are refused.

    Returns:
        Copies, on the block's device and of its dtypes. PyTorch systems get num_batches_tracked,
        RNL its mask.

    Raises:
        ValueError: the system has no block that computes the same: another kind, pooling, order of
            pooling or temporal group, or nothing that could hold a scale or a bias; an option that
            has no effect, or a value that no block has.
        TypeError: an unknown option; a norm that is a module; a prefix that is no str.

    Memory:
        A copy of the weights; for "rnl" min(inner, 32 to 63) times that of the region's.

    Example:
        >>> import nlkernels
        >>> block = nlkernels.NonLocalBlock3d(8)
        >>> sorted(block.to_foreign("caffe2", prefix="nonlocal_conv3_1_"))[:2]
        ['nonlocal_conv3_1_bn_b', 'nonlocal_conv3_1_bn_riv']
    """
    where = f"to_foreign({preset!r})"
    system = _system(where, preset)
    options = _with_groups(where, preset, options)
    check_prefix(where, prefix)
    source = shape_of(block)
    _check_export(where, block, options)
    settings = preset_options(preset, block.dims, {"kind": source.kind, **options})
    with torch.device("meta"):  # its constructor checks the options
        type(block)(block.dim, **{**settings, "zero_init": None})
    target = target_shape(where, source, system, settings, options, block.dim, block.inner)
    entries = {name: tensor.detach() for name, tensor in block.state_dict().items()}
    entries = convert(where, entries, source, target)
    form = _target_form(block, target)
    exported = {}
    for entry, tensor in entries.items():
        key = system.key(entry, form)
        if key is None:
            continue
        exported[prefix + key] = _foreign(where, entry, tensor)
        if entry == "region.weight":
            exported[prefix + MASK_KEY] = _mask(tensor)
    return exported


def _system(where: str, preset: str) -> System:
    check_choice(where, "preset", preset, tuple(SYSTEMS))
    return SYSTEMS[preset]


def _with_groups(where: str, preset: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with PySlowFast's number of groups replaced by the frames of one."""
    options = dict(options)
    if preset != "slowfast" or not {"groups", "frames"} & options.keys():
        return options
    groups, frames = options.pop("groups", None), options.pop("frames", None)
    counts = all(isinstance(n, int) and n >= 1 for n in (groups, frames))
    if not counts or frames % groups or "temporal_group" in options:
        raise ValueError(
            f"{where}: expected groups and frames, a multiple of it, and no temporal_group, got "
            f"groups={groups!r} and frames={frames!r}; or pass temporal_group, the frames of one"
        )
    return options if groups == 1 else {**options, "temporal_group": frames // groups}


def _check_export(where: str, block: NonLocalBlock, options: Mapping[str, Any]) -> None:
    """Refuse options of the target's block that would not change what is exported."""
    for name in _SHAPES:
        asked, own = options.get(name), getattr(block, name)
        if asked is not None and (tuple(asked) if isinstance(asked, list) else asked) != own:
            raise ValueError(
                f"{where}: expected {name}={own!r}, which the block has, got {asked!r}; leave it "
                "out, weights are exported in their sizes"
            )
    idle = [name for name in _IDLE if name in options]
    if idle:
        raise ValueError(
            f"{where}: expected options that change what a block computes, got {', '.join(idle)}; "
            "leave them out, the exported weights are those of this block"
        )


def _target_form(block: NonLocalBlock, target: Shape) -> Form:
    name = norm_abbreviation(block.norm) if target.norm == MODULE else "bn"
    return Form(target.dims, target.pool is not None, target.norm, name)


def _entries(
    where: str,
    block: NonLocalBlock,
    system: System,
    form: Form,
    given: Mapping[str, torch.Tensor],
    prefix: str,
) -> dict[str, torch.Tensor]:
    """The given values as entries of the block, which are all there and all fit."""
    entries, faults = {}, {"missing": [], "wrong shape": []}
    unused = set(given)
    for entry, ours in block.state_dict().items():
        key = system.key(entry, form)
        shapes = {} if key is None else {key: _foreign_shape(where, entry, ours)}
        if entry == "region.weight":
            shapes[MASK_KEY] = shapes[key]
        unused -= shapes.keys()
        for name, shape in shapes.items():
            if name not in given:
                if entry != _COUNT:
                    faults["missing"].append(prefix + name)
            elif given[name].shape != shape:
                got = tuple(given[name].shape)
                faults["wrong shape"].append(f"{prefix}{name} {got}, not {tuple(shape)}")
        if key in given:
            entries[entry] = given[key]
        elif entry == _COUNT:
            entries[entry] = torch.zeros_like(ours, device=_device(given))
    faults["unexpected"] = sorted(prefix + key for key in unused)
    if any(faults.values()):
        raise ValueError(_described(where, faults, prefix))
    if "region.weight" in entries:
        _check_mask(where, given[MASK_KEY])
    return {entry: _native(entry, tensor) for entry, tensor in entries.items()}


def _device(given: Mapping[str, torch.Tensor]) -> torch.device:
    return next(iter(given.values())).device


def _described(where: str, faults: Mapping[str, list[str]], prefix: str) -> str:
    lines = [
        f"\n  {fault}: {', '.join(keys[:_LISTED])}"
        + (f" and {len(keys) - _LISTED} more" if len(keys) > _LISTED else "")
        for fault, keys in faults.items()
        if keys
    ]
    return (
        f"{where}: expected exactly the keys of its block behind prefix {prefix!r}, got others:"
        f"{''.join(lines)}\nchoose the preset and the options of the model that saved them, and "
        "a prefix that ends where the block's own keys begin"
    )


def _check_projection(
    where: str,
    system: System,
    dims: int,
    given: Mapping[str, torch.Tensor],
    keys: Iterable[str],
    prefix: str,
) -> None:
    """Refuse a state dict without the one weight that says most, naming prefixes that would do."""
    anchors = projection_keys(system, dims)
    if any(anchor in given for anchor in anchors):
        return
    keys = [key for key in keys if isinstance(key, str)]
    near = sorted({key.removesuffix(end) for key in keys for end in anchors if key.endswith(end)})
    close = difflib.get_close_matches(prefix + anchors[-1], keys, n=3, cutoff=0.0)
    if near:
        remedy = "there are blocks behind prefix " + ", ".join(map(repr, near[:_LISTED]))
    else:
        remedy = f"the nearest of its {len(keys)} keys are {', '.join(close) or 'none at all'}"
    raise ValueError(
        f"{where}: expected the key {' or '.join(prefix + anchor for anchor in anchors)}, "
        f"got none; {remedy}"
    )


def _foreign_shape(where: str, entry: str, ours: torch.Tensor) -> torch.Size:
    """The shape in which other systems store an entry."""
    if entry == "concat_weight":
        return torch.Size((1, ours.numel(), 1, 1))
    if entry == "region.weight":
        _check_grouped(where, ours)
        return torch.Size((ours.shape[0], group_width(ours.shape[0]), *ours.shape[1:]))
    return ours.shape


def _foreign(where: str, entry: str, tensor: torch.Tensor) -> torch.Tensor:
    """An entry's values as other systems store them, in memory of their own."""
    if entry == "region.weight":
        _check_grouped(where, tensor)
        return dense_from_depthwise(tensor)
    return tensor.clone().view(_foreign_shape(where, entry, tensor))


def _native(entry: str, tensor: torch.Tensor) -> torch.Tensor:
    """The entry that others store as `tensor`."""
    if entry == "concat_weight":
        return tensor.view(2, -1)
    return depthwise_from_dense(tensor) if entry == "region.weight" else tensor


def _check_grouped(where: str, weight: torch.Tensor) -> None:
    if group_width(weight.shape[0]) is None:
        raise ValueError(
            f"{where}: expected inner to be a multiple of inner // 32, the number of its groups, "
            f"got {weight.shape[0]}; choose inner below 64 or a multiple of 32"
        )


def _mask(weight: torch.Tensor) -> torch.Tensor:
    """The constant beside a region's weight."""
    return dense_mask(weight.shape[0], tuple(weight.shape[1:])).to(weight)


def _check_mask(where: str, mask: torch.Tensor) -> None:
    if mask.is_meta:
        return
    expected = dense_mask(mask.shape[0], tuple(mask.shape[2:]))
    if not torch.equal(mask.cpu().to(expected.dtype), expected):
        raise ValueError(
            f"{where}: expected {MASK_KEY} to be 1 where an output channel meets itself and 0 "
            "elsewhere, got other values; such a block is no depthwise aggregation"
        )
