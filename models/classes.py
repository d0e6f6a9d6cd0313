"""Other classes for a trained network, and class numbers of other orders.

Systems number the classes of one data set differently: by the alphabet (video-nonlocal-net,
mmaction2, TSM, PySlowFast), or as they first appear in the training list (MindSpore). `class_rows`
says where each class is in the other order, `take_classes` moves the classifier's rows.
"""

import csv
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

CLASSIFIER = "fc"
# Systems that do not number classes by the alphabet, and how they do.
ORDERS = {"mindspore": "as they first appear in the training list, not by the alphabet"}


def alphabetical(labels: Iterable[str]) -> list[str]:
    """Names of classes by the alphabet, each once; the empty one is none.

    Args:
        labels: labels of videos, or names of classes.

    Returns:
        Names as they are in `labels`, sorted as the published lists are: by code point.

    Example:
        >>> from nlkernels.models.classes import alphabetical
        >>> alphabetical(["zumba", "abseiling", "", "zumba"])
        ['abseiling', 'zumba']
    """
    return sorted({label for label in labels if label})


def first_appearance(labels: Iterable[str]) -> list[str]:
    """Names of classes as they first appear; the empty one is none.

    Args:
        labels: the labels of a training list from its first line on, as of MindSpore's
            kinetics-400_train.csv.

    Example:
        >>> from nlkernels.models.classes import first_appearance
        >>> first_appearance(["zumba", "abseiling", "", "zumba"])
        ['zumba', 'abseiling']
    """
    return list(dict.fromkeys(label for label in labels if label))


def by_number(numbers: Mapping[str, int]) -> list[str]:
    """Names of classes in the order of their numbers, of a published map such as classids.json.

    Args:
        numbers: number by name; names may stand in quotes of their own, as in the original's file.

    Raises:
        ValueError: the numbers are not 0 to one less than there are.

    Example:
        >>> from nlkernels.models.classes import by_number
        >>> by_number({'"eating ice cream"': 1, "abseiling": 0})
        ['abseiling', 'eating ice cream']
    """
    names = sorted(numbers, key=numbers.__getitem__)
    if [numbers[name] for name in names] != list(range(len(names))):
        raise ValueError(
            f"by_number: expected the numbers 0 to {len(names) - 1}, got "
            f"{sorted(numbers.values())[:12]}; pass the map of all classes"
        )
    return [name.strip('"') for name in names]


