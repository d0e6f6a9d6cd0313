"""torchvision's ResNets for images, from which video networks start.

Their convolutions are repeated over time and divided by the number of frames, so that a clip of
equal frames gives what the image gives.

Source: pytorch/vision: torchvision/models/resnet.py.
"""

from torch import nn

from nlkernels.models.systems.layout import Layout
from nlkernels.models.systems.paths import unit

NAME = "torchvision"


def _module(model: nn.Module, path: str) -> str | None:
    return path if unit(path) or path in ("conv1", "bn1", "fc") else None


LAYOUT = Layout(
    name=NAME,
    module=_module,
    anchors=("conv1.weight", "layer1.0.conv1.weight"),
    counter_marks=(".nl.",),
    certainty=0.5,  # video networks took its names over
    flat=True,
    inflates=True,
)
detect, to_ours, from_ours = LAYOUT.detect, LAYOUT.to_ours, LAYOUT.from_ours
