"""safetensors: the format byte by byte, and beside the package of that name."""

import json
import struct

import pytest
import torch

from nlkernels.models import files
from tests.models.files.test_caffe2 import equal

WEIGHTS = {
    "conv1.weight": torch.rand(2, 3, 1, 2, 2),
    "count": torch.tensor(7),
    "half": torch.rand(3).half(),
    "brain": torch.rand(3).bfloat16(),
    "mask": torch.rand(3) > 0.5,
    "bytes": torch.arange(3, dtype=torch.uint8),
    "double": torch.rand(3, 2).double().t(),
    "empty": torch.empty(0, 3),
    "größe": torch.ones(1, dtype=torch.int16),
}
METADATA = {"licence": "CC BY-NC 4.0", "source": "https://example.org", "protocol": "10 x 3 views"}


def test_what_is_written_is_what_is_read(tmp_path):
    path = tmp_path / "model.safetensors"
    files.write(path, WEIGHTS, METADATA)
    found = files.read(path)
    assert equal(found.state, WEIGHTS)
    assert found.metadata == METADATA
    assert found.format == "safetensors"


def test_the_layout(tmp_path):
    path = tmp_path / "model.safetensors"
    files.write(path, {"b": torch.tensor([1, 2], dtype=torch.int16), "a": torch.tensor([0.5])})
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    assert size % 8 == 0
    assert json.loads(content[8 : 8 + size]) == {
        "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        "b": {"dtype": "I16", "shape": [2], "data_offsets": [4, 8]},
    }
    assert content[8 + size :] == struct.pack("<fhh", 0.5, 1, 2)


def test_no_tensors(tmp_path):
    files.write(tmp_path / "none.safetensors", {})
    assert files.read(tmp_path / "none.safetensors").state == {}


def test_the_package_reads_and_writes_the_same(tmp_path):
    theirs = pytest.importorskip("safetensors.torch", reason="the package safetensors is absent")
    safe_open = pytest.importorskip("safetensors").safe_open
    contiguous = {key: tensor.contiguous() for key, tensor in WEIGHTS.items()}
    path = tmp_path / "ours.safetensors"
    files.write(path, WEIGHTS, METADATA)
    assert equal(theirs.load_file(path), contiguous)
    with safe_open(path, "pt") as opened:
        assert opened.metadata() == METADATA
    theirs.save_file(contiguous, tmp_path / "theirs.safetensors", METADATA)
    found = files.read(tmp_path / "theirs.safetensors")
    assert equal(found.state, WEIGHTS)
    assert found.metadata == METADATA


def header(tensors, content=b"\0" * 8):
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text + content


def entry(start, end, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


DAMAGED = {
    "overlap": ({"a": entry(0, 4), "b": entry(0, 4)}, "where 4 is free"),
    "gap": ({"a": entry(4, 8)}, "where 0 is free"),
    "beyond": ({"a": entry(0, 4000, (1000,))}, "describes 4000"),
    "unused": ({"a": entry(0, 4)}, "8 bytes of tensors, of which the header describes 4"),
    "size": ({"a": entry(0, 8)}, "a at bytes 0 to 8"),
    "negative": ({"a": entry(0, 8, (-1, -2))}, "a of the shape"),
    "dtype": ({"a": entry(0, 8, dtype="F128")}, "a of the dtype F128"),
    "shapeless": ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, "the key 'shape'"),
    "huge": ({"a": entry(0, 2**62, (2**60,))}, "describes"),
}


@pytest.mark.parametrize(("tensors", "part"), DAMAGED.values(), ids=DAMAGED)
def test_headers_that_do_not_fit_their_file(tmp_path, tensors, part):
    path = tmp_path / "model.safetensors"
    path.write_bytes(header(tensors))
    with pytest.raises(ValueError, match=part):
        files.read(path)


def test_a_header_longer_than_the_file(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 90_000_000) + b'{"a":1}')
    with pytest.raises(ValueError, match="a header of 90000000 bytes in a file of 15"):
        files.read(path)
