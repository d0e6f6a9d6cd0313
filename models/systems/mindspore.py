"""nonlocal_mindspore and zjut_mindvideo: I3D-R50 with dot-product blocks.

Names follow from the cells of the code; no checkpoint of it could be read. One of a training also
holds the optimiser's entries for each weight, the learning rate and counters.

Source: ZJUT-ERCISS/nonlocal_mindspore: src/models/nonlocal3d.py.
"""

from torch import nn

from nlkernels.models.systems.layout import Layout
from nlkernels.models.systems.paths import unit

NAME = "mindspore"

_OPTIMISER = ("moments.", "accum.", "stat.", "learning_rate", "momentum")
_COUNTERS = ("global_step", "epoch_num", "step_num")

_UNITS = {"a": "conv12.conv1", "b": "conv12.conv2", "c": "conv3"}


def _module(model: nn.Module, path: str) -> str | None:
    part = unit(path)
    if part is None:
        outside = {
            "conv1": "backbone.conv1.features.0",
            "bn1": "backbone.conv1.features.1.bn2d",
            "fc": "head.dense",
        }
        return outside.get(path)
    name = "down_sample" if part.is_shortcut else _UNITS[part.letter]
    layer = "features.1.bn2d" if part.is_norm else "features.0"
    return f"backbone.layer{part.layer}.{part.index}.{name}.{layer}"


def _block(model: nn.Module, path: str) -> str | None:
    return f"backbone.{path}.non_local_block." if unit(path) else None


LAYOUT = Layout(
    name=NAME,
    module=_module,
    block_prefix=_block,
    preset="mindspore",
    anchors=("backbone.conv1.features.0.weight", "backbone.conv1.features.1.bn2d.gamma"),
    counts=False,
    ignored=(*_OPTIMISER, *_COUNTERS),
)
detect, to_ours, from_ours = LAYOUT.detect, LAYOUT.to_ours, LAYOUT.from_ours
