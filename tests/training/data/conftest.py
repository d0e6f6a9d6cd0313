"""Video files made for the tests, and the real clips where they lie beside the checkout."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

REAL_CLIPS = Path(__file__).resolve().parents[4] / "shared" / "data" / "videos"


@pytest.fixture(scope="session")
def decord():
    return pytest.importorskip("decord", reason="needs decord: pip install 'nlkernels[video]'")


@pytest.fixture(scope="session")
def real_clips(decord) -> Path:
    if not REAL_CLIPS.is_dir():
        pytest.skip(f"needs the real clips in {REAL_CLIPS}")
    return REAL_CLIPS


@pytest.fixture(scope="session")
def write_video() -> Callable[..., Path]:
    """Function that writes frames (T, H, W, 3), uint8, as a video file."""
    av = pytest.importorskip("av", reason="needs PyAV: pip install 'nlkernels[video]'")

    def write(path: Path, frames: np.ndarray, *, keyframes: int = 250) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w") as container:
            options = {"crf": "4", "preset": "ultrafast", "g": str(keyframes)}
            stream = container.add_stream("libx264", rate=10, options=options)
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = "yuv420p"
            for picture in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
        return path

    return write


@pytest.fixture(scope="session")
def numbered(write_video) -> Callable[..., Path]:
    """Function that writes a grey video whose frame k has level 10 + k * step."""

    def write(path: Path, frames: int, *, step: int = 4, size: tuple[int, int] = (32, 40)) -> Path:
        levels = np.arange(frames, dtype=np.uint8)[:, None, None, None] * step + 10
        return write_video(path, np.broadcast_to(levels, (frames, *size, 3)).copy())

    return write
