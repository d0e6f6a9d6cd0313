"""Blocks of other packages, computed by this one, in a model that stays what it is."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from nlkernels._spec import BACKENDS, autocasts, check_choice
from nlkernels.patching import clips
from nlkernels.patching.classes import Replaced, exchange, give_back, is_exchanged_by
from nlkernels.patching.report import Report, Row, row_of
from nlkernels.patching.systems import Found, find
from nlkernels.patching.twins import difference

_WHERE = "replace_nonlocal"


def replace_nonlocal(
    model: nn.Module,
    *,
    only: str | Iterable[str] | None = None,
    backend: str | None = None,
    check: bool | torch.Tensor | Sequence[Any] = False,
) -> Report:
    """Let this package compute the non-local blocks of pytorchvideo, PySlowFast, mmcv and others.

    The model keeps every module, parameter and buffer as the same object, all names and keys,
    hooks, modes, devices and dtypes: optimisers, averages, DistributedDataParallel and
    torch.compile go on. Only the class of each block is exchanged for one that derives from it and
    whose forward is that of our own blocks on the block's own layers. Where a layer has hooks or
    was exchanged, the block's layers run one by one around our attention. What asks for more than
    the output, as `return_nl_map=True` of Non-local_pytorch, is answered by the block's own
    forward; so are inputs on a CPU that are so small that it is the faster one, unless a
    backend is named. Maps that a region-based block keeps in attributes are not made, and None.

    Blocks are found by the path of their class: pytorchvideo's `NonLocal`, PySlowFast's `Nonlocal`
    (its groups are outside of it), mmcv's `NonLocal1d` to `3d`, which mmaction2 uses,
    `NONLocalBlock1D` to `3D` of Non-local_pytorch and temporal-shift-module, timm's `NonLocalAttn`
    and region-based blocks; the last and copied files by the end of the path. That a block
    computes what is known of its system is tried in any case: in float64, with random weights, on a
    small random clip, forward and backward, beside the model.

    Args:
        model: any module that contains such blocks, or is one; on any device.
        only: patterns of block names (as of fnmatch), such as "layer3.*"; None is all.
        backend: as for `nonlocal_attention`; None defers to NLKERNELS_BACKEND, then to "auto".
            `set_nonlocal_backend` switches replaced blocks, too.
        check: a clip, its shape, a list of them for a model that takes a list, or True for a small
            random one: the model runs before and after, each time on a copy. Each block then has to
            be right for what it gets, by the rule of all our operations (2x the error of plain
            PyTorch in that dtype, gradients 3x, in training mode), and the model's outputs may
            differ by rounding only: 4 times what other last bits of the blocks' inputs change,
            plus 4 eps of the coarsest dtype in use. Parameters, gradients, buffers and random
            states stay. If it fails, the model is given back as it was.

    Returns:
        A `Report`: print it for where, kind, order of pooling, N x M, backend and MiB saved (sizes
        only with `check`); `restore()`, or the end of a with statement, gives the model back.

    Raises:
        ValueError: no such block; one that is a subclass, has a forward of its own, is replaced
            already or computes something else, all of them listed: nothing is changed then; an
            unknown backend; a clip that is none, or that the model does not take.
        TypeError: no module.
        RuntimeError: the check failed, or could not: a block is not called for the clip, or no
            output is a floating-point tensor.

    Memory:
        Copies of one block at a time while it is tried, in float64 on the CPU.

    Determinism:
        As of `NonLocalBlock3d`.

    Example:
        >>> import sys, types, torch, nlkernels
        >>> class NonLocalAttn(torch.nn.Module):  # stands for timm's
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.t, self.p, self.g, self.z = (torch.nn.Conv2d(8, 8, 1) for _ in range(4))
        ...         self.norm, self.scale = torch.nn.BatchNorm2d(8), 8**-0.5
        ...
        ...     def forward(self, x):
        ...         t, p, g = (layer(x).flatten(2) for layer in (self.t, self.p, self.g))
        ...         weights = (t.mT @ p * self.scale).softmax(2)
        ...         return x + self.norm(self.z((g @ weights.mT).view_as(x)))
        >>> NonLocalAttn.__module__ = "timm.layers.non_local_attn"
        >>> NonLocalAttn.forward.__module__ = "timm.layers.non_local_attn"
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), NonLocalAttn())
        >>> with nlkernels.replace_nonlocal(model, backend="chunked", check=(2, 3, 8, 8)) as report:
        ...     print(report[0].where, report[0].system, report[0].queries, report[0].keys)
        1 timm 36 36

    Source:
        The blocks' semantics: `nlkernels.modules.presets`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{_WHERE}: expected a module, got {type(model).__name__}; pass the model whose blocks "
            "are to be replaced"
        )
    if backend is not None:
        check_choice(_WHERE, "backend", backend, BACKENDS)
    found = _selected(model, only)
    inner = clips.inner(model)
    blocks = {each.name: each.module for each in found}
    seen: dict[str, clips.Seen] = {}
    if check is not False and check is not None:
        clip = clips.clip_for(_WHERE, inner, check, _sizes_of(inner, found))
        before, seen = clips.first_run(_WHERE, inner, blocks, clip)
        eps = clips.eps_of(inner, seen, before)
        sensitivity = clips.apart(before, clips.nudged_outputs(inner, blocks, clip, eps))
    report = _replaced(found, {name: each.x for name, each in seen.items()}, backend)
    if seen:
        try:
            _check_blocks(blocks, seen)
            report.difference = clips.apart(before, clips.outputs(inner, clip))
            _check_outputs(seen, report.difference, sensitivity, eps)
        except BaseException:
            report.restore()
            raise
    return report


