"""SlowOnly: ResNets without temporal strides, in which the last two layers see three frames."""

from nlkernels.models.places import EVEN_PLACES
from nlkernels.models.recipes import MMACTION, PYTORCHVIDEO, SLOWFAST, register_resnet

_SLOW = {"inflated": ((0,), (0,), (1,), (1,)), "pool2": 0}
_MMACTION = {**MMACTION, "preset": "mmaction_slowonly", "placement": EVEN_PLACES}
# Its configurations SLOW_NLN_*_R50 leave the kind to the library, whose default is this one.
_SLOWFAST = {**SLOWFAST, "kind": "dot_product"}

for _setting, _frames in (("4x16", 4), ("8x8", 8)):
    register_resnet(f"mmaction_slowonly_r50_{_setting}", "slowonly", **_SLOW, **_MMACTION)
    register_resnet(
        f"slowfast_slow_r50_{_setting}", "slowonly", window=(_frames, 7, 7), **_SLOW, **_SLOWFAST
    )
register_resnet("pytorchvideo_slow_r50_8x8", "slowonly", window=(8, 7, 7), **_SLOW, **PYTORCHVIDEO)
