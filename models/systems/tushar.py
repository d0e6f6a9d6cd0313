"""pytorch-resnet3d: I3D-R50 converted from Caffe2; our own names but for the block's norm.

Source: Tushar-N/pytorch-resnet3d: models/resnet.py and utils/convert_weights.py.
"""

from torch import nn

from nlkernels.models.systems.layout import Layout
from nlkernels.models.systems.paths import unit

NAME = "tushar"


def _module(model: nn.Module, path: str) -> str | None:
    return path if unit(path) or path in ("conv1", "bn1", "fc") else None


def _block(model: nn.Module, path: str) -> str | None:
    return f"{path}.nl." if unit(path) else None


LAYOUT = Layout(
    name=NAME,
    module=_module,
    block_prefix=_block,
    preset="tushar",
    anchors=("conv1.weight", "layer1.0.conv1.weight", "fc.weight"),
    marks=(".nl.",),
)
detect, to_ours, from_ours = LAYOUT.detect, LAYOUT.to_ours, LAYOUT.from_ours
