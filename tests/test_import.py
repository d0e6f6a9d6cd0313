"""Importing the package is cheap and has no side effects."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import nlkernels

ROOT = Path(nlkernels.__file__).resolve().parents[1]
WATCH = Path(__file__).with_name("watch_import.py")
LIMIT_S = 0.3
# Packages that cost much or need a device; each is loaded by the call that needs it.
HEAVY = ("torch._dynamo", "torch._inductor", "triton", "matplotlib", "decord", "av", "yaml")


def _python(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def watched() -> dict:
    return json.loads(_python(str(WATCH), ",".join(HEAVY)))


def test_bare_import_loads_nothing_else():
    code = (
        "import sys, nlkernels; print([n for n in sys.modules if n.startswith(('torch', 'nlk'))])"
    )
    assert _python("-c", code).strip() == "['nlkernels']"


def test_no_heavy_package(watched):
    assert watched["heavy"] == []


def test_no_file_is_opened(watched):
    assert watched["opened"] == []


def test_no_process_socket_or_change_of_files(watched):
    assert watched["actions"] == []


def test_no_environment_variable_is_read(watched):
    assert watched["variables"] == []


def test_no_device_is_asked(watched):
    assert watched["device"] == []


def test_time_beyond_torch(watched):
    assert watched["bare_s"] < LIMIT_S / 10
    assert watched["public_s"] < LIMIT_S


def test_public_names_are_listed_and_others_refused():
    assert set(nlkernels.__all__) <= set(dir(nlkernels))
    with pytest.raises(AttributeError, match="has no attribute 'softmax'"):
        _ = nlkernels.softmax
