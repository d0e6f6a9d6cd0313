"""Hostile and broken files: one clear error each, and nothing in them is ever executed."""

import io
import os
import pickle
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch

from nlkernels.models import files

WEIGHTS = {f"layer{i}.weight": torch.rand(3, 5) for i in range(4)}
MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, 2)
PREAMBLE = MAGIC + pickle.dumps(1001, 2) + pickle.dumps({"little_endian": True}, 2)


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.fixture
def marker(tmp_path):
    """A file that a payload makes."""
    return tmp_path / "executed"


def payloads(marker):
    command = f"touch {marker}"
    return {
        "system": Payload(os.system, command),
        "eval": Payload(eval, f"open({str(marker)!r}, 'w')"),
        "exec": Payload(exec, f"open({str(marker)!r}, 'w')"),
        "open": Payload(open, str(marker), "w"),
        "getattr": Payload(getattr, Payload(__import__, "os"), "system"),
        "load": Payload(np.load, str(marker), None, True),
        "torch": Payload(torch.load, str(marker)),
        "hub": Payload(torch.hub.load, str(marker), "model"),
    }


KINDS = list(payloads(None))


def assert_armed(content, marker):
    """The payload works where it is unpickled."""
    with open(os.devnull) as _:
        pickle.loads(content)
    assert marker.exists()
    marker.unlink()


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_a_payload_among_blobs_is_refused_and_never_executed(tmp_path, marker, kind, protocol):
    blobs = {"conv1_w": np.ones(3, "f4"), "lr": payloads(marker)[kind]}
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps({"blobs": blobs}, protocol))
    if kind in ("system", "eval", "exec", "open"):
        assert_armed(path.read_bytes(), marker)
    with pytest.raises(ValueError, match=r"to hold data alone, got the name .*; nothing was exec"):
        files.read(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02cos\nsystem\n(S'touch %s'\ntR.",
        b"\x80\x02(S'touch %s'\nios\nsystem\n.",
        b"\x80\x02(cos\nsystem\nS'touch %s'\no.",
        b"\x80\x02cos\nsystem\nS'touch %s'\n\x85\x81.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93S'touch %s'\n\x85R.",
        b"\x80\x02}S'blobs'\ncos\nsystem\nS'touch %s'\n\x85Rs.",
        b"\x80\x02cnumpy\nndarray\n)\x81}S'__setstate__'\ncos\nsystem\nsb.",
    ],
    ids=["reduce", "inst", "obj", "newobj", "stack-global", "value", "setstate"],
)
def test_every_opcode_that_calls(tmp_path, marker, content):
    path = tmp_path / "model.pkl"
    path.write_bytes(content.replace(b"%s", str(marker).encode()))
    with pytest.raises(ValueError, match=r"got the name os.system, which is none of data"):
        files.read(path)
    assert not marker.exists()


def test_a_call_of_what_a_pickle_made(tmp_path):
    path = tmp_path / "model.pkl"
    path.write_bytes(b"\x80\x02K\x01K\x02\x85R.")
    with pytest.raises(ValueError, match="got a call of an object; nothing was executed"):
        files.read(path)


@pytest.mark.parametrize("opcode", [b"\x82\x01", b"\x84\x01\x00\x00\x00", b"\x97"])
def test_registered_and_outside_objects_are_refused(tmp_path, opcode):
    path = tmp_path / "model.pkl"
    path.write_bytes(b"\x80\x05" + opcode + b".")
    with pytest.raises(ValueError, match="which no data needs; nothing was executed"):
        files.read(path)


