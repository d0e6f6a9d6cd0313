"""Lists, annotation files and databases of every format; each error in one line."""

import json
import sys
import types

import pytest

from nlkernels.training.config_data import DataConfig
from nlkernels.training.data.annotations import read_hmdb51_json, read_kinetics_csv
from nlkernels.training.data.listed import ListFormat
from nlkernels.training.data.lists import (
    Record,
    direction_classes,
    numbered_names,
    read_text_list,
)
from nlkernels.training.data.lmdb_list import listing_of_records, parse_tensors, read_lmdb


@pytest.fixture
def write(tmp_path):
    def write(text, name="list.txt"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize(
    ("layout", "line", "record"),
    [
        ("caffe2", "/d/k/val/tying_knot/A.mp4 372", Record("/d/k/val/tying_knot/A.mp4", 372)),
        ("mmaction", "tea/A_000012.mp4 185", Record("tea/A_000012.mp4", 185)),
        ("mmaction", "tea/A_000012 298 185", Record("tea/A_000012", 185, 298)),
        ("mmaction", "tea/A_000012 20 298 185", Record("tea/A_000012", 185, 298, 20)),
        ("pyslowfast", "/d/A.mp4 185", Record("/d/A.mp4", 185)),
        ("pyslowfast", "/d/A.mp4 300 185", Record("/d/A.mp4", 185, 300)),
        ("tsm", "12345 48 17", Record("12345", 17, 48)),
        ("rnl", "making_tea/A_12_22,298,185", Record("making_tea/A_12_22", 185, 298)),
    ],
)
def test_lines(write, layout, line, record):
    assert read_text_list(write(f"{line}\n\n"), layout).records == [record]


def test_other_separators(write):
    path = write("/d/a video.mp4,3\n/d/b.mp4, 4\n")
    records = [Record("/d/a video.mp4", 3), Record("/d/b.mp4", 4)]
    assert read_text_list(path, "pyslowfast", separator=",").records == records


def test_short_videos_train_in_no_published_list(write):
    path = write("a 2 0\nb 3 1\nc 300 0\n")
    listing = read_text_list(path, "tsm")
    assert [record.path for record in listing.records] == ["b", "c"]
    assert listing.problems == [("a", "2 frames, fewer than 3")]
    assert len(read_text_list(path, "tsm", training=False).records) == 3
    assert len(read_text_list(path, "mmaction").records) == 3


@pytest.mark.parametrize(
    ("text", "layout", "message"),
    [
        ("", "caffe2", "expected videos in .*, got none"),
        ("a.mp4\n", "caffe2", r"expected 2 columns \(caffe2\) in .* line 1, got 1: a.mp4"),
        ("a b.mp4 3\n", "caffe2", "expected 2 columns .* got 3: a | b.mp4 | 3"),
        ("a,3\n", "tsm", "expected 3 columns .* data.separator"),
        ("a 300 x\n", "tsm", "expected whole numbers .* line 1, got 'x'"),
        ("ok 1\na -3\n", "caffe2", "line 2, got '-3'"),
        ("a.mp4 3,4\n", "caffe2", "expected one class per video .* got 3,4"),
        ("a 300 1\nb 300 1 5\n", "mmaction", "got four in line 2 and 3 in line 1; .*one class"),
        ("a 300 1 5 7\n", "mmaction", "columns .* line 1, got 5: .* give each video one class"),
    ],
)
def test_lines_that_are_no_videos(write, text, layout, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_text_list(write(text), layout)
    assert "\n" not in str(caught.value)
    assert "; " in str(caught.value)


def test_missing_lists_and_binary_ones(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected a file .*none; check data.train_list"):
        read_text_list(tmp_path / "none.txt", "caffe2")
    (tmp_path / "data.mdb").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ValueError, match=r"expected a text .* check data.list_format"):
        read_text_list(tmp_path / "data.mdb", "caffe2")


KINETICS = """label,youtube_id,time_start,time_end,split,is_cc
making tea,AbCdEf12345,12,22,train,0
"""
KINETICS += '"""eating ice cream""",b,1,11,train,0\nabseiling,c,100,110,train,0\n'


def test_kinetics_in_both_orders(write):
    path = write(KINETICS, "train.csv")
    template = "{split}/{youtube_id}_{time_start:06d}_{time_end:06d}.mp4"
    listing = read_kinetics_csv(path, path_template=template)
    assert listing.classes == ["abseiling", "eating ice cream", "making tea"]
    assert listing.records == [
        Record("train/AbCdEf12345_000012_000022.mp4", 2),
        Record("train/b_000001_000011.mp4", 1),
        Record("train/c_000100_000110.mp4", 0),
    ]
    first = read_kinetics_csv(path, path_template=template, order="first_appearance")
    assert first.classes == ["making tea", "eating ice cream", "abseiling"]
    assert [record.label for record in first.records] == [0, 1, 2]


def test_test_videos_have_the_numbers_of_the_training_file(write):
    test = write("label,youtube_id,time_start,time_end\nmaking tea,z,1,2\n,y,1,2\n", "test.csv")
    options = {"path_template": "{label}/{youtube_id}"}
    listing = read_kinetics_csv(test, **options, classes=["abseiling", "making tea"])
    assert listing.records == [Record("making tea/z", 1)]
    assert listing.problems == [("/y", "no class")]
    with pytest.raises(ValueError, match=r"expected the classes of the training list .*'making"):
        read_kinetics_csv(test, **options, classes=["abseiling"])


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("label,youtube_id\na,b\n", {}, "got no time_start"),
        ("", {}, "expected columns label, youtube_id, .* and a video"),
        (KINETICS.replace("12,22", "x,22"), {}, "line 2, got ValueError"),
        (KINETICS, {"path_template": "{name}.mp4"}, "got KeyError: 'name'; check data.path_temp"),
        (KINETICS, {"order": "random"}, "expected an order from alphabetical, first_appearance"),
    ],
)
def test_kinetics_files_that_are_none(write, text, options, message):
    with pytest.raises(ValueError, match=message):
        read_kinetics_csv(write(text, "a.csv"), **({"path_template": "{youtube_id}"} | options))


