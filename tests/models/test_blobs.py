"""Caffe2's tools: norms folded into factors, and stripping, against the golden case."""

import os
from pathlib import Path

import pytest
import torch

from nlkernels.models import create_model, files
from nlkernels.models.blobs import affine_to_bn, bn_to_affine, strip_for_finetuning
from nlkernels.models.convert import export_foreign, load_foreign
from tests.golden_cases import deviation, load
from tests.golden_cases import files as golden_files
from tests.models.files.test_caffe2 import equal

FOLDER = Path(os.environ.get("NLKERNELS_GOLDEN") or Path(__file__).parents[1] / "golden")
CASES = [load(path) for path in golden_files(FOLDER, "conversion")]


def cases(chosen):
    """Conversions of a kind, as parameters; a skipped one where the folder has none."""
    found = [pytest.param(case, id=case.record["case"]) for case in CASES if chosen(case)]
    reason = f"no such conversion among the golden cases in {FOLDER}"
    return found or [pytest.param(None, marks=pytest.mark.skip(reason=reason))]


def given(case, name):
    return torch.from_numpy(case.state[name])


def folds(case):
    """Whether norms were folded: statistics went in, and other factors came out."""
    norms = [name.removesuffix("_rm") for name in case.state if name.endswith("_bn_rm")]
    factors = [f"{norm}_s" for norm in norms if f"{norm}_s" in case.record["outputs"]]
    changed = [
        name
        for name in factors
        if deviation(case.record["outputs"][name], given(case, name)) > 1e-6
    ]
    return bool(changed)


def strips(case):
    """What a case says of stripping: of a second tool, or of the one that made its outputs."""
    record = case.record
    if "strip_for_finetuning" in record["config"]:
        return record["config"]["strip_for_finetuning"]
    if folds(case) or "scalars_after" not in record["config"]:
        return None
    names = sorted(record["outputs"])
    return {"names_after": names, "scalars_after": record["config"]["scalars_after"]}


FOLDING, STRIPPING = cases(folds), cases(strips)


def blobs(case, nested, dtype=torch.float32):
    values = {name: given(case, name).to(dtype) for name in case.state}
    values |= case.record["config"]["scalars_before"]
    return {"blobs": values} if nested else values


def tensors(values):
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


def scalars(values):
    return {name: value for name, value in values.items() if not isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "flat"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)], ids=str
)
@pytest.mark.parametrize("case", FOLDING)
def test_folding_is_that_of_the_original(case, nested, dtype, tolerance):
    record = case.record
    folded = bn_to_affine(blobs(case, nested, dtype))
    assert tensors(folded).keys() == record["outputs"].keys()
    assert scalars(folded) == record["config"]["scalars_after"]
    assert all(tensor.dtype == dtype for tensor in tensors(folded).values())
    for name, digest in record["outputs"].items():
        assert deviation(digest, folded[name]) < tolerance, name
    removed = blobs(case, False).keys() - folded.keys()
    assert removed == set(record["config"]["removed"])


@pytest.mark.parametrize("case", FOLDING)
def test_the_whole_way_through_files(tmp_path, case):
    """Read a training checkpoint, fold it, write it: the golden numbers again."""
    before, record = blobs(case, False), case.record
    path = tmp_path / "c2_model_iter400000.pkl"
    files.write(path, tensors(before), scalars(before), format="caffe2", entry="blobs")
    found = files.read(path)
    assert found.metadata == record["config"]["scalars_before"]
    folded = bn_to_affine({**found.state, **found.extra, **found.metadata})
    files.write(path, tensors(folded), scalars(folded), format="caffe2")
    found = files.read(path)
    assert equal(found.state, tensors(folded))
    assert found.metadata == record["config"]["scalars_after"]


@pytest.mark.parametrize("case", STRIPPING)
def test_stripping_is_that_of_the_original(case):
    stripped, expected = strip_for_finetuning(blobs(case, True)), strips(case)
    assert sorted(tensors(stripped)) == expected["names_after"]
    assert scalars(stripped) == expected["scalars_after"]
    kept = {name: value for name, value in blobs(case, False).items() if name in tensors(stripped)}
    assert equal(tensors(stripped), kept)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.record["case"])
def test_every_conversion_is_checked(case):
    assert folds(case) or strips(case), f"a conversion of no known kind: {case.record['source']}"


@pytest.mark.parametrize("case", FOLDING)
def test_factors_become_norms_that_leave_their_input_alone(case):
    folded = bn_to_affine(blobs(case, True, torch.float64))
    unfolded = affine_to_bn(folded, eps=1e-5)
    again = bn_to_affine(unfolded)
    for name, tensor in tensors(folded).items():
        torch.testing.assert_close(again[name], tensor, rtol=1e-14, atol=0)


@pytest.mark.parametrize(("affine_blocks", "new"), [(0, ()), (5, ("blocks",))])
def test_folded_networks_compute_the_same(affine_blocks, new):
    """The original's way to long clips: the trained 8 x 8 network, folded, then blocks added."""
    options = {"num_classes": 4, "width": 0.125}
    trained = create_model("i3d_r50_8x8", **options).double().eval()
    randomise(trained)
    affine = create_model("i3d_r50_32x4", **options, blocks=affine_blocks).double().eval()
    folded = tensors(bn_to_affine(export_foreign(trained)))
    report = load_foreign(affine, folded, new=("classifier", *new))
    assert report.system == "caffe2"
    assert len(report.matched) == len(folded)
    affine.fc.load_state_dict(trained.fc.state_dict())
    clip = torch.rand(1, 3, 8, 64, 64, dtype=torch.float64)
    with torch.no_grad():  # fresh blocks are the identity
        torch.testing.assert_close(affine(clip), trained(clip), rtol=1e-6, atol=1e-8)


def randomise(model):
    """Statistics and factors as of training."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm3d):
            for tensor in (module.weight, module.running_var):
                torch.nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (module.bias, module.running_mean):
                torch.nn.init.normal_(tensor, std=0.1)


ERRORS = {
    "affine": (bn_to_affine, {"res_conv1_bn_s": 1}, "no name that ends in _bn_rm; an affine"),
    "lost": (bn_to_affine, {"res_conv1_bn_rm": 1}, "none of res_conv1_bn_b, res_conv1_bn_riv"),
    "statistics": (affine_to_bn, {"a_bn_s": 1, "a_bn_rm": 1}, "got a_bn_rm; a checkpoint with"),
    "no-factors": (affine_to_bn, {"conv1_w": 1}, "no name that ends in _bn_s"),
}


@pytest.mark.parametrize(("function", "values", "part"), ERRORS.values(), ids=ERRORS)
def test_checkpoints_of_another_form(function, values, part):
    with pytest.raises(ValueError, match=part):
        function(values)


@pytest.mark.parametrize("function", [bn_to_affine, affine_to_bn, strip_for_finetuning])
def test_no_blobs(function):
    with pytest.raises(TypeError, match="expected values by name of blob, got list"):
        function([1])
