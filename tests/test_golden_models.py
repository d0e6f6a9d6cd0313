"""The published networks: every golden case through import, run and export."""

import os
from pathlib import Path

import pytest
import torch

from nlkernels.models.convert import export_foreign
from tests.golden_cases import assert_same_state, deviation, files, load
from tests.golden_models import loaded
from tests.golden_outputs import outputs

FOLDER = Path(os.environ.get("NLKERNELS_GOLDEN") or Path(__file__).parent / "golden")
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5}
CASES = files(FOLDER, "model")
# One of each architecture and system, together about half a minute; the others are gates.
FAST = (
    *("c2_c2d_r50_nl_8x8", "c2_i3d_r50_nl_8x8", "ha_i3d_rgb", "inc_i3d_flow_plain"),
    *("mm_c2d_r50", "mm_i3d_r50_nl_concatenation", "mm_slowonly_r50_nl_embedded_gaussian"),
    *("mm_tsm_r50_nl_dot_product", "pj_i3d_rgb", "ptv_c2d_r50", "rnl_tsm_r50"),
    *("sf_slow_nln_4x16_r50", "tn_i3d_r50_nl", "tsm_r50_block", "tsm_r50_nl"),
)


def test_there_are_cases():
    assert CASES, f"no network cases in {FOLDER}"


@pytest.mark.gate
@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_model(path):
    check(path)


@pytest.mark.parametrize(
    "path", [path for path in CASES if path.stem in FAST], ids=lambda path: path.stem
)
def test_model_in_seconds(path):
    check(path)


def check(path):
    """Import, export and both precisions of one case."""
    case = load(path)
    model, report = loaded(case)
    assert all(note.startswith("classes are numbered") for note in report.notes)
    assert_same_state(export_foreign(model, like=report), case.state)
    for dtype, tolerance in TOLERANCES.items():
        found = outputs(model, case, dtype)
        deviations = {
            name: deviation(digest, found[name]) for name, digest in case.record["outputs"].items()
        }
        bad = {name: value for name, value in deviations.items() if not value < tolerance}
        assert not bad, f"{dtype}: {bad}"
