"""Batches of a data set's clips: loader processes with time-outs, and what goes wrong in them."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from .config import Config
from .data.dataset import ClipDataset, DecodeRateError
from .data.reader import VideoReadError


class WorkerLostError(RuntimeError):
    """A loader process ended by itself."""


class _Numbered(Dataset[tuple[Any, ...]]):
    """Batches of a data set's clips and their numbers, drawn as in the epochs that a sampler names.

    Args:
        clips: Data set.
        decoded: Give lists of frames and views in place of network input.
    """

    def __init__(self, clips: ClipDataset, *, decoded: bool) -> None:
        self._clips, self._decoded = clips, decoded

    def __getitems__(self, keys: list[tuple[int, int]]) -> tuple[Any, ...]:
        batch, frames, views, labels = None, [], [], []
        for place, (epoch, number) in enumerate(keys):
            self._clips.set_epoch(epoch)
            video, view, label = self._clips.decoded(number)
            labels.append(label)
            if self._decoded:
                frames.append(video)
                views.append(view)
                continue
            if batch is None:
                # Clips are rendered into it: putting them together afterwards copies them again.
                batch = torch.empty(len(keys), *view.shape(video))
                if get_worker_info() is not None:
                    batch.share_memory_()
            self._clips.transform.render(video, view, out=batch[place])
        numbers = torch.tensor([number for _, number in keys])
        if self._decoded:
            return frames, views, torch.tensor(labels), numbers
        return batch, torch.tensor(labels), numbers


def _as_it_is(batch: tuple[Any, ...]) -> tuple[Any, ...]:
    return batch


class Batches:
    """Clips (B, C, T, H, W), labels (B,) and clip numbers (B,), a batch per item of an order.

    With ``data.augment_on: device`` clips are on ``run.device``, else on the CPU.

    What goes wrong in a loader process arrives as an error of ours: TimeoutError for one that
    hangs, WorkerLostError for one that is lost, VideoReadError for a video that fails again and
    again, DecodeRateError for too many.

    Args:
        clips: Data set.
        order: (epoch, clip number) pairs of every batch.
        config: Sections ``data`` and ``run``.
    """

    def __init__(
        self,
        clips: ClipDataset,
        order: Sequence[list[tuple[int, int]]] | Sampler[list[tuple[int, int]]],
        config: Config,
    ) -> None:
        workers = config.data.workers
        self._render: Callable[..., Tensor] | None = None
        if config.data.augment_on == "device":
            self._render = clips.transform.render
        self._device = torch.device(
            ("cuda" if torch.cuda.is_available() else "cpu")
            if config.run.device == "auto"
            else config.run.device
        )
        self._loader = DataLoader(
            _Numbered(clips, decoded=self._render is not None),
            batch_sampler=order,
            num_workers=workers,
            collate_fn=_as_it_is,
            # A hanging decoder is an error, not a hanging run.
            timeout=config.data.timeout_s if workers > 0 else 0,
            # Its own: a loader that starts draws a seed, and dropout must not notice a resumed run.
            generator=torch.Generator(),
            pin_memory=config.run.device != "cpu" and torch.cuda.is_available(),
        )

    def __len__(self) -> int:
        """Number of batches."""
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        try:
            for batch in self._loader:
                yield self._rendered(*batch) if self._render else tuple(batch)
        except (VideoReadError, DecodeRateError) as error:
            text = str(error)
            if "Traceback (most recent call last)" not in text:
                raise
            # From a loader process comes the text of its traceback, which ends with the message.
            # Its traceback here goes: it would keep the loader alive, and its processes waiting.
            message = text.strip().splitlines()[-1].partition("Error: ")[2]
            raise type(error)(message) from error.with_traceback(None)
        except RuntimeError as error:
            # DataLoader has no classes of its own for processes that hang or end.
            text = str(error)
            if "timed out" in text:
                raise TimeoutError(
                    f"data: expected a batch in time, got: {error}; a video may hang its decoder, "
                    "set data.decode=child or raise data.timeout_s"
                ) from error
            if "exited unexpectedly" not in text and "is killed by signal" not in text:
                raise
            raise WorkerLostError(
                f"data: expected loader processes that live, got: {text.rstrip('. ')}; a video may "
                "crash its decoder, set data.decode=child, or memory may be short, lower "
                "data.workers"
            ) from error

    def _rendered(
        self, frames: list[Tensor], views: list[Any], labels: Tensor, numbers: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        clips = [
            self._render(one.to(self._device, non_blocking=True), view)
            for one, view in zip(frames, views, strict=True)
        ]
        return torch.stack(clips), labels, numbers
