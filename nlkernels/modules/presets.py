"""The published systems' blocks, as options of `NonLocalBlock3d`."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from nlkernels._spec import check_choice, nearest
from nlkernels.modules.options import POOLS, REGION_KINDS, BlockOptions


class Preset(NamedTuple):
    """Options of one system's block.

    Attributes:
        options: keyword arguments of the block, without `dim`.
        source: repository and file.
        offers: options that the system itself lets its users choose.
        dims: dimensions for which it has blocks.
        without_norm: what changes with norm=None, besides that `out` starts at zero for the norm.
        unpooled: kinds that cannot pool in that system; they have pool=None.
    """

    options: Mapping[str, Any]
    source: str
    offers: tuple[str, ...]
    dims: tuple[int, ...] = (3,)
    without_norm: Mapping[str, Any] = MappingProxyType({})
    unpooled: tuple[str, ...] = ()


_EVERY = (1, 2, 3)

# What all of them share: projections to half of the channels, with biases, and sampling
# by (1, 2, 2). Each preset names its pool order and its scale: both change the function and neither
# shows in the weights. scale=None is D**-0.5 for softmax, scale=1.0 is the systems that have none.
_BEFORE = {"pool_order": "before", "scale": None}
_AFTER = {"pool_order": "after", "scale": 1.0}
_NORMAL = {"init": "normal", "zero_init": "gamma"}
# mmcv leaves the start of its output and of its concatenation to Kaiming.
_MMCV = {"init": "normal", "out_init": "kaiming", "zero_init": "gamma", "out_bias": False}

PRESETS: dict[str, Preset] = {
    "caffe2": Preset(
        {"kind": "softmax", **_BEFORE, **_NORMAL, "norm_eps": 1.0000001e-5},
        "facebookresearch/video-nonlocal-net: lib/models/nonlocal_helper.py",
        ("kind", "pool", "scale", "qkv_bias", "out_bias", "norm", "init"),
    ),
    "caffe2_dot": Preset(
        {"kind": "dot_product", **_BEFORE, **_NORMAL, "norm_eps": 1.0000001e-5},
        "facebookresearch/video-nonlocal-net: lib/models/nonlocal_helper.py",
        ("pool", "qkv_bias", "out_bias", "norm", "init"),
    ),
    # Its models attend within groups of 4 frames in res3, and only there: temporal_group=4.
    "caffe2_affine": Preset(
        {"kind": "softmax", **_BEFORE, "init": "normal", "norm": None, "zero_init": "weight"},
        "facebookresearch/video-nonlocal-net: lib/models/nonlocal_helper.py",
        ("kind", "pool", "scale", "qkv_bias", "out_bias", "init", "temporal_group"),
    ),
    # The port leaves torch's biases in new blocks, which it never trains: they are 0 here.
    "tushar": Preset(
        {"kind": "softmax", **_BEFORE, "init": "kaiming", "zero_init": None},
        "Tushar-N/pytorch-resnet3d: models/resnet.py",
        (),
    ),
    "inception_nl": Preset(
        {"kind": "softmax", **_BEFORE, "init": "kaiming", "zero_init": "gamma"},
        "seominseok0429/inception-I3D-NON-LOCAL: i3d/i3dpt_non.py",
        (),
    ),
    "slowfast": Preset(
        {"kind": "softmax", **_BEFORE, "init": "kaiming", "zero_init": "gamma"},
        "facebookresearch/SlowFast: slowfast/models/nonlocal_helper.py",
        ("kind", "pool", "zero_init", "norm", "norm_eps", "norm_momentum", "temporal_group"),
    ),
    "pytorchvideo": Preset(
        {"kind": "softmax", "pool": None, **_BEFORE, "init": "default", "zero_init": None},
        "facebookresearch/pytorchvideo: pytorchvideo/layers/nonlocal_net.py",
        ("inner", "kind", "pool", "norm", "norm_eps", "norm_momentum"),
    ),
    "alexhex7": Preset(
        {"kind": "softmax", **_AFTER, "init": "default", "zero_init": "gamma"},
        "AlexHex7/Non-local_pytorch: lib/non_local_{embedded_gaussian,gaussian,...}.py",
        ("inner", "kind", "pool", "norm"),
        _EVERY,
    ),
    "tsm": Preset(
        {"kind": "softmax", **_AFTER, "init": "default", "zero_init": "gamma"},
        "mit-han-lab/temporal-shift-module: ops/non_local.py",
        ("inner", "pool", "norm"),
        _EVERY,
    ),
    "mmaction_i3d": Preset(
        {"kind": "softmax", **_AFTER, **_MMCV},
        "open-mmlab/mmcv: mmcv/cnn/bricks/non_local.py, in I3D and TSM of open-mmlab/mmaction2",
        ("inner", "kind", "pool", "scale", "norm", "zero_init"),
        _EVERY,
        {"out_bias": True},
    ),
    "mmaction_slowonly": Preset(
        {"kind": "softmax", **_AFTER, "scale": None, **_MMCV},
        "open-mmlab/mmcv: mmcv/cnn/bricks/non_local.py, in SlowOnly of open-mmlab/mmaction2",
        ("inner", "kind", "pool", "scale", "norm", "zero_init"),
        _EVERY,
        {"out_bias": True},
    ),
    "mindspore": Preset(
        {
            "kind": "dot_product",
            **_AFTER,
            "init": "normal",
            "zero_init": None,
            "out_bias": False,
        },
        "ZJUT-ERCISS/nonlocal_mindspore: src/models/nonlocal3d.py",
        ("inner", "kind", "pool", "norm"),
        # Pooled, its queries and keys have different numbers of channels, which fails.
        unpooled=("gaussian",),
    ),
    # The models have a kernel of (3, 7, 7) in res3 and of (3, 3, 3) in res4.
    "rnl": Preset(
        {
            "kind": "region_softmax",
            "pool": None,
            **_AFTER,
            "init": "default",
            "zero_init": "gamma",
            "region_l2norm": False,
        },
        "guoxih/region-based-non-local-network: ops/rnl.py",
        ("inner", "kind", "pool", "region_kernel", "region_l2norm", "norm"),
    ),
}


def preset_options(name: str, dims: int, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of a preset's block, without `dim`.

    Args:
        name: a key of `PRESETS`.
        dims: 1, 2 or 3. Systems that have no such block give their conventions to one.
        overrides: options of a block that replace the preset's.

    Returns:
        A new dictionary. Options that another kind than the preset's does not have are left out: a
        concatenation has no scale, and only the region kinds have regions. With norm=None the block
        is that of the system without norm, with weight and bias of `out` zero where those of the
        norm were. A kind that the system cannot pool has pool=None.

    Raises:
        ValueError: unknown preset; dims not 1, 2 or 3.
        TypeError: unknown option.

    Example:
        >>> from nlkernels.modules.presets import preset_options
        >>> preset_options("tsm", 2, {"pool": None})["pool_order"]
        'after'
    """
    check_choice("preset", "the name", name, tuple(PRESETS))
    if dims not in _EVERY:
        raise ValueError(
            f"preset: expected dims to be 1, 2 or 3, got {dims!r}; pass that of the block, "
            "such as NonLocalBlock3d.dims"
        )
    for option in overrides:
        if option not in BlockOptions._fields:
            raise TypeError(
                f"preset: expected options among {', '.join(BlockOptions._fields)}, "
                f"got {option!r}{nearest(option, BlockOptions._fields)}"
            )
    preset = PRESETS[name]
    options = {"pool": POOLS[dims], **preset.options}
    if overrides.get("norm", "") is None:
        options.update(preset.without_norm)
        if options["zero_init"] == "gamma":
            options["zero_init"] = "weight"
    kind = overrides.get("kind", options["kind"])
    if kind in preset.unpooled:
        options["pool"] = None
    if kind == "concat":
        del options["scale"]
    if kind not in REGION_KINDS:
        options.pop("region_l2norm", None)
    elif options["pool_order"] == "before":
        del options["pool_order"]
    return {**options, **overrides}
