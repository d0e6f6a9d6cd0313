"""Our networks in the place of the golden cases' public ones, by system and configuration."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from nlkernels.models import create_model
from nlkernels.models.convert import LoadReport, load_foreign
from tests.golden_cases import KINDS, GoldenCase

Config = Mapping[str, Any]

# Two depths of res2 to res5.
_DEPTHS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


class Network(NamedTuple):
    """A registered model by name and options."""

    name: str
    options: dict[str, Any]


class Loaded(NamedTuple):
    """A model with a case's weights, and how they came in."""

    model: nn.Module
    report: LoadReport


def loaded(case: GoldenCase) -> Loaded:
    """The model for a case, in the case's mode, its weights through the public import."""
    network = NETWORKS[case.record["system"].split()[0]](case.record["config"], case)
    model = create_model(network.name, **network.options, dropout=0.0)
    report = load_foreign(model, case.state)
    return Loaded(model.train(case.record["mode"] == "train"), report)


def outputs(model: nn.Module, case: GoldenCase, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Every output that a case has a digest of, from one run in `dtype`."""
    digests = case.record["outputs"]
    model.to(dtype)
    seen: dict[str, torch.Tensor] = {}
    handles = [_tap(model, name, seen) for name in digests if name not in _RESULTS]
    handles.append(model.fc.register_forward_hook(_keep(seen, "location_logits")))
    clip = _clip(case, model.design.in_channels).to(dtype)
    with torch.no_grad():
        if "location_logits" in digests:
            seen["probabilities"] = model.probabilities(clip)
        else:
            seen["logits"] = model(clip)
            seen["probabilities"] = seen["logits"].softmax(-1)
    for handle in handles:
        handle.remove()
    return {name: _shaped(seen, name, digests[name]["shape"]) for name in digests}


_RESULTS = ("logits", "location_logits", "probabilities")


def _tap(model: nn.Module, name: str, seen: dict[str, torch.Tensor]):
    """Keep the activation of a name: the output of a layer, or of it before its block."""
    layer, before_block = _place(name)
    module = model.get_submodule(layer)
    block = getattr(module, "nl", None)
    if before_block and block is not None:
        return block.register_forward_pre_hook(
            lambda _module, inputs: seen.update({name: inputs[0]})
        )
    return module.register_forward_hook(_keep(seen, name))


def _keep(seen: dict[str, torch.Tensor], name: str) -> Callable[..., None]:
    return lambda _module, _inputs, output: seen.update({name: output})


def _place(name: str) -> tuple[str, bool]:
    """Our layer of a public name, and whether the name means it without the block behind it."""
    if match := re.fullmatch(r"res(\d)", name):
        return f"layer{int(match[1]) - 1}", False
    if match := re.fullmatch(r"nonlocal_conv(\d)_(\d+)", name):
        return f"layer{int(match[1]) - 1}.{match[2]}", False
    if match := re.fullmatch(r"mixed_(\d\w)", name):
        return f"mixed{match[1]}", True
    if match := re.fullmatch(r"conv3d_(\d\w)_.*", name):
        return f"conv{match[1]}", False
    names = {"pool1": "pool1", "nl_3": "mixed3c", "nl_4": "mixed4d"}
    return names[name], False


def _shaped(seen: Mapping[str, torch.Tensor], name: str, shape: list[int]) -> torch.Tensor:
    """A tensor in the form of the public code's."""
    found = seen[name]
    if name == "logits" and len(shape) == 3:  # (B, classes, T')
        return seen["location_logits"][:, :, 0, 0].transpose(1, 2)
    if name == "logits" and len(shape) == 1:  # one clip without its batch
        return found.squeeze(0)
    if found.dim() == 5 and len(shape) == 4:  # (B T, C, H, W)
        return found.transpose(1, 2).flatten(0, 1)
    return found


def _clip(case: GoldenCase, channels: int) -> torch.Tensor:
    """The input as (B, C, T, H, W)."""
    clip = torch.from_numpy(case.inputs["clip"])
    if clip.dim() == 5:
        return clip
    segments = case.record["config"]["num_segments"]
    # (B, T C, H, W) or (B T, C, H, W): the same numbers in the same order.
    return clip.reshape(-1, segments, channels, *clip.shape[2:]).transpose(1, 2)


def _given(config: Config, name: str, default: Any) -> Any:
    """A setting, or the system's own default where a case has none or null."""
    found = config.get(name)
    return default if found is None else found


def _patterns(flags: Any, depth: int) -> list[list[int]]:
    """0 and 1 for every bottleneck, from numbers or patterns for every layer."""
    return [
        [flag] * count if isinstance(flag, int) else list(flag)
        for flag, count in zip(flags, _DEPTHS[depth], strict=True)
    ]


def _places(flags: Any, depth: int) -> list[tuple[int, int]]:
    return [
        (layer, index)
        for layer, pattern in enumerate(_patterns(flags, depth), start=1)
        for index, flag in enumerate(pattern)
        if flag
    ]


def _caffe2(config: Config, case: GoldenCase) -> Network:
    arc = config["MODEL.VIDEO_ARC_CHOICE"]
    family = "c2d" if arc in (1, 3) else "i3d"
    depth = _given(config, "MODEL.DEPTH", 50 if arc < 3 else 101)
    strided = config["MODEL.MODEL_NAME"] == "resnet_video_org"
    affine = config["MODEL.USE_AFFINE"]
    setting = {(0, 0): "8x8", (1, 0): "32x2", (0, 1): "32x4", (1, 1): "128x1"}[strided, affine]
    return Network(
        f"{family}_r{depth}_{setting}",
        {
            "num_classes": config["MODEL.NUM_CLASSES"],
            "norm_eps": _given(config, "MODEL.BN_EPSILON", 1.0000001e-5),
            "window": _caffe2_window(config),
            "blocks": _caffe2_places(config, depth),
            "block": _caffe2_block(config),
            "layer_block": {2: {"temporal_group": config.get("res3_group_frames")}},
        },
    )


def _caffe2_window(config: Config) -> tuple[int | None, int, int]:
    kernel = config.get("pool5_kernel")
    return (None, 7, 7) if kernel is None else tuple(kernel)


def _caffe2_places(config: Config, depth: int) -> list[tuple[int, int]]:
    named = config.get("nonlocal_blocks")
    if named is not None:
        return [(int(stage[3:]) - 1, index) for stage, each in named.items() for index in each]
    mod = _given(config, "NONLOCAL.LAYER_MOD", 2)
    mods = {2: mod, 3: mod} if depth == 50 else {2: 2, 3: 4 * mod - 1}
    return [
        (layer, index)
        for layer, stage in ((2, "CONV3"), (3, "CONV4"))
        for index in range(_DEPTHS[depth][layer - 1])
        if config[f"NONLOCAL.{stage}_NONLOCAL"] and index % mods[layer] == mods[layer] - 1
    ]


def _caffe2_block(config: Config) -> dict[str, Any]:
    softmax = _given(config, "NONLOCAL.USE_SOFTMAX", True)
    scaled = softmax and _given(config, "NONLOCAL.USE_SCALE", True)
    biased = not _given(config, "NONLOCAL.NO_BIAS", 0)
    norm = None
    if config["NONLOCAL.USE_BN"] or _given(config, "NONLOCAL.USE_AFFINE", False):
        norm = "affine" if _given(config, "NONLOCAL.USE_AFFINE", False) else "batch"
    pool = tuple(_given(config, "nonlocal_pool", (1, 2, 2)))
    return {
        "preset": "caffe2",
        "kind": "softmax" if softmax else "dot_product",
        "scale": None if scaled else 1.0,
        "pool": pool if _given(config, "NONLOCAL.USE_MAXPOOL", True) else None,
        "qkv_bias": biased,
        "out_bias": biased,
        "norm": norm,
        "norm_eps": _given(config, "NONLOCAL.BN_EPSILON", 1.0000001e-5),
    }


def _tushar(config: Config, case: GoldenCase) -> Network:
    return Network(
        "tushar_i3d_r50_32x2",
        {
            "num_classes": config["num_classes"],
            "norm_eps": _given(config, "bn_eps", 1e-5),
            "blocks": 5 if config["use_nl"] else 0,
        },
    )


_SLOWFAST_NAMES = {
    "c2d": "slowfast_c2d_r50_8x8",
    "i3d": "slowfast_i3d_r50_8x8",
    "slow_i3d": "slowfast_i3d_r50_8x8",
    "2d": "slowfast_c2d_nopool_r50_8x8",
    "slow_c2d": "slowfast_c2d_nopool_r50_8x8",
    "slow": "slowfast_slow_r50_8x8",
}


def _slowfast(config: Config, case: GoldenCase) -> Network:
    arch, frames = config["arch"], config["num_frames"]
    pools = 2 if arch in ("c2d", "i3d") else 1
    behind = case.inputs["clip"].shape[2] // pools
    crop = _given(config, "train_crop_size", 224) // 32
    places = [
        (layer, index)
        for layer, (indices,) in enumerate(config["nonlocal_location"], start=1)
        for index in indices
    ]
    layers = {}
    for layer, ((group,), (pool, *_)) in enumerate(
        zip(
            _given(config, "nonlocal_group", [[1]] * 4),
            _given(config, "nonlocal_pool", [[[1, 2, 2]]] * 4),
            strict=True,
        ),
        start=1,
    ):
        layers[layer] = {
            "temporal_group": behind // group if group > 1 else None,
            "pool": tuple(pool) if pool and max(pool) > 1 else None,
        }
    return Network(
        _SLOWFAST_NAMES[arch],
        {
            "num_classes": _classes(case, "head.projection.weight"),
            "depth": config["depth"],
            "pool2": 2 if pools == 2 else 0,
            "norm_eps": _given(config, "bn_eps", 1e-5),
            "window": (frames // pools, crop, crop),
            "blocks": places,
            "block": {"kind": KINDS[_given(config, "instantiation", "dot_product")]},
            "layer_block": layers,
        },
    )


def _classes(case: GoldenCase, end: str) -> int:
    return next(len(array) for key, array in case.state.items() if key.endswith(end))


def _pytorchvideo(config: Config, case: GoldenCase) -> Network:
    family = case.record["source"]["unit"].split("_")[0]
    return Network(
        f"pytorchvideo_{family}_r50_8x8",
        {
            "num_classes": config["model_num_class"],
            "depth": config["depth"],
            "norm_eps": _given(config, "bn_eps", 1e-5),
            "window": tuple(config["head_pool_kernel_size"]),
        },
    )


def _mmaction(config: Config, case: GoldenCase) -> Network:
    depth = config["depth"]
    if "num_segments" in config:
        name, design = "mmaction_tsm_r50", _shift(config)
    elif "conv1_kernel" in config:
        name, design = "mmaction_i3d_r50_32x2", _mmaction_3d(config)
        if not config["with_pool2"]:
            name = "mmaction_slowonly_r50_8x8"
    else:
        pooled = case.record["source"]["unit"].startswith("C2D")
        name = f"mmaction_c2d_{'' if pooled else 'nopool_'}r50_8x8"
        design = {}
    return Network(
        name,
        {
            "num_classes": config["num_classes"],
            "depth": depth,
            "norm_eps": _given(config, "bn_eps", 1e-5),
            "blocks": _places(_given(config, "non_local", [0] * 4), depth),
            "block": _mmcv(_given(config, "non_local_cfg", {})),
            **design,
        },
    )


def _mmaction_3d(config: Config) -> dict[str, Any]:
    return {
        "stem_kernel_t": config["conv1_kernel"][0],
        "stem_stride_t": config["conv1_stride_t"],
        "pool1_stride_t": config["pool1_stride_t"],
        "pool2": 2 if config["with_pool2"] else 0,
        "inflated": _patterns(config["inflate"], config["depth"]),
    }


def _mmcv(config: Config) -> dict[str, Any]:
    """mmcv's options; `NonLocal3d` does not pool and does scale unless it is told."""
    kind = KINDS[_given(config, "mode", "embedded_gaussian")]
    options: dict[str, Any] = {
        "preset": "mmaction_slowonly" if _given(config, "use_scale", True) else "mmaction_i3d",
        "kind": kind,
        "pool": (1, 2, 2) if _given(config, "sub_sample", False) else None,
    }
    if kind != "softmax" and kind != "concat":
        options["scale"] = 1.0
    if config and config.get("norm_cfg") is None:
        options["norm"] = None
    return options


def _shift(config: Config) -> dict[str, Any]:
    shifts = _given(config, "is_shift", True)
    return {
        "shift": _given(config, "shift_place", "blockres") if shifts else None,
        "shift_div": _given(config, "shift_div", 8),
        "pool2": 3 if _given(config, "temporal_pool", False) else 0,
    }


def _tsm(name: str, config: Config, case: GoldenCase) -> Network:
    return Network(
        name,
        {
            "num_classes": config["num_class"],
            "in_channels": case.inputs["clip"].shape[1] // config["num_segments"],
            "norm_eps": _given(config, "bn_eps", 1e-5),
            "blocks": 5 if config["non_local"] else 0,
            **_shift(config),
        },
    )


def _inception(system: str, config: Config, case: GoldenCase) -> Network:
    channels = case.inputs["clip"].shape[1]
    blocks = 2 if any(key.startswith("NonLocalBlock") for key in case.state) else 0
    return Network(
        f"{system}_{'rgb' if channels == 3 else 'flow'}",
        {
            "num_classes": config["num_classes"],
            "norm_eps": config["bn_eps"],
            "blocks": blocks,
        },
    )


def _mindspore(config: Config, case: GoldenCase) -> Network:
    return Network(
        "mindspore_i3d_r50_32",
        {
            "num_classes": _classes(case, "head.dense.weight"),
            "norm_eps": _given(config, "bn_eps", 1e-5),
            "blocks": 5 if any("non_local_block" in key for key in case.state) else 0,
            "block": {"kind": KINDS[_given(config, "mode", "dot")]},
        },
    )


NETWORKS: dict[str, Callable[[Config, GoldenCase], Network]] = {
    "C2": _caffe2,
    "HA": lambda config, case: _inception("hassony2_i3d", config, case),
    "INC": lambda config, case: _inception("inception_nl", config, case),
    "MM": _mmaction,
    "MS": _mindspore,
    "PJ": lambda config, case: _inception("piergiaj_i3d", config, case),
    "PTV": _pytorchvideo,
    "RNL": lambda config, case: _tsm("rnl_tsm_r50", config, case),
    "SF": _slowfast,
    "TN": _tushar,
    "TSM": lambda config, case: _tsm("tsm_r50", config, case),
}