def restore_nonlocal(model: nn.Module) -> int:
    """Give all replaced blocks of a model back, of a copy or a loaded pickle for example.

    Args:
        model: any module.

    Returns:
        How many there were.

    Raises:
        TypeError: no module.
        RuntimeError: a block's class was changed since, as by parametrizations; nothing is changed.

    Example:
        >>> import torch, nlkernels
        >>> nlkernels.restore_nonlocal(torch.nn.Conv3d(3, 8, 1))
        0
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"restore_nonlocal: expected a module, got {type(model).__name__}; pass the model "
            "whose blocks were replaced"
        )
    named = model.named_modules()
    replaced = {name: module for name, module in named if isinstance(module, Replaced)}
    give_back(replaced)
    return len(replaced)


def _selected(model: nn.Module, only: str | Iterable[str] | None) -> list[Found]:
    """The blocks to replace, none of which is refused.

    Raises:
        ValueError: there is none, or at least one is refused.
    """
    found = list(find(model))
    if not found:
        raise ValueError(
            f"{_WHERE}: expected a model with non-local blocks of pytorchvideo, PySlowFast, mmcv, "
            "Non-local_pytorch, temporal-shift-module, timm or region-based-non-local-network, got "
            f"{type(model).__name__} without any; build it with blocks (in configurations "
            "their locations may be empty), or add some with nlkernels.insert_nonlocal"
        )
    if only is not None:
        patterns = [only] if isinstance(only, str) else list(only)
        names = [each.name for each in found]
        idle = [p for p in patterns if not any(fnmatchcase(name, p) for name in names)]
        if idle or not patterns:
            raise ValueError(
                f"{_WHERE}: expected only to match some of {', '.join(names)}, got "
                f"{', '.join(map(repr, idle)) or 'no pattern'}; use the names above"
            )
        found = [each for each in found if any(fnmatchcase(each.name, p) for p in patterns)]
    tried: dict[Any, str] = {}
    refused = {}
    for each in found:
        why = each.refusal
        if not why:
            design = _design(each.module)
            if design not in tried:
                tried[design] = _tried(each)
            why = tried[design]
        if why:
            refused[each.name] = why
    if refused:
        good = [each.name for each in found if each.name not in refused]
        lines = "".join(f"\n  {name or '(the model)'}: {why}" for name, why in refused.items())
        raise ValueError(
            f"{_WHERE}: expected blocks that compute what their systems publish, got "
            f"{len(refused)} of {len(found)} that cannot be replaced:{lines}\n"
            + (f"replace the others with only={good!r}" if good else "nothing is left to replace")
        )
    return found


def _design(module: nn.Module) -> tuple[Any, ...]:
    """What decides about a block's function besides its weights."""
    scalars = {n: v for n, v in vars(module).items() if isinstance(v, bool | int | float | str)}
    parameters = tuple((n, p.requires_grad, p.shape) for n, p in module.named_parameters())
    return type(module), repr(module), tuple(sorted(scalars.items())), parameters


def _tried(each: Found) -> str:
    try:
        if unknown := each.system.view(each.module).unknown():
            return f"it has {unknown}"
        why = difference(each.module, each.system.view)
    except Exception as error:
        return f"it cannot be tried: {type(error).__name__}: {clips.first_line(error)}"
    return f"it is no block of {each.system.name} as published: {why}" if why else ""


def _sizes_of(model: nn.Module, found: list[Found]) -> tuple[int, ...] | None:
    """(C, *positions) of a small clip for a model that is a block itself."""
    if found[0].module is not model:
        return None
    view = found[0].system.view(model)
    return (view.dim, *(8,) * view.dims)


def _replaced(found: list[Found], seen: dict[str, torch.Tensor], backend: str | None) -> Report:
    rows, tokens = [], {}
    for each in found:
        tokens[each.name] = exchange(each.module, Replaced)
        if backend is not None:
            each.module.backend = backend
        rows.append(_row(each, seen.get(each.name)))
    blocks = {each.name: each.module for each in found}
    report = Report(rows, dict(blocks))
    report.on_restore(
        lambda: give_back({n: m for n, m in blocks.items() if is_exchanged_by(m, tokens[n])})
    )
    return report


def _row(each: Found, x: torch.Tensor | None) -> Row:
    view, training = each.system.view(each.module), each.module.training
    if x is None:
        return row_of(each.name, each.system.name, view, None, training)
    computed = torch.get_autocast_dtype(x.device.type) if autocasts(x.device.type) else x.dtype
    where = (each.name, each.system.name)
    return row_of(*where, view, tuple(x.shape), training, computed, x.device)


def _check_blocks(blocks: dict[str, nn.Module], seen: dict[str, clips.Seen]) -> None:
    found = {name: clips.excess_of(blocks[name], each) for name, each in seen.items()}
    wrong = {name: why for name, why in found.items() if why}
    if wrong:
        lines = "".join(f"\n  {name or '(the model)'}: {why}" for name, why in wrong.items())
        raise RuntimeError(
            f"{_WHERE}: expected each block to answer as before, got{lines}\nthe model is as it "
            "was; try another backend, and nlk verify"
        )


def _check_outputs(
    seen: dict[str, clips.Seen], difference: float, sensitivity: float, eps: float
) -> None:
    if not clips.same_outputs(sensitivity, difference, eps):
        alike = {name or "(the model)": clips.equality_of(each) for name, each in seen.items()}
        lines = "".join(f"\n  {name}: {said[2:]}" for name, said in alike.items() if said)
        raise RuntimeError(
            f"{_WHERE}: expected the model's outputs as before, got a difference of "
            f"{difference:.1e} where last bits of what blocks get change {sensitivity:.1e}"
            f"{lines}\nthe model is as it was"
        )
