"""The LMDB databases of video-nonlocal-net: which videos they list, and in which order.

A record is a Caffe2 TensorProtos message: path, then label (training) or number of the video
(test), then for tests the number of the clip and of the crop. The message is read as data, by the
few lines below; Caffe2 is not needed.
"""

import os
import struct
from collections.abc import Iterator
from pathlib import Path

from .lists import Listing, Record, read_text_list


def read_lmdb(
    path: str | os.PathLike[str], *, ground_truth: str | os.PathLike[str] | None = None
) -> Listing:
    """Videos of a database that `create_video_lmdb*.py` of video-nonlocal-net wrote.

    Test databases have one record per clip and crop; their videos are listed once, by number, and
    clips and crops are those of the configuration.

    Args:
        path: The database, a folder.
        ground_truth: For test databases: the list ``path label`` they were made from.

    Raises:
        FileNotFoundError: No such database.
        ImportError: The package lmdb is not installed.
        ValueError: Records that are none, or a test database without its list.
    """
    path = Path(path)
    try:
        import lmdb
    except ImportError as error:
        raise ImportError(
            f"lmdb: expected the package lmdb to read {path}, got {error}; install it with: "
            "pip install lmdb, or use the text list that the database was made from"
        ) from error
    if not path.exists():
        raise FileNotFoundError(
            f"lmdb: expected a database {path}, got none; check data.train_list and data.test_list"
        )
    with (
        lmdb.open(str(path), readonly=True, lock=False, subdir=path.is_dir()) as database,
        database.begin() as transaction,
    ):
        pairs = [(bytes(key), parse_tensors(bytes(value))) for key, value in transaction.cursor()]
    return listing_of_records(pairs, str(path), ground_truth=ground_truth)


def listing_of_records(
    pairs: list[tuple[bytes, list["list[int] | list[bytes]"]]],
    where: str,
    *,
    ground_truth: str | os.PathLike[str] | None,
) -> Listing:
    """Videos of (key, tensors) pairs, in the order of their numbers.

    Args:
        pairs: Contents of the database.
        where: Its name, for messages.
        ground_truth: As in `read_lmdb`.

    Raises:
        ValueError: As in `read_lmdb`.
    """
    # Keys of test databases are not padded, and LMDB sorts them as texts.
    pairs = sorted(pairs, key=lambda pair: int(pair[0]))
    records: list[Record] = []
    tests: dict[int, str] = {}
    for key, tensors in pairs:
        try:
            (video,), numbers = tensors[0], tensors[1]
            name = video.decode()
        except (ValueError, IndexError, AttributeError, UnicodeDecodeError) as error:
            raise ValueError(
                f"lmdb: expected a path and a label in record {key.decode()} of {where}, got "
                f"{type(error).__name__}: {error}; make the database with paths of local files"
            ) from error
        if len(tensors) > 2:
            tests.setdefault(numbers[0], name)
        elif len(numbers) == 1:
            records.append(Record(name, numbers[0]))
        else:
            raise ValueError(
                f"lmdb: expected one class per video in {where}, got {len(numbers)} of {name}; "
                "training here has one class per clip"
            )
    if not tests:
        if not records:
            raise ValueError(f"lmdb: expected records in {where}, got none; make it anew")
        return Listing(records)
    if ground_truth is None:
        raise ValueError(
            f"lmdb: expected the list of the test videos with {where}, which has numbers of videos "
            "in place of labels, got none; set data.ground_truth=FILE"
        )
    truth = read_text_list(ground_truth, "caffe2").records
    if max(tests) >= len(truth):
        raise ValueError(
            f"lmdb: expected at least {max(tests) + 1} videos in {ground_truth}, got {len(truth)}; "
            "use the list that the database was made from"
        )
    return Listing([Record(tests[number], truth[number].label) for number in sorted(tests)])


def parse_tensors(message: bytes) -> list["list[int] | list[bytes]"]:
    """Values of the tensors of a Caffe2 TensorProtos message: whole numbers or texts.

    Args:
        message: As it is stored.

    Returns:
        For each tensor its int32 values, or its strings.

    Raises:
        ValueError: Not such a message.

    Example:
        >>> parse_tensors(
        ...     b"\\x0a\\x05\\x10\\x04\\x32\\x01a" + b"\\x0a\\x05\\x10\\x02\\x22\\x01\\x07"
        ... )
        [[b'a'], [7]]
    """
    tensors = []
    for number, value in _fields(message):
        if number != 1 or not isinstance(value, bytes):
            continue
        integers: list[int] = []
        strings: list[bytes] = []
        for part, content in _fields(value):
            if part == 4:  # int32_data, packed or one by one
                integers += _packed(content) if isinstance(content, bytes) else [_signed(content)]
            elif part == 6 and isinstance(content, bytes):  # string_data
                strings.append(content)
        tensors.append(strings or integers)
    return tensors


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of the fields of a protocol buffer message."""
    place = 0
    while place < len(message):
        key, place = _varint(message, place)
        kind = key & 7
        if kind == 0:
            value, place = _varint(message, place)
            yield key >> 3, value
            continue
        if kind == 2:
            length, place = _varint(message, place)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise ValueError(f"lmdb: expected a TensorProtos message, got a field of kind {kind}")
        value = message[place : place + length]
        if len(value) < length:
            raise ValueError("lmdb: expected a whole TensorProtos message, got its beginning only")
        place += length
        yield key >> 3, value if kind == 2 else struct.unpack("<Q", value.ljust(8, b"\0"))[0]


def _packed(content: bytes) -> list[int]:
    numbers, place = [], 0
    while place < len(content):
        number, place = _varint(content, place)
        numbers.append(_signed(number))
    return numbers


def _varint(message: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while place < len(message) and shift < 70:
        byte = message[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value, place
    raise ValueError("lmdb: expected a whole TensorProtos message, got a number that does not end")


def _signed(number: int) -> int:
    """Negative int32 values are written as 64 bits."""
    return number - 2**64 if number >= 2**63 else number
