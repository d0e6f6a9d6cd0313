"""The golden networks from files in the formats of their systems, and back into such files."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from nlkernels.models import create_model, files
from nlkernels.models.conversion import FORMS
from nlkernels.models.convert import export_foreign, load_foreign
from tests.golden_cases import deviation, load
from tests.golden_models import NETWORKS, outputs

FOLDER = Path(os.environ.get("NLKERNELS_GOLDEN") or Path(__file__).parents[2] / "golden")
CAFFE2 = ("c2_c2d_r50_nl_8x8", "c2_i3d_r50_nl_8x8", "c2_i3d_r50_nl_32x4_affine")
# Golden cases have no momenta; a training checkpoint has one for every blob that is trained.
TRAINED = ("conv1_w", "pred_w", "pred_b", "nonlocal_conv3_1_theta_w")
SOLVER = {"lr": 0.0001, "model_iter": 400000}


def network(case):
    found = NETWORKS[case.record["system"].split()[0]](case.record["config"], case)
    return create_model(found.name, **found.options, dropout=0.0).eval()


def caffe2_file(folder, case, entry):
    """A checkpoint of training, or the flat one of the original's tools."""
    blobs = dict(case.state)
    if entry:
        blobs |= {f"{name}_momentum": np.ones_like(blobs[name]) for name in TRAINED}
    path = folder / "c2_model_iter400000.pkl"
    files.write(path, blobs, SOLVER, format="caffe2", entry=entry)
    return path


@pytest.mark.parametrize("entry", ["blobs", ""], ids=["nested", "flat"])
@pytest.mark.parametrize("name", CAFFE2)
def test_pickles_of_caffe2(tmp_path, name, entry):
    case = load(FOLDER / f"{name}.json")
    path = caffe2_file(tmp_path, case, entry)
    model, direct = network(case), network(case)
    report = load_foreign(model, path)
    load_foreign(direct, case.state)
    assert report.system == "caffe2"
    assert set(report.matched) == case.state.keys()
    assert all(
        torch.equal(one, other)
        for one, other in zip(
            model.state_dict().values(), direct.state_dict().values(), strict=True
        )
    )
    found = files.read(path)
    assert found.metadata == SOLVER
    files.write(tmp_path / "back.pkl", export_foreign(model, like=report), format="caffe2")
    back = files.read(tmp_path / "back.pkl").state
    assert back.keys() == case.state.keys()
    for key, array in case.state.items():
        np.testing.assert_array_equal(back[key].numpy(), array, strict=True, err_msg=key)


@pytest.mark.gate
@pytest.mark.parametrize("name", CAFFE2)
def test_networks_from_pickles_compute_the_golden_numbers(tmp_path, name):
    case = load(FOLDER / f"{name}.json")
    model = network(case)
    load_foreign(model, caffe2_file(tmp_path, case, "blobs"))
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        found = outputs(model, case, dtype)
        for tap, digest in case.record["outputs"].items():
            assert deviation(digest, found[tap]) < tolerance, (dtype, tap)


OTHERS = {
    "tushar": "tn_i3d_r50_nl",
    "slowfast": "sf_c2d_nln_8x8_r50",
    "pytorchvideo": "ptv_slow_r50",
    "mmaction": "mm_i3d_r50_nl_gaussian",
    "tsm": "tsm_r50_nl",
    "rnl": "rnl_tsm_r50",
    "inception_nl": "inc_i3d_rgb_nl",
    "hassony2": "ha_i3d_rgb",
    "piergiaj": "pj_i3d_rgb",
}


@pytest.mark.gate
@pytest.mark.parametrize("archive", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("system", OTHERS)
def test_torch_files_of_every_system(tmp_path, system, archive):
    """As the system's code saves them: nested, prefixed, beside an optimiser."""
    case, form = load(FOLDER / f"{OTHERS[system]}.json"), FORMS[system]
    state = {form.prefix + key: torch.from_numpy(array) for key, array in case.state.items()}
    optimiser = {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
    content = {"epoch": 3, form.entry: state, "optimizer": optimiser} if form.entry else state
    path = tmp_path / "checkpoint.pth"
    torch.save(content, path, _use_new_zipfile_serialization=archive)
    model, direct = network(case), network(case)
    report = load_foreign(model, path)
    load_foreign(direct, case.state)
    assert report.system == system
    assert all(
        torch.equal(one, other)
        for one, other in zip(
            model.state_dict().values(), direct.state_dict().values(), strict=True
        )
    )
