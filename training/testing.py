"""``nlk test``: accuracy of trained networks over all views of the test videos, and ensembles.

What is averaged over views, and by which systems, is in ``view_scores.py``.
"""

import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nlkernels.models.classes import class_rows

from .batches import Batches
from .config import Config
from .data.dataset import ClipDataset
from .distributed import Processes, choose_device, joined
from .loading import load_test, problems_of
from .report import problem_lines
from .scores import (
    Accuracy,
    Scores,
    check_target,
    combine,
    parse_weighted,
    read_scores,
    write_scores,
)
from .sharding import test_order
from .trained import Trained, load_trained
from .view_scores import AVERAGES, Average, Sum, add_views, merge

# Seconds between two lines of progress.
_PROGRESS_S = 10.0


def run_test(
    config: Config,
    weights: Sequence[str],
    *,
    average: Average | None = None,
    dump: str | Path | None = None,
) -> Accuracy:
    """Test networks on the test videos of a configuration, alone or as processes of torchrun.

    Videos are dealt out to the processes, whole and each to one. Prints the accuracy of each
    network and of their ensemble with the protocol beside it.

    Args:
        config: From ``config_file.load_config``. Its section ``data`` chooses videos and views,
            ``optim.batch`` the views at a time, ``run`` the device; the networks are those of the
            files.
        weights: ``FILE`` or ``FILE:COEFFICIENT``, several for an ensemble. Files as `load_trained`
            reads them.
        average: ``probabilities`` or ``logits`` of the views; None is what the network's system
            does (at the top of this module).
        dump: ``.npz`` or ``.jsonl`` file for the scores of every video, of the ensemble if there is
            one.

    Returns:
        The accuracy of the network, or of the ensemble.

    Raises:
        FileNotFoundError: No such weights, videos or folder.
        ValueError: Weights of other classes than the data set's, networks of which some average
            logits, no usable videos, or scores that are not finite.
        VideoReadError: A test video cannot be decoded.

    Example:
        >>> from nlkernels.training.config_file import load_config
        >>> def test_both(config, data_root):
        ...     config = load_config(config, [f"data.root={data_root}", "data.test_clips=10"])
        ...     return run_test(config, ["one.pt:1.0", "other.pt:0.5"], dump="scores.npz")
    """
    with joined(config.run.device) as processes:
        return _run(config, weights, average, dump, processes)


def _run(
    config: Config,
    weights: Sequence[str],
    average: Average | None,
    dump: str | Path | None,
    processes: Processes,
) -> Accuracy:
    device = choose_device(config.run.device, processes)
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    if dump is not None:
        check_target(dump)
    weighted = [parse_weighted(text) for text in weights]
    networks = [load_trained(path, device) for path, _ in weighted]
    average = _average(networks, average)
    with processes.first_alone():
        test = load_test(config, classes=networks[0].classes, num_classes=networks[0].num_classes)
    print(f"{len(test.classes)} classes ({', '.join(test.classes)}), {len(test)} test clips")
    for line in problem_lines(problems_of(test), others=""):
        print(line, flush=True)
    for network in networks:
        _check_network(network, test.classes, config)

    order = test_order(test, config, processes)
    clips = sum(len(batch) for batch in order)
    batches = _progressing(Batches(test, order, config), clips)
    sums = add_views(
        [network.model for network in networks],
        batches,
        video_of=test.video_of,
        average=average,
        device=device,
    )
    merged = merge(processes.gather(sums))
    missing = set(range(test.num_videos)) - merged.keys()
    if missing:
        raise RuntimeError(f"test: expected the scores of every video, got none of {min(missing)}")
    parts = _scores(merged, networks, test, config, average)
    lines = [
        f"{path}: {part.accuracy()} of {len(part.videos)} videos ({part.protocol})"
        for (path, _), part in zip(weighted, parts, strict=True)
    ]
    result = parts[0]
    if len(parts) > 1:
        pairs = [(part, by) for part, (_, by) in zip(parts, weighted, strict=True)]
        result = combine(pairs, [str(path) for path, _ in weighted])
        lines.append(_ensemble_line(result))
    print("\n".join(lines), flush=True)
    _dump(result, dump if processes.first else None)
    return result.accuracy()


def run_combination(files: Sequence[str], *, dump: str | Path | None = None) -> Accuracy:
    """Accuracy of a weighted mean of scores that earlier tests have written.

    Two-stream networks are made so, and ensembles of networks that see other clips.

    Args:
        files: ``FILE`` or ``FILE:COEFFICIENT``; files that `run_test` has dumped.
        dump: ``.npz`` or ``.jsonl`` file for the combined scores.

    Returns:
        The accuracy of the combination.

    Raises:
        FileNotFoundError: No such file.
        ValueError: No scores in it, or scores of other videos, classes or averages.

    Example:
        >>> def two_streams():
        ...     return run_combination(["rgb.npz:1.0", "flow.npz:0.5"])
    """
    if dump is not None:
        check_target(dump)
    weighted = [parse_weighted(text) for text in files]
    parts = [read_scores(path) for path, _ in weighted]
    for (path, _), part in zip(weighted, parts, strict=True):
        print(f"{path}: {part.accuracy()} of {len(part.videos)} videos ({part.protocol})")
    result = parts[0]
    if len(parts) > 1:
        pairs = [(part, by) for part, (_, by) in zip(parts, weighted, strict=True)]
        result = combine(pairs, [str(path) for path, _ in weighted])
        print(_ensemble_line(result))
    _dump(result, dump)
    return result.accuracy()