def hmdb(labels, subsets=("training", "validation")):
    entries = {
        "clap_np1_0": {"subset": subsets[0], "annotations": {"label": "clap"}},
        "wave_np1_0": {"subset": subsets[0], "annotations": {"label": "wave"}},
        "broken": {"subset": subsets[0], "annotations": {"label": ""}},
        "wave_np2_0": {"subset": subsets[1], "annotations": {"label": "wave"}},
    }
    return json.dumps({"labels": labels, "database": entries})


def test_hmdb51_without_its_empty_class(write):
    for labels in (["clap", "wave"], ["", "clap", "wave"], ["clap", "", "wave"]):
        listing = read_hmdb51_json(write(hmdb(labels)), training=True)
        assert listing.classes == ["clap", "wave"]
        assert listing.records == [Record("clap_np1_0", 0), Record("wave_np1_0", 1)]
        assert listing.problems == [("broken", "no class")]


def test_hmdb51_tests_on_testing_or_validation(write):
    for subset in ("validation", "testing"):
        path = write(hmdb(["clap", "wave"], ("training", subset)))
        assert read_hmdb51_json(path, training=False).records == [Record("wave_np2_0", 1)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "expected labels and database .* KeyError"),
        ("nothing", "expected labels and database .* JSONDecodeError"),
        (hmdb(["clap"]), "expected classes among the labels .*'wave' of wave_np1_0"),
        (hmdb(["clap", "wave"], ("a", "b")), "expected videos of subset training .* it has a, b"),
    ],
)
def test_hmdb51_files_that_are_none(write, text, message):
    with pytest.raises(ValueError, match=message):
        read_hmdb51_json(write(text), training=True)


def varint(number):
    number %= 2**64
    out = b""
    while number >= 0x80:
        out, number = out + bytes([number & 0x7F | 0x80]), number >> 7
    return out + bytes([number])


def part(number, content):
    """A field of a protocol buffer message."""
    if isinstance(content, int):
        return varint(number << 3) + varint(content)
    return varint(number << 3 | 2) + varint(len(content)) + content


def tensors(path, *numbers, packed=True):
    """What create_video_lmdb*.py writes: a path, then tensors of whole numbers."""
    message = part(1, part(2, 4) + part(6, path))
    for values in numbers:
        data = b"".join(varint(value) for value in values)
        data = part(4, data) if packed else b"".join(part(4, value) for value in values)
        message += part(1, part(1, len(values)) + part(2, 2) + data)
    return message


@pytest.mark.parametrize("packed", [True, False])
def test_messages_of_caffe2(packed):
    message = tensors(b"/d/a.mp4", [372], [9], [300, -1], packed=packed)
    assert parse_tensors(message) == [[b"/d/a.mp4"], [372], [9], [300, -1]]
    # Fields that are not needed, of other kinds, change nothing.
    extra = part(
        1, part(6, b"x") + varint(3 << 3 | 5) + b"\0\0\0\0" + varint(9 << 3 | 1) + bytes(8)
    )
    assert parse_tensors(message + extra)[-1] == [b"x"]


