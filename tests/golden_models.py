"""Our networks in the place of the golden cases' public ones, by system and configuration."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from nlkernels.models import create_model
from nlkernels.models.convert import LoadReport, load_foreign
from nlkernels.models.registry import registered
from tests.golden_cases import KINDS, GoldenCase
from tests.golden_systems import given, mmcv_norm, sampled

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


def _only(config: Config, name: str, *values: Any) -> None:
    """Refuse a setting that no network here has, rather than compute something else."""
    got = config.get(name)
    if got is not None and got not in values:
        raise _refused(name, " or ".join(map(repr, values)), got)


def _refused(name: str, expected: str, got: Any) -> ValueError:
    return ValueError(
        f"golden case: expected {name} {expected}, got {got!r}; no network here has this option"
    )


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
    depth = given(config, "MODEL.DEPTH", 50 if arc < 3 else 101)
    strided = config["MODEL.MODEL_NAME"] == "resnet_video_org"
    affine = config["MODEL.USE_AFFINE"]
    _only(config, "RESNETS.NUM_GROUPS", 1)
    _only(config, "RESNETS.WIDTH_PER_GROUP", 64)
    setting = {(0, 0): "8x8", (1, 0): "32x2", (0, 1): "32x4", (1, 1): "128x1"}[strided, affine]
    return Network(
        f"{family}_r{depth}_{setting}",
        {
            "num_classes": config["MODEL.NUM_CLASSES"],
            "norm_eps": given(config, "MODEL.BN_EPSILON", 1.0000001e-5),
            "window": _caffe2_window(config),
            "blocks": _caffe2_places(config, depth),
            "block": _caffe2_block(config),
            "layer_block": {2: {"temporal_group": _caffe2_group(config)}},
        },
    )


def _caffe2_group(config: Config) -> int | None:
    """Frames of a group in res3, of which the original's affine networks have 4."""
    default = 4 if config["MODEL.USE_AFFINE"] else None
    return config.get("res3_group_frames", default)


def _caffe2_window(config: Config) -> tuple[int | None, int, int]:
    kernel = config.get("pool5_kernel")
    return (None, 7, 7) if kernel is None else tuple(kernel)


def _caffe2_places(config: Config, depth: int) -> list[tuple[int, int]]:
    named = config.get("nonlocal_blocks")
    if named is not None:
        return [(int(stage[3:]) - 1, index) for stage, each in named.items() for index in each]
    mod = given(config, "NONLOCAL.LAYER_MOD", 2)
    mods = {2: mod, 3: mod} if depth == 50 else {2: 2, 3: 4 * mod - 1}
    return [
        (layer, index)
        for layer, stage in ((2, "CONV3"), (3, "CONV4"))
        for index in range(_DEPTHS[depth][layer - 1])
        if config[f"NONLOCAL.{stage}_NONLOCAL"] and index % mods[layer] == mods[layer] - 1
    ]


def _caffe2_block(config: Config) -> dict[str, Any]:
    softmax = given(config, "NONLOCAL.USE_SOFTMAX", True)
    scaled = softmax and given(config, "NONLOCAL.USE_SCALE", True)
    biased = not given(config, "NONLOCAL.NO_BIAS", 0)
    norm = None
    if config["NONLOCAL.USE_BN"] or given(config, "NONLOCAL.USE_AFFINE", False):
        norm = "affine" if given(config, "NONLOCAL.USE_AFFINE", False) else "batch"
    pool = tuple(given(config, "nonlocal_pool", (1, 2, 2)))
    return {
        "preset": "caffe2",
        "kind": "softmax" if softmax else "dot_product",
        "scale": None if scaled else 1.0,
        "pool": pool if given(config, "NONLOCAL.USE_MAXPOOL", True) else None,
        "qkv_bias": biased,
        "out_bias": biased,
        "norm": norm,
        "norm_eps": given(config, "NONLOCAL.BN_EPSILON", 1.0000001e-5),
    }


