"""Registered ResNets: a name for a design, every choice of which stays an option."""

import dataclasses
from typing import Any

from nlkernels.models.design import CAFFE2_EPS, ResNetDesign
from nlkernels.models.places import ORIGINAL_PLACES, SLOWFAST_PLACES
from nlkernels.models.registry import register_model
from nlkernels.models.resnet import VideoResNet

# Options of every ResNet: those of `VideoResNet`, and the choices of its design.
DESIGN_OPTIONS = tuple(
    each.name
    for each in dataclasses.fields(ResNetDesign)
    if each.name not in ("system", "preset", "kind", "gates", "placement")
)
OPTIONS = ("blocks", "block", "dropout", "checkpointing", *DESIGN_OPTIONS)

# Temporal kernels of an I3D: every bottleneck of layer1, then every other one.
I3D = {"stem_kernel_t": 5, "inflated": ((1,), (1, 0), (1, 0), (0, 1))}
# The stem that halves time twice: of 32 frames with a stride of 2, and of 128.
STRIDED = {"stem_stride_t": 2, "pool1_kernel_t": 2, "pool1_stride_t": 2}

# What all networks of a system share.
CAFFE2 = {
    "system": "caffe2",
    "pool1_padding": 0,
    "norm_eps": CAFFE2_EPS,
    "zero_init": True,
    "preset": "caffe2",
}
# The original's long clips: factors for norms, and blocks of res3 within groups of 4 frames.
CAFFE2_AFFINE = {
    **CAFFE2,
    "norm": "affine",
    "zero_init": False,
    "preset": "caffe2_affine",
    "layer_block": {2: {"temporal_group": 4}},
}
CAFFE2_UNGROUPED = {**CAFFE2_AFFINE, "layer_block": {}}
# (suffix of the name, frames, what differs) of the original's four settings.
CAFFE2_SETTINGS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("8x8", CAFFE2),
    ("32x2", {**CAFFE2, **STRIDED}),
    ("32x4", CAFFE2_AFFINE),
    ("32x4_ungrouped", CAFFE2_UNGROUPED),
    ("128x1", {**CAFFE2_AFFINE, **STRIDED}),
    ("128x1_ungrouped", {**CAFFE2_UNGROUPED, **STRIDED}),
)
SLOWFAST = {
    "system": "slowfast",
    "zero_init": True,
    "head": "window",
    "preset": "slowfast",
    "placement": SLOWFAST_PLACES,
}
PYTORCHVIDEO = {"system": "pytorchvideo", "head": "window", "preset": "pytorchvideo"}
MMACTION = {"system": "mmaction", "preset": "mmaction_i3d"}


def register_resnet(
    name: str, family: str, *, blocks: int = 0, dropout: float = 0.5, **design: Any
) -> None:
    """Register a `VideoResNet`.

    Args:
        name: its name in the registry.
        family: its architecture.
        blocks: number of blocks where the caller names none.
        dropout: that of the published recipe.
        **design: fields of `ResNetDesign`; blocks go where the original has them by default.
    """
    chosen = ResNetDesign(**{"placement": ORIGINAL_PLACES, **design})
    defaults = {"blocks": blocks, "dropout": dropout}

    def build(*, num_classes: int, width: float, **options: Any) -> VideoResNet:
        changed = {key: options.pop(key) for key in DESIGN_OPTIONS if key in options}
        own = dataclasses.replace(chosen, **changed)
        return VideoResNet(
            name, own, num_classes=num_classes, width=width, **{**defaults, **options}
        )

    register_model(build, name=name, options=OPTIONS, family=family, design=chosen)
