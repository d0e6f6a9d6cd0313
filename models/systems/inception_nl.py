"""inception-I3D-NON-LOCAL: Inception-I3D in the names of kinetics_i3d_pytorch, and two blocks.

Source: seominseok0429/inception-I3D-NON-LOCAL: i3d/i3dpt_non.py.
"""

from torch import nn

from nlkernels.models.systems.hassony2 import module
from nlkernels.models.systems.layout import Layout

NAME = "inception_nl"

_BLOCKS = {"mixed3c": "NonLocalBlock_mixed_3.", "mixed4d": "NonLocalBlock_mixed_4."}


def _block(model: nn.Module, path: str) -> str | None:
    return _BLOCKS.get(path)


LAYOUT = Layout(
    name=NAME,
    module=module,
    block_prefix=_block,
    preset="inception_nl",
    anchors=("conv3d_1a_7x7.conv3d.weight", "conv3d_1a_7x7.batch3d.weight"),
    marks=("NonLocalBlock_mixed_",),
    classifier_dims=5,
)
detect, to_ours, from_ours = LAYOUT.detect, LAYOUT.to_ours, LAYOUT.from_ours
