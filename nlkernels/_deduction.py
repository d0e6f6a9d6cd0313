"""What the keys and shapes of another system's block say about its design."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from nlkernels._conversion import wanted_norm
from nlkernels._systems import AFFINE, BATCH, MODULE, Form, System
from nlkernels.modules.options import POOLS
from nlkernels.modules.presets import preset_options

Given = Mapping[str, torch.Tensor]


def deduce(
    where: str, dims: int, preset: str, system: System, given: Given, options: Mapping[str, Any]
) -> tuple[int, dict[str, Any], Form]:
    """Read a block's design from its keys.

    Args:
        where: the caller, for error messages.
        dims: 1, 2 or 3, those of the block that is to be built.
        preset: the system's preset, for what neither keys nor options say.
        system: the layout.
        given: values by key without prefix; those of `projection_keys` are among them.
        options: what the caller says; it wins where keys leave a choice.

    Returns:
        dim, the block's options, and the form of its keys.

    Raises:
        ValueError: options and keys contradict each other, or are of no block of that system.
    """
    kind = _kind(where, preset, system, given, options)
    projection = next(given[key] for key in projection_keys(system, dims) if key in given)
    if projection.dim() != dims + 2:
        remedy = "pass the state dict as the other system saved it"
        if 3 <= projection.dim() <= 5:
            remedy = f"use the block of as many dimensions, NonLocalBlock{projection.dim() - 2}d"
        raise ValueError(
            f"{where}: expected 1x1 convolutions of {dims} dimensions, got a weight of shape "
            f"{tuple(projection.shape)}; {remedy}"
        )
    inner, dim = projection.shape[:2]
    form = _form(where, dims, dim, preset, system, given, options)
    found = {"kind": kind, "inner": inner, "zero_init": None}
    if form.norm != MODULE:
        found["norm"] = form.norm
    found["qkv_bias"], found["out_bias"] = _biases(system, form, given)
    if system.regional:
        weight = given.get(system.key("region.weight", form))
        found["region_kernel"] = (1,) * dims if weight is None else _kernel(where, dims, weight)
    if system.pool_in_keys:
        found["pool"] = POOLS[dims] if form.pooled else None
    _check_agreement(where, found, options)
    return dim, preset_options(preset, dims, {**found, **options}), form


def _kernel(where: str, dims: int, weight: torch.Tensor) -> tuple[int, ...]:
    """The neighbourhood of a region's dense weight (D, D / groups, *kernel)."""
    if weight.dim() != dims + 2:
        raise ValueError(
            f"{where}: expected a region's weight of {dims} dimensions, got one of shape "
            f"{tuple(weight.shape)}; pass the state dict as the other system saved it"
        )
    return tuple(weight.shape[2:])


def projection_keys(system: System, dims: int) -> tuple[str, ...]:
    """Keys, one of which every block of the system has: of the weight (inner, dim, 1, ...)."""
    entry = "theta.weight" if system.regional else "g.weight"
    forms = (Form(dims, pooled, None) for pooled in (True, False))
    return tuple(dict.fromkeys(system.key(entry, form) for form in forms))


def _kind(where: str, preset: str, system: System, given: Given, options: Mapping[str, Any]) -> str:
    """The kind that was asked for, else the one that keys show, else the preset's."""
    kind = preset_options(preset, 3, {})["kind"]
    if "kind" in options:
        kind = options["kind"]
    elif "concat" in system.modules and _under(system.modules["concat"], system, given):
        kind = "concat"
    elif "gaussian" in system.kinds and not _under(system.modules["theta"], system, given):
        kind = "gaussian"
    if kind not in system.kinds:
        raise ValueError(
            f"{where}: expected kind {' or '.join(system.kinds)}, got {kind!r}; "
            "that system has no other blocks"
        )
    return kind


def _under(module: str, system: System, given: Iterable[str]) -> list[str]:
    """Keys of a module's parameters."""
    return [key for key in given if key.startswith(module + system.separator)]


def _form(
    where: str,
    dims: int,
    dim: int,
    preset: str,
    system: System,
    given: Given,
    options: Mapping[str, Any],
) -> Form:
    """What the keys show of pooling and norm; else the options, else the preset."""
    settings = preset_options(preset, dims, options)
    pooled = settings["pool"] is not None
    if system.pool_in_keys:
        pooled = projection_keys(system, dims)[0] in given
    name = _norm_name(system, given)
    asked, _ = wanted_norm(settings.get("norm", BATCH), dim, 0.0)
    if "norm" in options:
        return Form(dims, pooled, asked, name)
    keys = _under(system.modules["norm"].format(name=name), system, given)
    mean = system.separator + system.norm_names.get("running_mean", "running_mean")
    if not keys:
        norm = None if None in system.norms else asked
    elif any(key.endswith(mean) for key in keys):
        norm = BATCH
    else:
        norm = AFFINE if AFFINE in system.norms else MODULE
    if norm == AFFINE and asked == BATCH:
        raise ValueError(
            f"{where}: expected a batch norm with its mean and variance, got "
            f"{', '.join(sorted(keys))}; pass norm='affine' or preset 'caffe2_affine' for a model "
            "with affine layers, else the statistics were lost when the weights were saved"
        )
    if norm not in system.norms or norm == MODULE:
        raise ValueError(
            f"{where}: expected {_spoken(system)}, got {', '.join(sorted(keys))}; pass norm, "
            "which may be a function of the channels as functools.partial(torch.nn.GroupNorm, 8)"
        )
    return Form(dims, pooled, norm, name)


def _norm_name(system: System, given: Iterable[str]) -> str:
    """What the norm is called where the system calls it by its type."""
    if "{name}" not in system.modules["norm"]:
        return "bn"
    parent = system.modules["norm"].removesuffix("{name}")
    layer = system.modules["out"].removeprefix(parent)
    names = {key.removeprefix(parent).split(".")[0] for key in given if key.startswith(parent)}
    return min(names - {layer}, default="bn")


def _spoken(system: System) -> str:
    names = {BATCH: "a batch norm", AFFINE: "an affine norm", None: "no norm"}
    return " or ".join(names[norm] for norm in system.norms if norm != MODULE)


def _biases(system: System, form: Form, given: Given) -> tuple[bool, bool]:
    """Whether theta, phi and g have biases, and whether out has one."""
    qkv, out = system.qkv_bias, system.out_bias
    if qkv is None:
        keys = (system.key(f"{name}.bias", form) for name in ("theta", "phi", "g"))
        qkv = any(key in given for key in keys)
    if out is None:
        out = system.key("out.bias", form) in given
    return qkv, form.norm is None if out == "unnormed" else out


def _check_agreement(where: str, found: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    for name in ("inner", "region_kernel"):
        asked = options.get(name)
        asked = tuple(asked) if isinstance(asked, list) else asked
        if name in found and asked is not None and asked != found[name]:
            raise ValueError(
                f"{where}: expected {name}={found[name]}, which the weights have, got "
                f"{options[name]!r}; leave it out"
            )
    if {"pool"} <= found.keys() & options.keys():
        shown, asked = found["pool"] is not None, options["pool"] is not None
        if shown != asked:
            raise ValueError(
                f"{where}: expected {'a pool' if shown else 'pool=None'}, which the keys show "
                f"{'by their .0' if shown else 'without .0'}, got {options['pool']!r}; "
                "leave it out or use the other checkpoint"
            )
