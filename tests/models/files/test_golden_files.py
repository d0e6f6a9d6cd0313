"""The golden networks from files in the formats of their systems, and back into such files."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from nlkernels.models import create_model, files
from nlkernels.models.conversion import FORMS
from nlkernels.models.convert import export_foreign, load_foreign
from tests.golden_cases import deviation, load
from tests.golden_cases import files as golden_files
from tests.golden_models import NETWORKS
from tests.golden_outputs import outputs

FOLDER = Path(os.environ.get("NLKERNELS_GOLDEN") or Path(__file__).parents[2] / "golden")
PREFIXES = {
    "C2": "caffe2",
    "TN": "tushar",
    "SF": "slowfast",
    "PTV": "pytorchvideo",
    "MM": "mmaction",
    "TSM": "tsm",
    "RNL": "rnl",
    "INC": "inception_nl",
    "HA": "hassony2",
    "PJ": "piergiaj",
    "MS": "mindspore",
}
# Golden cases have no momenta; a training checkpoint has one for every blob that is trained.
TRAINED = ("conv1_w", "pred_w", "pred_b", "nonlocal_conv3_1_theta_w")
SOLVER = {"lr": 0.0001, "model_iter": 400000}


def by_system():
    """Files of networks by system, those with the most keys first."""
    found = {}
    for path in golden_files(FOLDER, "model"):
        record = json.loads(path.read_text(encoding="utf-8"))
        system = PREFIXES[record["system"].split()[0]]
        found.setdefault(system, []).append((-len(record["state"]), path))
    return {system: [path for _, path in sorted(paths)] for system, paths in found.items()}


def parameters(found, kind):
    """Files as parameters; a skipped one where the folder has none."""
    reason = f"no network of {kind} among the golden cases in {FOLDER}"
    return [pytest.param(path, id=path.stem) for path in found] or [
        pytest.param(None, marks=pytest.mark.skip(reason=reason))
    ]


BY_SYSTEM = by_system()
CAFFE2 = parameters(BY_SYSTEM.get("caffe2", []), "the Caffe2 original")
# The largest network of each system that saves with torch.
OTHERS = parameters(
    [paths[0] for system, paths in BY_SYSTEM.items() if FORMS[system].format == "torch"],
    "a system that saves with torch",
)


def network(case):
    found = NETWORKS[case.record["system"].split()[0]](case.record["config"], case)
    return create_model(found.name, **found.options, dropout=0.0).eval()


def caffe2_file(folder, case, entry):
    """A checkpoint of training, or the flat one of the original's tools."""
    blobs = dict(case.state)
    if entry:
        blobs |= {
            f"{name}_momentum": np.ones_like(blobs[name]) for name in TRAINED if name in blobs
        }
    path = folder / "c2_model_iter400000.pkl"
    files.write(path, blobs, SOLVER, format="caffe2", entry=entry)
    return path


@pytest.mark.parametrize("entry", ["blobs", ""], ids=["nested", "flat"])
@pytest.mark.parametrize("source", CAFFE2)
def test_pickles_of_caffe2(tmp_path, source, entry):
    case = load(source)
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
@pytest.mark.parametrize("source", CAFFE2)
def test_networks_from_pickles_compute_the_golden_numbers(tmp_path, source):
    case = load(source)
    model = network(case)
    load_foreign(model, caffe2_file(tmp_path, case, "blobs"))
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        found = outputs(model, case, dtype)
        for tap, digest in case.record["outputs"].items():
            assert deviation(digest, found[tap]) < tolerance, (dtype, tap)


@pytest.mark.gate
@pytest.mark.parametrize("archive", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("source", OTHERS)
def test_torch_files_of_every_system(tmp_path, source, archive):
    """As the system's code saves them: nested, prefixed, beside an optimiser."""
    case = load(source)
    system = PREFIXES[case.record["system"].split()[0]]
    form = FORMS[system]
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
