"""Annotation files of data sets: Kinetics' CSV, and the JSON of HMDB51's splits."""

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nlkernels.models.classes import alphabetical, first_appearance

from .lists import Listing, Record, read_lines

_ORDERS = {"alphabetical": alphabetical, "first_appearance": first_appearance}


def read_kinetics_csv(
    path: str | os.PathLike[str],
    *,
    path_template: str,
    order: str = "alphabetical",
    classes: Sequence[str] | None = None,
) -> Listing:
    """Read a Kinetics annotation file with columns label, youtube_id, time_start, time_end.

    Names of classes may stand in quotes of their own. Of Tushar-N's frames the path template is
    ``{label}/{youtube_id}_{time_start:06d}_{time_end:06d}``, of MindSpore's videos
    ``{split}/{youtube_id}_{time_start:06d}_{time_end:06d}.mp4``.

    Args:
        path: The CSV file, with a header.
        path_template: Path of a video below the root, with names of columns in braces.
        order: How classes are numbered: ``alphabetical`` (Tushar-N, video-nonlocal-net), or
            ``first_appearance`` (MindSpore).
        classes: Names by number, of the training file; unset takes them from this one.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Columns that are missing, times that are no numbers, or a class of its own.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp(), "train.csv")
        >>> _ = path.write_text("label,youtube_id,time_start,time_end\\nzumba,a,1,11\\n")
        >>> read_kinetics_csv(path, path_template="{youtube_id}_{time_start:06d}.mp4").records
        [Record(path='a_000001.mp4', label=0, num_frames=None, offset=0)]
    """
    path = Path(path)
    if order not in _ORDERS:
        raise ValueError(
            f"annotations: expected an order from {', '.join(_ORDERS)}, got {order!r}; choose one"
        )
    rows = list(csv.DictReader(read_lines(path)))
    needed = ("label", "youtube_id", "time_start", "time_end")
    missing = [name for name in needed if not rows or rows[0].get(name) is None]
    if missing:
        raise ValueError(
            f"annotations: expected columns {', '.join(needed)} and a video in {path}, got no "
            f"{missing[0]}; check data.list_format"
        )
    for row in rows:
        row["label"] = (row["label"] or "").strip().strip('"')
    names = _ORDERS[order](row["label"] for row in rows) if classes is None else list(classes)
    numbers = {name: number for number, name in enumerate(names)}
    records, problems = [], []
    for line, row in enumerate(rows, 2):
        try:
            times = {name: int(float(row[name])) for name in ("time_start", "time_end")}
            name = path_template.format(**{**row, **times})
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ValueError(
                f"annotations: expected values for {path_template} in {path} line {line}, got "
                f"{type(error).__name__}: {error}; check data.path_template"
            ) from error
        if row["label"] == "":
            problems.append((name, "no class"))
        elif row["label"] in numbers:
            records.append(Record(name, numbers[row["label"]]))
        else:
            raise ValueError(
                f"annotations: expected the classes of the training list in {path}, got "
                f"{row['label']!r} in line {line}; give every class training videos"
            )
    return Listing(records, names, problems)


def read_hmdb51_json(path: str | os.PathLike[str], *, training: bool) -> Listing:
    """Read a split of HMDB51 as inception-I3D-NON-LOCAL writes it.

    ``{"labels": [...], "database": {id: {"subset": ..., "annotations": {"label": ...}}}}``. The
    published files may list an empty class, which shifts all later numbers there; it is none here.

    Args:
        path: The JSON file, of training and test videos.
        training: The videos of subset ``training``; else those of ``testing``, or of ``validation``
            if it has no others.

    Returns:
        Videos by identity; their images lie in ``u/IDENTITY`` and ``v/IDENTITY`` below the root.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Not such a file, a class that is not listed, or no videos.
    """
    path = Path(path)
    text = "\n".join(read_lines(path))
    try:
        content = json.loads(text)
        # The numbers are those of the listed order, which is the alphabet's in the published files.
        names = first_appearance(content["labels"])
        entries = {
            identity: (entry["subset"], entry["annotations"]["label"])
            for identity, entry in content["database"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"annotations: expected labels and database in {path}, got {type(error).__name__}: "
            f"{error}; check data.list_format"
        ) from error
    return _of_subset(path, names, entries, training)


def _of_subset(path: Path, names: list[str], entries: dict[str, Any], training: bool) -> Listing:
    subsets = {subset for subset, _ in entries.values()}
    wanted = "training" if training else "testing" if "testing" in subsets else "validation"
    numbers = {name: number for number, name in enumerate(names)}
    records, problems = [], []
    for identity, (subset, label) in entries.items():
        if subset != wanted:
            continue
        if label in numbers:
            records.append(Record(identity, numbers[label]))
        elif label == "":
            problems.append((identity, "no class"))
        else:
            raise ValueError(
                f"annotations: expected classes among the labels of {path}, got {label!r} of "
                f"{identity}; add it to the labels"
            )
    if not records:
        raise ValueError(
            f"annotations: expected videos of subset {wanted} in {path}, got none; it has "
            f"{', '.join(sorted(map(str, subsets)))}"
        )
    return Listing(records, names, problems)
