"""Testing: accuracy over the fixed clips of the test videos, and a check that needs no network."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Batches = Iterable[tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class TestResult:
    """Result of one test."""

    # Not a test class, whatever pytest makes of the name.
    __test__ = False

    accuracy: float
    """Share of the videos that were classified correctly, between 0 and 1."""
    loss: float
    """Mean cross-entropy of the averaged scores."""


def evaluate(
    model: nn.Module, batches: Batches, *, clips_per_video: int, device: torch.device
) -> TestResult:
    """Test a model; its softmax scores are averaged over the clips of each video.

    Args:
        model: Gives logits (B, classes).
        batches: Clips (B, 3, T, H, W), labels (B,) and clip numbers (B,); the clips of one video
            follow each other.
        clips_per_video: How many they are.
        device: Where the model is.

    Returns:
        Accuracy and loss. The model is in training mode again if it was.
    """
    training = model.training
    model.eval()
    scores, labels = [], []
    with torch.inference_mode():
        for clips, truth, _ in batches:
            scores.append(model(clips.to(device)).float().softmax(1).cpu())
            labels.append(truth)
    model.train(training)
    videos = torch.cat(scores).unflatten(0, (-1, clips_per_video)).mean(1)
    truth = torch.cat(labels)[::clips_per_video]
    return TestResult(
        accuracy=(videos.argmax(1) == truth).double().mean().item(),
        loss=nn.functional.nll_loss(videos.clamp_min(1e-12).log(), truth).item(),
    )


def mean_colour_accuracy(train: Batches, test: Batches, *, num_classes: int) -> float:
    """Accuracy of the nearest class mean of each clip's mean colour.

    A number to hold beside a network's accuracy on a handful of videos: where it is high, the clips
    can be told apart without looking at what happens in them.

    Args:
        train: Batches of training clips; every class occurs.
        test: Batches of test clips.
        num_classes: Number of classes.

    Returns:
        Share of the test clips that are classified correctly, between 0 and 1.
    """
    colours, labels = _mean_colours(train)
    means = torch.stack([colours[labels == label].mean(0) for label in range(num_classes)])
    colours, labels = _mean_colours(test)
    return (torch.cdist(colours, means).argmin(1) == labels).double().mean().item()


def _mean_colours(batches: Batches) -> tuple[Tensor, Tensor]:
    """Mean colours (clips, 3) and labels (clips,)."""
    colours, labels = [], []
    for clips, truth, _ in batches:
        colours.append(clips.double().mean((2, 3, 4)))
        labels.append(truth)
    return torch.cat(colours), torch.cat(labels)
