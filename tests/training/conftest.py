"""Fixtures of the training tests."""

from pathlib import Path

import pytest
import torch

from nlkernels.training.data.child import ChildReader

SHARED_VIDEOS = Path(__file__).parents[3] / "shared" / "data" / "videos"


@pytest.fixture
def shared_videos():
    """Folder of real videos, which is no part of the project."""
    if not SHARED_VIDEOS.is_dir():
        pytest.skip("no real videos: ../shared/data/videos is missing")
    return SHARED_VIDEOS


@pytest.fixture
def one_thread():
    """Of networks as small as these, threads cost more than they give; no child outlives a test."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    ChildReader.stop_children()
