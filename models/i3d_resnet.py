"""I3D: ResNets in which every other bottleneck sees three frames."""

from nlkernels.models.recipes import (
    CAFFE2_SETTINGS,
    I3D,
    MMACTION,
    PYTORCHVIDEO,
    SLOWFAST,
    STRIDED,
    register_resnet,
)

# The original's, and a port of its 32x2 setting with another head and epsilon.
for _depth in (50, 101):
    for _setting, _design in CAFFE2_SETTINGS:
        register_resnet(f"i3d_r{_depth}_{_setting}", "i3d", depth=_depth, **I3D, **_design)
register_resnet(
    "tushar_i3d_r50_32x2",
    "i3d",
    system="tushar",
    preset="tushar",
    pool1_padding=0,
    **I3D,
    **STRIDED,
)

for _depth in (50, 101):
    register_resnet(
        f"slowfast_i3d_r{_depth}_8x8",
        "i3d",
        depth=_depth,
        window=(4, 7, 7),
        **I3D,
        **SLOWFAST,
    )
register_resnet("pytorchvideo_i3d_r50_8x8", "i3d", window=(4, 7, 7), **I3D, **PYTORCHVIDEO)

# mmaction2's pools look at every frame and skip every other one. "Heavy" inflates all bottlenecks.
register_resnet(
    "mmaction_i3d_r50_32x2", "i3d", stem_stride_t=2, pool1_stride_t=2, **I3D, **MMACTION
)
register_resnet(
    "mmaction_i3d_heavy_r50_32x2", "i3d", stem_kernel_t=5, inflated=((1,),) * 4, **MMACTION
)
# The MindSpore port starts without any temporal stride.
register_resnet("mindspore_i3d_r50_32", "i3d", system="mindspore", preset="mindspore", **I3D)
