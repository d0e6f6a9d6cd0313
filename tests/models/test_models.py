"""Every registered model: gradients, sizes, costs, and equality with a 2-D network."""

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from nlkernels.models import create_model, list_models

BLOCKS = {"c2d_tiny": (0, 1, 2), "c2d_r50_8x8": (0, 1, 5, 10), "i3d_r50_8x8": (0, 1, 5, 10)}
CASES = [
    pytest.param(name, blocks, variant, id=f"{name}-blocks{blocks}-{variant}")
    for name, counts in BLOCKS.items()
    for blocks in counts
    for variant in (("nonlocal", "local") if blocks == max(counts) else ("nonlocal",))
]


def small_model(name, *, blocks, seed, **block):
    """Narrow float64 model in which no batch norm is zero and all have statistics of their own."""
    torch.manual_seed(seed)
    model = create_model(
        name, num_classes=5, width=0.125, blocks=blocks, block=block, dropout=0.0
    ).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm3d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 1.0, 3.0)
        elif isinstance(module, nn.Conv3d) and module.bias is not None:  # projections of a block
            nn.init.normal_(module.weight, std=0.7 * module.in_channels**-0.5)
            nn.init.normal_(module.bias, std=0.1)
    return model


def test_every_registered_model_is_covered():
    assert sorted(BLOCKS) == list_models()


@pytest.mark.parametrize(("name", "blocks", "variant"), CASES)
def test_every_parameter_receives_a_gradient(name, blocks, variant):
    # In training mode a batch norm removes every bias in front of it: eval mode hides nothing.
    model = small_model(name, blocks=blocks, seed=0, variant=variant).eval()
    clip = torch.randn(2, 3, 4, 32, 40, dtype=torch.float64, requires_grad=True)
    F.cross_entropy(model(clip), torch.tensor([0, 4])).backward()
    for key, parameter in model.named_parameters():
        largest = parameter.grad.abs().max()
        if key.endswith("nl.phi.bias"):  # adds a constant to a row of scores: softmax removes it
            assert largest < 1e-14, key
        else:
            assert largest > 1e-8, key
    assert clip.grad.abs().amax(dim=(0, 1, 3, 4)).min() > 0


@pytest.mark.parametrize(("name", "blocks", "variant"), CASES)
def test_training_step(name, blocks, variant):
    torch.manual_seed(8)
    model = create_model(
        name, num_classes=5, width=0.125, blocks=blocks, block={"variant": variant}
    )
    logits = model(torch.randn(2, 3, 4, 32, 40))
    assert logits.shape == (2, 5)
    F.cross_entropy(logits, torch.tensor([0, 4])).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    statistics = {key: b for key, b in model.named_buffers() if key.endswith("running_var")}
    assert all((variance != 1).any() for variance in statistics.values())


@pytest.mark.parametrize("name", BLOCKS)
def test_activation_checkpointing_gives_the_same_gradients(name):
    gradients = []
    for run in (
        lambda model, clip: model(clip),
        lambda *args: checkpoint(*args, use_reentrant=False),
    ):
        model = small_model(name, blocks=max(BLOCKS[name]), seed=1)
        run(model, torch.randn(2, 3, 4, 32, 32, dtype=torch.float64)).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["softmax", "gaussian", "dot_product"])
def test_blocks_of_every_kind_change_the_logits(kind):
    clip = torch.randn(2, 3, 4, 32, 32, dtype=torch.float64)
    plain = small_model("c2d_tiny", blocks=0, seed=9).eval()
    model = small_model("c2d_tiny", blocks=2, seed=9, kind=kind).eval()
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert all(".nl." in key for key in missing)
    difference = (model(clip) - plain(clip)).abs().max()
    assert difference.isfinite()
    assert difference > 0.01


