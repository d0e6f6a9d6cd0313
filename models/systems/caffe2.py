"""video-nonlocal-net: Caffe2 blobs, with batch norms or the factors that replace them.

Source: facebookresearch/video-nonlocal-net: lib/models/resnet_helper.py, nonlocal_helper.py and
lib/utils/checkpoints.py. `_riv` holds a variance.
"""

from torch import nn

from nlkernels.models.systems.layout import Layout
from nlkernels.models.systems.paths import unit

NAME = "caffe2"

_OUTSIDE = {"conv1": "conv1", "bn1": "res_conv1_bn", "fc": "pred"}


def _module(model: nn.Module, path: str) -> str | None:
    part = unit(path)
    if part is None:
        return _OUTSIDE.get(path)
    branch = "branch1" if part.is_shortcut else f"branch2{part.letter}"
    return f"res{part.layer + 1}_{part.index}_{branch}" + ("_bn" if part.is_norm else "")


def _block(model: nn.Module, path: str) -> str | None:
    part = unit(path)
    return None if part is None else f"nonlocal_conv{part.layer + 1}_{part.index}_"


LAYOUT = Layout(
    name=NAME,
    module=_module,
    block_prefix=_block,
    preset="caffe2",
    anchors=("conv1_w", "res_conv1_bn_s"),
    separator="_",
    weight="w",
    bias="b",
    counts=False,
    ignored=("lr", "model_iter", "epoch", "_momentum"),
    inflates=True,
)
detect, to_ours, from_ours = LAYOUT.detect, LAYOUT.to_ours, LAYOUT.from_ours
