"""Replaced blocks of every system and option: outputs, gradients, statistics and keys as before."""

import copy
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

from nlkernels import replace_nonlocal
from tests.golden_cases import block_files, cotangent, deviation, load
from tests.patching.blocks import BLOCKS, SHAPES, assert_same, randomised, results
from tests.patching.packages.lib import (
    non_local_concatenation,
    non_local_dot_product,
    non_local_embedded_gaussian,
    non_local_gaussian,
)
from tests.patching.packages.ops import non_local, rnl
from tests.patching.packages.slowfast.models.nonlocal_helper import Nonlocal

# A sample for `make test`; the gate runs all of them.
SAMPLE = (
    "slowfast-softmax-(1,2,2)-bn",
    "non_local_gaussian-3d-sub-bn",
    "non_local_concatenation-2d-sub-bare",
    "rnl-(1,3,5)-softmax-True-False",
    "timm-True",
)


def check(name, dtypes=(torch.float64, torch.float32)):
    dims, make = BLOCKS[name]
    check_module(make(), SHAPES[dims], dtypes)


def check_module(made, shape, dtypes=(torch.float64, torch.float32), backward=True):
    """A block, replaced: in few passes and layer after layer, in both modes."""
    randomised(made)
    keys = list(made.state_dict())
    parameters = list(made.parameters())
    for dtype in dtypes:
        theirs = copy.deepcopy(made).to(dtype)
        ours = copy.deepcopy(theirs)
        assert len(replace_nonlocal(ours, backend="chunked")) == 1
        x = torch.randn(shape, dtype=dtype)
        for training in (True, False):
            expected = results(theirs.train(training), x, backward)
            for fused in (None, False):
                ours.fused = fused
                found = results(ours.train(training), x, backward)
                if dtype == torch.float64:
                    assert_same(found, expected, 1e-9)
                else:  # a rounding of theirs is no fault of ours
                    truth = results(copy.deepcopy(theirs).double(), x.double(), backward)
                    assert_same(found, truth, 1e-6 + 3 * furthest(expected, truth))
        assert list(ours.state_dict()) == keys
    made_again = replace_nonlocal(made)
    assert all(a is b for a, b in zip(parameters, made.parameters(), strict=True))
    made_again.restore()
    assert type(made).__dict__.get("nonlocal_original") is None


def furthest(found, truth):
    """Largest difference from the truth, relative to the largest number, of all gradients' one."""
    gradients = [t.abs().max().item() for n, t in truth.items() if n.startswith("grad")]
    largest = max(gradients, default=1.0)
    scales = {
        n: largest if n.startswith("grad") else t.abs().max().item() for n, t in truth.items()
    }
    return max(
        (found[n].double() - t).abs().max().item() / (scales[n] or 1) for n, t in truth.items()
    )


@pytest.mark.parametrize("name", SAMPLE)
def test_block(name):
    check(name, [torch.float64])


@pytest.mark.gate
@pytest.mark.parametrize("name", BLOCKS)
def test_every_block(name):
    check(name)


def test_regions_of_several_groups_of_channels():
    check_module(rnl.NONLocalBlock3D(160, 2, [1, 3, 3], False), (2, 160, 2, 4, 3), [torch.float64])


def test_gates_of_regions_stay_as_they_are():
    frames = nn.Sequential(OrderedDict(bn3=nn.BatchNorm2d(8)))
    model = randomised(rnl.NL3DWrapper(frames, 3, "cg+nl", ks=[3, 3, 3])).double()
    x = torch.randn(6, 8, 5, 4).double()
    expected = results(model, x)
    with replace_nonlocal(model, backend="chunked") as report:
        assert list(report.blocks) == ["nl"] and type(model.cg) is rnl.ChannelGate
        assert_same(results(model, x), expected, 1e-9)


GOLDEN = Path(__file__).resolve().parents[1] / "golden"
FILES = {
    "gaussian": non_local_gaussian,
    "embedded_gaussian": non_local_embedded_gaussian,
    "dot_product": non_local_dot_product,
    "concatenation": non_local_concatenation,
}


def golden_block(case):
    """A stand-in for a golden case, and what its keys have in front."""
    config, system = case.record["config"], case.record["system"].split()[0]
    channels = case.inputs["x"].shape[1]
    if system == "SF":
        arguments = (config["dim"], config["dim_inner"], config["pool_size"])
        return Nonlocal(*arguments, config["instantiation"])
    if system == "AH":
        cls = getattr(FILES[config["variant"]], f"NONLocalBlock{case.inputs['x'].ndim - 2}D")
        names = ("sub_sample", "bn_layer")
        return cls(channels, **{name: config[name] for name in names if name in config})
    if "n_segment" in config and "nl.theta.weight" in case.state:
        frames = nn.Sequential(OrderedDict(bn3=nn.BatchNorm2d(channels)))
        if system == "TSM":
            return non_local.NL3DWrapper(frames, config["n_segment"])
        names = ("n_segment", "attr", "ratio", "ks", "sub_sample")
        return rnl.NL3DWrapper(frames, **{name: config[name] for name in names})
    if system == "RNL" and "ks" in config:
        names = ("ratio", "ks", "sub_sample", "activation", "use_norm", "bn_layer")
        return rnl._NonLocalBlockND(channels, **{name: config[name] for name in names})
    return None


CASES = [
    path for path in block_files(GOLDEN) if golden_block(load(path)) is not None
]  # fmt: skip


@pytest.mark.gate
@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_stand_ins_are_what_they_stand_for(path):
    case = load(path)
    made = golden_block(case).double()
    made.load_state_dict({key: torch.from_numpy(array) for key, array in case.state.items()})
    made.train(case.record["mode"] == "train")
    for replaced in (False, True):
        module = copy.deepcopy(made)
        if replaced:
            replace_nonlocal(module, backend="chunked")
        x = torch.from_numpy(case.inputs["x"]).double().requires_grad_()
        out = module(x)
        assert deviation(case.record["outputs"]["out"], out) < 1e-9
        if "grad:x" in case.record["outputs"]:
            out.backward(cotangent(out))
            assert deviation(case.record["outputs"]["grad:x"], x.grad) < 1e-9


def test_tsm_is_the_embedded_gaussian():
    ours = non_local.NONLocalBlock3D(8)
    other = non_local_embedded_gaussian.NONLocalBlock3D(8)
    other.load_state_dict(randomised(ours).state_dict())
    x = torch.randn(SHAPES[3])
    torch.testing.assert_close(ours(x), other(x), rtol=0, atol=0)
