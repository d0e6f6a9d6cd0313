"""Inserted blocks: where they sit, that they start as the identity, and the local control."""

import pytest
import torch
from torch.nn import functional as F

from nlkernels.models import LocalBlock3d, create_model
from nlkernels.modules import NonLocalBlock3d

PLACES = {
    ("c2d_tiny", 0): [],
    ("c2d_tiny", 1): ["layers.4.nl"],
    ("c2d_tiny", 2): ["layers.3.nl", "layers.4.nl"],
    ("c2d_r50_8x8", 1): ["layer3.4.nl"],
    ("i3d_r50_8x8", 0): [],
    ("i3d_r50_8x8", 10): [
        *(f"layer2.{index}.nl" for index in range(4)),
        *(f"layer3.{index}.nl" for index in range(6)),
    ],
    ("i3d_r50_8x8", 5): ["layer2.1.nl", "layer2.3.nl", "layer3.1.nl", "layer3.3.nl", "layer3.5.nl"],
}
SMALL_CLIP = (2, 3, 4, 32, 32)
ALL_WITH_BLOCKS = [("c2d_tiny", 2), ("c2d_r50_8x8", 5), ("i3d_r50_8x8", 5)]
VARIANTS = {"nonlocal": NonLocalBlock3d, "local": LocalBlock3d}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("name", "blocks"), PLACES, ids=lambda value: str(value))
def test_places(name, blocks, variant):
    with torch.device("meta"):
        model = create_model(name, num_classes=2, blocks=blocks, block={"variant": variant})
    found = [path for path, module in model.named_modules() if path.endswith(".nl")]
    assert found == PLACES[name, blocks]
    assert all(isinstance(model.get_submodule(path), VARIANTS[variant]) for path in found)


def test_block_options_arrive():
    block = {"inner": 24, "norm_eps": 0.5, "kind": "dot_product", "qkv_bias": False}
    model = create_model("c2d_tiny", num_classes=2, blocks=2, block=block)
    for index in (3, 4):
        nl = model.layers[index].nl
        assert nl.theta.weight.shape == (24, 64, 1, 1, 1)
        assert nl.theta.bias is None
        assert nl.norm.eps == 0.5
        assert nl.kind == "dot_product"


@pytest.mark.parametrize("variant", VARIANTS)
def test_presets_arrive_and_other_options_win(variant):
    block = {"preset": "mmaction_i3d", "kind": "gaussian", "variant": variant}
    model = create_model("i3d_r50_8x8", num_classes=2, width=0.125, blocks=1, block=block)
    nl = model.layer3[4].nl
    if variant == "local":
        assert isinstance(nl, LocalBlock3d)
        return
    assert (nl.kind, nl.pool_order, nl.scale) == ("gaussian", "after", 1.0)
    assert nl.out.bias is None
    assert nl.norm.eps == 1e-5  # the preset's, not the original's
    with pytest.raises(ValueError, match="did you mean 'mmaction_i3d'"):
        create_model("c2d_tiny", num_classes=2, block={"preset": "mmaction_i3"})


@pytest.mark.parametrize("kind", ["relu", "concat", "region_softmax", "region_relu"])
def test_every_kind_trains_inside_a_model(kind):
    block = {"kind": kind, "zero_init": None}
    model = create_model("c2d_tiny", num_classes=2, width=0.5, blocks=1, block=block)
    F.cross_entropy(model(torch.randn(SMALL_CLIP)), torch.tensor([1, 0])).backward()
    for name, parameter in model.layers[4].nl.named_parameters():
        assert parameter.grad.isfinite().all(), name


def test_resnet_blocks_follow_the_original():
    torch.manual_seed(0)
    model = create_model("i3d_r50_8x8", num_classes=2, width=0.5, blocks=5)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm3d):
            assert module.eps == 1.0000001e-5
    nl = model.layer3[5].nl
    for conv in (nl.theta, nl.phi, nl.g, nl.out):
        assert conv.weight.std().item() == pytest.approx(0.01, rel=0.02)
        assert not conv.bias.any()


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("name", "blocks"), ALL_WITH_BLOCKS, ids=lambda value: str(value))
def test_blocks_start_as_the_identity(name, blocks, variant, mode):
    outputs = []
    for count in (0, blocks):
        torch.manual_seed(1)
        model = create_model(
            name,
            num_classes=5,
            width=0.125,
            blocks=count,
            block={"variant": variant},
            dropout=0.0,
        ).train(mode == "train")
        clip = torch.randn(SMALL_CLIP, generator=torch.Generator().manual_seed(2))
        outputs.append(model(clip))
    assert outputs[0].abs().max() > 0
    assert torch.equal(outputs[0], outputs[1])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("name", "blocks"), ALL_WITH_BLOCKS, ids=lambda value: str(value))
def test_zero_gamma_receives_a_gradient_at_the_first_step(name, blocks, variant):
    torch.manual_seed(3)
    model = create_model(
        name, num_classes=5, width=0.125, blocks=blocks, block={"variant": variant}
    )
    F.cross_entropy(model(torch.randn(SMALL_CLIP)), torch.tensor([1, 3])).backward()
    gammas = {key: p for key, p in model.named_parameters() if key.endswith("nl.norm.weight")}
    assert len(gammas) == blocks
    for key, gamma in gammas.items():
        assert not gamma.any(), key
        assert gamma.grad.abs().max() > 0, key


def test_loss_falls_and_blocks_leave_the_identity_within_20_steps():
    torch.manual_seed(4)
    model = create_model("c2d_tiny", num_classes=2, width=0.25, blocks=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    clips, labels = torch.randn(8, 3, 4, 32, 32), torch.arange(8) % 2
    losses = []
    for _ in range(20):
        loss = F.cross_entropy(model(clips), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(model.layers[index].nl.norm.weight.abs().max() > 0 for index in (3, 4))


@pytest.mark.parametrize("width", [0.125, 0.25, 0.5, 0.75, 1.0, 2.0])
@pytest.mark.parametrize(("name", "blocks"), ALL_WITH_BLOCKS, ids=lambda value: str(value))
def test_local_blocks_match_the_parameters(name, blocks, width):
    counts = {}
    for variant in VARIANTS:
        with torch.device("meta"):
            model = create_model(
                name, num_classes=2, width=width, blocks=blocks, block={"variant": variant}
            )
        counts[variant] = [
            sum(parameter.numel() for parameter in module.parameters())
            for path, module in model.named_modules()
            if path.endswith(".nl")
        ]
    assert len(counts["local"]) == blocks
    for local, nonlocal_ in zip(counts["local"], counts["nonlocal"], strict=True):
        assert local == pytest.approx(nonlocal_, rel=0.03)


def test_local_block_sees_its_neighbourhood_only():
    torch.manual_seed(5)
    block = LocalBlock3d(16, parameters=2000).double().eval()
    torch.nn.init.ones_(block.norm.weight)
    x = torch.randn(1, 16, 5, 7, 7, dtype=torch.float64)
    before, changed = block(x), x.clone()
    changed[:, :, 2, 3, 3] += 1
    differs = (block(changed) - before).abs().amax(dim=(0, 1)) > 0
    expected = torch.zeros_like(differs)
    expected[1:4, 2:5, 2:5] = True
    assert torch.equal(differs, expected)


@pytest.mark.parametrize(("dim", "parameters"), [(0, 10), (16, 0)])
def test_local_block_mistakes(dim, parameters):
    with pytest.raises(ValueError, match=rf">= 1, got {dim} and {parameters}; pass"):
        LocalBlock3d(dim, parameters=parameters)
