"""Lists of videos with their classes, in the text formats of the published systems.

| format | line | of |
|---|---|---|
| ``caffe2`` | ``path label`` | video-nonlocal-net |
| ``mmaction`` | ``path label``, ``path frames label`` or ``path offset frames label`` | mmaction2 |
| ``pyslowfast`` | ``path label`` or ``path frames label``, any separator | PySlowFast |
| ``tsm`` | ``path frames label`` | TSM |
| ``rnl`` | ``path,frames,label`` | region-based non-local network |

`annotations.py` reads CSV and JSON files of data sets, `lmdb_list.py` the databases of
video-nonlocal-net; `read_listing` all of them.
"""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

# Of the published lists of TSM and RNL: shorter training videos are left out.
_MIN_FRAMES = 3

_SEPARATORS = {"rnl": ","}
_NUMBERED = ("tsm", "rnl")


@dataclass(frozen=True)
class Record:
    """A video of a list.

    Attributes:
        path: As the list says it, below the root.
        label: Number of its class.
        num_frames: Its length, if the list says it.
        offset: Its first frame, where several videos share a folder of images.
    """

    path: str
    label: int
    num_frames: int | None = None
    offset: int = 0


@dataclass(frozen=True)
class Listing:
    """A list that was read.

    Attributes:
        records: Videos in order.
        classes: Names of the classes by number; None if the list has numbers only.
        problems: (path, reason) of what was left out.
    """

    records: list[Record]
    classes: list[str] | None = None
    problems: list[tuple[str, str]] = field(default_factory=list)


def read_text_list(
    path: str | os.PathLike[str],
    layout: str,
    *,
    separator: str | None = None,
    training: bool = True,
) -> Listing:
    """Read a list with a video on each line.

    Args:
        path: The list.
        layout: ``caffe2``, ``mmaction``, ``pyslowfast``, ``tsm`` or ``rnl``.
        separator: What stands between the columns; unset takes the format's own.
        training: Leave out videos of fewer than three frames (tsm, rnl only).

    Returns:
        Its videos; blank lines are none.

    Raises:
        FileNotFoundError: No such list.
        ValueError: A line that is no video, or no line at all.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp(), "list.txt")
        >>> _ = path.write_text("making_tea/a 298 185\\n")
        >>> read_text_list(path, "tsm").records
        [Record(path='making_tea/a', label=185, num_frames=298, offset=0)]
    """
    path = Path(path)
    if separator is None:
        separator = _SEPARATORS.get(layout)
    records, problems = [], []
    widths: dict[int, int] = {}
    for number, line in enumerate(read_lines(path), 1):
        columns = [column.strip() for column in line.strip().split(separator)]
        if columns in ([], [""]):
            continue
        widths.setdefault(len(columns), number)
        record = _record(columns, layout, f"{path} line {number}")
        short = record.num_frames is not None and record.num_frames < _MIN_FRAMES
        if layout in _NUMBERED and training and short:
            problems.append((record.path, f"{record.num_frames} frames, fewer than {_MIN_FRAMES}"))
        else:
            records.append(record)
    if layout == "mmaction" and 4 in widths and len(widths) > 1:
        # Where a video may have several classes, the second one looks like an offset.
        other = next(count for count in widths if count != 4)
        raise ValueError(
            f"list: expected offsets (four columns, mmaction) in every line of {path} or in none, "
            f"got four in line {widths[4]} and {other} in line {widths[other]}; give each video "
            "one class, training here has one class per clip"
        )
    if not records:
        raise ValueError(
            f"list: expected videos in {path}, got none; write one on each line, path and label"
        )
    return Listing(records, problems=problems)


def read_lines(path: Path) -> list[str]:
    """Lines of a text file, or FileNotFoundError or ValueError in one line."""
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise FileNotFoundError(
            f"list: expected a file {path}, got none; check data.train_list and data.test_list"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"list: expected a text in {path}, got {error}; check data.list_format"
        ) from error


def direction_classes(names: Sequence[str]) -> frozenset[int]:
    """Numbers of the classes whose names tell left from right: their clips must not be mirrored.

    Args:
        names: Names of the classes by number.

    Example:
        >>> direction_classes(["pulling from left to right", "bright_side", "turning_left"])
        frozenset({0, 2})
    """
    return frozenset(
        number
        for number, name in enumerate(names)
        if re.search(r"\b(left|right)\b", name.replace("_", " ").casefold())
    )


def numbered_names(listings: Iterable[Listing]) -> list[str]:
    """Names for classes that have numbers only: the numbers up to the largest."""
    largest = max(record.label for listing in listings for record in listing.records)
    return [str(number) for number in range(largest + 1)]


def _record(columns: list[str], layout: str, where: str) -> Record:
    shapes = {"caffe2": (2,), "mmaction": (2, 3, 4), "pyslowfast": (2, 3)}.get(layout, (3,))
    if len(columns) not in shapes:
        raise ValueError(
            f"list: expected {' or '.join(map(str, shapes))} columns ({layout}) in {where}, got "
            f"{len(columns)}: {' | '.join(columns)[:120]}; check data.list_format and "
            "data.separator, and give each video one class"
        )
    name, *middle, label = columns
    if "," in label:
        raise ValueError(
            f"list: expected one class per video in {where}, got {label}; keep one of them, "
            "training here has one class per clip"
        )
    numbers = [_whole(text, where) for text in [*middle, label]]
    frames = numbers[-2] if len(numbers) > 1 else None
    return Record(name, numbers[-1], frames, offset=numbers[0] if len(numbers) == 3 else 0)


def _whole(text: str, where: str) -> int:
    if not text.isdecimal():
        raise ValueError(
            f"list: expected whole numbers after the path in {where}, got {text!r}; "
            "check data.list_format and data.separator"
        )
    return int(text)
