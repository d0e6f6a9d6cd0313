"""Caffe2's pickles: those of a real Python 2, and ours."""

import io
import pickle
import pickletools

import numpy as np
import pytest
import torch

from nlkernels.models import files
from tests.models.files import python2_pickles

WEIGHTS = {
    "conv1_w": torch.tensor([[0.125, 0.25], [0.375, 0.5]]).view(2, 1, 1, 1, 2),
    "res_conv1_bn_s": torch.tensor([0.25, 0.375]),
    "res_conv1_bn_rm": torch.tensor([[0.375, 0.5], [0.625, 0.75]]),  # in Fortran order
    "pred_b": torch.tensor([0.625, 0.75, 0.875], dtype=torch.float64),  # big-endian, unicode name
    "pred_w": torch.empty(0, 3, dtype=torch.float16),
}
BLOBS = {"conv1_w": torch.rand(2, 3, 5, 7, 7), "pred_b": torch.rand(2).double()}


def equal(one, other):
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]) for key in one
    )


@pytest.mark.parametrize(("name", "entry"), [("NESTED", "blobs"), ("FLAT", "")])
def test_pickles_of_python_2(tmp_path, name, entry):
    path = tmp_path / "c2_model_iter400000.pkl"
    path.write_bytes(getattr(python2_pickles, name))
    found = files.read(path)
    assert equal(found.state, WEIGHTS)
    # An array, a numpy scalar and a number, as the solver leaves them behind.
    assert found.metadata == {"model_iter": 400000.0, "lr": 0.25, "epoch": 12}
    assert list(found.extra) == ["conv1_w_momentum"]
    assert (found.format, found.entry) == ("caffe2", entry)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("core", ["numpy.core", "numpy._core"])
def test_pickles_of_python_3(tmp_path, protocol, core):
    content = pickle.dumps({"blobs": {k: v.numpy() for k, v in BLOBS.items()}}, protocol)
    if protocol < 4:  # names stand in lines; later they carry their length
        content = content.replace(b"numpy._core", core.encode())
    path = tmp_path / "model.pkl"
    path.write_bytes(content)
    assert equal(files.read(path).state, BLOBS)


@pytest.mark.parametrize("entry", ["blobs", ""])
def test_what_is_written_is_what_is_read(tmp_path, entry):
    path = tmp_path / "model.pkl"
    files.write(path, BLOBS, {"lr": 0.00125, "epoch": 12}, format="caffe2", entry=entry)
    found = files.read(path)
    assert equal(found.state, BLOBS)
    assert found.metadata == {"lr": 0.00125, "epoch": 12}
    assert found.entry == entry


def test_the_original_finds_a_learning_rate(tmp_path):
    files.write(tmp_path / "model.pkl", BLOBS, format="caffe2")
    assert files.read(tmp_path / "model.pkl").metadata == {"lr": 0.01}


def test_python_unpickles_what_is_written(tmp_path):
    path = tmp_path / "model.pkl"
    files.write(path, BLOBS, {"model_iter": 7}, format="caffe2", entry="blobs")
    root = pickle.loads(path.read_bytes(), encoding="latin1")
    assert equal({key: torch.from_numpy(root["blobs"][key]) for key in BLOBS}, BLOBS)
    assert root["blobs"]["model_iter"] == 7
    # As Python 2 pickles: its protocol, and byte strings for names and contents.
    opcodes = [op.name for op, *_ in pickletools.genops(path.read_bytes())]
    assert max(op.proto for op, *_ in pickletools.genops(path.read_bytes())) == 2
    assert {"SHORT_BINSTRING", "BINSTRING"} <= set(opcodes)
    assert not {"BINUNICODE", "BINBYTES"} & set(opcodes)


def test_arrays_are_written_as_tensors_are(tmp_path):
    arrays = {key: tensor.numpy().astype(">f4") for key, tensor in BLOBS.items()}
    files.write(tmp_path / "model.pkl", arrays, format="caffe2")
    expected = {key: tensor.float() for key, tensor in BLOBS.items()}
    assert equal(files.read(tmp_path / "model.pkl").state, expected)


def test_a_dtype_without_array_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError, match="conv1_w to be a tensor of a dtype that caffe2 has"):
        files.write(tmp_path / "m.pkl", {"conv1_w": torch.zeros(2).bfloat16()}, format="caffe2")
    assert list(tmp_path.iterdir()) == []


NO_NUMBERS = {
    "objects": np.array([{}, 1], dtype=object),
    "structures": np.zeros(2, dtype=[("a", "f4")]),
    "texts": np.array(["a"]),
    "complex": np.zeros(2, dtype=complex),
}


@pytest.mark.parametrize("array", NO_NUMBERS.values(), ids=NO_NUMBERS)
def test_arrays_of_no_numbers_are_refused(tmp_path, array):
    stream = io.BytesIO()
    pickle.dump({"conv1_w": array}, stream, 2)
    (tmp_path / "model.pkl").write_bytes(stream.getvalue())
    with pytest.raises(ValueError, match=r"no numbers|numpy.rec|is none of data"):
        files.read(tmp_path / "model.pkl")