def _tushar(config: Config, case: GoldenCase) -> Network:
    return Network(
        "tushar_i3d_r50_32x2",
        {
            "num_classes": config["num_classes"],
            "norm_eps": given(config, "bn_eps", 1e-5),
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
    arch, depth, frames = config["arch"], config["depth"], config["num_frames"]
    _only(config, "arch", *_SLOWFAST_NAMES)
    name = _SLOWFAST_NAMES[arch]
    pools = 2 if arch in ("c2d", "i3d") else 1
    crop = given(config, "train_crop_size", 224) // 32
    locations = given(config, "nonlocal_location", [[[]]] * 4)
    return Network(
        name,
        {
            "num_classes": _classes(case, "head.projection.weight"),
            "depth": depth,
            "inflated": _slowfast_kernels(config, registered(name).design.inflated),
            "pool2": 2 if pools == 2 else 0,
            "norm_eps": given(config, "bn_eps", 1e-5),
            "window": (frames // pools, crop, crop),
            "blocks": [
                (layer, index)
                for layer, (indices,) in enumerate(locations, start=1)
                for index in indices
            ],
            "block": {"kind": KINDS[given(config, "instantiation", "dot_product")]},
            "layer_block": _slowfast_layers(config, case.inputs["clip"].shape[2], pools),
        },
    )


def _slowfast_kernels(config: Config, patterns: Sequence[Sequence[int]]) -> list[list[int]]:
    """The first bottlenecks of a layer have the kernels over time of its pattern, others none."""
    depths = _DEPTHS[config["depth"]]
    counts = given(config, "num_block_temp_kernel", depths)
    counts = [count[0] if isinstance(count, list) else count for count in counts]
    return [
        [pattern[index % len(pattern)] if index < count else 0 for index in range(depth)]
        for pattern, count, depth in zip(patterns, counts, depths, strict=True)
    ]


def _slowfast_layers(config: Config, frames: int, pools: int) -> dict[int, dict[str, Any]]:
    """Groups, given by their number, and pools of each layer; time is pooled behind the first."""
    groups = given(config, "nonlocal_group", [[1]] * 4)
    sizes = given(config, "nonlocal_pool", [[[1, 2, 2]]] * 4)
    layers = {}
    for layer, ((group,), (pool, *_)) in enumerate(zip(groups, sizes, strict=True), start=1):
        there = frames if layer == 1 else frames // pools
        layers[layer] = {
            "temporal_group": there // group if group > 1 else None,
            "pool": tuple(pool) if pool and max(pool) > 1 else None,
        }
    return layers


def _classes(case: GoldenCase, end: str) -> int:
    return next(len(array) for key, array in case.state.items() if key.endswith(end))


def _pytorchvideo(config: Config, case: GoldenCase) -> Network:
    family = case.record["source"]["unit"].split("_")[0]
    return Network(
        f"pytorchvideo_{family}_r50_8x8",
        {
            "num_classes": config["model_num_class"],
            "depth": config["depth"],
            "norm_eps": given(config, "bn_eps", 1e-5),
            "window": tuple(config["head_pool_kernel_size"]),
        },
    )


def _mmaction(config: Config, case: GoldenCase) -> Network:
    depth, unit = config["depth"], case.record["source"]["unit"]
    _only(config, "style", "pytorch")
    _only(config, "inflate_style", "3x1x1")
    if "TSM" in unit or "shift_div" in config:
        name, design = "mmaction_tsm_r50", _shift(config)
    elif "conv1_kernel" in config:
        pooled = config["with_pool2"]
        name = "mmaction_i3d_r50_32x2" if pooled else "mmaction_slowonly_r50_8x8"
        design = _mmaction_3d(config)
    else:
        pooled = unit.startswith("C2D")
        name, design = f"mmaction_c2d_{'' if pooled else 'nopool_'}r50_8x8", {}
    block = given(config, "non_local_cfg", {})
    return Network(
        name,
        {
            "num_classes": config["num_classes"],
            "in_channels": case.state["backbone.conv1.conv.weight"].shape[1],
            "depth": depth,
            "norm_eps": given(config, "bn_eps", 1e-5),
            "blocks": _places(given(config, "non_local", [0] * 4), depth),
            "block": _mmcv(block),
            "layer_block": _reduced(given(block, "reduction", 2)),
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
    """mmcv's options; `NonLocal3d` scales, neither pools nor has a norm unless it is told."""
    kind = KINDS[given(config, "mode", "embedded_gaussian")]
    options: dict[str, Any] = {
        "preset": "mmaction_slowonly" if given(config, "use_scale", True) else "mmaction_i3d",
        "kind": kind,
        **sampled(config, 3, default=False),
    }
    if kind != "softmax" and kind != "concat":
        options["scale"] = 1.0
    return options | ({"norm": None} if config.get("norm_cfg") is None else mmcv_norm(config, 3))


def _reduced(ratio: int) -> dict[int, dict[str, Any]]:
    """Channels inside of blocks behind each layer of a ResNet."""
    return {layer: {"inner": max(128 * 2**layer // ratio, 1)} for layer in (1, 2, 3, 4)}


def _shift(config: Config) -> dict[str, Any]:
    shifts = given(config, "is_shift", True)
    return {
        "shift": given(config, "shift_place", "blockres") if shifts else None,
        "shift_div": given(config, "shift_div", 8),
        "pool2": 3 if given(config, "temporal_pool", False) else 0,
    }


def _tsm(name: str, config: Config, case: GoldenCase) -> Network:
    stem = next(key for key in case.state if key.endswith("base_model.conv1.weight"))
    deep = any(".layer3.22." in key for key in case.state)
    if deep and config["non_local"]:
        raise _refused("depth", "50 for non_local", 101)
    _only(config, "consensus", "avg")
    return Network(
        name,
        {
            "num_classes": config["num_class"],
            "depth": 101 if deep else 50,
            "in_channels": case.state[stem].shape[1],
            "norm_eps": given(config, "bn_eps", 1e-5),
            "blocks": 5 if config["non_local"] else 0,
            **(_alexhex7(config) if name == "tsm_r50" else _region(config)),
            **_shift(config),
        },
    )


def _alexhex7(config: Config, default: bool = True) -> dict[str, Any]:
    """Options of blocks that TSM and others took from one source."""
    norm = {} if given(config, "bn_layer", True) else {"norm": None}
    return {"block": {**sampled(config, 3, default), **norm}}


def _region(config: Config) -> dict[str, Any]:
    """Options of the region-based block, with a kernel for each layer or for both."""
    kernels = given(config, "ks", [[3, 7, 7], [3, 3, 3]])
    kernels = [kernels] * 3 if isinstance(kernels, int) else kernels
    if isinstance(kernels, Mapping):
        kernels = [kernels[layer] for layer in ("layer2", "layer3")]
    elif isinstance(kernels[0], int):
        kernels = [kernels, kernels]
    kind = f"region_{given(config, 'activation', 'softmax')}"
    layers = _reduced(given(config, "ratio", 2))
    for layer, kernel in zip((2, 3), kernels, strict=True):
        layers[layer]["region_kernel"] = tuple(kernel)
    block = _alexhex7(config, default=False)["block"]
    l2norm = given(config, "use_norm", False)
    return {"block": {**block, "kind": kind, "region_l2norm": l2norm}, "layer_block": layers}


def _inception(system: str, config: Config, case: GoldenCase) -> Network:
    channels = case.inputs["clip"].shape[1]
    blocks = 2 if any(key.startswith("NonLocalBlock") for key in case.state) else 0
    return Network(
        f"{system}_{'rgb' if channels == 3 else 'flow'}",
        {
            "num_classes": config["num_classes"],
            "norm_eps": given(config, "bn_eps", 1e-5 if system == "inception_nl" else 1e-3),
            "blocks": blocks,
        },
    )


def _mindspore(config: Config, case: GoldenCase) -> Network:
    return Network(
        "mindspore_i3d_r50_32",
        {
            "num_classes": _classes(case, "head.dense.weight"),
            "norm_eps": given(config, "bn_eps", 1e-5),
            "blocks": 5 if any("non_local_block" in key for key in case.state) else 0,
            "block": {**_alexhex7(config)["block"], "kind": KINDS[given(config, "mode", "dot")]},
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
