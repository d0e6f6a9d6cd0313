"""Our modules in the place of the golden cases' public ones, chosen by system and configuration."""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

import nlkernels
from nlkernels.modules import ChannelGate, SegmentBlock
from tests.golden_cases import KINDS, GoldenCase

BLOCKS = {
    1: nlkernels.NonLocalBlock1d,
    2: nlkernels.NonLocalBlock2d,
    3: nlkernels.NonLocalBlock3d,
}
_POOLS = {1: (2,), 2: (2, 2), 3: (1, 2, 2)}

Config = Mapping[str, Any]


class Subject(NamedTuple):
    """A module with a case's weights, and its state dict in the case's keys."""

    module: nn.Module
    export: Callable[[nn.Module], dict[str, torch.Tensor]]


def exported_gradients(
    module: nn.Module, export: Callable[[nn.Module], dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Gradients of all parameters in a system's keys, by an export that only moves numbers."""
    twin = copy.deepcopy(module)
    for mine, parameter in zip(module.parameters(), twin.parameters(), strict=True):
        parameter.data = torch.zeros_like(mine) if mine.grad is None else mine.grad
    return export(twin)


def subject(case: GoldenCase) -> Subject:
    """The module for a case, in float32 and in the case's mode."""
    system, config = case.record["system"].split()[0], case.record["config"]
    made = _made(system, config, case)
    return made._replace(module=made.module.train(case.record["mode"] == "train"))


def _made(system: str, config: Config, case: GoldenCase) -> Subject:
    if "W_k.weight" in case.state:
        gate = ChannelGate.from_foreign(case.state, "rnl", **_batch_norm(config, momentum=0.01))
        return Subject(gate, lambda module: module.to_foreign("rnl"))
    preset, options = _SYSTEMS[system](config, case)
    if "n_segment" in config:
        return _wrapper(preset, options, config, case)
    cls = BLOCKS[case.inputs["x"].ndim - 2]
    prefix = _caffe2_prefix(case) if preset.startswith("caffe2") else ""
    block = cls.from_foreign(case.state, preset, prefix=prefix, **options)
    return Subject(block, lambda module: module.to_foreign(preset, prefix=prefix, **options))


def _wrapper(preset: str, options: dict[str, Any], config: Config, case: GoldenCase) -> Subject:
    """Frames through a residual block, of which the cases have the last norm only; then clips."""
    own = {key.removeprefix("block."): torch.from_numpy(array) for key, array in case.state.items()}
    eps, momentum = _batch_norm(config).values()
    block = nn.Sequential()
    block.add_module("bn3", nn.BatchNorm2d(len(own["bn3.weight"]), eps, momentum))
    block.load_state_dict({key: own[key] for key in block.state_dict()})
    parts = {key.split(".")[0] for key in case.state}
    gate = nl = None
    if "cg" in parts:
        gate = ChannelGate.from_foreign(case.state, "rnl", prefix="cg.")
    if "nl" in parts:
        nl = nlkernels.NonLocalBlock3d.from_foreign(case.state, preset, prefix="nl.", **options)
    made = SegmentBlock(block, nl, config["n_segment"], gate=gate)

    def export(module: SegmentBlock) -> dict[str, torch.Tensor]:
        state = {f"block.{key}": tensor for key, tensor in module.block.state_dict().items()}
        if gate is not None:
            state |= module.cg.to_foreign("rnl", prefix="cg.")
        if nl is not None:
            state |= module.nl.to_foreign(preset, prefix="nl.", **options)
        return state

    return Subject(made, export)


def _alexhex7(config: Config, case: GoldenCase) -> tuple[str, dict[str, Any]]:
    dims = case.inputs["x"].ndim - 2
    kind = KINDS[config["variant"]]
    return "alexhex7", {"kind": kind, **sampled(config, dims), **_batch_norm(config)}


def _tsm(config: Config, case: GoldenCase) -> tuple[str, dict[str, Any]]:
    return "tsm", {**sampled(config, 3), **_batch_norm(config)}


def _mmcv(config: Config, case: GoldenCase) -> tuple[str, dict[str, Any]]:
    dims = case.inputs["x"].ndim - 2
    kind = KINDS[given(config, "mode", "embedded_gaussian")]
    options = {"kind": kind, **sampled(config, dims, default=False)}
    preset = "mmaction_slowonly" if given(config, "use_scale", True) else "mmaction_i3d"
    return preset, {**options, **mmcv_norm(config, dims)}


def mmcv_norm(config: Config, dims: int) -> dict[str, Any]:
    """mmcv's norm_cfg, a name or a dictionary with a type, as options of a block."""
    named = config.get("norm_cfg")
    if named is None:  # or not told: the keys show it
        return _batch_norm(config)
    settings = {"type": named} if isinstance(named, str) else dict(named)
    kind = settings.pop("type")
    if kind.startswith(("BN", "SyncBN")):
        told = {f"bn_{name}": settings[name] for name in ("eps", "momentum") if name in settings}
        return _batch_norm({**config, **told})
    settings.pop("requires_grad", None)
    settings.setdefault("eps", given(config, "gn_eps", _batch_norm(config)["norm_eps"]))
    if kind == "GN":
        groups = settings.pop("num_groups", None) or config["num_groups"]
        return {"norm": partial(nn.GroupNorm, groups, **settings)}
    if kind.startswith("IN"):
        start = {} if settings.get("affine") else {"zero_init": None}  # it has no weight
        return {"norm": partial(getattr(nn, f"InstanceNorm{dims}d"), **settings), **start}
    raise ValueError(f"golden case: expected norm_cfg BN, SyncBN, GN or IN, got {named!r}")


def _pytorchvideo(config: Config, case: GoldenCase) -> tuple[str, dict[str, Any]]:
    return "pytorchvideo", _pool_first(config)


def _slowfast(config: Config, case: GoldenCase) -> tuple[str, dict[str, Any]]:
    groups = next((config[name] for name in _GROUPS if config.get(name)), None)
    options = _pool_first(config)
    if groups is not None:
        options |= {"groups": groups, "frames": case.inputs["x"].shape[2]}
    return "slowfast", options


_GROUPS = ("groups", "group", "num_groups")


def _pool_first(config: Config) -> dict[str, Any]:
    pool = config.get("pool_size")
    return {
        "kind": KINDS[given(config, "instantiation", "softmax")],
        "pool": None if pool is None or max(pool) == 1 else tuple(pool),
        **_batch_norm(config),
    }


def _pool_first_fixed(preset: str, config: Config, case: GoldenCase) -> tuple[str, dict[str, Any]]:
    return preset, _batch_norm(config)


def _region(config: Config, case: GoldenCase) -> tuple[str, dict[str, Any]]:
    return "rnl", {
        "kind": f"region_{given(config, 'activation', 'softmax')}",
        "region_l2norm": given(config, "use_norm", False),
        **sampled(config, 3, default=False),
        **_batch_norm(config),
    }


def _mindspore(config: Config, case: GoldenCase) -> tuple[str, dict[str, Any]]:
    kind = KINDS[given(config, "mode", "dot")]
    return "mindspore", {"kind": kind, **sampled(config, 3), **_batch_norm(config)}


def _caffe2(config: Config, case: GoldenCase) -> tuple[str, dict[str, Any]]:
    """No golden case of a single Caffe2 block exists; its models' cases name these settings."""
    affine = not any(key.endswith("_bn_rm") for key in case.state)
    preset = "caffe2_affine" if affine else "caffe2"
    kind = config.get("instantiation", config.get("mode", "softmax"))
    options = {"kind": KINDS[kind], "temporal_group": config.get("group_size")}
    if "pool_size" in config:
        options["pool"] = config["pool_size"] and tuple(config["pool_size"])
    if "bn_eps" in config and not affine:
        options["norm_eps"] = config["bn_eps"]
    return preset, options


def _caffe2_prefix(case: GoldenCase) -> str:
    return next(key for key in case.state if key.endswith("g_w")).removesuffix("g_w")


def sampled(config: Config, dims: int, default: bool = True) -> dict[str, Any]:
    return {"pool": _POOLS[dims] if given(config, "sub_sample", default) else None}


def _batch_norm(config: Config, momentum: float = 0.1) -> dict[str, Any]:
    """How a batch norm works, should the keys show one."""
    return {
        "norm_eps": given(config, "bn_eps", 1e-5),
        "norm_momentum": given(config, "bn_momentum", momentum),
    }


def given(config: Config, name: str, default: Any) -> Any:
    """A setting, or the system's own default where a case has none or null."""
    found = config.get(name)
    return default if found is None else found


_SYSTEMS: dict[str, Callable[[Config, GoldenCase], tuple[str, dict[str, Any]]]] = {
    "AH": _alexhex7,
    "C2": _caffe2,
    "INC": partial(_pool_first_fixed, "inception_nl"),
    "MM": _mmcv,
    "MS": _mindspore,
    "PTV": _pytorchvideo,
    "RNL": _region,
    "SF": _slowfast,
    "TN": partial(_pool_first_fixed, "tushar"),
    "TSM": _tsm,
}