@pytest.mark.parametrize("archive", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_payload_in_a_torch_file_is_never_executed(tmp_path, marker, kind, archive):
    path = tmp_path / "model.pth"
    content = {"state_dict": WEIGHTS, "meta": payloads(marker)[kind]}
    torch.save(content, path, _use_new_zipfile_serialization=archive)
    found = files.read(path)  # the payload is inert, like any object of an unknown class
    assert found.state.keys() == WEIGHTS.keys()
    assert not marker.exists()


@pytest.mark.parametrize("archive", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_payload_in_place_of_weights_is_never_executed(tmp_path, marker, kind, archive):
    path = tmp_path / "model.pth"
    torch.save(payloads(marker)[kind], path, _use_new_zipfile_serialization=archive)
    with pytest.raises(ValueError, match=r"got a pickled .*; save its state_dict\(\) instead"):
        files.read(path)
    assert not marker.exists()


@pytest.mark.parametrize("position", ["magic", "version", "system", "keys"])
def test_a_payload_beside_a_legacy_file_s_data(tmp_path, marker, position):
    attack = pickle.dumps(Payload(os.system, f"touch {marker}"), 2)
    parts = {
        "magic": attack,
        "version": MAGIC + attack,
        "system": MAGIC + pickle.dumps(1001, 2) + attack,
        "keys": PREAMBLE + pickle.dumps({"a": 1}, 2) + attack,
    }
    path = tmp_path / "model.pth"
    path.write_bytes(parts[position])
    with pytest.raises(ValueError, match=r"got the name \w+.system"):
        files.read(path)
    assert not marker.exists()


def content_of(kind):
    if kind == "caffe2":
        arrays = {key: tensor.numpy() for key, tensor in WEIGHTS.items()}
        return pickle.dumps({"blobs": {**arrays, "lr": 0.1}}, 2)
    stream = io.BytesIO()
    torch.save({"model_state": WEIGHTS}, stream, _use_new_zipfile_serialization=kind == "zip")
    return stream.getvalue()


def outcome(path):
    """The keys that are read, or the error."""
    try:
        return files.read(path).state.keys(), None
    except ValueError as error:
        return None, str(error)


@pytest.mark.parametrize("kind", ["caffe2", "zip", "legacy", "safetensors", "mindspore"])
def test_cut_off_files(tmp_path, kind):
    path = tmp_path / "model"
    if kind in ("safetensors", "mindspore"):
        files.write(path, WEIGHTS, format=kind)
        content = path.read_bytes()
    else:
        content = content_of(kind)
    path.write_bytes(content)
    assert files.read(path).state.keys() == WEIGHTS.keys()
    step = max(1, len(content) // 300)
    complete = 0
    for length in [*range(0, len(content), step), len(content) - 1]:
        path.write_bytes(content[:length])
        keys, error = outcome(path)
        if error:
            assert error.startswith("read: expected")
            assert "is the file complete" in error or "nothing was executed" in error
        else:  # a cut between two records of MindSpore shows as missing keys
            assert keys < WEIGHTS.keys()
            complete += 1
    assert complete <= (len(WEIGHTS) if kind == "mindspore" else 0)


@pytest.mark.filterwarnings("ignore:invalid escape")
@pytest.mark.parametrize("kind", ["caffe2", "zip", "legacy"])
def test_flipped_bytes_give_errors_or_weights(tmp_path, kind):
    """No byte of a file makes reading fail otherwise than with the one error."""
    content = bytearray(content_of(kind))
    path = tmp_path / "model"
    generator = np.random.default_rng(0)
    for position in generator.integers(0, len(content), 300):
        damaged = bytearray(content)
        damaged[position] ^= 1 << int(generator.integers(8))
        path.write_bytes(damaged)
        _, error = outcome(path)
        assert error is None or error.startswith("read: expected")


BROKEN = {
    "empty": b"",
    "text": b"hello",
    "page": b"<!DOCTYPE html>",
    "pointer": b"version https://git-lfs.github.com/spec/v1\n",
    "noise": bytes(range(250, 0, -1)),
    "stop": b"\x80\x02.",
    "number": b"\x80\x02K\x01.",
    "list": b"\x80\x02]K\x01a.",
    "no-mark": b"\x80\x02}e.",
    "odd": b"\x80\x02}(K\x01u.",
    "memo": b"\x80\x02h\x05.",
    "memo-number": b"\x80\x02}r\xff\xff\xff\x7f.",  # Python's unpickler takes 32 GiB for this
    "string-length": b"\x80\x02T\xff\xff\xff\x7fabc.",
    "unhashable": b"\x80\x02}]K\x01s.",
    "deep": b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b".",
    "state": b"\x80\x02K\x01K\x02b.",
    "shape": b"\x80\x02}U\x01acnumpy\nndarray\n)\x81(K\x01(J\xff\xff\xff\xfftcnumpy\ndtype\n"
    b"U\x02f4\x85R\x89U\x00tbs.",
    "archive": b"PK\x03\x04" + bytes(100),
    "tar": bytes(257) + b"ustar" + bytes(250),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_files_that_are_no_checkpoint(tmp_path, content):
    path = tmp_path / "model.pkl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^read: expected the weights of a model in .*; is the"):
        files.read(path)


def tampered(path, change):
    """A zip archive of torch with one record replaced or added."""
    source = io.BytesIO()
    torch.save({"model_state": WEIGHTS}, source)
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(path, "w") as target:
        for record in archive.infolist():
            content = archive.read(record)
            target.writestr(record.filename, change(record.filename, content))


ARCHIVES = {
    "short-storage": (lambda n, c: c[:8] if n.endswith("data/0") else c, "8 bytes in"),
    "big-endian": (lambda n, c: b"big" if n.endswith("byteorder") else c, "big-endian"),
    "strides": (lambda n, c: c.replace(b"K\x05K\x01", b"K\x63K\x01"), "a tensor that ends at"),
    "shape": (lambda n, c: c.replace(b"K\x03K\x05", b"K\x03K\x63"), "a tensor that ends at"),
}


@pytest.mark.parametrize(("change", "part"), ARCHIVES.values(), ids=ARCHIVES)
def test_archives_whose_parts_do_not_fit(tmp_path, change, part):
    tampered(tmp_path / "model.pth", change)
    with pytest.raises(ValueError, match=part):
        files.read(tmp_path / "model.pth")


def test_archives_that_unfold_are_refused(tmp_path):
    path = tmp_path / "model.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model/data.pkl", b"\x80\x02}." + bytes(10_000_000))
    with pytest.raises(ValueError, match=r"compressed, which torch.save never does"):
        files.read(path)


def test_a_storage_of_more_numbers_than_the_file(tmp_path):
    path = tmp_path / "model.pth"
    stream = io.BytesIO()
    torch.save(WEIGHTS, stream, _use_new_zipfile_serialization=False)
    content = stream.getvalue().replace(struct.pack("<q", 15), struct.pack("<q", 2**40))
    path.write_bytes(content)
    with pytest.raises(ValueError, match="numbers that no tensor has"):
        files.read(path)


@pytest.mark.parametrize("archive", [True, False], ids=["zip", "legacy"])
def test_tensors_that_unfold_are_refused(tmp_path, archive):
    path = tmp_path / "model.pth"
    state = {"a": torch.ones(1).expand(2**36)}  # 256 GiB out of 4 bytes
    torch.save(state, path, _use_new_zipfile_serialization=archive)
    with pytest.raises(ValueError, match=f"{2**38} bytes of tensors in a file of"):
        files.read(path)
    shared = torch.ones(2**18)
    torch.save({str(i): shared for i in range(200)}, path)
    with pytest.raises(ValueError, match=f"{200 * 2**20} bytes of tensors in a file of"):
        files.read(path)


def repeated(array, times):
    """Blobs as Python 2 pickles them: one string of bytes, and many arrays that are made of it."""
    content = array.tobytes()
    made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    kind = b"cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffK\x00K\x00tb"
    shape = b"J" + struct.pack("<i", array.size) + b"\x85"
    pickled = b"\x80\x02}(U\x04textT" + struct.pack("<i", len(content)) + content + b"q\x01"
    for number in range(times):
        name = f"conv{number}_w".encode()
        pickled += b"U" + bytes([len(name)]) + name + made
        pickled += b"(K\x01" + shape + kind + b"\x89h\x01tb"
    return pickled + b"u."


@pytest.mark.parametrize("encoded", [False, True], ids=["python2", "python3"])
def test_arrays_that_repeat_are_refused(tmp_path, encoded):
    """One array under many names takes its memory many times, of which a file can ask for any."""
    path = tmp_path / "model.pkl"
    array = np.zeros(2**18, "f4")
    if encoded:  # Python 3 writes the bytes of each array as a text to encode
        path.write_bytes(pickle.dumps({f"conv{i}_w": array for i in range(600)}, 2))
    else:
        path.write_bytes(repeated(array, 600))
    assert path.stat().st_size < 2.2 * 2**20
    tracemalloc.start()
    with pytest.raises(ValueError, match=f"{600 * 2**20} bytes of tensors in a file of"):
        files.read(path)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 16 * 2**20
    path.write_bytes(repeated(array, 8))  # what networks share is no attack
    assert len(files.read(path).state) == 8


def test_arrays_that_repeat_in_a_torch_file_are_refused(tmp_path):
    path = tmp_path / "model.pth"
    array = np.zeros(2**18, "f4")
    torch.save({"model_state": {f"conv{i}_w": array for i in range(600)}}, path)
    with pytest.raises(ValueError, match=f"{600 * 2**20} bytes of tensors in a file of"):
        files.read(path)


def test_a_storage_that_ends_behind_its_file(tmp_path):
    path = tmp_path / "model.pth"
    stream = io.BytesIO()
    torch.save({"a": torch.ones(9)}, stream, _use_new_zipfile_serialization=False)
    many = struct.pack("<q", 2**40)
    content = stream.getvalue().replace(struct.pack("<q", 9), many)
    path.write_bytes(content.replace(b"K\tNtq", b"\x8a\x06" + many[:6] + b"Ntq"))
    with pytest.raises(ValueError, match="an end 4398046511068 bytes before that of its numbers"):
        files.read(path)


def test_missing_files_and_folders(tmp_path):
    for path in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(FileNotFoundError, match=r"expected a checkpoint, got .*; check the"):
            files.read(path)


def test_a_write_that_breaks_off_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    files.write(path, {"a": torch.ones(2)})
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        files.write(path, {"a": torch.zeros(2)})
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    assert files.read(path).state["a"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"format": "npz"}, "expected format to be one of safetensors, torch, caffe2, mindspore"),
        ({"entry": "model"}, "expected no entry in safetensors, got 'model'"),
        ({"format": "caffe2", "entry": "model"}, "expected no entry in caffe2, got 'model'"),
    ],
)
def test_options_that_no_format_has(tmp_path, options, part):
    with pytest.raises(ValueError, match=part):
        files.write(tmp_path / "model", {"a": torch.ones(2)}, **options)
    assert list(tmp_path.iterdir()) == []
