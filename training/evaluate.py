"""Tests of a training: accuracy and loss over the test videos; a check that needs no network."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .distributed import ALONE, Processes
from .scores import accuracy_of
from .updates import NonFiniteError
from .view_scores import Average, Views, add_views, merge


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
    model: nn.Module,
    batches: Views,
    *,
    video_of: Callable[[int], int],
    average: Average,
    device: torch.device,
    processes: Processes = ALONE,
) -> TestResult:
    """Test a model as ``nlk test`` does: the scores of a video are the mean over its views.

    Args:
        model: Gives logits (B, classes).
        batches: Views (B, C, T, H, W), labels (B,) and their numbers (B,) of this process's videos.
        video_of: Number of the video that a view is of, by the view's number.
        average: ``probabilities`` or ``logits``, see ``view_scores.py``.
        device: Where the model is.
        processes: Those that test together, each its own videos.

    Returns:
        Accuracy and loss over the videos of all processes, each counted once. The model is in
        training mode again if it was.

    Raises:
        NonFiniteError: Scores are not finite, though the last loss was.
    """
    training = model.training
    model.eval()
    sums = add_views([model], batches, video_of=video_of, average=average, device=device)
    model.train(training)
    # Of a process with more peers than there are videos nothing comes.
    videos = merge(processes.gather(sums)).values()
    scores = torch.stack([video.means[0] for video in videos])
    labels = torch.tensor([video.label for video in videos])
    logs = scores.log_softmax(1) if average == "logits" else scores.clamp_min(1e-12).log()
    loss = nn.functional.nll_loss(logs, labels).item()
    if not math.isfinite(loss):
        raise NonFiniteError(
            f"train: expected finite scores of the test, got a loss of {loss}; the weights have "
            "diverged, lower optim.lr or lengthen optim.warmup"
        )
    return TestResult(accuracy_of(scores.float().numpy(), labels.numpy()).top1, loss)


def mean_colour_accuracy(train: Views, test: Views, *, num_classes: int) -> float:
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


def _mean_colours(batches: Views) -> tuple[Tensor, Tensor]:
    """Mean colours (clips, 3) and labels (clips,)."""
    colours, labels = [], []
    for clips, truth, _ in batches:
        colours.append(clips.double().mean((2, 3, 4)))
        labels.append(truth)
    return torch.cat(colours), torch.cat(labels)
