"""The readers: exact frames, and one clear error for everything that is not a video."""

import pickle
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from nlkernels.training.data import reader as reader_module
from nlkernels.training.data.reader import DecordReader, VideoReadError, choose_reader
from nlkernels.training.data.reader_av import AvReader


@pytest.fixture(params=["decord", "av"])
def open_video(request):
    """Function that opens a video with one of the readers."""
    pytest.importorskip(request.param, reason="needs pip install 'nlkernels[video]'")
    return lambda path: reader_module.open_video(path, request.param)


def levels(frames):
    return frames.double().mean((1, 2, 3)).tolist()


@pytest.mark.parametrize(
    "indices", [[0], [9], [3, 4, 5], [5, 2, 2, 7], [8, 9, 0, 1], [9, 0, 9, 0]], ids=str
)
def test_frames_are_those_asked_for(tmp_path, numbered, indices, open_video):
    with closing(open_video(numbered(tmp_path / "v.mp4", 10))) as video:
        frames = video.frames(indices)
    assert frames.shape == (len(indices), 32, 40, 3)
    assert frames.dtype == torch.uint8
    assert levels(frames) == pytest.approx([10 + 4 * index for index in indices], abs=1.5)


@pytest.mark.parametrize("width", [16, 20, 24, 32, 48, 50, 64, 72, 96, 100])
def test_every_width_keeps_its_pixels(tmp_path, write_video, width, open_video):
    blocks = np.random.default_rng(width).integers(40, 216, (6, 3, (width + 7) // 8, 1))
    frames = np.kron(blocks, np.ones((1, 8, 8, 3), np.int64))[:, :, :width].astype(np.uint8)
    with closing(open_video(write_video(tmp_path / "v.mp4", frames))) as video:
        got = video.frames([4, 0, 5])
    assert got.shape == (3, 24, width, 3)
    assert (got.double() - torch.from_numpy(frames[[4, 0, 5]])).abs().max() <= 8


def test_length_and_frame_rate(tmp_path, numbered, open_video):
    with closing(open_video(numbered(tmp_path / "v.mp4", 7))) as video:
        assert len(video) == 7
        assert video.fps == pytest.approx(10)


def test_single_frame(tmp_path, numbered, open_video):
    with closing(open_video(numbered(tmp_path / "v.mp4", 1))) as video:
        assert levels(video.frames([0, 0])) == pytest.approx([10, 10], abs=1.5)


def test_any_place_can_be_reached_in_real_clips(real_clips, open_video):
    for name in ("arm_wrestling.mp4", "flipping_pancake.mkv", "applying_eye_makeup.avi"):
        with closing(open_video(real_clips / name)) as video:
            whole = video.frames(range(90))
            for index in (89, 0, 61, 17):
                assert torch.equal(video.frames([index])[0], whole[index]), (name, index)
            assert torch.equal(video.frames([70, 3, 44]), whole[[70, 3, 44]]), name


def missing(path, make):
    return None


def empty(path, make):
    path.touch()


def folder(path, make):
    path.mkdir()


def text(path, make):
    path.write_text("not a video\n" * 100)


def garbage(path, make):
    path.write_bytes(np.random.default_rng(0).bytes(20_000))


def no_index(path, make):
    # The table of frames is at the end of an MP4 file.
    path.write_bytes(make(path.with_name("whole.mp4"), 40).read_bytes()[:-300])


def audio_only(path, make):
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        stream.layout = "mono"
        silence = av.AudioFrame.from_ndarray(
            np.zeros((1, 16000), np.float32), format="fltp", layout="mono"
        )
        silence.sample_rate = 16000
        container.mux(stream.encode(silence))
        container.mux(stream.encode())


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (missing, "no such file"),
        (empty, "the file is empty"),
        (folder, "not a file"),
        (text, "cannot be opened"),
        (garbage, "cannot be opened"),
        (no_index, "cannot be opened"),
        (audio_only, "cannot be opened|no video in it"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_is_no_video_is_one_clear_error(tmp_path, numbered, damage, reason, open_video):
    path = tmp_path / "broken.mp4"
    damage(path, numbered)
    with pytest.raises(VideoReadError, match=reason) as caught:
        open_video(path)
    assert caught.value.path == str(path)
    message = str(caught.value)
    assert message.startswith("video reader: expected")
    assert ", got " in message
    assert "; " in message
    assert "\n" not in message


def test_damaged_body_is_the_same_error(real_clips, open_video):
    with closing(open_video(real_clips / "corrupted.mp4")) as video:
        assert len(video) == 50
        with pytest.raises(VideoReadError, match=r"decoding of frames 0 to 49 failed|could not be"):
            video.frames([0, 25, 49])


@pytest.mark.parametrize("indices", [[10], [-1], [3, 400]], ids=str)
def test_too_few_frames(tmp_path, numbered, indices, open_video):
    with (
        closing(open_video(numbered(tmp_path / "v.mp4", 10))) as video,
        pytest.raises(VideoReadError, match="has 10 frames"),
    ):
        video.frames(indices)


def test_no_index_and_closed_reader_are_refused(tmp_path, numbered, open_video):
    video = open_video(numbered(tmp_path / "v.mp4", 3))
    with pytest.raises(ValueError, match="expected at least one index"):
        video.frames([])
    video.close()
    video.close()
    with pytest.raises(ValueError, match="expected an open reader"):
        video.frames([0])


def test_the_bridge_of_the_program_is_respected(tmp_path, numbered, decord, open_video):
    path = numbered(tmp_path / "v.mp4", 4, size=(32, 48))
    with closing(open_video(path)) as video:
        expected = video.frames([2, 3])
        with decord.bridge.use_torch():
            assert torch.equal(video.frames([2, 3]), expected)
            # Still the program's own choice afterwards.
            assert isinstance(decord.VideoReader(str(path))[0], torch.Tensor)


@pytest.mark.parametrize(("package", "reader"), [("decord", DecordReader), ("av", AvReader)])
def test_missing_packages_name_the_extra(monkeypatch, tmp_path, package, reader):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"pip install 'nlkernels\[video\]'"):
        reader.open(tmp_path / "v.mp4")
    with pytest.raises(ImportError, match=rf"expected the package {package}, got none"):
        choose_reader(package)


def test_av_stands_in_where_decord_is_missing(monkeypatch):
    for package in ("decord", "av"):
        pytest.importorskip(package, reason="needs pip install 'nlkernels[video]'")
    assert choose_reader().endswith(":DecordReader")
    monkeypatch.setitem(sys.modules, "decord", None)
    assert choose_reader().endswith(":AvReader")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match="expected the package decord or av, got none"):
        choose_reader()


def test_both_readers_see_the_same(real_clips):
    pytest.importorskip("av", reason="needs PyAV: pip install 'nlkernels[video]'")
    for name in ("arm_wrestling.mp4", "flipping_pancake.mkv", "applying_eye_makeup.avi"):
        with (
            closing(DecordReader.open(real_clips / name)) as one,
            closing(AvReader.open(real_clips / name)) as other,
        ):
            assert len(one) == len(other)
            assert one.fps == pytest.approx(other.fps, rel=1e-3)
            wanted = [0, 1, 57, 58, 100]
            a, b = one.frames(wanted).double(), other.frames(wanted).double()
        # The same frames, mostly to the bit: other builds of FFmpeg. Neighbours differ by more.
        assert (a - b).abs().mean((1, 2, 3)).max() < 0.5, name


def test_error_survives_pickling_and_a_loader():
    error = pickle.loads(pickle.dumps(VideoReadError(Path("a.mp4"), "broken")))
    assert (error.path, error.reason) == ("a.mp4", "broken")
    # A DataLoader passes on nothing but the text.
    assert str(VideoReadError(str(error))) == str(error)