def read_names(path: str | os.PathLike) -> list[str]:
    """Names of classes in the order of a file.

    Args:
        path: a .json map from names to numbers, or list of names; a training list .csv whose first
            column, or the one called "label", names each video's class, in order of appearance; any
            other text with a name on each line, blank ones left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file without names, or no text.

    Example:
        >>> import pathlib, tempfile
        >>> from nlkernels.models.classes import read_names
        >>> path = pathlib.Path(tempfile.mkdtemp(), "train.csv")
        >>> _ = path.write_text("label,youtube_id\\nzumba,a\\nabseiling,b\\nzumba,c\\n")
        >>> read_names(path)
        ['zumba', 'abseiling']
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        names = _names(path.suffix.lower(), text)
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError, TypeError) as error:
        raise ValueError(
            f"read_names: expected names of classes in {path}, got "
            f"{type(error).__name__}: {error}; write one name on each line"
        ) from None
    if not names:
        raise ValueError(
            f"read_names: expected names of classes in {path}, got none; write one on each line"
        )
    return names


def _names(suffix: str, text: str) -> list[str]:
    if suffix == ".json":
        found = json.loads(text)
        return by_number(found) if isinstance(found, dict) else [name.strip() for name in found]
    if suffix != ".csv":
        return [line.strip() for line in text.splitlines() if line.strip()]
    head, *rows = [row for row in csv.reader(text.splitlines()) if row]
    column = head.index("label") if "label" in head else 0
    rows = rows if "label" in head else [head, *rows]
    return first_appearance(row[column].strip() for row in rows)


def class_rows(theirs: Sequence[str], ours: Sequence[str]) -> list[int]:
    """Where each of our classes is among theirs.

    Spellings of one name are the same here: quotes, parentheses, apostrophes and letter case do
    not count, and a blank is an underscore.

    Args:
        theirs: names of classes in the order of a checkpoint's classifier.
        ours: the same names, or some of them, in the order that is wanted.

    Returns:
        For each of ours the row of theirs, as `take_classes` takes them.

    Raises:
        ValueError: a name that is not among theirs, or two of one spelling.

    Example:
        >>> from nlkernels.models.classes import class_rows
        >>> class_rows(["eating ice cream", "abseiling"], ["abseiling", "eating_ice_cream"])
        [1, 0]
    """
    rows = {_spelling(name): row for row, name in enumerate(theirs)}
    if len(rows) != len(theirs):
        seen = set(rows.values())
        twice = [name for row, name in enumerate(theirs) if row not in seen]
        raise ValueError(
            f"class_rows: expected names that differ, got {twice[0]!r} twice; pass each class once"
        )
    unknown = [name for name in ours if _spelling(name) not in rows]
    if unknown:
        raise ValueError(
            f"class_rows: expected names among the {len(theirs)} of the checkpoint, got "
            f"{', '.join(map(repr, unknown[:5]))}; pass the names of the checkpoint's own data set"
        )
    return [rows[_spelling(name)] for name in ours]


def _spelling(name: str) -> str:
    return re.sub(r"[\"'()]", "", name).strip().replace(" ", "_").casefold()


def take_classes(
    model: nn.Module, rows: Sequence[int | None], *, generator: torch.Generator | None = None
) -> nn.Module:
    """Give a model a classifier of other classes: rows of its old one, and fresh ones.

    Args:
        model: a registered model; its layer `fc` is replaced.
        rows: for each new class the row of the old classifier to copy, None for a fresh one:
            weights from N(0, 0.01^2), bias 0. `[None] * 51` replaces all of 51 classes;
            `class_rows(...)` reorders.
        generator: of the fresh weights; torch's own if None.

    Returns:
        The model.

    Raises:
        ValueError: no rows, or one that the old classifier does not have.
        TypeError: a model without the layer, or rows that are no whole numbers.

    Example:
        >>> from nlkernels.models import create_model
        >>> from nlkernels.models.classes import take_classes
        >>> model = create_model("c2d_tiny", num_classes=3)
        >>> take_classes(model, [2, 0, None, None]).fc.out_features
        4
    """
    old = getattr(model, CLASSIFIER, None)
    if not isinstance(old, nn.Linear):
        raise TypeError(
            f"take_classes: expected a model with a linear layer {CLASSIFIER!r}, got "
            f"{type(model).__name__}; pass one of create_model"
        )
    rows = list(rows)
    if not all(row is None or (isinstance(row, int) and not isinstance(row, bool)) for row in rows):
        raise TypeError(
            f"take_classes: expected rows to be ints or None, got {rows[:8]}; see above"
        )
    beyond = [row for row in rows if row is not None and not 0 <= row < old.out_features]
    if beyond or not rows:
        raise ValueError(
            f"take_classes: expected rows from 0 to {old.out_features - 1}, got "
            f"{beyond[:8] if beyond else 'none'}; None makes a fresh row"
        )
    new = nn.Linear(old.in_features, len(rows), device=old.weight.device, dtype=old.weight.dtype)
    kept = [place for place, row in enumerate(rows) if row is not None]
    taken = [row for row in rows if row is not None]
    with torch.no_grad():
        new.weight.normal_(std=0.01, generator=generator)
        new.bias.zero_()
        new.weight[kept] = old.weight[taken]
        new.bias[kept] = old.bias[taken]
    new.requires_grad_(old.weight.requires_grad)
    setattr(model, CLASSIFIER, new.train(old.training))
    return model
