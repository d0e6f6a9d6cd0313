"""Scores of tested videos: accuracy, files, and weighted means of several tests.

A file of scores is ``.npz`` (arrays ``video``, ``label``, ``scores``, ``classes`` and the texts
``average`` and ``protocol``; read it with ``numpy.load``), or ``.jsonl``: a line with ``classes``,
``average`` and ``protocol``, then a line ``{"video": ..., "label": ..., "scores": [...]}`` for each
video.
"""

import json
import math
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

SUFFIXES = (".npz", ".jsonl")
_TOP = 5


class Accuracy(NamedTuple):
    """Shares of the videos, from 0 to 1.

    Attributes:
        top1: The label has the highest score.
        top5: The label is among the five highest; None for five classes or fewer, where it says
            nothing.
    """

    top1: float
    top5: float | None

    def __str__(self) -> str:
        top5 = "" if self.top5 is None else f", top-5 {self.top5:.2%}"
        return f"top-1 {self.top1:.2%}{top5}"


@dataclass(frozen=True)
class Scores:
    """Scores of tested videos.

    Attributes:
        videos: Names of the V videos.
        labels: (V,), int64.
        scores: (V, classes), float32.
        classes: Names of the classes.
        average: What the scores are: ``probabilities`` or ``logits``.
        protocol: How they were measured.
    """

    videos: list[str]
    labels: np.ndarray
    scores: np.ndarray
    classes: list[str]
    average: str
    protocol: str

    def accuracy(self) -> Accuracy:
        """Top-1 and top-5; of equal scores the class that comes first counts as the higher one.

        Example:
            >>> scores = np.array([[0.9, 0.1], [0.6, 0.4]], np.float32)
            >>> names = ["run", "walk"]
            >>> Scores(["a", "b"], np.array([0, 1]), scores, names, "probabilities", "").accuracy()
            Accuracy(top1=0.5, top5=None)
        """
        return accuracy_of(self.scores, self.labels)


def accuracy_of(scores: np.ndarray, labels: np.ndarray) -> Accuracy:
    """Top-1 and top-5 of scores (V, classes), float32, and labels (V,)."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :_TOP]
    right = order == labels[:, None]
    more = scores.shape[1] > _TOP
    return Accuracy(right[:, 0].mean().item(), right.any(1).mean().item() if more else None)


def combine(parts: Sequence[tuple[Scores, float]], names: Sequence[str]) -> Scores:
    """Weighted mean of the scores of several tests of the same videos.

    Args:
        parts: Scores and coefficients.
        names: What to call each of them in the protocol and in messages.

    Returns:
        Sum of coefficient * scores over the sum of the coefficients, in the order of the first.

    Raises:
        ValueError: Tests of different videos, labels, classes or kinds of scores, or a coefficient
            that is no positive number.

    Example:
        >>> def one(first):
        ...     scores = np.array([[first, 1 - first]], np.float32)
        ...     return Scores(["a"], np.array([0]), scores, ["0", "1"], "probabilities", "1 clip")
        >>> both = combine([(one(0.5), 1.0), (one(0.125), 0.5)], ["rgb", "flow"])
        >>> both.scores.tolist(), both.protocol
        ([[0.375, 0.625]], '1 x rgb + 0.5 x flow, each: 1 clip')
    """
    first = parts[0][0]
    total, mixed = 0.0, np.zeros(first.scores.shape)
    for (part, coefficient), name in zip(parts, names, strict=True):
        check_coefficient(coefficient, name)
        for what, own, wanted in (
            ("averages of", part.average, first.average),
            ("this number of classes:", len(part.classes), len(first.classes)),
            ("the classes", part.classes, first.classes),
        ):
            if own != wanted:
                raise ValueError(
                    f"scores: expected {what} {_short(wanted)} in {name}, as in {names[0]}, got "
                    f"{_short(own)}; test both on the same classes with the same --average"
                )
        rows = _rows(part.videos, first.videos, name, names[0])
        if (part.labels[rows] != first.labels).any():
            raise ValueError(
                f"scores: expected the labels of {names[0]} in {name}, got others; "
                "test both on the same list"
            )
        mixed += coefficient * part.scores[rows].astype(np.float64)
        total += coefficient
    protocol = " + ".join(
        f"{coefficient:g} x {name}" for (_, coefficient), name in zip(parts, names, strict=True)
    )
    protocols = [part.protocol for part, _ in parts]
    if len(set(protocols)) == 1:
        protocol += f", each: {protocols[0]}"
    else:
        each = zip(names, protocols, strict=True)
        protocol = "; ".join([protocol, *(f"{name}: {one}" for name, one in each)])
    return Scores(
        first.videos,
        first.labels,
        (mixed / total).astype(np.float32),
        first.classes,
        first.average,
        protocol,
    )


def parse_weighted(text: str) -> tuple[Path, float]:
    """A file and its coefficient out of ``FILE`` or ``FILE:0.5``.

    Raises:
        FileNotFoundError: No such file.
        ValueError: A coefficient that is no positive number.
    """
    name, colon, number = text.rpartition(":")
    if colon and not Path(text).is_file():
        try:
            coefficient = float(number)
        except ValueError:
            name, coefficient = text, 1.0
    else:
        name, coefficient = text, 1.0
    if not Path(name).is_file():
        remedy = "check the path"
        if "=" in text:
            remedy = "write section.key=value in front of the options"
        raise FileNotFoundError(
            f"test: expected FILE or FILE:COEFFICIENT, got {text!r}, and there is no such file; "
            f"{remedy}"
        )
    check_coefficient(coefficient, name)
    return Path(name), coefficient


def check_coefficient(coefficient: float, name: str) -> None:
    """Raise ValueError unless a coefficient is a positive, finite number."""
    if not (math.isfinite(coefficient) and coefficient > 0):
        raise ValueError(
            f"scores: expected a coefficient > 0 of {name}, got {coefficient:g}; "
            "leave out what does not count"
        )


def check_target(path: str | Path) -> None:
    """Raise what `write_scores` would, before hours of testing.

    Raises:
        ValueError: An unknown suffix.
        FileNotFoundError: No folder for the file.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(
            f"scores: expected a file name that ends in {' or '.join(SUFFIXES)}, got {path.name!r};"
            " the ending chooses the format"
        )
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"scores: expected a folder for {path}, got none at {path.parent}; make it first"
        )


