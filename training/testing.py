"""``nlk test``: accuracy of trained networks over all views of the test videos, and ensembles.

The scores of a video are the mean over its views (clips x crops) of probabilities or of logits.
What published systems average is the default for their networks:

- logits: Tushar-N/pytorch-resnet3d, TSM, RNL, and kinetics_i3d_pytorch, which sums them;
- probabilities: all others, and our own networks. Networks of video-nonlocal-net and PySlowFast
  take the softmax at every location of the last map first (2 x 2 of them where crops have 256
  pixels, more with ``data.test_crops=full``), then the mean over locations, then over views.

Sums over views, which some systems take, rank classes as means do.
"""

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from nlkernels.models.classes import class_rows

from .config import Config
from .data.dataset import ClipDataset
from .distributed import Processes, choose_device, joined
from .evaluate import Batches as Clips
from .loading import Batches, Data, load_data
from .report import data_lines
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
from .trained import AVERAGES, Average, Trained, load_trained, view_scores

# Seconds between two lines of progress.
_PROGRESS_S = 10.0


@dataclass
class Sum:
    """What has been added up of one video.

    Attributes:
        label: Its class.
        views: How many views.
        scores: (networks, classes), float64, the sum over them.
    """

    label: int
    views: int
    scores: Tensor


def add_views(
    models: Sequence[nn.Module],
    batches: Clips,
    *,
    video_of: Callable[[int], int],
    average: Average,
    device: torch.device,
) -> dict[int, Sum]:
    """Scores of every video, summed over its views.

    Args:
        models: Networks in evaluation mode, on ``device``.
        batches: Views (B, C, T, H, W), labels (B,) and their numbers (B,) of this process's videos.
        video_of: Number of the video that a view is of.
        average: ``probabilities`` or ``logits``.
        device: Where the networks are.

    Returns:
        By number of the video.
    """
    sums: dict[int, Sum] = {}
    with torch.inference_mode():
        for clips, labels, numbers in batches:
            clips = clips.to(device)
            scores = torch.stack([view_scores(model, clips, average) for model in models], 1)
            for number, label, one in zip(
                numbers.tolist(), labels.tolist(), scores.double().cpu(), strict=True
            ):
                video = sums.setdefault(video_of(number), Sum(label, 0, torch.zeros_like(one)))
                video.views += 1
                video.scores += one
    return sums


def merge(parts: Iterable[Mapping[int, Sum]]) -> dict[int, Sum]:
    """What all processes have added up; each video belongs to one of them.

    Raises:
        RuntimeError: A video was tested by two processes.
    """
    merged: dict[int, Sum] = {}
    for part in parts:
        twice = merged.keys() & part.keys()
        if twice:
            raise RuntimeError(f"test: expected every video in one process, got {min(twice)} twice")
        merged.update(part)
    return merged


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
        data = load_data(config, seed=config.run.seed)
    print("\n".join(data_lines(data)), flush=True)
    for network in networks:
        _check_network(network, data, config)

    order = test_order(data.test, config, processes)
    clips = sum(len(batch) for batch in order)
    batches = _progressing(Batches(data.test, order, config), clips)
    sums = add_views(
        [network.model for network in networks],
        batches,
        video_of=data.test.video_of,
        average=average,
        device=device,
    )
    merged = merge(processes.gather(sums))
    missing = set(range(data.test.num_videos)) - merged.keys()
    if missing:
        raise RuntimeError(f"test: expected the scores of every video, got none of {min(missing)}")
    parts = _scores(merged, networks, data, config, average)
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


def _check_network(network: Trained, data: Data, config: Config) -> None:
    """Raise ValueError unless a network tells the classes of a data set apart, in its order."""
    if network.num_classes != len(data.classes):
        raise ValueError(
            f"test: expected a network of {len(data.classes)} classes, as the data set has, got "
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
        rows = class_rows(network.classes, data.classes)
    except ValueError:
        return  # numbers, or other names for the same classes
    if rows != list(range(len(rows))):
        first = next(place for place, row in enumerate(rows) if row != place)
        raise ValueError(
            f"test: expected the classes of {network.path} in the order of the data set, got "
            f"{network.classes[first]!r} as class {first} in place of {data.classes[first]!r}; "
            "reorder them with nlk convert --classes THEIRS OURS"
        )


def _scores(
    merged: Mapping[int, Sum],
    networks: Sequence[Trained],
    data: Data,
    config: Config,
    average: Average,
) -> list[Scores]:
    """Mean scores of every network."""
    numbers = sorted(merged)
    names = _names(data.test, config)
    means = torch.stack([merged[number].scores / merged[number].views for number in numbers])
    views = data.test.views_per_video
    clips = None if views is None else views // data.test.transform.crops
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
                list(data.classes),
                average,
                network.protocol(config.data, clips, average),
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
    paths = [Path(video.path) for video in test.videos]
    if root is None:
        return [str(path) for path in paths]
    return [str(path.relative_to(root) if path.is_relative_to(root) else path) for path in paths]


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
