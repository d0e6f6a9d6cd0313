"""pytorchvideo: c2d_r50, i3d_r50 and slow_r50 of its hub, none of which has blocks.

Source: facebookresearch/pytorchvideo: pytorchvideo/models/resnet.py, stem.py, head.py.
"""

from torch import nn

from nlkernels.models.systems.layout import Layout
from nlkernels.models.systems.paths import unit

NAME = "pytorchvideo"


def _module(model: nn.Module, path: str) -> str | None:
    part = unit(path)
    # The pool behind the first stage has an index of its own.
    pooled = int(model.pool2 is not None)
    if part is None:
        outside = {
            "conv1": "blocks.0.conv",
            "bn1": "blocks.0.norm",
            "fc": f"blocks.{5 + pooled}.proj",
        }
        return outside.get(path)
    stage = part.layer + (pooled if part.layer > 1 else 0)
    kind = "norm" if part.is_norm else "conv"
    branch = f"branch1_{kind}" if part.is_shortcut else f"branch2.{kind}_{part.letter}"
    return f"blocks.{stage}.res_blocks.{part.index}.{branch}"


LAYOUT = Layout(
    name=NAME,
    module=_module,
    anchors=("blocks.0.conv.weight", "blocks.0.norm.weight"),
)
detect, to_ours, from_ours = LAYOUT.detect, LAYOUT.to_ours, LAYOUT.from_ours
