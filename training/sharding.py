"""Which clips a process reads: its part of every batch, and whole videos of the test."""

import warnings
from collections.abc import Iterator, Mapping

from torch.utils.data import Sampler

from .config import Config
from .data.dataset import ClipDataset
from .distributed import Processes
from .loading import StepSampler

Order = list[list[tuple[int, int]]]


class ShardedSampler(Sampler[list[tuple[int, int]]]):
    """The part of every step's clips that one process reads.

    All parts together are the steps of a single process, whatever the number of processes is.

    Args:
        order: (epoch, clip number) pairs of every step.
        processes: This process among those that train together; their count divides the batch.
    """

    def __init__(self, order: StepSampler, processes: Processes) -> None:
        self._order, self._processes = order, processes

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        rank, count = self._processes.rank, self._processes.count
        for step in self._order:
            part = len(step) // count
            yield step[rank * part : (rank + 1) * part]


def test_order(clips: ClipDataset, config: Config, processes: Processes) -> Order:
    """(0, clip number) pairs of this process's part of a test, in batches.

    Videos are dealt out in turn, whole; none is taken twice to make the parts equal. A batch has as
    many clips as a part of a training step, and whole frames of one video only: those of others
    have other sizes.

    Args:
        clips: The test.
        config: ``optim.batch``, ``optim.accumulate``, ``data.test_crops``.
        processes: This process among those that test together.
    """
    optim = config.optim
    batch = max(1, optim.batch // (optim.accumulate * processes.count))
    order: Order = []
    last = None
    for number in range(len(clips)):
        video = clips.video_of(number)
        if video % processes.count != processes.rank:
            continue
        other = video != last and config.data.test_crops == "full"
        if not order or len(order[-1]) == batch or other:
            order.append([])
        order[-1].append((0, number))
        last = video
    return order


def check_batch(batch: int, accumulate: int, processes: Processes) -> None:
    """Raise ValueError unless every process gets equally many clips of a step, in equal parts."""
    parts = accumulate * processes.count
    if batch % parts != 0:
        larger = parts * -(-batch // parts)
        raise ValueError(
            f"run: expected optim.batch to be a multiple of {parts} (processes x "
            f"optim.accumulate), got {batch}; set for example optim.batch={larger}"
        )


def warn_of_another_order(saved: Mapping[str, int] | None, own: Mapping[str, int]) -> None:
    """Warn where a resumed training takes other clips than it would have taken.

    Args:
        saved: Position in the data of the checkpoint, if it has one; the order of clips is a
            function of these numbers.
        own: The same of this training.
    """
    if saved is None:
        return
    changed = [
        f"{key} {saved[key]} -> {own[key]}"
        for key in ("clips", "batch", "seed")
        if saved[key] != own[key]
    ]
    if changed:
        warnings.warn(
            f"run: the clips come in another order than before the break ({', '.join(changed)})",
            UserWarning,
            stacklevel=3,
        )
