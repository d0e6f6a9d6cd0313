"""What converted weights are said to be: published ones only where nothing speaks against it."""

import pytest
import torch

from nlkernels.models import create_model
from nlkernels.models.convert import LoadReport
from nlkernels.models.fitting import Fit
from nlkernels.models.provenance import Conversion, known, open_kinds

PLAIN = {"num_classes": 400, "blocks": 0}
BLOCKS = {"num_classes": 400, "blocks": 5}


def conversion(name, system, options, *, rewritten=False, **report):
    with torch.device("meta"):
        model = create_model(name, **options)
    report = LoadReport(system, **report)
    return Conversion("model.pkl", {"lr": 0.1}, Fit(name, options), model, report, rewritten)


PUBLISHED = {
    "plain": ("c2d_r50_8x8", "caffe2", PLAIN, "top-1 71.9, top-5 90.0"),
    "one-kind": ("tsm_r50", "tsm", BLOCKS, "top-1 75.6 (softmax)"),
    "keys": (
        "mmaction_i3d_r50_32x2",
        "mmaction",
        {**BLOCKS, "block": {"kind": "gaussian"}},
        "top-1 73.97, top-5 91.33 (gaussian)",
    ),
    "named": (
        "i3d_r50_8x8",
        "caffe2",
        {**BLOCKS, "block": {"kind": "softmax"}, "dropout": 0.0},
        "top-1 74.7, top-5 91.6 (softmax)",
    ),
}


@pytest.mark.parametrize(
    ("name", "system", "options", "accuracy"), PUBLISHED.values(), ids=PUBLISHED
)
def test_published_weights(name, system, options, accuracy):
    found = known(conversion(name, system, options))
    assert found["published"] == accuracy
    assert found["protocol"].startswith("Kinetics-400: 10 ")
    assert "candidates" not in found
    assert found["source.lr"] == 0.1


CANDIDATES = {
    "kind": (
        "mmaction_i3d_r50_32x2",
        "mmaction",
        BLOCKS,
        "top-1 74.8, top-5 92.07 (dot_product) | top-1 74.73, top-5 91.8 (softmax)",
    ),
    "recipe": (
        "mmaction_i3d_r50_32x2",
        "mmaction",
        PLAIN,
        "top-1 73.47, top-5 91.27 | top-1 73.77, top-5 91.35 (dense)",
    ),
    "original": ("i3d_r50_8x8", "caffe2", BLOCKS, "top-1 74.7, top-5 91.6 (softmax)"),
}


@pytest.mark.parametrize(
    ("name", "system", "options", "accuracies"), CANDIDATES.values(), ids=CANDIDATES
)
def test_weights_that_do_not_tell_which_they_are(name, system, options, accuracies):
    found = known(conversion(name, system, options))
    assert found["candidates"] == accuracies
    assert "published" not in found


OTHERS = {
    "classes": ({**BLOCKS, "num_classes": 7}, {}),
    "width": ({**BLOCKS, "width": 0.125}, {}),
    "padding": ({**BLOCKS, "pool1_padding": 1}, {}),
    "biases": ({**BLOCKS, "block": {"qkv_bias": False}}, {}),
    "places": ({**BLOCKS, "blocks": [(2, 1)]}, {}),
    "fresh": (BLOCKS, {"new": ("fc.bias", "fc.weight")}),
    "inflated": (BLOCKS, {"inflated": ("conv1_w",)}),
    "rewritten": (BLOCKS, {"rewritten": True}),
}


@pytest.mark.parametrize(("options", "how"), OTHERS.values(), ids=OTHERS)
def test_weights_that_cannot_be_the_published_ones(options, how):
    found = known(conversion("i3d_r50_8x8", "caffe2", options, **how))
    assert not {"published", "candidates"} & found.keys()
    assert found["protocol"] == "none published for these weights"
    assert found["licence"] == "repository: CC-BY-NC-4.0; weights: not stated"


def test_names_of_caffe2_do_not_tell_the_source_of_other_networks():
    """PySlowFast publishes pickles with the original's names."""
    found = known(conversion("slowfast_i3d_r50_8x8", "caffe2", BLOCKS))
    assert found["source"] == "unknown (Caffe2 names)"
    assert found["licence"] == "repository: unknown; weights: not stated"
    assert not {"published", "candidates"} & found.keys()
    own = known(conversion("i3d_r50_8x8", "caffe2", BLOCKS))
    assert own["source"] == "github.com/facebookresearch/video-nonlocal-net"
    assert own["licence"] == "repository: CC-BY-NC-4.0; weights: CC-BY-NC-4.0"


def test_images_are_torchvision_s():
    found = known(conversion("i3d_r50_8x8", "torchvision", PLAIN, inflated=("conv1.weight",)))
    assert found["source"] == "github.com/pytorch/vision"
    assert found["licence"] == "repository: BSD-3-Clause; weights: not stated"


def test_kinds_that_weights_leave_open():
    assert open_kinds(conversion("i3d_r50_8x8", "caffe2", PLAIN)) == []
    assert open_kinds(conversion("tsm_r50", "tsm", BLOCKS)) == ["softmax"]
    assert open_kinds(conversion("i3d_r50_8x8", "caffe2", BLOCKS)) == ["softmax", "dot_product"]
    slow = conversion("slowfast_slow_r50_8x8", "slowfast", BLOCKS)
    assert open_kinds(slow) == ["dot_product", "softmax"]