# Parameters for 400 classes, and multiply-adds of one 8 x 224 x 224 clip, as counted for the
# original: convolutions, classifier and, in blocks, the two products of the full affinity.
COSTS = {
    ("c2d_r50_8x8", 0): ("24.328M", "19.3G"),
    ("c2d_r50_8x8", 5): ("31.686M", "27.4G"),
    ("i3d_r50_8x8", 0): ("28.043M", "28.1G"),
    ("i3d_r50_8x8", 5): ("35.402M", "36.2G"),
}


@pytest.mark.parametrize(("name", "blocks"), COSTS, ids=lambda value: str(value))
def test_parameters_and_flops_are_the_published_ones(name, blocks):
    counter = FlopCounterMode(display=False)
    with FakeTensorMode(), counter, torch.no_grad():
        model = create_model(name, num_classes=400, blocks=blocks).eval()
        model(torch.empty(1, 3, 8, 224, 224))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    multiply_adds = counter.get_total_flops() / 2
    assert (f"{parameters / 1e6:.3f}M", f"{multiply_adds / 1e9:.1f}G") == COSTS[name, blocks]


@pytest.mark.parametrize("name", ["c2d_r50_8x8", "i3d_r50_8x8"])
def test_stage_sizes_at_224(name):
    sizes = {}
    with torch.device("meta"):
        model = create_model(name, num_classes=400, width=0.125).eval()
        for stage in ("conv1", "pool1", "layer1", "layer2", "layer3", "layer4"):
            model.get_submodule(stage).register_forward_hook(
                lambda _module, _inputs, output, stage=stage: sizes.update(
                    {stage: tuple(output.shape[2:])}
                )
            )
        model(torch.empty(1, 3, 8, 224, 224))
    assert sizes == {
        "conv1": (8, 112, 112),
        "pool1": (8, 55, 55),
        "layer1": (8, 55, 55),
        "layer2": (4, 28, 28),
        "layer3": (4, 14, 14),
        "layer4": (4, 7, 7),
    }


def test_tiny_blocks_see_8_by_6_by_6():
    seen = []
    model = create_model("c2d_tiny", num_classes=2, blocks=2)
    for index in (3, 4):
        model.layers[index].nl.register_forward_hook(
            lambda _module, inputs, _output: seen.append(tuple(inputs[0].shape))
        )
    model(torch.zeros(1, 3, 8, 48, 48))
    assert seen == [(1, 64, 8, 6, 6)] * 2


@pytest.mark.parametrize("name", ["c2d_r50_8x8", "i3d_r50_8x8"])
def test_location_logits(name):
    model = small_model(name, blocks=1, seed=2).eval()
    with torch.no_grad():
        clip = torch.randn(1, 3, 2, 32, 32, dtype=torch.float64)
        torch.testing.assert_close(model.location_logits(clip)[:, 0, 0, 0], model(clip))
        clip = torch.randn(1, 3, 2, 256, 224, dtype=torch.float64)
        logits = model.location_logits(clip)
        assert logits.shape == (1, 1, 2, 1, 5)
        second = model.features(clip)[:, :, :, 1:8].mean(dim=(2, 3, 4))
        torch.testing.assert_close(logits[:, 0, 1, 0], model.fc(second))


def norm_2d(x, norm):
    return F.batch_norm(
        x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
    )


def conv_2d(x, conv):
    return F.conv2d(x, conv.weight[:, :, 0], conv.bias, conv.stride[1:], padding=conv.padding[1:])


def block_2d(x, nl):
    keys = F.max_pool2d(x, 2)
    theta, phi, g = conv_2d(x, nl.theta), conv_2d(keys, nl.phi), conv_2d(keys, nl.g)
    scores = torch.einsum("bcij,bckl->bijkl", theta, phi) * theta.shape[1] ** -0.5
    weights = scores.flatten(3).softmax(-1).unflatten(3, scores.shape[3:])
    return x + norm_2d(conv_2d(torch.einsum("bijkl,bckl->bcij", weights, g), nl.out), nl.norm)


