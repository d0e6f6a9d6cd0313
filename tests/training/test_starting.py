"""``model.weights``: trainings that start from the weights of others."""

import pytest
import torch

from nlkernels.cli import main
from nlkernels.models import create_model, files
from nlkernels.models.blobs import bn_to_affine
from nlkernels.models.convert import export_foreign
from nlkernels.models.weights import save_weights
from nlkernels.training import checkpoint
from nlkernels.training.data.synthetic import write_synthetic
from nlkernels.training.starting import start_from

SMALL = {"num_classes": 3, "width": 0.125}


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    root = tmp_path_factory.mktemp("generated")
    write_synthetic(root / "clips", train=12, test=4, seed=0, frames=4, size=32)
    return root / "clips"


@pytest.fixture
def ours(tmp_path):
    """Weights of a small network without blocks, in a file of ours."""
    model = create_model("c2d_tiny", **SMALL)
    path = tmp_path / "ours.safetensors"
    save_weights(path, model, "c2d_tiny", SMALL)
    return path, model.state_dict()


def test_weights_of_images_are_repeated_over_time(tmp_path):
    images = create_model("mmaction_c2d_nopool_r50_8x8", **SMALL).state_dict()
    flat = {
        key: value.squeeze(2) if value.ndim == 5 else value
        for key, value in images.items()
        if not key.startswith("fc.")
    }
    flat |= {"fc.weight": torch.zeros(1000, flat["layer4.2.bn3.weight"].numel())}
    flat |= {"fc.bias": torch.zeros(1000)}
    torch.save(flat, tmp_path / "resnet50.pth")
    model = create_model("i3d_r50_8x8", blocks=5, **SMALL)
    fresh = {key: value.clone() for key, value in model.state_dict().items()}
    line = start_from(model, str(tmp_path / "resnet50.pth"))
    found = model.state_dict()
    assert torch.allclose(found["conv1.weight"].sum(2), flat["conv1.weight"])
    assert torch.equal(found["layer3.0.bn1.weight"], flat["layer3.0.bn1.weight"])
    for key in ("fc.weight", "layer2.1.nl.theta.weight"):
        assert torch.equal(found[key], fresh[key])
    assert line.startswith("weights: ") and "(torchvision)" in line and line.endswith("start fresh")


def test_a_published_checkpoint_without_blocks(tmp_path):
    plain = create_model("i3d_r50_8x8", num_classes=5, width=0.125)
    files.write(tmp_path / "plain.pkl", export_foreign(plain), format="caffe2")
    model = create_model("i3d_r50_8x8", blocks=5, **SMALL)
    start_from(model, str(tmp_path / "plain.pkl"))
    assert torch.equal(model.layer4[2].conv3.weight, plain.layer4[2].conv3.weight)


STARTS = {
    "mindspore": ("mmaction_i3d_r50_32x2", {"blocks": 5, "block": {"kind": "dot_product"}}),
    "inception": ("hassony2_i3d_flow", {}),
    "slowfast": ("slowfast_c2d_r50_8x8", {}),
}
TARGETS = {
    "mindspore": ("mindspore_i3d_r50_32", {"blocks": 5}),
    "inception": ("inception_nl_flow", {"blocks": 2}),
    "slowfast": ("slowfast_c2d_r50_8x8", {"blocks": 5}),
}


@pytest.mark.parametrize("kind", STARTS)
def test_networks_that_start_from_others(tmp_path, kind):
    name, options = STARTS[kind]
    source = create_model(name, num_classes=5, width=0.125, **options)
    torch.save(export_foreign(source), tmp_path / "source.pth")
    name, options = TARGETS[kind]
    model = create_model(name, **SMALL, **options)
    start_from(model, str(tmp_path / "source.pth"))
    first = "conv1a.conv.weight" if kind == "inception" else "layer4.2.conv3.weight"
    assert torch.equal(model.state_dict()[first], source.state_dict()[first])


def test_factors_start_from_norms(tmp_path):
    plain = create_model("i3d_r50_8x8", num_classes=3, width=0.125)
    blobs = bn_to_affine(export_foreign(plain))
    tensors = {key: value for key, value in blobs.items() if isinstance(value, torch.Tensor)}
    files.write(tmp_path / "affine.pkl", tensors, format="caffe2")
    model = create_model("i3d_r50_32x4", blocks=5, **SMALL)
    start_from(model, str(tmp_path / "affine.pkl"))
    assert torch.equal(model.layer4[2].conv3.weight, plain.layer4[2].conv3.weight)


def test_weights_of_ours(ours, generated, tmp_path, capsys):
    path, state = ours
    model = create_model("c2d_tiny", num_classes=2, width=0.125, blocks=2)
    block = model.layers[3].nl.theta.weight.clone()
    assert "start fresh" in start_from(model, str(path))
    assert torch.equal(model.state_dict()["layers.0.conv.weight"], state["layers.0.conv.weight"])
    assert torch.equal(model.layers[3].nl.theta.weight, block)

    argv = ["train", "smoke", f"data.root={generated}", "data.train_files=12", "data.test_files=4"]
    argv += ["model.width=0.125", "optim.lr=0", "optim.weight_decay=0", f"run.out={tmp_path / 'a'}"]
    assert main([*argv, f"model.weights={path}"]) == 0
    assert f"tensors of {path} (nlkernels)" in capsys.readouterr().out
    first = checkpoint.load(tmp_path / "a" / "model.pt")["model"]
    assert torch.equal(first["layers.5.conv.weight"], state["layers.5.conv.weight"])
    # The checkpoint of a training serves, too; a resumed training keeps its own weights.
    argv[-1] = f"run.out={tmp_path / 'b'}"
    assert main([*argv, f"model.weights={tmp_path / 'a' / 'model.pt'}", "run.seed=7"]) == 0
    assert torch.equal(
        checkpoint.load(tmp_path / "b" / "model.pt")["model"]["fc.weight"], first["fc.weight"]
    )
    argv += ["run.seed=7", "run.resume=auto"]
    assert main([*argv, "model.weights=gone", "optim.steps=5"]) == 0


def test_weights_that_are_others(ours, tmp_path):
    path, _ = ours
    with pytest.raises(ValueError, match=r"model.weights: .* got layers.0.conv.weight \(8"):
        start_from(create_model("c2d_tiny", num_classes=2, width=1.0), str(path))
    save_weights(
        tmp_path / "blocks.safetensors",
        create_model("c2d_tiny", blocks=1, **SMALL),
        "c2d_tiny",
        SMALL | {"blocks": 1},
    )
    model = create_model("c2d_tiny", **SMALL)
    with pytest.raises(ValueError, match=r"got layers.4.nl.* and \d+ differences in all; use the"):
        start_from(model, str(tmp_path / "blocks.safetensors"))
    with pytest.raises(FileNotFoundError, match="which is no file; check the path"):
        start_from(model, str(tmp_path / "none.pth"))
