"""The scan: hanging, crashing and talkative decoders cost one file each, and nothing else."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from nlkernels.training.data.scan import scan_videos

# A reader of files whose name says how it behaves.
FAKE = """
import ctypes, os, signal, sys, time
import numpy as np

class Reader:
    def __init__(self, path):
        self.name = os.path.basename(path)

    @classmethod
    def open(cls, path):
        reader = cls(path)
        if reader.name.startswith("hang"):
            ctypes.PyDLL(None).sleep(60)  # in native code, with the interpreter's lock held
        if reader.name.startswith("exit"):
            os._exit(3)
        if reader.name.startswith("crash"):
            os.kill(os.getpid(), signal.SIGSEGV)
        if reader.name.startswith("raise"):
            raise RuntimeError("deep inside")
        if reader.name.startswith("talk"):
            print("on standard output")
            os.write(1, b"{} and past Python")
        if reader.name.startswith("torch") and "torch" in sys.modules:
            raise RuntimeError("torch was imported")
        return reader

    def __len__(self):
        return 6

    fps = 25.0

    def frames(self, indices):
        level = ord(self.name[-1])
        return np.stack([np.full((2, 4, 3), level + index, np.uint8) for index in indices])

    def close(self):
        pass
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    (tmp_path / "fake_reader.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "fake_reader:Reader"


def test_hanging_and_crashing_files_are_given_up(fake):
    names = ["a", "hang-1", "b", "exit-1", "c", "crash-1", "raise-1", "d", "hang-2", "e"]
    began = time.monotonic()
    found = scan_videos(names, reader=fake, timeout_s=0.5, processes=2)
    assert time.monotonic() - began < 20
    assert [video.path for video in found] == names
    reasons = {video.path: video.reason for video in found if video.reason}
    assert reasons == {
        "hang-1": "no answer within 0.5 s, given up",
        "hang-2": "no answer within 0.5 s, given up",
        "exit-1": "the decoding process ended (exit code 3)",
        "crash-1": "the decoding process ended (signal 11)",
        "raise-1": "RuntimeError: deep inside",
    }
    assert [video.num_frames for video in found] == [0 if v.path in reasons else 6 for v in found]


def test_all_files_hang(fake):
    found = scan_videos(["hang-1", "hang-2", "hang-3"], reader=fake, timeout_s=0.2, processes=2)
    assert all(video.reason.startswith("no answer") for video in found)


def test_talkative_decoders_do_not_disturb(fake):
    found = scan_videos(["talk-a", "b", "talk-c"], reader=fake, processes=1)
    assert [(video.num_frames, video.reason) for video in found] == [(6, "")] * 3


def test_children_do_not_load_torch(fake):
    assert scan_videos(["torch"], reader=fake)[0].reason == ""


def test_no_child_is_left(fake):
    def children():
        listing = Path(f"/proc/{os.getpid()}/task").glob("*/children")
        return {child for task in listing for child in task.read_text().split()}

    before = children()
    scan_videos(["a", "hang-1", "b", "c"], reader=fake, timeout_s=0.2, processes=2)
    assert children() == before


def test_kept_frames(fake):
    found = scan_videos(["a", "hang", "b"], reader=fake, timeout_s=0.3, keep=lambda n: range(2, n))
    assert found[1].pixels is None
    for video in (found[0], found[2]):
        expected = np.arange(2, 6, dtype=np.uint8) + ord(video.path)
        assert video.pixels.shape == (4, 2, 4, 3)
        assert (video.pixels == expected[:, None, None, None]).all()


# One fake video has 6 x 2 x 4 x 3 = 144 bytes.
@pytest.mark.parametrize(
    ("limit_bytes", "subject"), [(143, "for [abc]"), (300, "for the first 3 videos")]
)
def test_memory_limit(fake, limit_bytes, subject):
    def scan(limit):
        return scan_videos(["a", "b", "c"], reader=fake, keep=range, limit_mib=limit / 2**20)

    with pytest.raises(ValueError, match=f"expected decoded videos of at most .*{subject}"):
        scan(limit_bytes)
    assert len(scan(3 * 144)) == 3


@pytest.mark.parametrize("reader", ["no_such_module:Reader", "fake_reader:Missing"])
def test_reader_that_does_not_load(fake, reader):
    with pytest.raises(ImportError, match=rf"expected {reader} to load .* got .*Error"):
        scan_videos(["a"], reader=reader)


def test_no_files_and_no_time(fake):
    assert scan_videos([], reader=fake) == []
    with pytest.raises(ValueError, match="time-out above 0 s, got 0"):
        scan_videos(["a"], reader=fake, timeout_s=0)


def test_corrupted_real_clip_is_reported(real_clips):
    found = scan_videos([real_clips / "corrupted.mp4", real_clips / "arm_wrestling.mp4"])
    assert "decoding of frames 0 to 49 failed" in found[0].reason
    assert (found[1].num_frames, found[1].reason) == (280, "")


def test_a_script_without_main_guard_works(tmp_path, numbered):
    for name in ("train/a", "train/b", "test/a", "test/b"):
        numbered(tmp_path / f"{name}/v.mp4", 8)
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from nlkernels.training.data.crops import TestCrops\n"
        "from nlkernels.training.data.folder import FolderDataset\n"
        "from nlkernels.training.data.samplers import Caffe2Sampler\n"
        "from nlkernels.training.data.transforms import TestTransform\n"
        "clips = FolderDataset(sys.argv[1], split='test', sampler=Caffe2Sampler(8),\n"
        "    transform=TestTransform(TestCrops('centre', 'caffe2', 32, 32)), seed=0,\n"
        "    preload=True)\n"
        "print(len(clips), clips[1][1])\n"
    )
    import nlkernels

    root = str(Path(nlkernels.__file__).resolve().parent.parent)
    done = subprocess.run(
        [sys.executable, script, tmp_path],
        env={**os.environ, "PYTHONPATH": root},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.stdout, done.returncode) == ("2 1\n", 0), done.stderr
