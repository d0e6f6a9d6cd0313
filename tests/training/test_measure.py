"""Measured costs: exact counts where they are known, order of magnitude where they are timed."""

import pytest
import torch
from torch import nn

from nlkernels.training.config import VARIANTS, ModelConfig, OptimConfig, ProfileConfig
from nlkernels.training.measure import (
    attention_sizes,
    count_flops,
    count_multiply_adds,
    count_parameters,
    input_channels,
    measure,
    overhead,
)
from nlkernels.training.memory import largest_batch, state_mib
from nlkernels.training.variants import DESCRIPTIONS, build_variant

MODEL = ModelConfig(width=0.5)
CPU = torch.device("cpu")


def test_counts_of_a_known_layer():
    model = nn.Conv3d(3, 5, 3, padding=1)
    assert count_parameters(model) == 5 * 3 * 27 + 5
    assert count_flops(model, torch.zeros(1, 3, 4, 6, 6)) == 2 * 5 * 3 * 27 * 4 * 6 * 6


def test_every_variant_has_a_description():
    assert set(DESCRIPTIONS) == set(VARIANTS)


def test_variants_start_from_the_same_weights():
    states = {name: build_variant(name, MODEL, 2, seed=5).state_dict() for name in VARIANTS}
    for name in ("naive", "frame"):
        assert states[name].keys() == states["fast"].keys()
    for name in VARIANTS:
        shared = states[name].keys() & states["none"].keys()
        assert shared == states["none"].keys()
        assert all(torch.equal(states[name][key], states["none"][key]) for key in shared)
    for key, value in states["fast"].items():
        assert torch.equal(value, states["naive"][key]), key
    other = build_variant("none", MODEL, 2, seed=6).state_dict()
    assert not torch.equal(other["fc.weight"], states["none"]["fc.weight"])


def test_variants_are_what_they_are_called():
    clip = torch.randn(1, 3, 4, 64, 64)
    for name in VARIANTS:
        sizes = attention_sizes(build_variant(name, MODEL, 2, seed=0), frames=4, size=64)
        if name in ("none", "local"):
            assert sizes == []
            continue
        frames = 1 if name == "frame" else 4
        assert [(one["n"], one["m"]) for one in sizes] == [(frames * 64, frames * 16)] * 2
        assert {one["backend"] == "reference" for one in sizes} == {name == "naive"}
    naive, fast = (build_variant(name, MODEL, 2, seed=0) for name in ("naive", "fast"))
    assert count_flops(naive, clip) == count_flops(fast, clip)
    assert count_parameters(naive) == count_parameters(fast)


def test_flops_of_the_blocks_are_those_of_the_formula():
    none, fast = (build_variant(name, MODEL, 2, seed=0) for name in ("none", "fast"))
    clip = torch.zeros(1, 3, 4, 64, 64)
    n, m, channels, inner = 256, 64, 32, 16
    projections = 2 * (2 * n + 2 * m) * channels * inner
    attention = 2 * n * m * (inner + inner)
    assert count_flops(fast, clip) - count_flops(none, clip) == 2 * (projections + attention)


@pytest.mark.parametrize("kind", ["softmax", "dot_product"])
def test_published_flops_are_those_of_the_definition(kind):
    model = ModelConfig(width=0.5, block={"kind": kind})
    none, fast, naive = (build_variant(n, model, 2, seed=0) for n in ("none", "fast", "naive"))
    clip = torch.zeros(1, 3, 4, 64, 64)
    n, m, channels, inner = 256, 64, 32, 16
    projections = (2 * n + 2 * m) * channels * inner
    blocks = 2 * (projections + n * m * (inner + inner))
    assert count_multiply_adds(fast, clip) - count_multiply_adds(none, clip) == blocks
    assert count_multiply_adds(naive, clip) == count_flops(naive, clip) / 2
    backends = {block.backend for block in fast.modules() if hasattr(block, "backend")}
    assert backends == {"auto"}


def test_overhead_is_a_difference_and_a_percentage():
    assert overhead(120.0, 80.0) == (40.0, 50.0)


def test_largest_batch_is_on_the_line_through_the_peaks():
    # 100 MiB and 300 for each clip, beside a state of 124: 2048 hold 6 clips and not 7.
    fit = largest_batch({1: 400.0, 2: 700.0}, state_mib=124.0, gib=2.0)
    assert (fit.batch, fit.fixed_mib, fit.clip_mib, fit.deviation) == (6, 224.0, 300.0, None)
    # The third peak counts: it lies a tenth above the line, and the line goes on from there.
    fit = largest_batch({1: 400.0, 4: 1430.0, 2: 700.0}, state_mib=124.0, gib=2.0)
    assert fit.deviation == pytest.approx(0.1)
    assert fit.clip_mib == pytest.approx(365.0)
    assert fit.batch == 5
    assert str(fit).startswith("batch 5 fits 2 GiB, reckoned from peaks at B=1, 2, 4 (+10.0%")
    assert largest_batch({1: 4e3, 2: 5e3}, state_mib=0.0, gib=2.0).batch == 0
    assert largest_batch({1: 4.0, 2: 4.0}, state_mib=0.0, gib=2.0).batch is None


