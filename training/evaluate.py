"""Testing: accuracy over the fixed clips of the test videos, and a check that needs no network."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .distributed import ALONE, Processes

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
    model: nn.Module,
    batches: Batches,
    *,
    video_of: Callable[[int], int],
    device: torch.device,
    processes: Processes = ALONE,
) -> TestResult:
    """Test a model; its softmax scores are averaged over the clips of each video.

    Args:
        model: Gives logits (B, classes).
        batches: Clips (B, C, T, H, W), labels (B,) and clip numbers (B,) of this process's videos.
        video_of: Number of the video that a clip is of, by the clip's number.
        device: Where the model is.
        processes: Those that test together, each its own videos.

    Returns:
        Accuracy and loss over the videos of all processes, each counted once. The model is in
        training mode again if it was.
    """
    training = model.training
    model.eval()
    parts = []
    with torch.inference_mode():
        for clips, truth, numbers in batches:
            parts.append((numbers, truth, model(clips.to(device)).float().softmax(1).cpu()))
    model.train(training)
    # Of a process with more peers than there are videos nothing comes.
    gathered = [part for own in processes.gather(parts) for part in own]
    numbers, labels, scores = (torch.cat(column) for column in zip(*gathered, strict=True))
    order = numbers.argsort()
    of_clips = torch.tensor([video_of(number) for number in numbers[order].tolist()])
    _, places, counts = of_clips.unique(return_inverse=True, return_counts=True)
    videos = scores.new_zeros(len(counts), scores.shape[1])
    videos = videos.index_add(0, places, scores[order]) / counts.unsqueeze(1)
    truth = labels.new_zeros(len(counts)).index_copy(0, places, labels[order])
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