def write_scores(path: str | Path, scores: Scores) -> None:
    """Write scores as ``.npz`` or ``.jsonl``; the file appears complete or not at all.

    Args:
        path: The file.
        scores: What to write.

    Raises:
        ValueError: An unknown suffix.
        FileNotFoundError: No folder for the file.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "scores.jsonl")
        >>> scores = np.array([[0.75, 0.25]], np.float32)
        >>> write_scores(path, Scores(["a"], np.array([1]), scores, ["0", "1"], "logits", "1 clip"))
        >>> path.read_text().splitlines()[1]
        '{"video": "a", "label": 1, "scores": [0.75, 0.25]}'
    """
    check_target(path)
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    write = _write_npz if path.suffix == ".npz" else _write_lines
    try:
        with temporary.open("wb") as file:
            write(file, scores)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_scores(path: str | Path) -> Scores:
    """Read what `write_scores` wrote.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: No such file.
        ValueError: An unknown suffix, or a file that holds no scores.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"scores: expected a file, got {str(path)!r} which does not exist; check the path"
        )
    check_target(path)
    try:
        scores = _read_npz(path) if path.suffix == ".npz" else _read_lines(path)
        fits = scores.scores.shape == (len(scores.videos), len(scores.classes))
        fits &= scores.labels.shape == (len(scores.videos),) and len(scores.videos) > 0
    except (ValueError, KeyError, TypeError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"scores: expected scores of nlk test in {path}, got {type(error).__name__}: "
            f"{error}; write the file with nlk test --dump"
        ) from error
    if not fits:
        raise ValueError(
            f"scores: expected a label and a score of every class for each video in {path}, got "
            f"{len(scores.videos)} videos, {len(scores.classes)} classes and scores of shape "
            f"{scores.scores.shape}; write the file with nlk test --dump"
        )
    return scores


def _rows(own: Sequence[str], wanted: Sequence[str], name: str, first: str) -> list[int]:
    """Where the wanted videos are among one's own."""
    if list(own) == list(wanted):
        return list(range(len(own)))
    places = {video: row for row, video in enumerate(own)}
    missing = [video for video in wanted if video not in places]
    if missing or len(places) != len(own) or len(own) != len(wanted):
        example = f", {missing[0]} is missing" if missing else ""
        raise ValueError(
            f"scores: expected the {len(wanted)} videos of {first} in {name}, got {len(own)}"
            f"{example}; test both on the same list"
        )
    return [places[video] for video in wanted]


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _write_npz(file: BinaryIO, scores: Scores) -> None:
    np.savez_compressed(
        file,
        video=np.array(scores.videos),
        label=scores.labels.astype(np.int64),
        scores=scores.scores.astype(np.float32),
        classes=np.array(scores.classes),
        average=np.array(scores.average),
        protocol=np.array(scores.protocol),
    )


def _read_npz(path: Path) -> Scores:
    with np.load(path, allow_pickle=False) as arrays:
        return Scores(
            arrays["video"].tolist(),
            arrays["label"],
            arrays["scores"],
            arrays["classes"].tolist(),
            str(arrays["average"]),
            str(arrays["protocol"]),
        )


def _write_lines(file: BinaryIO, scores: Scores) -> None:
    head = {
        "classes": scores.classes,
        "average": scores.average,
        "protocol": scores.protocol,
    }
    file.write(json.dumps(head).encode() + b"\n")
    for video, label, row in zip(scores.videos, scores.labels, scores.scores, strict=True):
        # Nine digits give a float32 back exactly.
        numbers = [float(f"{number:.9g}") for number in row.tolist()]
        line = {"video": video, "label": int(label), "scores": numbers}
        file.write(json.dumps(line).encode() + b"\n")


def _read_lines(path: Path) -> Scores:
    head, *lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return Scores(
        [line["video"] for line in lines],
        np.array([line["label"] for line in lines], np.int64),
        np.array([line["scores"] for line in lines], np.float32),
        head["classes"],
        head["average"],
        head["protocol"],
    )