@pytest.mark.parametrize(
    ("peaks", "gib", "said"),
    [
        ({1: 4.0}, 2.0, "expected the peaks of two or three batches, got 1; measure"),
        ({1: 4.0, 2: 5.0}, 0.0, "expected a memory of more than 0 GiB, got 0.0; give its size"),
        ({1: 4.0, 2: 5.0}, float("nan"), "expected a memory of more than 0 GiB, got nan"),
    ],
    ids=["one-point", "no-memory", "nan"],
)
def test_wrong_questions_for_a_batch(peaks, gib, said):
    with pytest.raises(ValueError, match=said):
        largest_batch(peaks, state_mib=0.0, gib=gib)


def test_state_is_weights_buffers_and_momentum():
    model = nn.BatchNorm1d(2**18)
    optimiser = torch.optim.SGD(model.parameters(), momentum=0.9)
    # Weight, bias, mean and variance of 1 MiB each; a count of 8 bytes.
    assert state_mib(model, optimiser) == pytest.approx(4, abs=1e-4)
    model(torch.randn(2, 2**18)).sum().backward()
    optimiser.step()
    assert state_mib(model, optimiser) == pytest.approx(6, abs=1e-4)


def test_batch_that_fits_is_asked_of_every_variant():
    models = {name: build_variant(name, MODEL, 2, seed=0) for name in ("none", "naive")}
    profile = ProfileConfig(batch=3, frames=8, size=64, rounds=1)
    costs = measure(
        models, profile, OptimConfig(steps=1), num_classes=2, device=CPU, memory_gib=0.5
    )
    assert list(costs["none"].fit.peaks_mib) == [1, 2, 3]
    assert 1 < costs["naive"].fit.batch < costs["none"].fit.batch
    # The clips of three are in the peak.
    clips_mib = 3 * 3 * 8 * 64 * 64 * 4 / 2**20
    assert costs["none"].fit.peaks_mib[3] == pytest.approx(costs["none"].memory_mib + clips_mib)


def test_measured_costs():
    models = {name: build_variant(name, MODEL, 2, seed=0) for name in ("none", "naive", "fast")}
    profile = ProfileConfig(batch=2, frames=8, size=128, rounds=3)
    costs = measure(models, profile, OptimConfig(steps=1), num_classes=2, device=CPU)
    assert list(costs) == list(models)
    for cost in costs.values():
        assert 0 < cost.step_ms.p20 <= cost.step_ms.p50 <= cost.step_ms.p80
        parts = cost.forward_ms.p20 + cost.backward_ms.p20 + cost.optimiser_ms.p20
        assert parts <= cost.step_ms.p80
        assert cost.clips_per_s == pytest.approx(2e3 / cost.step_ms.p50)
        assert cost.device_mib is None
    # Two blocks, batch 2, 2048 x 512 scores in float32: 16 MiB that only naive holds.
    assert costs["naive"].memory_mib > costs["fast"].memory_mib + 16
    assert costs["naive"].memory_mib > costs["none"].memory_mib + 16


def test_measuring_leaves_no_gradients_and_moves_no_weight():
    models = {"none": build_variant("none", MODEL, 2, seed=0)}
    before = [p.detach().clone() for p in models["none"].parameters()]
    profile = ProfileConfig(batch=1, frames=2, size=16, rounds=1)
    measure(models, profile, OptimConfig(steps=1), num_classes=2, device=CPU)
    for parameter, old in zip(models["none"].parameters(), before, strict=True):
        assert parameter.grad is None
        assert torch.equal(parameter, old)


def test_networks_of_flow_are_measured():
    config = ModelConfig("inception_nl_flow", width=0.125, blocks=2)
    model = build_variant("fast", config, 2, seed=0)
    assert input_channels(model) == 2
    assert [one["n"] for one in attention_sizes(model, frames=4, size=32)] == [2 * 4 * 4, 2 * 2]
    profile = ProfileConfig(batch=2, frames=4, size=32, rounds=1)
    costs = measure({"fast": model}, profile, OptimConfig(steps=1), num_classes=2, device=CPU)
    assert costs["fast"].parameters == count_parameters(model)
