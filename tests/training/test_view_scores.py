"""What is averaged over views, by system, and the line that says so."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from nlkernels.models.registry import registered
from nlkernels.training.config_data import DataConfig
from nlkernels.training.trained import Trained
from nlkernels.training.view_scores import LOGITS_SYSTEMS, add_views

CPU = torch.device("cpu")


class Given(nn.Module):
    """Its logits are the first two numbers of a clip."""

    def forward(self, clips):
        return clips.flatten(1)[:, :2]


def view(first, second):
    return torch.tensor([first, second]).view(1, 2, 1, 1, 1)


def test_means_of_probabilities_and_of_logits_differ_as_by_hand():
    # Logits (0, ln 3) and (2 ln 3, 0): probabilities (1/4, 3/4) and (9/10, 1/10).
    third = math.log(3)
    clips = torch.cat([view(0, third), view(2 * third, 0), view(0, 0)])
    batches = [
        (clips[:1], torch.tensor([1]), torch.tensor([0])),
        (clips[1:], torch.tensor([1, 0]), torch.tensor([1, 2])),
    ]
    videos = {"video_of": lambda number: number // 2, "device": CPU}
    sums = add_views([Given()], batches, average="probabilities", **videos)
    assert [(one.label, one.views) for one in sums.values()] == [(1, 2), (0, 1)]
    mean = sums[0].scores[0] / 2
    assert mean.tolist() == pytest.approx([(1 / 4 + 9 / 10) / 2, (3 / 4 + 1 / 10) / 2], abs=1e-7)
    sums = add_views([Given()], batches, average="logits", **videos)
    assert (sums[0].scores[0] / 2).tolist() == pytest.approx([third, third / 2], abs=1e-7)


def test_the_models_own_probabilities_are_taken():
    class Located(Given):
        def probabilities(self, clips):
            return torch.stack([torch.full((len(clips),), 0.2), torch.full((len(clips),), 0.8)], 1)

    batches = [(view(5, 0), torch.tensor([0]), torch.tensor([0]))]
    both = {"video_of": int, "device": CPU}
    found = [
        add_views([Located()], batches, average=average, **both)[0].scores[0].tolist()
        for average in ("probabilities", "logits")
    ]
    assert found[0] == pytest.approx([0.2, 0.8])
    assert found[1] == [5, 0]


def test_every_system_averages_as_published():
    averages = {
        system: Trained(Path(), nn.Identity(), name, None, {}).average
        for name, system in (
            ("i3d_r50_32x2", "caffe2"),
            ("tushar_i3d_r50_32x2", "tushar"),
            ("slowfast_i3d_r50_8x8", "slowfast"),
            ("mmaction_i3d_r50_32x2", "mmaction"),
            ("mmaction_tsm_r50", "mmaction"),
            ("tsm_r50", "tsm"),
            ("rnl_tsm_r50", "rnl"),
            ("inception_nl_flow", "inception_nl"),
            ("hassony2_i3d_rgb", "hassony2"),
        )
        if registered(name).system == system
    }
    assert {system for system, average in averages.items() if average == "logits"} == set(
        LOGITS_SYSTEMS
    )
    assert len(averages) == 8


PROTOCOLS = {
    "10 clips x 3 crops of 256, softmax at every location, probabilities averaged": (
        "i3d_r50_32x2",
        {"test_crops": "three", "test_size": 256, "test_short_side": 256},
        "probabilities",
    ),
    "10 clips x 3 crops of 256, probabilities averaged": (
        "mmaction_i3d_r50_32x2",
        {"test_crops": "three", "test_size": 256, "test_short_side": 256},
        "probabilities",
    ),
    "10 clips x 6 crops of 48, half of them mirrored, logits averaged": (
        "tsm_r50",
        {"test_crops": "six_flip"},
        "logits",
    ),
    "10 clips x whole frames of short side 64, softmax at every location, probabilities averaged": (
        "slowfast_i3d_r50_8x8",
        {"test_crops": "full", "test_short_side": 64},
        "probabilities",
    ),
}


@pytest.mark.parametrize("line", PROTOCOLS)
def test_protocols(line):
    name, data, average = PROTOCOLS[line]
    trained = Trained(Path(), nn.Identity(), name, None, {})
    assert trained.protocol(DataConfig(**data), 10, average) == line