@pytest.mark.parametrize("damage", [slice(0, 10), slice(0, -1), slice(0, 1)])
def test_damaged_messages(damage):
    with pytest.raises(ValueError, match="expected a whole TensorProtos message"):
        parse_tensors(tensors(b"/d/a.mp4", [372])[damage])


class FakeLmdb(types.ModuleType):
    """A database in memory under the interface of the package lmdb."""

    def __init__(self, records):
        super().__init__("lmdb")
        self.records = records

    def open(self, path, **options):
        assert options["readonly"]
        return self

    def begin(self):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False

    def cursor(self):
        return iter(sorted(self.records.items()))


def test_training_databases(tmp_path, monkeypatch):
    records = {b"%09d" % n: tensors(b"/d/%d.mp4" % n, [n % 5]) for n in range(12)}
    monkeypatch.setitem(sys.modules, "lmdb", FakeLmdb(records))
    listing = read_lmdb(tmp_path)
    assert listing.records == [Record(f"/d/{n}.mp4", n % 5) for n in range(12)]
    assert ListFormat("lmdb").read(tmp_path, training=True) == listing


def test_test_databases_list_their_videos_once_and_by_number(tmp_path, monkeypatch, write):
    # As create_video_lmdb_test_multicrop.py: 3 crops of 10 clips, keys that are not padded.
    records, key = {}, 0
    for video in range(3):
        for crop in range(3):
            for clip in range(10):
                message = tensors(b"/d/%d.mp4" % video, [video], [clip], [crop])
                records[b"%d" % key] = message
                key += 1
    monkeypatch.setitem(sys.modules, "lmdb", FakeLmdb(records))
    truth = write("/d/0.mp4 7\n/d/1.mp4 5\n/d/2.mp4 7\n")
    listing = read_lmdb(tmp_path, ground_truth=truth)
    assert listing.records == [Record(f"/d/{n}.mp4", label) for n, label in enumerate((7, 5, 7))]
    with pytest.raises(ValueError, match=r"numbers of videos in place.*ground_truth=FILE"):
        read_lmdb(tmp_path)
    with pytest.raises(ValueError, match=r"expected at least 3 videos .* got 1"):
        read_lmdb(tmp_path, ground_truth=write("/d/0.mp4 7\n"))


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "expected records"),
        ([(b"0", [[b"a"], [1, 2]])], "expected one class per video .* got 2 of a"),
        ([(b"0", [[b"\xff\xd8\xff"], [1]])], "expected a path and a label in record 0"),
        ([(b"0", [[b"a"]])], "expected a path and a label in record 0"),
    ],
)
def test_databases_that_are_none(pairs, message):
    with pytest.raises(ValueError, match=message):
        listing_of_records(pairs, "db", ground_truth=None)


def test_a_database_needs_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(ImportError, match=r"expected the package lmdb .* pip install lmdb"):
        read_lmdb(tmp_path)


def test_a_real_database(tmp_path):
    lmdb = pytest.importorskip("lmdb", reason="needs lmdb: pip install 'nlkernels[lmdb]'")
    with lmdb.open(str(tmp_path / "db")) as database, database.begin(write=True) as transaction:
        for n in range(3):
            transaction.put(b"%09d" % n, tensors(b"/d/%d.mp4" % n, [n]))
    assert read_lmdb(tmp_path / "db").records == [Record(f"/d/{n}.mp4", n) for n in range(3)]
    with pytest.raises(FileNotFoundError, match="expected a database"):
        read_lmdb(tmp_path / "none")


def test_every_format_of_the_configuration_is_read(write, monkeypatch):
    texts = {
        "caffe2": "a 0\n",
        "mmaction": "a 0\n",
        "pyslowfast": "a 0\n",
        "tsm": "a 9 0\n",
        "rnl": "a,9,0\n",
        "kinetics_csv": "label,youtube_id,time_start,time_end\nx,a,1,2\n",
        "hmdb51_json": hmdb(["clap", "wave"]),
        "lmdb": "",
    }
    monkeypatch.setitem(sys.modules, "lmdb", FakeLmdb({b"0": tensors(b"a", [0])}))
    for name in DataConfig.__dataclass_fields__["list_format"].type.__args__:
        layout = ListFormat(name, path_template="{youtube_id}")
        assert layout.read(write(texts[name]), training=True).records[0].label == 0


def test_names_of_numbers_and_directions(write):
    one, other = (read_text_list(write(text), "caffe2") for text in ("a 0\n", "b 3\n"))
    assert numbered_names([one, other]) == ["0", "1", "2", "3"]
    names = ["Pulling something from left to right", "brightly_lit", "turning the camera Right"]
    assert direction_classes(names) == {0, 2}
