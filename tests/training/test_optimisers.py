"""Parameter groups of every recipe, and optimisers that are equal to published formulations."""

import pytest
import torch

from nlkernels.models import create_model
from nlkernels.training.config_optim import OptimConfig
from nlkernels.training.optimisers import make_optimiser, parameter_groups


def factors(model, **options):
    """Name of a parameter -> (factor of the rate, factor of the decay)."""
    optim = OptimConfig(weight_decay=0.5, steps=1, **options)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {}
    for group in parameter_groups(model, optim):
        assert group["params"], group["name"]
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert name not in found
            found[name] = group["lr_mult"], group["weight_decay"] / 0.5
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(found) == trained
    return found


def build(name, **options):
    with torch.device("meta"):
        return create_model(name, num_classes=4, width=0.25, **options)


def test_weights_spares_biases_and_norms():
    model = build("i3d_r50_8x8", blocks=5)
    found = factors(model)
    for name, parameter in model.named_parameters():
        assert found[name] == (1, 1 if parameter.ndim > 1 else 0), name


def test_all_decays_everything():
    assert set(factors(build("mmaction_c2d_r50_8x8"), decay="all").values()) == {(1, 1)}


@pytest.mark.parametrize("name", ["i3d_r50_8x8", "slowfast_c2d_r50_8x8"])
def test_caffe2_decays_biases_and_spares_norms(name):
    found = factors(build(name, blocks=5), decay="caffe2")
    assert found["layer2.1.nl.theta.bias"] == (1, 1)
    assert found["layer2.1.nl.norm.weight"] == (1, 0)
    assert found["layer2.1.nl.norm.bias"] == (1, 0)
    assert found["fc.bias"] == (1, 1)
    assert found["bn1.weight"] == found["layer1.0.downsample.1.bias"] == (1, 0)
    assert found["conv1.weight"] == (1, 1)


def test_affine_norms_are_in_no_group():
    found = factors(build("i3d_r50_32x4", blocks=5), decay="caffe2")
    assert "bn1.weight" not in found
    assert found["layer2.1.nl.out.bias"] == (1, 1)


def test_tsm():
    found = factors(build("tsm_r50", blocks=5), decay="tsm")
    assert found["conv1.weight"] == found["layer2.0.conv1.weight"] == (1, 1)
    assert found["layer2.0.nl.theta.weight"] == (1, 1)
    assert found["layer2.0.nl.theta.bias"] == (2, 0)
    assert found["bn1.weight"] == found["layer2.0.nl.norm.weight"] == (1, 0)
    assert found["fc.weight"] == (5, 1)
    assert found["fc.bias"] == (10, 0)
    plain = factors(build("tsm_r50", blocks=5), decay="tsm", fc_lr5=False)
    assert plain["fc.weight"] == (1, 1)
    assert plain["fc.bias"] == (2, 0)


def test_tsm_of_optical_flow_moves_its_first_convolution_faster():
    found = factors(build("tsm_r50", in_channels=10), decay="tsm")
    assert found["conv1.weight"] == (5, 1)
    assert found["layer1.0.conv1.weight"] == (1, 1)


def test_rnl():
    found = factors(build("rnl_tsm_r50"), decay="rnl")
    assert found["layer2.0.nl.theta.weight"] == (1, 1)
    assert found["layer2.0.nl.theta.bias"] == found["layer2.0.nl.out.bias"] == (2, 0)
    assert found["layer2.0.nl.norm.weight"] == (1, 1)
    assert found["layer2.0.nl.norm.bias"] == (2, 0)
    (region,) = [n for n in found if n.startswith("layer2.0.nl.") and "region" in n]
    assert found[region] == (2, 0)
    # The gate is no block to the published rule.
    assert found["layer2.0.gate.reduce.weight"] == found["layer2.0.gate.score.weight"] == (1, 1)
    assert found["layer2.0.gate.reduce.bias"] == (2, 0)
    assert found["layer2.0.gate.norm.weight"] == (1, 0)
    assert found["fc.weight"] == (5, 1)
    assert found["bn1.weight"] == (1, 0)


def test_caffe2_momentum_is_that_of_torch_when_the_rate_changes():
    """V = mu V + lr g, rescaled at a new rate; the step is (1 + mu) V - mu V_before."""
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(9, 5, generator=generator, dtype=torch.float64)
    rates = [0.1] * 3 + [0.01] * 3 + [0.05] * 3
    parameter = torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))
    optimiser = torch.optim.SGD([parameter], lr=0.1, momentum=0.9, nesterov=True)
    theirs, velocity = torch.zeros(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    before = rates[0]
    for gradient, rate in zip(gradients, rates, strict=True):
        parameter.grad = gradient.clone()
        optimiser.param_groups[0]["lr"] = rate
        optimiser.step()
        velocity = velocity * (rate / before)
        new = 0.9 * velocity + rate * gradient
        theirs -= 1.9 * new - 0.9 * velocity
        velocity, before = new, rate
        assert torch.allclose(parameter.detach(), theirs, rtol=1e-12, atol=1e-14)


def test_options_reach_the_optimiser():
    model = torch.nn.Linear(2, 2)
    optim = OptimConfig(momentum=0.9, dampening=0.9, nesterov=False, weight_decay=1e-3)
    sgd = make_optimiser(model, optim)
    assert {g["dampening"] for g in sgd.param_groups} == {0.9}
    assert not sgd.param_groups[0]["nesterov"]
    assert type(make_optimiser(model, OptimConfig(name="adam"))) is torch.optim.Adam
    assert type(make_optimiser(model, OptimConfig(name="adamw"))) is torch.optim.AdamW


def test_nothing_to_train():
    model = torch.nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="expected parameters that are trained, got none"):
        make_optimiser(model, OptimConfig())
