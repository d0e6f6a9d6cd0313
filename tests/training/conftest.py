"""Fixtures of the training tests."""

from pathlib import Path

import pytest

SHARED_VIDEOS = Path(__file__).parents[3] / "shared" / "data" / "videos"


@pytest.fixture
def shared_videos():
    """Folder of real videos, which is no part of the project."""
    if not SHARED_VIDEOS.is_dir():
        pytest.skip("no real videos: ../shared/data/videos is missing")
    return SHARED_VIDEOS
