"""SlowOnly: ResNets without temporal strides, in which the last two layers see three frames."""

from nlkernels.models.recipes import (
    MMACTION,
    PYTORCHVIDEO,
    SLOWFAST,
    default_places,
    register_resnet,
)

_SLOW = {"inflated": ((0,), (0,), (1,), (1,)), "pool2": 0}
_MMACTION = {**MMACTION, "preset": "mmaction_slowonly", "places": default_places(50, even=True)}

for _setting, _frames in (("4x16", 4), ("8x8", 8)):
    register_resnet(f"mmaction_slowonly_r50_{_setting}", "slowonly", **_SLOW, **_MMACTION)
    register_resnet(
        f"slowfast_slow_r50_{_setting}", "slowonly", window=(_frames, 7, 7), **_SLOW, **SLOWFAST
    )
register_resnet("pytorchvideo_slow_r50_8x8", "slowonly", window=(8, 7, 7), **_SLOW, **PYTORCHVIDEO)
