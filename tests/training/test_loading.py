"""Order of training clips, equal batches for any number of loader processes, time-outs."""

import time

import pytest
import torch
from torch.utils.data import Dataset

from nlkernels.training.config import Config, DataConfig, OptimConfig
from nlkernels.training.data.dataset import DecodeRateError
from nlkernels.training.data.reader import VideoReadError
from nlkernels.training.data.views import View
from nlkernels.training.loading import StepSampler, training_batches
from nlkernels.training.loading import test_batches as batches_of_the_test


class Clips(Dataset):
    """Twelve clips that depend on epoch and number, as those of a FolderDataset do."""

    epoch = 0

    def __len__(self):
        return 12

    def set_epoch(self, epoch):
        self.epoch = epoch

    def decoded(self, number):
        video = torch.full((1, 2, 2, 3), 100.0 * self.epoch + number)
        return video, View(None, 0, 0, 2, 2), number % 2

    class transform:
        @staticmethod
        def render(video, view, out):
            return out.copy_(video.permute(3, 0, 1, 2))


class Hanging(Clips):
    """Hangs long enough for the time-out, and not so long that its process must be waited for."""

    def decoded(self, number):
        time.sleep(0.5)
        return super().decoded(number)


class Failing(Clips):
    def decoded(self, number):
        raise VideoReadError("clip.mp4", "damaged")


class TooManyFailing(Clips):
    def decoded(self, number):
        raise DecodeRateError("data: expected at most 5% to fail, got more; take videos out")


class Broken(Clips):
    def decoded(self, number):
        raise RuntimeError("something else")


def config(workers=0, timeout_s=60.0):
    data = DataConfig(workers=workers, timeout_s=timeout_s)
    return Config(data=data, optim=OptimConfig(steps=9, batch=4))


def order(clips=12, *, batch=4, steps=9, start=0, seed=0):
    return list(StepSampler(clips, batch=batch, steps=steps, start=start, seed=seed))


def test_every_pass_takes_every_clip_once():
    flat = [pair for step in order() for pair in step]
    for epoch in range(3):
        passed = flat[12 * epoch : 12 * (epoch + 1)]
        assert {one[0] for one in passed} == {epoch}
        assert sorted(one[1] for one in passed) == list(range(12))


def test_passes_and_seeds_differ():
    first, second, _ = (order()[3 * epoch : 3 * epoch + 3] for epoch in range(3))
    assert [[number for _, number in step] for step in first] != [
        [number for _, number in step] for step in second
    ]
    assert order(seed=0) != order(seed=1)
    assert order(seed=1) == order(seed=1)


def test_a_resumed_run_continues_the_order():
    assert order(start=5) == order()[5:]


def test_batches_may_span_passes():
    steps = order(3, batch=8, steps=3)
    assert [len(step) for step in steps] == [8, 8, 8]
    assert [epoch for step in steps for epoch, _ in step] == [k // 3 for k in range(24)]


@pytest.mark.parametrize("workers", [1, 2])
def test_loader_processes_change_nothing(workers):
    expected = list(training_batches(Clips(), config(), seed=3, steps=9))
    found = list(training_batches(Clips(), config(workers), seed=3, steps=9))
    assert len(found) == 9
    for one, other in zip(expected, found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    # Clips of later passes are other clips: the epoch reached the data set.
    clips, _, numbers = found[-1]
    assert torch.equal(clips[:, 0, 0, 0, 0], 200.0 + numbers)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
@pytest.mark.parametrize("workers", [0, 2, 4])
def test_a_restarted_loader_gives_the_same_batches(workers):
    expected = list(training_batches(Clips(), config(), seed=3, steps=9))[5:]
    found = list(training_batches(Clips(), config(workers), seed=3, steps=9, start=5))
    assert len(found) == 4
    for one, other in zip(expected, found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_test_takes_every_clip_once_in_order():
    batches = list(batches_of_the_test(Clips(), config()))
    numbers = torch.cat([numbers for _, _, numbers in batches])
    assert torch.equal(numbers, torch.arange(12))


def test_a_hanging_loader_process_is_an_error():
    batches = training_batches(Hanging(), config(workers=1, timeout_s=0.5), seed=0, steps=1)
    with pytest.raises(TimeoutError, match=r"data: expected a batch in time.*data\.timeout_s"):
        next(iter(batches))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_video_that_keeps_failing_is_one_line(workers):
    batches = training_batches(Failing(), config(workers), seed=0, steps=1)
    with pytest.raises(VideoReadError) as caught:
        next(iter(batches))
    assert str(caught.value) == (
        "video reader: expected a video that can be decoded, got clip.mp4 (damaged); "
        "repair the file or take it out of the folder"
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_failures_are_one_line(workers):
    batches = training_batches(TooManyFailing(), config(workers), seed=0, steps=1)
    with pytest.raises(DecodeRateError) as caught:
        next(iter(batches))
    assert str(caught.value) == "data: expected at most 5% to fail, got more; take videos out"


def test_other_errors_of_the_loader_pass_through():
    with pytest.raises(RuntimeError, match="something else"):
        next(iter(training_batches(Broken(), config(), seed=0, steps=1)))
