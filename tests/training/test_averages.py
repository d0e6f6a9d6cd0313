"""Moving averages of weights, and precise statistics of batch norms."""

import pytest
import torch
from torch import nn

from nlkernels.training.averages import moving_average, set_precise_norms
from nlkernels.training.config_optim import OptimConfig
from nlkernels.training.stopping import Stopped

CPU = torch.device("cpu")


def model(momentum=0.1):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(3, 4, 1), nn.BatchNorm3d(4, momentum=momentum), nn.Dropout(0.5))


def batches(count=5, batch=6):
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(batch, 3, 2, 4, 4, generator=generator) * (1 + k) + k,
            torch.zeros(batch, dtype=torch.int64),
            torch.arange(batch),
        )
        for k in range(count)
    ]


def test_precise_statistics_are_those_of_all_batches():
    network = model().double()
    clips = [(batch.double(), *rest) for batch, *rest in batches()]
    everything = torch.cat([network[0](batch).detach() for batch, *_ in clips])
    values = everything.transpose(0, 1).flatten(1)
    set_precise_norms(network, clips, OptimConfig(), device=CPU)
    norm = network[1]
    assert torch.allclose(norm.running_mean, values.mean(1), rtol=1e-12)
    # Torch's running variances have n / (n - 1) of each batch, which is no factor of all of them.
    own = torch.stack([network[0](b).detach().transpose(0, 1).flatten(1).var(1) for b, *_ in clips])
    means = torch.stack(
        [network[0](b).detach().transpose(0, 1).flatten(1).mean(1) for b, *_ in clips]
    )
    expected = (own + means.square()).mean(0) - means.mean(0).square()
    assert torch.allclose(norm.running_var, expected, rtol=1e-12)
    assert torch.allclose(norm.running_var, values.var(1, unbiased=False), rtol=0.01)
    assert not torch.allclose(norm.running_var, own[-1], rtol=0.1)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_precise_statistics_leave_everything_else_alone(momentum):
    network = model(momentum)
    network.train()
    network(batches(1)[0][0])
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = torch.get_rng_state()
    set_precise_norms(network, batches(), OptimConfig(), device=CPU)
    assert torch.equal(torch.get_rng_state(), state)
    assert network[1].momentum == momentum
    changed = {n for n, v in network.state_dict().items() if not torch.equal(v, before[n])}
    assert changed == {"1.running_mean", "1.running_var"}


def test_batches_that_end_early_leave_the_statistics_alone():
    network = model()
    before = {name: value.clone() for name, value in network.state_dict().items()}

    def interrupted():
        yield batches(1)[0]
        raise Stopped

    with pytest.raises(Stopped):
        set_precise_norms(network, interrupted(), OptimConfig(), device=CPU)
    assert network[1].momentum == 0.1
    assert all(torch.equal(v, before[n]) for n, v in network.state_dict().items())


def test_norms_at_rest_keep_their_statistics():
    network = model()
    set_precise_norms(network, batches(), OptimConfig(norms="running"), device=CPU)
    assert torch.equal(network[1].running_mean, torch.zeros(4))


def test_a_moving_average_follows_weights_and_buffers():
    network = model()
    average = moving_average(network, 0.9)
    expected = None
    for batch, *_ in batches():
        network.train()
        network(batch)
        with torch.no_grad():
            network[0].weight += 1.0
        average.update_parameters(network)
        new = torch.cat([network[0].weight.flatten(), network[1].running_mean]).detach().clone()
        expected = new if expected is None else 0.9 * expected + 0.1 * new
    inner = average.module
    found = torch.cat([inner[0].weight.flatten(), inner[1].running_mean]).detach()
    assert torch.allclose(found, expected, rtol=1e-6)
    assert inner[1].num_batches_tracked.dtype == torch.int64
