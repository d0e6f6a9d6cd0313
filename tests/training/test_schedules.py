"""Learning rates: the vectors of every published recipe."""

import math

import pytest
import torch

from nlkernels.training.config_file import load_config
from nlkernels.training.config_optim import OptimConfig
from nlkernels.training.schedules import Plateau, Schedule


def rates(optim, steps, *, clips=None, of=None):
    schedule = Schedule(optim, steps=steps, clips=clips)
    return [schedule.rate(step) for step in (range(steps) if of is None else of)]


def test_warmup_then_cosine():
    found = rates(OptimConfig(lr=1.0, warmup=4, steps=12), 12)
    assert found[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert found[8] == pytest.approx(0.5)
    assert found == pytest.approx(
        [0.25, 0.5, 0.75, 1.0] + [0.5 * (1 + math.cos(math.pi * k / 8)) for k in range(8)]
    )


def test_steps_and_constant():
    optim = OptimConfig(lr=1.0, schedule="step", milestones=(2, 4), gamma=0.1, steps=6)
    assert rates(optim, 6) == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert rates(OptimConfig(lr=0.3, schedule="constant", steps=6), 6) == [0.3] * 6


CAFFE2 = {  # lengths, batch, lr, first and last step of every part
    "400k": ((150_000, 150_000, 100_000), 64, 0.01),
    "300k": ((150_000, 100_000, 50_000), 64, 0.01),
    "600k": ((300_000, 200_000, 100_000), 32, 0.005),
    "300k-4-gpus": ((150_000, 100_000, 50_000), 32, 0.005),
    "affine": ((150_000, 150_000, 100_000), 16, 0.0025),
}


@pytest.mark.parametrize(("lengths", "batch", "lr"), CAFFE2.values(), ids=CAFFE2)
def test_caffe2(lengths, batch, lr):
    optim = OptimConfig(
        lr=0.01,
        lr_batch=64,
        batch=batch,
        schedule="multistep",
        lengths=lengths,
        rates=(1, 0.1, 0.01),
    )
    first, second, end = lengths[0], lengths[0] + lengths[1], sum(lengths)
    of = (0, first - 1, first, second - 1, second, end - 1, end)
    expected = [lr, lr, lr / 10, lr / 10, lr / 100, lr / 100, lr / 100]
    assert rates(optim, end, of=of) == pytest.approx(expected)


def test_caffe2_warmup_meets_both_ends():
    optim = OptimConfig(
        lr=3.2, schedule="constant", warmup=11, warmup_start=0.1 / 3.2, warmup_form="both"
    )
    assert rates(optim, 12) == pytest.approx([0.1 + 0.31 * k for k in range(11)] + [3.2])


def by_epoch(**options):
    """Ten steps a pass: 40 clips in batches of 4."""
    return OptimConfig(unit="epoch", batch=4, **options)


def test_mmaction_milestones_by_epoch():
    optim = by_epoch(lr=0.01, schedule="step", milestones=(40, 80))
    found = rates(optim, 1000, clips=40, of=(0, 399, 400, 799, 800, 999))
    assert found == pytest.approx([0.01, 0.01, 1e-3, 1e-3, 1e-4, 1e-4])


def test_a_warmup_by_iteration_meets_both_ends():
    optim = by_epoch(lr=0.01, schedule="constant", warmup=10, warmup_start=0.1, warmup_form="both")
    found = rates(optim, 200, clips=40, of=(0, 1, 99, 100))
    assert found == pytest.approx([1e-3, 1e-3 + 0.009 / 99, 0.01, 0.01])


def mmaction(lr, epochs, *, warmup, begin, milestones):
    """Rates by epoch of LinearLR(start_factor=0.1, begin=0, end=warmup) and MultiStepLR.

    As mmengine chains them: each has a counter of its own, which starts at its ``begin``, and
    changes the rate that the epoch before left.
    """
    found, rate = [], lr
    for epoch in range(epochs):
        if epoch == 0:
            rate *= 0.1
        elif epoch < warmup:
            rate *= 1 + 0.9 / ((warmup - 1) * 0.1 + (epoch - 1) * 0.9)
        if epoch - begin in milestones:
            rate *= 0.1
        found.append(rate)
    return found


MMACTION = {
    "mmaction_slowonly_r50_nl_4x16_150e": (0.01, 150, 10, 10, (90, 130)),
    "mmaction_slowonly_r50_nl_8x8_150e": (0.01, 150, 10, 10, (90, 130)),
    "mmaction_tsm_r50_nl_embedded_gaussian_8f_50e": (0.02, 50, 5, 0, (25, 45)),
}


@pytest.mark.parametrize("name", MMACTION)
def test_mmaction_warms_up_by_whole_epochs(name):
    lr, epochs, warmup, begin, milestones = MMACTION[name]
    expected = mmaction(lr, epochs, warmup=warmup, begin=begin, milestones=milestones)
    optim = load_config(name).optim
    # Passes of 10 steps, and passes that steps do not divide.
    for clips in (1280, 1000):
        steps = epochs * clips // optim.batch
        schedule = Schedule(optim, steps=steps, clips=clips)
        found = [schedule.rate(step) for step in range(steps)]
        by_step = [expected[step * optim.batch // clips] for step in range(steps)]
        assert found == pytest.approx(by_step, rel=1e-9)


@pytest.mark.parametrize(
    ("form", "expected"),
    [("first", [0.1, 0.4, 0.7, 1]), ("last", [0.4, 0.7, 1, 1]), ("both", [0.1, 0.55, 1, 1])],
)
def test_forms_of_a_warmup_by_whole_epochs(form, expected):
    optim = by_epoch(
        lr=1.0,
        schedule="constant",
        warmup=3,
        warmup_start=0.1,
        warmup_form=form,
        warmup_every="epoch",
    )
    found = rates(optim, 40, clips=40)
    assert found == pytest.approx([rate for rate in expected for _ in range(10)])


@pytest.mark.parametrize("counted_from", [0, 1])
def test_both_conventions_of_tsm_and_rnl_have_the_same_boundaries(counted_from):
    optim = by_epoch(lr=0.02, schedule="step", milestones=(20, 40))
    found = rates(optim, 500, clips=40)
    for step, rate in enumerate(found):
        epoch = step // 10 + counted_from
        behind = sum(epoch >= m if counted_from == 0 else epoch > m for m in (20, 40))
        assert rate == pytest.approx(0.02 * 0.1**behind), step


def test_rnl_cosine_with_fractional_epochs():
    optim = by_epoch(lr=0.02, warmup=5, warmup_start=0.1, warmup_form="first")
    found = rates(optim, 1000, clips=40)
    for step, rate in enumerate(found):
        epoch = step / 10
        expected = 0.002 + 0.018 * epoch / 5
        if epoch >= 5:
            expected = 0.5 * 0.02 * (1 + math.cos(math.pi * (epoch - 5) / 95))
        assert rate == pytest.approx(expected), step


def test_slowfast_cosine_from_the_start():
    optim = by_epoch(
        lr=0.1,
        warmup=34,
        warmup_start=0.1,
        warmup_form="first",
        warmup_to="schedule",
        cosine_from="start",
    )
    found = rates(optim, 1960, clips=40)

    def cosine(epoch):
        return 0.1 * (math.cos(math.pi * epoch / 196) + 1) * 0.5

    for step, rate in enumerate(found):
        epoch = step / 10
        expected = epoch * (cosine(34) - 0.01) / 34 + 0.01 if epoch < 34 else cosine(epoch)
        assert rate == pytest.approx(expected), step


def test_slowfast_relative_steps():
    optim = by_epoch(lr=0.01, schedule="multistep", lengths=(44, 44, 30), rates=(1, 0.1, 0.01))
    found = rates(optim, 1180, clips=40, of=(0, 439, 440, 879, 880, 1179))
    assert found == pytest.approx([0.01, 0.01, 1e-3, 1e-3, 1e-4, 1e-4])


def test_mindspore_cosine_by_whole_epochs():
    optim = by_epoch(
        lr=3e-4, warmup=1, cosine_from="start", cosine_every="epoch", cosine_period=100
    )
    found = rates(optim, 50, clips=40)
    for step, rate in enumerate(found):
        expected = 3e-4 * (step + 1) / 10
        if step >= 10:
            expected = 3e-4 * (1 + math.cos(math.pi * (step // 10) / 100)) / 2
        assert rate == pytest.approx(expected), step


def test_whole_epochs_of_a_schedule_by_steps():
    """Three clips in batches of 7: quotients that are no exact numbers."""
    optim = OptimConfig(lr=1.0, batch=7, cosine_every="epoch")
    found = rates(optim, 30, clips=3)
    for step, rate in enumerate(found):
        epoch = step * 7 // 3
        assert rate == pytest.approx(0.5 * (1 + math.cos(math.pi * epoch * 3 / 7 / 30))), step


def test_plateau_counts_as_torch_does():
    optim = OptimConfig(lr=0.001, schedule="plateau", patience=2, gamma=0.1)
    schedule = Schedule(optim, steps=200)
    parameter = torch.nn.Parameter(torch.zeros(1))
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        torch.optim.SGD([parameter], lr=0.001), patience=2, factor=0.1, eps=0
    )
    generator = torch.Generator().manual_seed(0)
    losses = (1 + 0.3 * torch.rand(60, generator=generator)).tolist()
    # Better by less than the threshold is no better.
    losses += [min(losses) * (1 - 5e-5)] * 2 + [0.1] + [0.2] * 7
    seen = set()
    for step, loss in enumerate(losses):
        schedule.tested(loss)
        theirs.step(loss)
        assert schedule.rate(step) == pytest.approx(theirs.get_last_lr()[0], rel=1e-12)
        seen.add(schedule.rate(step))
    assert len(seen) > 3


def test_a_plateau_continues_from_its_state():
    optim = OptimConfig(schedule="plateau", patience=1)
    one = Schedule(optim, steps=9)
    for loss in (1.0, 2.0):
        one.tested(loss)
    other = Schedule(optim, steps=9)
    other.load_state_dict(one.state_dict())
    for schedule in (one, other):
        schedule.tested(3.0)
    assert one.rate(0) == other.rate(0) == pytest.approx(0.01)
    assert Plateau(1).reductions == 0


def test_a_training_shorter_than_its_warmup_ends_inside_it():
    optim = by_epoch(lr=1.0, warmup=34, warmup_start=0.1, warmup_form="first", cosine_from="start")
    assert all(0 < rate < 1 for rate in rates(optim, 2, clips=400))


def test_epochs_need_clips():
    with pytest.raises(ValueError, match=r"expected the number of clips .*; pass clips"):
        Schedule(OptimConfig(unit="epoch"), steps=3)
