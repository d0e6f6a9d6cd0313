"""Videos decoded in a child process: the same frames, and no hang or crash of a decoder spreads."""

import contextlib
import os
import time
import types
from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from nlkernels.training.data.augment import Augmentation
from nlkernels.training.data.child import ChildReader
from nlkernels.training.data.listed import ListDataset
from nlkernels.training.data.lists import Listing, Record
from nlkernels.training.data.openers import FileOpener
from nlkernels.training.data.reader import VideoReadError, choose_reader, open_video
from nlkernels.training.data.samplers import Caffe2Sampler
from nlkernels.training.data.transforms import TrainTransform

from .test_scan import FAKE


@pytest.fixture
def fake(tmp_path, monkeypatch):
    (tmp_path / "fake_reader.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    yield "fake_reader:Reader"
    ChildReader.stop_children()


@pytest.fixture
def decoder(decord):
    yield choose_reader()
    ChildReader.stop_children()


def test_frames_are_the_same(tmp_path, numbered, decoder):
    path = numbered(tmp_path / "v.mp4", 12)
    with (
        closing(open_video(path)) as here,
        closing(ChildReader.open(path, reader=decoder)) as there,
    ):
        assert (len(there), there.fps) == (len(here), here.fps)
        for indices in ([0], [7, 3, 3, 11], range(12)):
            assert torch.equal(there.frames(indices), here.frames(indices))


def test_errors_are_the_same(tmp_path, numbered, decoder):
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(VideoReadError, match="the file is empty"):
        ChildReader.open(tmp_path / "empty.mp4", reader=decoder)
    video = ChildReader.open(numbered(tmp_path / "v.mp4", 3), reader=decoder)
    with pytest.raises(VideoReadError, match="has 3 frames, frames 1 to 3 were asked for"):
        video.frames([1, 3])
    assert len(video.frames([1, 2])) == 2


def test_hanging_and_crashing_decoders_cost_one_video_each(fake):
    began = time.monotonic()
    for name, reason in (
        ("hang-1", "no answer within 0.5 s, given up"),
        ("exit-1", r"the decoding process ended \(exit code 3\)"),
        ("crash-1", r"the decoding process ended \(signal 11\)"),
        ("raise-1", "RuntimeError: deep inside"),
    ):
        with pytest.raises(VideoReadError, match=reason):
            ChildReader.open(name, reader=fake, timeout_s=0.5)
        video = ChildReader.open("talk-a", reader=fake, timeout_s=0.5)
        assert video.frames([1, 0])[:, 0, 0, 0].tolist() == [ord("a") + 1, ord("a")]
    assert time.monotonic() - began < 30


def test_one_child_serves_all_videos_and_none_is_left(fake):
    def children():
        with open(f"/proc/{os.getpid()}/task/{os.getpid()}/children") as listing:
            return set(listing.read().split())

    before = children()
    for name in ("a", "b", "c"):
        ChildReader.open(name, reader=fake).frames([0])
    (child,) = map(int, children() - before)
    # What a terminal or torchrun sends to the whole group is not for it.
    assert os.getpgid(child) == child
    ChildReader.stop_children()
    assert children() == before


def test_an_interrupted_request_is_not_answered_later(fake):
    video = ChildReader.open("a", reader=fake)

    def interrupted():
        raise KeyboardInterrupt

    (child,) = [one for key, one in ChildReader._children.items() if key[0] == os.getpid()]
    child.answers = types.SimpleNamespace(readline=interrupted)
    with pytest.raises(KeyboardInterrupt):
        video.frames([1])
    assert ChildReader.open("talk-b", reader=fake).frames([0])[0, 0, 0, 0] == ord("b")


def alive(word):
    """Processes with a word in their command line."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if word in entry.read_text():
                found.append(entry.parent.name)
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_set_goes_on_past_a_decoder_that_hangs(fake, workers):
    names = ["a", "hang-1", "b", "c"]
    listing = Listing([Record(name, number) for number, name in enumerate(names)])
    data = ListDataset(
        listing,
        names,
        root="",
        training=True,
        sampler=Caffe2Sampler(2),
        transform=TrainTransform(Augmentation("caffe2", (2, 2), 2)),
        seed=0,
        opener=FileOpener(fake, child_timeout_s=0.5),
        check="none",
    )
    batches = list(DataLoader(data, batch_size=2, num_workers=workers))
    labels = torch.cat([labels for _, labels in batches]).tolist()
    assert [labels[0], *labels[2:]] == [0, 2, 3]
    assert labels[1] in (0, 2, 3)
    levels = torch.cat([clips for clips, _ in batches])[:, 0, 0, 0, 0] * 57.375 + 114.75
    # Six frames from the letter's own level on.
    for label, level in zip(labels, levels.tolist(), strict=True):
        assert 0 <= round(level) - ord(names[label]) <= 5
    assert data.decode_failures == [("hang-1", 1)]
    ChildReader.stop_children()
    patience = time.monotonic() + 10
    while alive(fake) and time.monotonic() < patience:
        time.sleep(0.1)
    assert alive(fake) == []
