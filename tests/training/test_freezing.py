"""What is frozen: patterns, all but the blocks, inception_nl's flag, batch norms."""

import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from nlkernels.models import create_model
from nlkernels.training.config_optim import OptimConfig
from nlkernels.training.freezing import freeze, norms_at_rest, train_mode


def build(name, **options):
    with torch.device("meta"):
        return create_model(name, num_classes=4, width=0.25, **options)


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_patterns_cover_whole_names():
    model = build("i3d_r50_8x8", blocks=5)
    everything = trained(model)
    freeze(model, OptimConfig(freeze=("layer1.*", "conv1.weight")))
    assert everything - trained(model) == {
        name for name in everything if name.startswith("layer1.") or name == "conv1.weight"
    }


def test_a_pattern_that_matches_nothing():
    with pytest.raises(ValueError, match=r"expected optim\.freeze to match .* got 'layer9\.\*'"):
        freeze(build("c2d_r50_8x8"), OptimConfig(freeze=("layer9.*",)))


@pytest.mark.parametrize("name", ["inception_nl_flow", "i3d_r50_8x8", "rnl_tsm_r50"])
def test_only_nonlocal(name):
    model = build(name, blocks=2 if name.startswith("inception") else 5)
    freeze(model, OptimConfig(only_nonlocal=True))
    kept = trained(model)
    assert {"fc.weight", "fc.bias"} < kept
    assert all(".nl." in one or ".gate." in one or one.startswith("fc.") for one in kept)
    assert any(one.endswith("nl.norm.weight") for one in kept)


def test_only_nonlocal_without_blocks():
    with pytest.raises(ValueError, match="expected a network with blocks"):
        freeze(build("c2d_r50_8x8"), OptimConfig(only_nonlocal=True))


def test_inception_nl_begin_index_8():
    """Both blocks, the first branches of the later mixed layers and the classifier are trained."""
    model = build("inception_nl_flow", blocks=2)
    freeze(model, OptimConfig(ft_begin_index=8))
    kept = trained(model)
    later = ("4b", "4c", "4d", "4e", "4f", "5b", "5c")
    expected = {f"mixed{one}.b0.conv.weight" for one in later}
    blocks = {
        n for n, _ in model.named_parameters() if n.startswith(("mixed3c.nl.", "mixed4d.nl."))
    }
    assert kept == expected | blocks | {"fc.weight", "fc.bias"}


def test_inception_nl_begin_index_counts_blocks_where_they_are_registered():
    model = build("inception_nl_flow", blocks=2)
    freeze(model, OptimConfig(ft_begin_index=13))
    kept = trained(model)
    assert not any(".nl." in one for one in kept)
    assert "mixed4d.b0.conv.weight" in kept
    assert "mixed4c.b0.conv.weight" not in kept


def test_inception_nl_begin_index_0_freezes_norms_and_other_branches():
    model = build("inception_nl_rgb", blocks=2)
    freeze(model, OptimConfig(ft_begin_index=0))
    kept = trained(model)
    assert "conv1a.conv.weight" in kept
    assert "conv1a.norm.weight" not in kept
    assert "mixed3b.b0.conv.weight" in kept
    assert "mixed3b.b1b.conv.weight" not in kept
    assert "mixed4d.nl.norm.weight" in kept


def test_begin_index_of_another_network():
    with pytest.raises(ValueError, match=r"expected an Inception-I3D for optim\.ft_begin_index"):
        freeze(build("c2d_r50_8x8"), OptimConfig(ft_begin_index=8))


@pytest.mark.parametrize("norms", ["running", "frozen"])
def test_norms_at_rest(norms):
    model = build("i3d_r50_8x8", blocks=5)
    optim = OptimConfig(norms=norms)
    freeze(model, optim)
    train_mode(model, optim)
    found = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    assert not any(norm.training for norm in found)
    assert {norm.weight.requires_grad for norm in found} == {norms == "running"}
    assert model.dropout.training


def test_partial_norms_are_all_but_the_first_and_those_of_blocks():
    model = build("rnl_tsm_r50")
    optim = OptimConfig(norms="partial")
    freeze(model, optim)
    train_mode(model, optim)
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            free = name == "bn1" or ".nl." in name or ".gate." in name
            assert (module.training, module.weight.requires_grad) == (free, free), name
    assert not norms_at_rest(model, OptimConfig())


def test_partial_norms_of_a_network_without_any():
    with pytest.raises(ValueError, match=r"expected batch norms for optim\.norms=partial, got 0"):
        freeze(build("i3d_r50_32x4"), OptimConfig(norms="partial"))
