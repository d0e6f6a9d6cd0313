"""Eleven kinds of broken and odd files, with every reader: nothing hangs, and all is listed."""

import os
import time
from contextlib import closing

import numpy as np
import pytest

from nlkernels.training.data.augment import Augmentation
from nlkernels.training.data.child import ChildReader
from nlkernels.training.data.dataset import DecodeRateError, Video
from nlkernels.training.data.listed import ListDataset
from nlkernels.training.data.lists import Listing, Record
from nlkernels.training.data.openers import FileOpener
from nlkernels.training.data.reader import READERS, VideoReadError
from nlkernels.training.data.samplers import Caffe2Sampler
from nlkernels.training.data.transforms import TrainTransform

from .test_reader import audio_only, empty, garbage, missing, no_index


def half_a_body(path, make):
    whole = make(path.with_name("body.mkv"), 200).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def without_the_last_kilobyte(path, make):
    path.write_bytes(make(path.with_name("last.mkv"), 200).read_bytes()[:-1024])


def noise_in_the_body(path, make):
    whole = bytearray(make(path.with_name("noise.mkv"), 200).read_bytes())
    middle = slice(len(whole) // 3, len(whole) // 2)
    whole[middle] = np.random.default_rng(1).bytes(len(whole[middle]))
    path.write_bytes(whole)


def one_frame(path, make):
    make(path, 1)


def written(path, *, stamps, rotate=False):
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "4"})
        stream.height, stream.width, stream.pix_fmt = 32, 40, "yuv420p"
        if rotate:
            stream.metadata["rotate"] = "90"
        for number, stamp in enumerate(stamps):
            frame = av.VideoFrame.from_ndarray(
                np.full((32, 40, 3), 10 + 4 * number, np.uint8), format="rgb24"
            )
            frame.pts = stamp
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def irregular_times(path, make):
    written(path, stamps=[0, 1, 2, 3, 9, 10, 40, 41, 55, 70])


def rotated(path, make):
    written(path, stamps=range(10), rotate=True)


KINDS = (
    missing,
    empty,
    garbage,
    no_index,
    half_a_body,
    without_the_last_kilobyte,
    noise_in_the_body,
    audio_only,
    one_frame,
    irregular_times,
    rotated,
)
USABLE = {"one_frame", "irregular_times", "rotated"}
# Where a container still says what it held, a reader may find frames in what is left.
EITHER = {"half_a_body", "without_the_last_kilobyte", "noise_in_the_body"}
# How files are opened: in the process that asks, or in one that may be killed.
PLACES = {"inside": None, "child": 10.0}


@pytest.fixture(scope="module")
def listing(tmp_path_factory, numbered):
    root = tmp_path_factory.mktemp("broken")
    records = []
    for kind in KINDS:
        suffix = ".mkv" if kind.__name__ in EITHER else ".mp4"
        path = root / f"{kind.__name__}{suffix}"
        kind(path, numbered)
        records.append(Record(str(path), len(records) % 2))
    numbered(root / "good.mp4", 20)
    return Listing([*records, Record(str(root / "good.mp4"), 1)])


@pytest.fixture(params=READERS)
def reader(request):
    pytest.importorskip(request.param, reason="needs pip install 'nlkernels[video]'")
    yield READERS[request.param][1]
    ChildReader.stop_children()


def clips_of(listing, reader, place, check, max_failed):
    return ListDataset(
        listing,
        ["a", "b"],
        root="",
        training=True,
        sampler=Caffe2Sampler(4),
        transform=TrainTransform(Augmentation("caffe2", (16, 20), 16)),
        seed=0,
        opener=FileOpener(reader, child_timeout_s=PLACES[place]),
        check=check,
        timeout_s=10.0,
        max_failed=max_failed,
    )


@pytest.mark.parametrize("place", PLACES)
def test_whatever_a_file_is_it_gives_frames_or_one_kind_of_error(listing, reader, place):
    opener = FileOpener(reader, child_timeout_s=PLACES[place])
    for number, record in enumerate(listing.records):
        kind = os.path.basename(record.path).partition(".")[0]
        began, failed_with = time.monotonic(), None
        try:
            with closing(opener(number, Video(record.path, record.label))) as video:
                last = len(video) - 1
                frames = video.frames([0, last // 2, last])
            assert frames.shape == (3, 32, 40, 3)
        except VideoReadError as error:
            failed_with = error
        assert time.monotonic() - began < 10, kind
        if kind not in EITHER:
            assert (failed_with is None) == (kind in USABLE | {"good"}), kind
        assert failed_with is None or failed_with.path == record.path


@pytest.mark.parametrize("place", PLACES)
def test_more_failures_than_allowed_end_the_training(listing, reader, place):
    data = clips_of(listing, reader, place, "none", 0.01)

    def passes():
        for epoch in range(9):
            data.set_epoch(epoch)
            for index in range(len(data)):
                data[index]

    with pytest.raises(DecodeRateError, match=r"at most 1\.0% of the training clips to fail"):
        passes()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("check", ["decode", "none"])
def test_a_training_goes_on_and_lists_what_is_broken(listing, reader, place, check):
    data = clips_of(listing, reader, place, check, 1.0)
    for index in range(len(data)):
        clip, label = data[index]
        assert clip.shape == (3, 4, 16, 16)
        assert label in (0, 1)
    listed = {
        os.path.basename(path).partition(".")[0]
        for path, _ in (*data.problems, *data.decode_failures)
    }
    broken = {kind.__name__ for kind in KINDS} - USABLE
    assert broken - EITHER <= listed <= broken
    for _, reason in data.problems:
        assert reason
        assert "\n" not in reason
