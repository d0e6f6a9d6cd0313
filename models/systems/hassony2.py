"""kinetics_i3d_pytorch: Inception-I3D.

Source: hassony2/kinetics_i3d_pytorch: src/i3dpt.py.
"""

import re

from torch import nn

from nlkernels.models.systems.layout import Layout

NAME = "hassony2"

STEM = {"conv1a": "conv3d_1a_7x7", "conv2b": "conv3d_2b_1x1", "conv2c": "conv3d_2c_3x3"}
_BRANCHES = {
    "b0": "branch_0",
    "b1a": "branch_1.0",
    "b1b": "branch_1.1",
    "b2a": "branch_2.0",
    "b2b": "branch_2.1",
    "b3": "branch_3.1",
}
_LAYERS = {"conv": "conv3d", "norm": "batch3d"}


def module(model: nn.Module, path: str) -> str | None:
    """Their name of a module of ours outside of blocks."""
    if path == "fc":
        return "conv3d_0c_1x1.conv3d"
    owner, _, layer = path.rpartition(".")
    match = re.fullmatch(r"mixed(\d\w)\.(\w+)", owner)
    if match is not None:
        return f"mixed_{match[1]}.{_BRANCHES[match[2]]}.{_LAYERS[layer]}"
    return f"{STEM[owner]}.{_LAYERS[layer]}" if owner in STEM else None


LAYOUT = Layout(
    name=NAME,
    module=module,
    anchors=("conv3d_1a_7x7.conv3d.weight", "conv3d_1a_7x7.batch3d.weight"),
    counter_marks=("NonLocalBlock_mixed_",),
    classifier_dims=5,
)
detect, to_ours, from_ours = LAYOUT.detect, LAYOUT.to_ours, LAYOUT.from_ours
