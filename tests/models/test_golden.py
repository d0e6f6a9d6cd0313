"""The 8 x 8 ResNets against golden vectors of the Caffe2 original (weights by blob name)."""

import re
from pathlib import Path

import pytest
import torch

from nlkernels.models import create_model
from tests.golden_cases import deviation, load

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"
TOLERANCE = 1e-9

SUFFIXES = {
    "w": "weight",
    "s": "weight",
    "b": "bias",
    "rm": "running_mean",
    "riv": "running_var",
}


def model_key(blob):
    """State-dict key of a blob."""
    stem, _, suffix = blob.rpartition("_")
    if stem in ("conv1", "res_conv1_bn", "pred"):
        module = {"conv1": "conv1", "res_conv1_bn": "bn1", "pred": "fc"}[stem]
    elif match := re.fullmatch(r"res(\d)_(\d+)_branch2([abc])(_bn)?", stem):
        place = f"layer{int(match[1]) - 1}.{match[2]}"
        module = f"{place}.{'bn' if match[4] else 'conv'}{'abc'.index(match[3]) + 1}"
    elif match := re.fullmatch(r"res(\d)_(\d+)_branch1(_bn)?", stem):
        module = f"layer{int(match[1]) - 1}.{match[2]}.downsample.{1 if match[3] else 0}"
    elif match := re.fullmatch(r"nonlocal_conv(\d)_(\d+)_(theta|phi|g|out|bn)", stem):
        part = "norm" if match[3] == "bn" else match[3]
        module = f"layer{int(match[1]) - 1}.{match[2]}.nl.{part}"
    else:
        raise ValueError(f"model_key: expected a blob of the 8 x 8 models, got {blob!r}")
    return f"{module}.{SUFFIXES[suffix]}"


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="golden vectors (../shared/golden) are absent")
@pytest.mark.parametrize("name", ["c2d", "i3d"])
def test_golden(name):
    case = load(GOLDEN / f"c2_{name}_r50_nl_8x8.json")
    model = create_model(f"{name}_r50_8x8", num_classes=20, blocks=5).double().eval()
    state = {model_key(blob): torch.from_numpy(array) for blob, array in case.state.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(key.endswith("num_batches_tracked") for key in missing)

    outputs = {}
    taps = {
        "pool1": "pool1",
        "res2": "layer1",
        "nonlocal_conv3_1": "layer2.1",
        "res3": "layer2",
        "res4": "layer3",
        "res5": "layer4",
    }
    for tap, path in taps.items():
        model.get_submodule(path).register_forward_hook(
            lambda _module, _inputs, output, tap=tap: outputs.update({tap: output})
        )
    with torch.no_grad():
        outputs["location_logits"] = model.location_logits(
            torch.from_numpy(case.inputs["clip"]).double()
        )
    outputs["probabilities"] = outputs["location_logits"].softmax(-1).mean(dim=(1, 2, 3))

    digests = case.record["outputs"]
    assert set(outputs) == set(digests)
    deviations = {tap: deviation(digests[tap], output) for tap, output in outputs.items()}
    assert max(deviations.values()) < TOLERANCE, deviations
