"""PySlowFast: networks of one pathway.

Source: facebookresearch/SlowFast: slowfast/models/resnet_helper.py, stem_helper.py,
video_model_builder.py.
"""

from torch import nn

from nlkernels.models.systems.layout import Layout
from nlkernels.models.systems.paths import unit

NAME = "slowfast"

_OUTSIDE = {
    "conv1": "s1.pathway0_stem.conv",
    "bn1": "s1.pathway0_stem.bn",
    "fc": "head.projection",
}


def _module(model: nn.Module, path: str) -> str | None:
    part = unit(path)
    if part is None:
        return _OUTSIDE.get(path)
    branch = "branch1" if part.is_shortcut else f"branch2.{part.letter}"
    norm = "_bn" if part.is_norm else ""
    return f"s{part.layer + 1}.pathway0_res{part.index}.{branch}{norm}"


def _block(model: nn.Module, path: str) -> str | None:
    part = unit(path)
    return None if part is None else f"s{part.layer + 1}.pathway0_nonlocal{part.index}."


LAYOUT = Layout(
    name=NAME,
    module=_module,
    block_prefix=_block,
    preset="slowfast",
    anchors=("s1.pathway0_stem.conv.weight", "s1.pathway0_stem.bn.weight"),
)
detect, to_ours, from_ours = LAYOUT.detect, LAYOUT.to_ours, LAYOUT.from_ours
