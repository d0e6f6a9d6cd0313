"""MindSpore's .ckpt: written by hand from the message's description, and by us."""

import struct

import pytest
import torch

from nlkernels.models import files
from nlkernels.models.files import _mindspore
from tests.models.files.test_caffe2 import equal

WEIGHTS = {
    "backbone.conv1.features.0.weight": torch.rand(300, 3, 1, 1, 1),
    "backbone.conv1.features.1.bn2d.moving_variance": torch.rand(64).half(),
    "brain": torch.rand(3).bfloat16(),
    "step": torch.tensor(7, dtype=torch.int32),
    "one": torch.rand(1).double(),
    "flag": torch.tensor([True, False]),
    "large": torch.tensor([2**40]),
}


def field(number, content):
    assert len(content) < 128  # lengths of one byte
    return bytes([number << 3 | 2, len(content)]) + content


def record(name, dims, kind, content):
    tensor = dims + field(2, kind.encode()) + field(3, content)
    return field(1, field(1, name.encode()) + field(2, tensor))


def read(tmp_path, content):
    path = tmp_path / "nonlocal-1_1.ckpt"
    path.write_bytes(content)
    return files.read(path)


NUMBERS = struct.pack("<4f", 1, 2, 3, 4)
ONE_BY_ONE, PACKED = b"\x08\x02\x08\x02", field(1, b"\x02\x02")


@pytest.mark.parametrize("dims", [ONE_BY_ONE, PACKED], ids=["unpacked", "packed"])
@pytest.mark.parametrize("end", [b"", b"crc_num" + bytes(10)], ids=["plain", "sum"])
def test_a_file_by_hand(tmp_path, dims, end):
    content = record("fc.weight", dims, "Float32", NUMBERS)
    content += record("step", b"\x08\x00", "Int32", struct.pack("<i", 5))
    found = read(tmp_path, content + end)
    expected = {
        "fc.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        "step": torch.tensor(5, dtype=torch.int32),
    }
    assert equal(found.state, expected)
    assert found.format == "mindspore"


def test_large_tensors_come_in_pieces(tmp_path):
    pieces = [
        record("fc.weight", ONE_BY_ONE, "Float32", part) for part in (NUMBERS[:8], NUMBERS[8:])
    ]
    state = read(tmp_path, b"".join(pieces)).state
    assert state["fc.weight"].tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_what_is_written_is_what_is_read(tmp_path):
    path = tmp_path / "nonlocal-1_1.ckpt"
    files.write(path, WEIGHTS, format="mindspore")
    assert equal(files.read(path).state, WEIGHTS)
    _mindspore.write(path, WEIGHTS, slice_bytes=100)
    assert equal(files.read(path).state, WEIGHTS)


def test_the_bytes_are_those_of_protobuf(tmp_path):
    path = tmp_path / "nonlocal-1_1.ckpt"
    files.write(path, {"fc.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}, format="mindspore")
    assert path.read_bytes() == record("fc.weight", ONE_BY_ONE, "Float32", NUMBERS)


DAMAGED = {
    "type": (record("a", ONE_BY_ONE, "Float4", NUMBERS), "a of the type 'Float4'"),
    "size": (record("a", b"\x08\x05", "Float32", NUMBERS), "16 bytes for"),
    "nameless": (field(1, field(2, b"")), "a record without a name"),
    "group": (field(1, b"\x0b"), "an end within a number"),
    "encrypted": (b"\n\x03\x0b\x01\x02", "wire type 3, encrypted or of another format"),
    "number": (b"\n" + b"\xff" * 20, "a number of more than 64 bits"),
}


@pytest.mark.parametrize(("content", "part"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_records(tmp_path, content, part):
    with pytest.raises(ValueError, match=part):
        read(tmp_path, content)