def check_average(average: str | None) -> None:
    """Raise ValueError unless an average is None or one of `AVERAGES`."""
    if average is not None and average not in AVERAGES:
        raise ValueError(
            f"test: expected an average of {' or '.join(AVERAGES)}, got {average!r}; choose one"
        )


def _average(networks: Sequence[Trained], average: Average | None) -> Average:
    check_average(average)
    if average is not None:
        return average
    own = dict.fromkeys(network.average for network in networks)
    if len(own) > 1:
        each = ", ".join(f"{network.path}: {network.average}" for network in networks)
        raise ValueError(
            f"test: expected networks whose systems average the same, got {each}; "
            "choose with --average"
        )
    return next(iter(own))


def _check_network(network: Trained, classes: Sequence[str], config: Config) -> None:
    """Raise ValueError unless a network tells the classes of a data set apart, in its order."""
    if network.num_classes != len(classes):
        raise ValueError(
            f"test: expected a network of {len(classes)} classes, as the data set has, got "
            f"{network.num_classes} in {network.path}; test it on the data that it was trained "
            "for, or take classes with nlk convert --classes"
        )
    if network.name != config.model.name:
        warnings.warn(
            f"test: {network.path} is a {network.name}, the configuration's model a "
            f"{config.model.name}; the data are the configuration's",
            UserWarning,
            stacklevel=2,
        )
    if network.classes is None:
        return
    try:
        rows = class_rows(network.classes, classes)
    except ValueError:
        return  # numbers, or other names for the same classes
    if rows != list(range(len(rows))):
        first = next(place for place, row in enumerate(rows) if row != place)
        raise ValueError(
            f"test: expected the classes of {network.path} in the order of the data set, got "
            f"{network.classes[first]!r} as class {first} in place of {classes[first]!r}; "
            "reorder them with nlk convert --classes THEIRS OURS"
        )


def _scores(
    merged: Mapping[int, Sum],
    networks: Sequence[Trained],
    test: ClipDataset,
    config: Config,
    average: Average,
) -> list[Scores]:
    """Mean scores of every network."""
    numbers = list(merged)
    names = _names(test, config)
    means = torch.stack([merged[number].means for number in numbers])
    found = []
    for place, network in enumerate(networks):
        own = means[:, place]
        broken = [number for number, one in zip(numbers, own, strict=True) if not _finite(one)]
        if broken:
            raise ValueError(
                f"test: expected finite scores of {network.path}, got others for {len(broken)} "
                f"videos, the first one {names[broken[0]]}; the weights have diverged"
            )
        found.append(
            Scores(
                [names[number] for number in numbers],
                np.array([merged[number].label for number in numbers], np.int64),
                own.float().numpy(),
                list(test.classes),
                average,
                network.protocol(config.data, test.clips_per_video, average),
            )
        )
    return found


def _finite(scores: Tensor) -> bool:
    return bool(scores.isfinite().all())


def _names(test: ClipDataset, config: Config) -> list[str]:
    """Names of the test videos: their paths below the folder of all of them."""
    root = config.data.root
    if root is None and config.data.kind == "synthetic":
        root = Path(config.run.out, "data")
    names = []
    for video in test.videos:
        path = Path(video.path)
        below = root is not None and path.is_relative_to(root)
        name = str(path.relative_to(root) if below else path)
        names.append(f"{name}, {video.part}" if video.part else name)
    return names


def _progressing(
    batches: Iterable[tuple[Tensor, Tensor, Tensor]], clips: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Batches, with a line on how far they are now and then."""
    begun = last = time.perf_counter()
    done = 0
    for batch in batches:
        yield batch
        done += len(batch[1])
        now = time.perf_counter()
        if now - last > _PROGRESS_S:
            rate, last = done / (now - begun), now
            left_min = (clips - done) / rate / 60
            print(
                f"test: {done} of {clips} views, {rate:.1f} views/s, {left_min:.0f} min left",
                flush=True,
            )


def _ensemble_line(result: Scores) -> str:
    return f"ensemble: {result.accuracy()} of {len(result.videos)} videos ({result.protocol})"


def _dump(result: Scores, path: str | Path | None) -> None:
    if path is not None:
        write_scores(path, result)
        print(f"scores: {path}")
