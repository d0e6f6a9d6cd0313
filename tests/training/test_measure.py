"""Measured costs: exact counts where they are known, order of magnitude where they are timed."""

import pytest
import torch
from torch import nn

from nlkernels.training.config import VARIANTS, ModelConfig, OptimConfig, ProfileConfig
from nlkernels.training.measure import attention_sizes, count_flops, count_parameters, measure
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
