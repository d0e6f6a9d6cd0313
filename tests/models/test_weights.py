"""Files of our own: what they say of a model builds that model again."""

import pytest
import torch

from nlkernels.models import create_model, files
from nlkernels.models.weights import load_weights, save_weights

# Options that JSON writes in another form than the caller.
OPTIONS = {
    "groups": (
        "i3d_r50_32x4_ungrouped",
        {"blocks": 5, "layer_block": {2: {"temporal_group": 4}}},
    ),
    "regions": (
        "rnl_tsm_r50",
        {"blocks": 5, "layer_block": {2: {"region_kernel": (3, 5, 5)}}},
    ),
    "places": (
        "c2d_r50_8x8",
        {
            "blocks": [(2, 0), (3, 1)],
            "block": {"pool": (1, 4, 4), "scale": 0.3, "zero_init": None},
            "window": (None, 5, 5),
            "inflated": ((1,), (1, 0), (0,), (0,)),
        },
    ),
    "mixed": ("inception_nl_rgb", {"blocks": ["mixed3c"], "block": {"pool_order": "after"}}),
}


@pytest.mark.parametrize(("name", "options"), OPTIONS.values(), ids=OPTIONS)
def test_a_saved_model_computes_the_same_when_it_is_loaded(tmp_path, name, options):
    torch.manual_seed(0)
    options = {"num_classes": 3, "width": 0.125, **options}
    model = create_model(name, **options)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm3d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
        if module.__class__.__name__ == "Conv3d" and module.bias is not None:
            torch.nn.init.normal_(module.weight, std=0.5)
    save_weights(tmp_path / "m.safetensors", model, name, options)
    loaded = load_weights(tmp_path / "m.safetensors")
    clip = torch.randn(1, 3, 16, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(clip), model.eval()(clip))
    blocks = [module for module in model.modules() if hasattr(module, "temporal_group")]
    again = [module for module in loaded.modules() if hasattr(module, "temporal_group")]
    kept = ("kind", "temporal_group", "region_kernel", "pool_size", "pool_order", "scale")
    assert [[getattr(each, option) for option in kept] for each in again] == [
        [getattr(each, option) for option in kept] for each in blocks
    ]


def test_options_that_json_cannot_hold(tmp_path):
    options = {"num_classes": 3, "width": 0.125, "block": {"norm": torch.nn.BatchNorm3d}}
    model = create_model("c2d_tiny", **options, blocks=1)
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_weights(tmp_path / "m", model, "c2d_tiny", {**options, "blocks": 1})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_options_that_were_broken(tmp_path, text):
    model = create_model("c2d_tiny", num_classes=3, width=0.125)
    path = tmp_path / "m.safetensors"
    files.write(path, model.state_dict(), {"model": "c2d_tiny", "options": text})
    with pytest.raises(
        ValueError, match=r"load_weights: .*m\.safetensors: expected options .*JSON"
    ):
        load_weights(path)
