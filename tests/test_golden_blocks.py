"""The published systems' blocks: every golden case through import, run, gradients and export."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.golden_cases import assert_same_state, block_files, cotangent, deviation, load
from tests.golden_systems import exported_gradients, subject

FOLDER = Path(os.environ.get("NLKERNELS_GOLDEN") or Path(__file__).parent / "golden")
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5}


def test_there_are_cases():
    assert block_files(FOLDER), f"no block cases in {FOLDER}"


def test_a_wrong_number_shows(tmp_path):
    path = block_files(FOLDER)[0]
    case = load(path)
    digest = case.record["outputs"]["out"]
    out = torch.as_tensor(digest["values"][0]).expand(digest["shape"])
    assert deviation(digest, out) > 0.1
    assert np.isnan(deviation(digest, out * torch.nan))
    other = tmp_path / path.name
    other.write_text(path.read_text().replace('"crc32": ', '"crc32": 1'))
    with pytest.raises(ValueError, match="draws other random numbers"):
        load(other)


@pytest.mark.parametrize("path", block_files(FOLDER), ids=lambda path: path.stem)
def test_block(path):
    case = load(path)
    chosen = subject(case)
    assert_same_state(chosen.export(chosen.module), case.state)
    for dtype, tolerance in TOLERANCES.items():
        deviations = {
            name: deviation(digest, tensor)
            for name, (digest, tensor) in compared(case, dtype).items()
        }
        bad = {name: value for name, value in deviations.items() if not value < tolerance}
        assert not bad, f"{dtype}: {bad}"


# What the keys of a case's state show, or what its system does unless told otherwise.
OPTIONAL = (
    *("bn_layer", "bn_eps", "bn_momentum", "norm", "norm_cfg", "ks", "attr"),
    *("in_channels", "gate_channels", "reduction_ratio", "activation", "use_norm"),
)


@pytest.mark.parametrize("said", [{}, dict.fromkeys(OPTIONAL)], ids=["absent", "null"])
def test_cases_may_leave_settings_out(said):
    for path in block_files(FOLDER):
        case = load(path)
        needed = {key: each for key, each in case.record["config"].items() if key not in OPTIONAL}
        norm = case.record["config"].get("norm_cfg")
        if norm is not None and not str(norm).startswith("BN"):
            continue
        shorter = case._replace(record={**case.record, "config": {**needed, **said}})
        chosen = subject(shorter)
        assert_same_state(chosen.export(chosen.module), case.state)


def compared(case, dtype):
    """Each stored digest beside the tensor that this package computes in `dtype`."""
    chosen = subject(case)
    chosen.module.to(dtype)
    x = torch.from_numpy(case.inputs["x"]).to(dtype).requires_grad_()
    digests = case.record["outputs"]
    if "map" in digests:
        out, weights = chosen.module(x, return_map=True)
    else:
        out, weights = chosen.module(x), None
    out.backward(cotangent(out))
    found = {"out": out, "map": weights, "grad:x": x.grad}
    gradients = exported_gradients(chosen.module, chosen.export)
    found |= {f"grad:{key}": tensor for key, tensor in gradients.items()}
    for key in [key for key in found if key.endswith("penta.weight")]:
        dense = found[key]
        own = torch.arange(dense.shape[0])
        found[f"{key}:diagonal"] = dense[own, own % dense.shape[1]]
    found |= {f"after:{key}": tensor for key, tensor in chosen.export(chosen.module).items()}
    return {name: (digest, found[name]) for name, digest in digests.items()}