def resnet_2d(model, image):
    """The C2D ResNet on an image, from 2-D functions only."""
    x = F.max_pool2d(norm_2d(conv_2d(image, model.conv1), model.bn1).relu(), 3, stride=2)
    for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
        for unit in layer:
            y = norm_2d(conv_2d(x, unit.conv1), unit.bn1).relu()
            y = norm_2d(conv_2d(y, unit.conv2), unit.bn2).relu()
            y = norm_2d(conv_2d(y, unit.conv3), unit.bn3)
            if unit.downsample is not None:
                x = norm_2d(conv_2d(x, unit.downsample[0]), unit.downsample[1])
            x = (x + y).relu()
            x = x if unit.nl is None else block_2d(x, unit.nl)
    return model.fc(x.mean(dim=(2, 3)))


def tiny_2d(model, image):
    """C2DTiny on an image, from 2-D functions only."""
    x = image
    for layer in model.layers:
        x = norm_2d(conv_2d(x, layer.conv), layer.bn).relu()
        x = x if layer.nl is None else block_2d(x, layer.nl)
    return model.fc(x.mean(dim=(2, 3)))


@pytest.mark.parametrize(
    ("name", "blocks", "frames"),
    [
        ("c2d_tiny", 2, 1),
        ("c2d_tiny", 2, 4),
        ("c2d_r50_8x8", 0, 8),
        ("c2d_r50_8x8", 5, 2),
        ("c2d_r50_8x8", 5, 8),
    ],
    ids=lambda value: str(value),
)
def test_c2d_on_a_constant_clip_equals_a_2d_network(name, blocks, frames):
    model = small_model(name, blocks=blocks, seed=3).eval()
    image = torch.randn(2, 3, 48, 56, dtype=torch.float64)
    with torch.no_grad():
        expected = (tiny_2d if name == "c2d_tiny" else resnet_2d)(model, image)
        logits = model(image.unsqueeze(2).expand(-1, -1, frames, -1, -1))
    torch.testing.assert_close(logits, expected, rtol=1e-11, atol=1e-11)


def test_i3d_with_centre_taps_only_equals_c2d():
    c2d = small_model("c2d_r50_8x8", blocks=5, seed=4).eval()
    i3d = small_model("i3d_r50_8x8", blocks=5, seed=5).eval()
    state = c2d.state_dict()
    inflated = 0
    for key, tensor in i3d.state_dict().items():
        if tensor.shape != state[key].shape:
            centre = torch.zeros_like(tensor)
            centre[:, :, tensor.shape[2] // 2] = state[key][:, :, 0]
            state[key] = centre
            inflated += 1
    i3d.load_state_dict(state)
    assert inflated == 10
    clip = torch.randn(1, 3, 4, 48, 48, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(i3d(clip), c2d(clip), rtol=1e-11, atol=1e-11)


def test_initialisation_of_a_resnet():
    torch.manual_seed(6)
    model = create_model("i3d_r50_8x8", num_classes=400, width=0.5)
    for path in ("conv1", "layer1.0.conv1", "layer3.2.conv2", "layer4.0.downsample.0"):
        weight = model.get_submodule(path).weight
        fan_out = weight.shape[0] * weight[0, 0].numel()
        assert weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05), path
    assert not model.layer2[3].bn3.weight.any()
    assert torch.all(model.layer2[0].downsample[1].weight == 1)
    assert model.fc.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert not model.fc.bias.any()


@pytest.mark.parametrize("name", BLOCKS)
def test_dropout_acts_in_training_only(name):
    torch.manual_seed(7)
    model = create_model(name, num_classes=5, width=0.25, dropout=0.5).eval()
    clip = torch.randn(1, 3, 2, 64, 64)
    assert torch.equal(model(clip), model(clip))
    model.dropout.train()
    assert not torch.equal(model(clip), model(clip))
