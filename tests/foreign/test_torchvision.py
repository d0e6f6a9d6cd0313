"""Blocks in torchvision's own networks: the same until they learn, and gone again."""

import pytest

from tests.patching.packages.torchvision.models.video import resnet
from tests.patching.test_insert import PLACES, check_network

torchvision = pytest.importorskip(
    "torchvision.models", reason="torchvision is in no environment of the Makefile"
)
pytestmark = pytest.mark.gate


@pytest.mark.parametrize("name", ["r3d_18", "mc3_18", "r2plus1d_18"])
def test_videos(name):
    made = getattr(torchvision.video, name)(weights=None, num_classes=5)
    check_network(made, (2, 3, 4, 32, 32), [128, 256])


@pytest.mark.parametrize(
    ("name", "channels", "segments"),
    [("resnet50", [512, 1024], None), ("resnet18", [128, 256], 4)],
)
def test_images_and_frames(name, channels, segments):
    made = getattr(torchvision, name)(weights=None, num_classes=5)
    check_network(made, (4, 3, 64, 64), channels, segments=segments)


def test_names_are_those_of_the_stand_in():
    for name in ("r3d_18", "mc3_18"):
        theirs = getattr(torchvision.video, name)(weights=None, num_classes=5)
        assert theirs.state_dict().keys() == getattr(resnet, name)().state_dict().keys()
    assert dict(theirs.named_modules()).keys() >= PLACES
