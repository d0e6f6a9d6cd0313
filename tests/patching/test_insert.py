"""Blocks behind modules of models that have none."""

import copy

import pytest
import torch
from torch import nn

from nlkernels import NonLocalBlock2d, NonLocalBlock3d, insert_nonlocal
from nlkernels.patching import FramesBlock
from tests.patching.packages.torchvision.models.video import resnet

CLIP = (2, 3, 4, 16, 16)
PLACES = {"layer2.1", "layer3.1"}


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv3d(channels, channels, 3, padding=1)
        self.bn = nn.BatchNorm3d(channels)

    def forward(self, x, *, relu=True):
        out = x + self.bn(self.conv(x))
        return out.relu() if relu else out


class Video(nn.Module):
    """As torchvision's networks for clips are built."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv3d(3, 8, 3, stride=(1, 2, 2), padding=1), nn.ReLU())
        self.layer2 = nn.Sequential(Residual(8), Residual(8))
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(self.layer2(self.stem(x)).mean((2, 3, 4)))


class Frames(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

    def forward(self, x):
        return self.conv2(self.conv1(x))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_model_stays_the_same_until_it_learns(training):
    model, x = Video().train(training), torch.randn(CLIP)
    keys, expected = list(model.state_dict()), copy.deepcopy(model)(x)
    buffers = copy.deepcopy(dict(model.named_buffers()))
    report = insert_nonlocal(model, at=["layer2.0", "layer2"], backend="chunked")
    assert [row.where for row in report] == ["layer2.0.nl", "layer2.nl"]
    assert list(report.blocks) == ["layer2.0.nl", "layer2.nl"]
    for name, buffer in buffers.items():
        assert torch.equal(model.get_buffer(name), buffer)
    new = [key for key in model.state_dict() if key not in keys]
    assert new and all(".nl." in key for key in new)
    assert model.layer2[0].nl.dim == 8 and model.layer2.nl.training == training
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    model(x).sum().backward()
    for block in report.blocks.values():
        assert block.norm.weight.grad.abs().sum() > 0
        nn.init.ones_(block.norm.weight)
    assert not torch.allclose(model(x), expected)
    report.restore()
    assert list(model.state_dict()) == keys and len(model.layer2) == 2
    assert type(model.layer2[0]) is Residual and "nonlocal_place" not in vars(model.layer2[0])


def test_the_block_takes_what_the_module_returns():
    model = Video().eval()
    with insert_nonlocal(model, at="layer2.1", kind="dot_product", channels=8) as report:
        assert report[0][:7] == (
            "layer2.1.nl",
            "caffe2",
            "dot_product",
            "before",
            *[None] * 2,
            "auto",
        )
        x, block = torch.randn(2, 8, 2, 4, 4), report.blocks["layer2.1.nl"]
        nn.init.normal_(block.norm.weight)
        with torch.no_grad():
            expected = block(
                model.layer2[1].conv(x) * 0 + x + model.layer2[1].bn(model.layer2[1].conv(x))
            )
            torch.testing.assert_close(model.layer2[1](x, relu=False), expected)


def test_presets_are_the_identity_at_the_start():
    for preset in ("pytorchvideo", "tushar", "caffe2_affine", "tsm"):
        model, x = Video().eval(), torch.randn(CLIP)
        expected = model(x)
        insert_nonlocal(model, at=["layer2.1"], preset=preset)
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


def test_frames_as_images_and_as_clips():
    x = torch.randn(8, 3, 12, 12)
    model = Frames().double()
    report = insert_nonlocal(model, at=["conv1"], clip=x.double(), name="nonlocal_block")
    assert type(model.conv1.nonlocal_block) is NonLocalBlock2d and report[0].queries == 100
    report.restore()
    report = insert_nonlocal(model, at=["conv1"], segments=4, clip=(8, 3, 12, 12))
    block = model.conv1.nl
    assert type(block) is FramesBlock and report[0].queries == 400
    assert block.theta.weight.dtype == torch.float64
    nn.init.ones_(block.norm.weight)
    model.eval()
    features = torch.randn(8, 8, 5, 5).double()
    clips = features.unflatten(0, (2, 4)).transpose(1, 2)
    expected = NonLocalBlock3d.forward(block, clips).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(block(features), expected)
    with pytest.raises(ValueError, match="multiple of segments=4"):
        model(x.double()[:6])


def check_network(model, shape, channels, **options):
    """Blocks behind residual blocks of another package's network: inserted, trained, taken out."""
    x, keys = torch.randn(shape), list(model.state_dict())
    classes = {name: type(module) for name, module in model.named_modules()}
    expected = model.eval()(x)
    report = insert_nonlocal(model, at=sorted(PLACES), clip=shape, backend="chunked", **options)
    assert list(report.blocks) == [f"{place}.nl" for place in sorted(PLACES)]
    assert [block.dim for block in report.blocks.values()] == channels
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    added = {key for key in model.state_dict() if key.split(".nl.")[0] in PLACES} - set(keys)
    assert set(keys) | added == set(model.state_dict())
    for block in report.blocks.values():
        nn.init.ones_(block.norm.weight)
    assert not torch.allclose(model(x), expected)
    model.train()(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert "nl.out.bias" in name or "nl.phi.bias" in name or parameter.grad.any(), name
    report.restore()
    assert list(model.state_dict()) == keys
    assert {name: type(module) for name, module in model.named_modules()} == classes


@pytest.mark.parametrize("name", ["r3d_18", "mc3_18", "r2plus1d_18"])
def test_networks_like_torchvision_s(name):
    check_network(getattr(resnet, name)(), (2, 3, 4, 32, 32), [16, 32])


@pytest.mark.gate
def test_copies_and_compiled_models():
    model, x = Video().eval(), torch.randn(CLIP)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = compiled(x)
    report = insert_nonlocal(compiled, at=["layer2.0"], backend="chunked")
    assert report[0].where == "_orig_mod.layer2.0.nl"
    nn.init.ones_(report.blocks["_orig_mod.layer2.0.nl"].norm.weight)
    changed = model(x)
    assert not torch.allclose(changed, expected)
    torch.testing.assert_close(compiled(x), changed)
    torch.testing.assert_close(copy.deepcopy(model)(x), changed)


class Awkward(nn.Module):
    """What cannot run without data."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(3, 4, 1)
        self.pair = nn.MaxPool3d(2, return_indices=True)

    def forward(self, x):
        x = self.conv(x)
        return self.pair(x if x.sum().item() > 0 else -x)


def test_models_that_need_data_run_on_random_numbers():
    model = Awkward()
    report = insert_nonlocal(model, at=["conv"], clip=(1, 3, 2, 6, 6))
    assert report[0].queries == 72 and model.training
    report.restore()
    with pytest.raises(ValueError, match=r"expected pair to return one tensor .*got a tuple"):
        insert_nonlocal(model, at=["pair"], clip=(1, 3, 2, 6, 6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"at": ["layer2.3"]}, "got 'layer2.3'; near ones are layer2"),
        ({"at": []}, "each once"),
        ({"at": ["fc"]}, r"fc to return one tensor .*got \(2, 5\)"),
        ({"at": ["layer2.0"], "name": "conv"}, "a name that layer2.0 does not have"),
        ({"at": ["layer2.0"], "zero_init": None}, "identity at the start"),
        ({"at": ["layer2.0"], "segments": 4}, "leave segments out for clips"),
        ({"at": ["layer2.0"], "channels": [8, 8]}, "channels for each of 1 modules"),
        ({"at": ["layer2.0"], "kind": "soft"}, "expected kind to be one of"),
        ({"at": ["layer2.0"], "clip": (2, 3, 8, 8)}, r"a clip that the model takes.*pass clip="),
    ],
)
def test_mistakes_change_nothing(options, message):
    model = Video()
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        insert_nonlocal(model, **options)
    assert list(model.state_dict()) == keys and type(model.layer2[0]) is Residual


def test_twice_at_one_place_is_refused():
    model = Video()
    insert_nonlocal(model, at=["layer2.0"])
    with pytest.raises(ValueError, match="replaced or extended"):
        insert_nonlocal(model, at=["layer2.0"], name="other")
    with pytest.raises(TypeError, match="expected a module"):
        insert_nonlocal([], at=["layer2.0"])
