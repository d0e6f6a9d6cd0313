"""Updates: accumulated gradients, clipping, lower precision, steps that are left out."""

import copy
import itertools

import pytest
import torch
from torch import nn

from nlkernels import NonLocalBlock3d
from nlkernels.models import create_model
from nlkernels.training.config_optim import OptimConfig
from nlkernels.training.freezing import freeze, train_mode
from nlkernels.training.optimisers import make_optimiser
from nlkernels.training.updates import NonFiniteError, Stopwatch, Updater

CPU = torch.device("cpu")


def clips(batch=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, 3, 4, 32, 32, generator=generator),
        torch.randint(4, (batch,), generator=generator),
    )


def small_model(seed=0):
    torch.manual_seed(seed)
    model = create_model("c2d_tiny", num_classes=4, width=0.5, blocks=2, block={"zero_init": None})
    for module in model.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model


def updated(model, optim, steps=3, batch=8):
    """Parameters after some steps, the results of the steps, and the updater."""
    freeze(model, optim)
    updater = Updater(model, make_optimiser(model, optim), optim, CPU)
    watch, results = Stopwatch(CPU), []
    for step in range(steps):
        train_mode(model, optim)
        results.append(updater.step(*clips(batch, seed=step), watch, where=f"step {step + 1}"))
    return nn.utils.parameters_to_vector(model.parameters()).detach(), results, updater


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_accumulated_gradients_are_those_of_the_whole_batch(parts):
    model = small_model().double()
    optim = {"lr": 0.05, "norms": "running", "clip_norm": 1.0}

    def run(parts):
        one = copy.deepcopy(model)
        options = OptimConfig(accumulate=parts, **optim)
        updater = Updater(one, make_optimiser(one, options), options, CPU)
        for step in range(3):
            train_mode(one, options)
            batch, labels = clips(seed=step)
            result = updater.step(batch.double(), labels, Stopwatch(CPU), where="here")
        return nn.utils.parameters_to_vector(one.parameters()).detach(), result

    whole, expected = run(1)
    accumulated, found = run(parts)
    assert (accumulated - whole).abs().max() < 1e-12 * whole.abs().max()
    for key in ("loss", "accuracy", "grad_norm"):
        assert found[key] == pytest.approx(expected[key], rel=1e-10)


def test_norms_of_batches_tell_parts_from_the_whole():
    """Without it the test above could not fail."""
    whole, *_ = updated(small_model(), OptimConfig(lr=0.05))
    parts, *_ = updated(small_model(), OptimConfig(lr=0.05, accumulate=2))
    assert (whole - parts).abs().max() > 1e-4


def test_long_gradients_are_shortened():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    optim = OptimConfig(lr=1.0, momentum=0, nesterov=False, weight_decay=0, clip_norm=0.01)
    before = nn.utils.parameters_to_vector(model.parameters()).detach()
    updater = Updater(model, make_optimiser(model, optim), optim, CPU)
    for group in updater.optimiser.param_groups:
        group["lr"] = 1.0
    batch = torch.full((4, 3, 1, 2, 2), 5.0)
    result = updater.step(batch, torch.tensor([0, 0, 1, 0]), Stopwatch(CPU), where="here")
    moved = nn.utils.parameters_to_vector(model.parameters()).detach() - before
    assert result["grad_norm"] > 1
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision_trains_as_float32_does(precision):
    optim = {"lr": 0.02, "momentum": 0.5}
    start = nn.utils.parameters_to_vector(small_model().parameters()).detach()
    exact, expected, _ = updated(small_model(), OptimConfig(**optim))
    found, results, updater = updated(small_model(), OptimConfig(precision=precision, **optim))
    assert updater.skips == 0
    assert all(p.dtype == torch.float32 for p in updater.model.parameters())
    for one, other in zip(results, expected, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=0.05)
        assert one["loss"] != other["loss"]
    # The same way, to some digits.
    assert torch.cosine_similarity(found - start, exact - start, dim=0) > 0.95


