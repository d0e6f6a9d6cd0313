"""Ten kinds of broken and odd files, with every reader: nothing hangs, and all is listed."""

import os

import numpy as np
import pytest

from nlkernels.training.data.augment import Augmentation
from nlkernels.training.data.child import ChildReader
from nlkernels.training.data.listed import ListDataset
from nlkernels.training.data.lists import Listing, Record
from nlkernels.training.data.openers import FileOpener
from nlkernels.training.data.reader import READERS
from nlkernels.training.data.samplers import Caffe2Sampler
from nlkernels.training.data.transforms import TrainTransform

from .test_reader import audio_only, empty, garbage, missing, no_index


def half_a_body(path, make):
    whole = make(path.with_name("body.mkv"), 200).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


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
    noise_in_the_body,
    audio_only,
    one_frame,
    irregular_times,
    rotated,
)
USABLE = {"one_frame", "irregular_times", "rotated"}
# Where a container still says what it held, a reader may find frames in what is left.
EITHER = {"half_a_body", "noise_in_the_body"}


@pytest.fixture(scope="module")
def listing(tmp_path_factory, numbered):
    root = tmp_path_factory.mktemp("broken")
    records = []
    for kind in KINDS:
        suffix = ".mkv" if kind in (half_a_body, noise_in_the_body) else ".mp4"
        path = root / f"{kind.__name__}{suffix}"
        kind(path, numbered)
        records.append(Record(str(path), len(records) % 2))
    numbered(root / "good.mp4", 20)
    return Listing([*records, Record(str(root / "good.mp4"), 1)])


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("check", ["decode", "none"])
def test_ten_kinds_of_files(listing, reader, check):
    pytest.importorskip(reader, reason="needs pip install 'nlkernels[video]'")
    data = ListDataset(
        listing,
        ["a", "b"],
        root="",
        training=True,
        sampler=Caffe2Sampler(4),
        transform=TrainTransform(Augmentation("caffe2", (16, 20), 16)),
        seed=0,
        opener=FileOpener(READERS[reader][1], child_timeout_s=10.0),
        check=check,
        timeout_s=10.0,
        max_failed=1.0,
    )
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
    ChildReader.stop_children()
