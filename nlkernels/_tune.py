"""Which configuration of a kernel runs a problem: forced, measured on this machine, or shipped.

Nothing is timed but within `tuning`, which `_warmup` enters. What it finds is kept in the cache by
architecture, kernel, dtype, channels in steps of 16, and powers of two of the other sizes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from nlkernels import _cache, _device, _launch
from nlkernels._launch import Config

_CHANNELS = ("depth", "value_depth")
# How a problem says where it lies; not part of its bucket.
_PLACES = ("device", "index")

_forced: dict[str, Config] = {}
# Number of the candidate that every kernel runs, and how many candidates each of them had.
_numbered: tuple[int, dict[str, int]] | None = None
_session: dict[str, Tuned] | None = None
# Configurations that did not fit the device, and what runs in their place.
_fitting: dict[tuple[str, Config], Config] = {}
# A default stays unless another configuration is this much faster: times of runs differ as much.
_WORTHWHILE = 1.02


class Tuned(NamedTuple):
    """The fastest configuration of a kernel for a bucket of problems."""

    kernel: str
    config: Config
    default: Config
    ms: float


@contextlib.contextmanager
def forced(configs: Mapping[str, Config]) -> Iterator[None]:
    """Within the context, kernels run with these configurations, by name."""
    global _forced
    before, _forced = _forced, {**_forced, **configs}
    try:
        yield
    finally:
        _forced = before


@contextlib.contextmanager
def numbered(number: int) -> Iterator[dict[str, int]]:
    """Within the context, kernels run with their candidate of that number, or the last before it.

    Yields:
        Name of each kernel that has run -> how many candidates it had at most.
    """
    global _numbered
    counts: dict[str, int] = {}
    before, _numbered = _numbered, (number, counts)
    try:
        yield counts
    finally:
        _numbered = before


@contextlib.contextmanager
def tuning() -> Iterator[dict[str, Tuned]]:
    """Within the context, every kernel that runs is timed in all its configurations.

    Yields:
        Bucket -> what is the fastest there, when the kernel has run; `keep` stores it.
    """
    global _session
    before, _session = _session, {}
    try:
        yield _session
    finally:
        _session = before


def keep(device: torch.device, found: Mapping[str, Tuned]) -> None:
    """Let kernels run with these configurations from now on, in later processes too."""
    entries = {key: {"config": list(t.config), "ms": t.ms} for key, t in found.items()}
    if entries:
        _cache.update(device, "configs", entries)


def run_best(
    kernel: str,
    problem: tuple,
    device: torch.device,
    candidates: Sequence[Any],
    run: Callable[[Any], None],
) -> None:
    """Call `run` with the configuration known to be the fastest, else with the first candidate.

    Args:
        kernel: its name, "softmax_fused".
        problem: sizes and dtype; decides the bucket.
        device: where it runs.
        candidates: at most 6, each a Config or other named tuple; the first is the shipped default.
        run: launches the kernel; may be called several times while timing.
    """
    if kernel in _forced:
        run(_forced[kernel])
        return
    if _session is not None and not _launch.capturing(device):
        _time(_session, kernel, problem, device, candidates, run)
        return
    if _numbered is not None:
        number, counts = _numbered
        counts[kernel] = max(len(candidates), counts.get(kernel, 0))
        config = candidates[min(number, len(candidates) - 1)]
    else:
        config = _measured(kernel, problem, device)
    # What is legal depends on more than the bucket: on the operands' alignment, for example.
    config = candidates[candidates.index(config)] if config in candidates else candidates[0]
    instead = _fitting.get((kernel, config))
    if instead in candidates:
        config = instead
    try:
        run(config)
    except Exception as error:
        if type(error).__name__ != "OutOfResources":
            raise
        _run_another(kernel, config, candidates, run, error)


def _run_another(
    kernel: str,
    config: Config,
    candidates: Sequence[Config],
    run: Callable[[Config], None],
    refusal: Exception,
) -> None:
    """Run the first candidate that fits into the device where `config` does not."""
    for other in candidates:
        if other == config:
            continue
        try:
            run(other)
        except Exception as error:
            if type(error).__name__ != "OutOfResources":
                raise
            continue
        _fitting[kernel, config] = other
        return
    raise refusal


def _measured(kernel: str, problem: tuple, device: torch.device) -> tuple | None:
    """The fields of the configuration that is known to be the fastest."""
    configs = _cache.section(device)["configs"]
    if not configs:
        return None
    asked = ("config", kernel, problem, device, _launch.precision(torch.float32))
    if asked not in _cache.memo:
        entry = configs.get(bucket(kernel, problem, device))
        _cache.remember(asked, None if entry is None else tuple(entry["config"]))
    return _cache.memo.get(asked)


def _time(
    session: dict[str, Tuned],
    kernel: str,
    problem: tuple,
    device: torch.device,
    candidates: Sequence[Config],
    run: Callable[[Config], None],
) -> None:
    """Time the candidates, unless this bucket has been, and run the fastest."""
    key = bucket(kernel, problem, device)
    if key not in session or session[key].config not in candidates:
        times, errors = {}, []
        for config in candidates:
            try:
                times[config] = _device.median_ms(partial(run, config), device)
            except Exception as error:
                errors.append(error)
        if not times:
            raise errors[0]
        best = min(times, key=times.__getitem__)
        default = candidates[0]
        if default in times and times[default] <= _WORTHWHILE * times[best]:
            best = default
        session[key] = Tuned(kernel, best, default, times[best])
    run(session[key].config)


def bucket(kernel: str, problem: tuple, device: torch.device) -> str:
    """The cache key of all problems that share a configuration."""
    names: Sequence[str] = getattr(problem, "_fields", [""] * len(problem))
    parts = [f"sm_{_launch.architecture(device)}", kernel]
    for name, entry in zip(names, problem, strict=True):
        if name in _PLACES:
            continue
        if isinstance(entry, torch.dtype):
            parts.append(f"{str(entry).removeprefix('torch.')} {_launch.precision(entry)}")
        elif not isinstance(entry, int) or isinstance(entry, bool):
            parts.append(f"{name}={entry}")
        elif name in _CHANNELS:
            parts.append(f"{name}={-(-entry // 16) * 16}")
        else:
            parts.append(f"{name}<=2^{max(entry - 1, 0).bit_length()}")
    return " ".join(parts)
