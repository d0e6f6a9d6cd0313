"""pytorch-i3d: Inception-I3D.

Source: piergiaj/pytorch-i3d: pytorch_i3d.py.
"""

import re

from torch import nn

from nlkernels.models.systems.hassony2 import STEM
from nlkernels.models.systems.layout import Layout

NAME = "piergiaj"

_LAYERS = {"conv": "conv3d", "norm": "bn"}


def _module(model: nn.Module, path: str) -> str | None:
    if path == "fc":
        return "logits.conv3d"
    owner, _, layer = path.rpartition(".")
    match = re.fullmatch(r"mixed(\d\w)\.(\w+)", owner)
    if match is not None:
        branch = "b3b" if match[2] == "b3" else match[2]
        return f"Mixed_{match[1]}.{branch}.{_LAYERS[layer]}"
    return f"{STEM[owner].capitalize()}.{_LAYERS[layer]}" if owner in STEM else None


LAYOUT = Layout(
    name=NAME,
    module=_module,
    anchors=("Conv3d_1a_7x7.conv3d.weight", "Conv3d_1a_7x7.bn.weight"),
    classifier_dims=5,
)
detect, to_ours, from_ours = LAYOUT.detect, LAYOUT.to_ours, LAYOUT.from_ours