# What the backward takes from the forward: maxima and sums of the rows (2, B, N) of a softmax, the
# state (B, D, V) of dot-product attention.
STATISTICS = {
    "softmax": (2, 2, 256),
    "gaussian": (2, 2, 256),
    "dot_product": (2, 24, 24),
}


@pytest.mark.parametrize("kind", STATISTICS)
def test_statistics_of_attention_stay_float32_under_autocast(kind):
    torch.manual_seed(0)
    block = NonLocalBlock3d(48, kind=kind, zero_init=None)
    x = torch.randn(2, 48, 4, 8, 8, requires_grad=True)
    saved = []

    def note(tensor):
        saved.append((tuple(tensor.shape), tensor.dtype))
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16),
    ):
        out = block(x)
    assert not any(shape[-2:] == (256, 64) for shape, _ in saved), "the scores are held"
    assert ((2, 256, 24), torch.bfloat16) in saved
    assert {dtype for shape, dtype in saved if shape == STATISTICS[kind]} == {torch.float32}
    out.float().square().mean().backward()
    assert x.grad.isfinite().all()


class Overflowing(nn.Module):
    """Its gradient is infinite while the loss is scaled by more than a limit."""

    def __init__(self, limit):
        super().__init__()
        self.linear = nn.Linear(12, 2)
        self.limit = limit

    def forward(self, x):
        logits = self.linear(x.flatten(1))
        logits.register_hook(self._overflow)
        return logits

    def _overflow(self, gradient):
        return gradient * (float("inf") if gradient.abs().max() > self.limit else 1.0)


def step_of(model, updater, number=0):
    batch = torch.randn(4, 3, 1, 2, 2, generator=torch.Generator().manual_seed(number))
    return updater.step(batch, torch.tensor([0, 1, 1, 0]), Stopwatch(CPU), where=f"step {number}")


def test_overflowing_gradients_leave_steps_out_until_the_scale_fits():
    torch.manual_seed(0)
    model = Overflowing(limit=1000.0)
    optim = OptimConfig(lr=0.1, precision="float16")
    updater = Updater(model, make_optimiser(model, optim), optim, CPU)
    results, states = [], []
    for number in range(9):
        results.append(step_of(model, updater, number)["grad_norm"])
        states.append(nn.utils.parameters_to_vector(model.parameters()).detach().clone())
    skipped = [norm is None for norm in results]
    assert skipped == sorted(skipped, reverse=True)
    assert 3 < updater.skips == sum(skipped) < 9
    for (one, other), out in zip(itertools.pairwise(states), skipped[1:], strict=True):
        assert torch.equal(one, other) == out


def test_steps_left_out_in_a_row_are_bounded():
    model = Overflowing(limit=-1.0)
    optim = OptimConfig(precision="float16", max_skips=4)
    updater = Updater(model, make_optimiser(model, optim), optim, CPU)
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    for number in range(4):
        assert step_of(model, updater, number)["grad_norm"] is None
    message = (
        r"got (inf|nan) at step 4 after 4 steps in a row that were left out, with losses scaled"
    )
    with pytest.raises(NonFiniteError, match=message):
        step_of(model, updater, 4)
    assert torch.equal(nn.utils.parameters_to_vector(model.parameters()), before)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_bad_part_of_a_step_changes_no_parameter(precision):
    model = small_model()
    optim = OptimConfig(accumulate=4, precision=precision)
    updater = Updater(model, make_optimiser(model, optim), optim, CPU)
    before = [p.detach().clone() for p in model.parameters()]
    batch, labels = clips()
    batch[5, 0, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"finite loss, got nan at here \(clips 0, 1, 2, 3"):
        updater.step(batch, labels, Stopwatch(CPU), where="here", numbers=torch.arange(8))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_the_scale_continues_from_its_state():
    one, other = (Overflowing(limit=1000.0) for _ in range(2))
    optim = OptimConfig(precision="float16")
    first = Updater(one, make_optimiser(one, optim), optim, CPU)
    for number in range(3):
        step_of(one, first, number)
    second = Updater(other, make_optimiser(other, optim), optim, CPU)
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == first.state_dict()
    assert second.skips == 3
