"""Every registered model: gradients, sizes, costs, and equality with a 2-D network."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nlkernels.models import create_model, list_models
from nlkernels.models.i3d_inception import InceptionI3D, Unit
from nlkernels.models.registry import registered
from nlkernels.modules import ChannelGate
from nlkernels.modules.layers import Affine

# The number of blocks that each builder is tested with by `make test`; all others are gates.
BLOCKS = {
    "c2d_tiny": (0, 1, 2),
    "c2d_r50_8x8": (0, 1, 5, 10),
    "i3d_r50_8x8": (0, 1, 5, 10),
    "i3d_r50_32x4": (5,),
    "tsm_r50": (0, 5),
    "rnl_tsm_r50": (5,),
    "inception_nl_flow": (0, 2),
}


def every_case():
    """Name, number of blocks and variant of every network, gates marked."""
    for name in list_models():
        design = registered(name).design
        counts = BLOCKS.get(name) or getattr(design, "places", (0, 2))
        for blocks in counts:
            for variant in ("nonlocal", "local") if blocks == max(counts) else ("nonlocal",):
                yield pytest.param(
                    name,
                    blocks,
                    variant,
                    id=f"{name}-blocks{blocks}-{variant}",
                    marks=() if name in BLOCKS else pytest.mark.gate,
                )


CASES = list(every_case())


def model_is_softmax(model):
    """Whether its blocks are: their biases of phi change no row of scores but by a constant."""
    return all(getattr(module, "kind", "softmax") == "softmax" for module in model.modules())


def a_clip(model, dtype=torch.float32):
    """Two clips of noise that the model takes, with more than one key for each of its blocks."""
    inception = isinstance(model, InceptionI3D)
    channels = getattr(getattr(model, "design", None), "in_channels", 3)
    frames = max(4, getattr(model, "min_frames", 1))
    sizes = (8, 64, 72) if inception else (frames, 48, 56)
    return torch.randn(2, channels, *sizes, dtype=dtype)


def small_model(name, *, blocks, seed, **block):
    """Narrow float64 model in which no batch norm is zero and all have statistics of their own."""
    torch.manual_seed(seed)
    model = create_model(
        name, num_classes=5, width=0.125, blocks=blocks, block=block, dropout=0.0
    ).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm3d | nn.BatchNorm1d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 1.0, 3.0)
        elif isinstance(module, nn.Conv3d) and module.bias is not None:  # projections of a block
            nn.init.normal_(module.weight, std=0.7 * module.in_channels**-0.5)
            nn.init.normal_(module.bias, std=0.1)
        elif isinstance(module, ChannelGate):
            nn.init.normal_(module.expand.weight, std=0.3)
        elif isinstance(module, Affine):
            nn.init.uniform_(module.weight, 0.5, 0.9)
        elif isinstance(module, Unit):
            nn.init.kaiming_normal_(module.conv.weight)
    return model


def test_every_registered_model_is_covered():
    assert {case.values[0] for case in CASES} == set(list_models())


@pytest.mark.parametrize(("name", "blocks", "variant"), CASES)
def test_every_parameter_receives_a_gradient(name, blocks, variant):
    # In training mode a batch norm removes every bias in front of it: eval mode hides nothing.
    model = small_model(name, blocks=blocks, seed=0, variant=variant).eval()
    clip = a_clip(model, torch.float64).requires_grad_()
    F.cross_entropy(model(clip), torch.tensor([0, 4])).backward()
    for key, parameter in model.named_parameters():
        if not parameter.requires_grad:  # the factors of an affine network
            assert parameter.grad is None
            continue
        largest = parameter.grad.abs().max()
        constant = key.endswith("nl.phi.bias") and model_is_softmax(model)
        if constant or key.endswith("gate.score.bias"):  # is added to a row: softmax removes it
            assert largest < 1e-14, key
        else:
            assert largest > 1e-8, key
    seen = clip.grad.abs().amax(dim=(0, 1, 3, 4))
    design = getattr(model, "design", None)
    if getattr(design, "stem_kernel_t", 3) == 1:  # its stride in time passes frames over
        seen = seen[:: design.stem_stride_t]
    assert seen.min() > 0


@pytest.mark.parametrize(("name", "blocks", "variant"), CASES)
def test_training_step(name, blocks, variant):
    torch.manual_seed(8)
    model = create_model(
        name, num_classes=5, width=0.125, blocks=blocks, block={"variant": variant}
    )
    logits = model(a_clip(model))
    assert logits.shape == (2, 5)
    F.cross_entropy(logits, torch.tensor([0, 4])).backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.grad.isfinite().all() for parameter in trained)
    statistics = {key: b for key, b in model.named_buffers() if key.endswith("running_var")}
    assert all((variance != 1).any() for variance in statistics.values())


@pytest.mark.parametrize("name", BLOCKS)
def test_activation_checkpointing_gives_the_same_gradients(name):
    """From outside and by the option, which alone counts the statistics of a batch once."""
    results = []
    for option, run in (
        (False, lambda model, clip: model(clip)),
        (False, lambda *args: checkpoint(*args, use_reentrant=False)),
        (True, lambda model, clip: model(clip)),
    ):
        model = small_model(name, blocks=max(BLOCKS[name]), seed=1)
        model.checkpointing = option
        run(model, a_clip(model, torch.float64)).square().sum().backward()
        trained = [each for each in model.parameters() if each.requires_grad]
        results.append(([each.grad for each in trained], list(model.buffers())))
    (plain, statistics), *others = results
    for gradients, _ in others:
        for mine, theirs in zip(gradients, plain, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    for mine, theirs in zip(others[1][1], statistics, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name in BLOCKS if "tiny" not in name])
def test_checkpointing_keeps_less(name):
    kept = []
    for checkpointing in (False, True):
        model = small_model(name, blocks=max(BLOCKS[name]), seed=1)
        model.checkpointing = checkpointing
        bytes_kept = 0

        def pack(tensor):
            nonlocal bytes_kept
            bytes_kept += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(a_clip(model, torch.float64))
        kept.append(bytes_kept)
    assert kept[1] < 0.6 * kept[0]


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
    clip = a_clip(model)
    assert torch.equal(model(clip), model(clip))
    model.dropout.train()
    assert not torch.equal(model(clip), model(clip))
