"""What a network costs: parameters, FLOPs, times of a training step, memory of a training step.

Times are taken in interleaved rounds, every variant once per round, so that a slow minute of the
machine meets all of them. Memory is the peak of live tensor bytes above the level before the step
(weights and optimiser state are there before); on GPUs also the device allocator's peak, on Linux
also the growth of the resident set as a cross-check that needs no cooperation of the allocator.
"""

import ctypes
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from nlkernels import NonLocalBlock3d
from nlkernels._memory import MIB, PeakMemory

from .config import OptimConfig, ProfileConfig
from .freezing import train_mode
from .memory import BatchFit, largest_batch, state_mib
from .optimisers import make_optimiser
from .updates import Stopwatch, Updater


class Overhead(NamedTuple):
    """How much more one network costs than another."""

    difference: float
    """In the unit of the costs."""
    percent: float
    """Of the other's cost."""


@dataclass(frozen=True)
class Quantiles:
    """Distribution of a time over the rounds, in milliseconds."""

    p20: float
    p50: float
    p80: float


@dataclass(frozen=True)
class Cost:
    """What one variant costs at the measured clip shape."""

    parameters: int
    """Number of trainable values."""
    multiply_adds: int
    """Those of the forward pass of one clip as papers count FLOPs, see ``count_multiply_adds``."""
    flops: int
    """Floating-point operations of the forward pass of one clip; a multiply-add counts as two."""
    forward_ms: Quantiles
    """Forward pass and loss of a batch."""
    backward_ms: Quantiles
    """Backward pass of a batch."""
    optimiser_ms: Quantiles
    """Update of the parameters."""
    step_ms: Quantiles
    """Sum of the three, step by step."""
    clips_per_s: float
    """Batch divided by the median step time."""
    memory_mib: float
    """Peak of live tensor bytes of a training step above the level before it."""
    device_mib: float | None
    """The same by the GPU allocator's own peak; None on CPU."""
    resident_mib: float | None
    """Growth of the process's peak resident set in the same step; None where it cannot be read."""
    state_mib: float
    """Weights, buffers and optimiser state, which are held before the step."""
    fit: BatchFit | None
    """The largest batch that a memory holds; None where none was asked about."""


def overhead(value: float, base: float) -> Overhead:
    """What ``value`` costs over ``base``.

    Example:
        >>> overhead(120.0, 100.0)
        Overhead(difference=20.0, percent=20.0)
    """
    return Overhead(value - base, 100 * (value - base) / base)


def count_parameters(model: nn.Module) -> int:
    """Number of trainable values of a model."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def count_flops(model: nn.Module, clip: Tensor) -> int:
    """Floating-point operations of one forward pass; a multiply-add counts as two."""
    training = model.training
    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(clip)
    model.train(training)
    return counter.get_total_flops()


def count_multiply_adds(model: nn.Module, clip: Tensor) -> int:
    """Multiply-adds of one forward pass, as papers on video networks count FLOPs.

    Each counts once: those of convolutions, of linear layers and, in non-local blocks, of the
    products with the whole N x M affinity, in whichever form a backend computes it. Nothing runs.

    Args:
        model: Any network; its blocks' backends are as before afterwards.
        clip: (B, 3, T, H, W), of which only shape, dtype and device matter.
    """
    blocks = [module for module in model.modules() if getattr(module, "is_nonlocal", False)]
    backends = [block.backend for block in blocks]
    try:
        for block in blocks:
            block.set_backend("reference")
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            return count_flops(model, mode.from_tensor(clip)) // 2
    finally:
        for block, backend in zip(blocks, backends, strict=True):
            block.backend = backend


def needed_mib(peak: PeakMemory) -> float:
    """What a step needs of a device: its allocator's own peak where it has one, else live bytes."""
    return peak.live_mib if peak.device_mib is None else peak.device_mib


def input_channels(model: nn.Module) -> int:
    """Channels of a frame: 3 of colours, unless the network is one of optical flow."""
    return getattr(getattr(model, "design", None), "in_channels", 3)


def measure(
    models: Mapping[str, nn.Module],
    profile: ProfileConfig,
    optim: OptimConfig,
    *,
    num_classes: int,
    device: torch.device,
    memory_gib: float | None = None,
) -> dict[str, Cost]:
    """Measure every model on the same random clips.

    Args:
        models: Name -> network on ``device``, frozen where it is to be; their weights are changed.
        profile: Clip shape, complete, and number of rounds; see ``config.profile_of``.
        optim: Which optimiser updates the parameters, and norms that use running statistics; its
            rate is set to zero.
        num_classes: Number of classes.
        device: Where the models are.
        memory_gib: Size of a memory in GiB whose largest batch is asked for; None asks for none.

    Returns:
        Name -> cost.
    """
    generator = torch.Generator().manual_seed(0)
    channels = input_channels(next(iter(models.values())))
    shape = (profile.batch, channels, profile.frames, profile.size, profile.size)
    clips = torch.randn(shape, generator=generator).to(device)
    labels = torch.randint(num_classes, (profile.batch,), generator=generator).to(device)
    # A measured batch may have fewer clips than a step has parts.
    optim = dataclasses.replace(optim, accumulate=1)
    optimisers = {name: make_optimiser(model, optim) for name, model in models.items()}
    updaters = {
        name: Updater(model, optimisers[name], optim, device) for name, model in models.items()
    }
    for optimiser in optimisers.values():
        for group in optimiser.param_groups:
            group["lr"] = 0.0

    def step(name: str, clips: Tensor = clips, labels: Tensor = labels) -> dict[str, float]:
        watch.lap_ms()
        return updaters[name].step(clips, labels, watch, where=f"profile of {name}")

    def weigh(name: str, clips: Tensor = clips, labels: Tensor = labels) -> PeakMemory:
        optimisers[name].zero_grad(set_to_none=True)
        with PeakMemory(device) as peak:
            step(name, clips, labels)
        optimisers[name].zero_grad(set_to_none=True)
        return peak

    def fit(name: str, own: PeakMemory) -> BatchFit | None:
        if memory_gib is None:
            return None
        peaks = {profile.batch: own}
        for batch in {1, 2} - {profile.batch}:
            peaks[batch] = weigh(name, _first(clips, batch), _first(labels, batch))
        clip_mib = clips[:1].numel() * clips.element_size() / MIB
        peaks_mib = {
            batch: needed_mib(peak) + batch * clip_mib for batch, peak in sorted(peaks.items())
        }
        state = state_mib(models[name], optimisers[name])
        return largest_batch(peaks_mib, state_mib=state, gib=memory_gib)

    watch = Stopwatch(device)
    for model in models.values():
        train_mode(model, optim)
    laps: dict[str, list[dict[str, float]]] = {name: [] for name in models}
    for round_number in range(profile.rounds + 1):
        for name in models:
            result = step(name)
            # The first round warms up caches, optimiser state and one-off choices.
            if round_number > 0:
                laps[name].append(result)

    costs = {}
    for name, model in models.items():
        peak = weigh(name)
        resident_mib = _resident_growth_mib(lambda name=name: step(name))
        optimisers[name].zero_grad(set_to_none=True)
        times = {
            part: [lap[part] for lap in laps[name]]
            for part in ("forward_ms", "backward_ms", "optimiser_ms")
        }
        times["step_ms"] = [sum(parts) for parts in zip(*times.values(), strict=True)]
        quantiles = {part: _quantiles(values) for part, values in times.items()}
        costs[name] = Cost(
            parameters=count_parameters(model),
            multiply_adds=count_multiply_adds(model, clips[:1]),
            flops=count_flops(model, clips[:1]),
            clips_per_s=1e3 * profile.batch / quantiles["step_ms"].p50,
            memory_mib=peak.live_mib,
            device_mib=peak.device_mib,
            resident_mib=resident_mib,
            state_mib=state_mib(model, optimisers[name]),
            fit=fit(name, peak),
            **quantiles,
        )
    return costs


def attention_sizes(model: nn.Module, *, frames: int, size: int) -> list[dict[str, int | str]]:
    """Query and key positions of one attention of every non-local block.

    Args:
        model: Any network; with ``temporal_group`` one group is counted.
        frames: Frames of the clip.
        size: Height and width of the clip.

    Returns:
        ``block`` (name), ``n``, ``m`` and ``backend`` (which one runs the forward of a training
        step of one such clip) of every block, in the order of the forward pass.
    """
    sizes: list[dict[str, int | str]] = []
    names = {module: name for name, module in model.named_modules()}

    def record(block: NonLocalBlock3d, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        grouped = x.shape[2] if block.temporal_group is None else block.temporal_group
        positions = (min(grouped, x.shape[2]), *x.shape[3:])
        pool = (1, 1, 1) if block.pool_size is None else block.pool_size
        n = math.prod(positions)
        m = math.prod(size // by for size, by in zip(positions, pool, strict=True))
        backend = block.explain(x).backend
        sizes.append({"block": names[block], "n": n, "m": m, "backend": backend})

    handles = [
        module.register_forward_pre_hook(record)
        for module in model.modules()
        if isinstance(module, NonLocalBlock3d)
    ]
    training = model.training
    model.eval()
    shape = (1, input_channels(model), frames, size, size)
    clip = torch.zeros(shape, device=next(model.parameters()).device)
    try:
        with torch.no_grad():
            model(clip)
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    return sizes


def _first(tensor: Tensor, batch: int) -> Tensor:
    """The first items of a batch, which is repeated where it has fewer."""
    return tensor.repeat(-(-batch // len(tensor)), *[1] * (tensor.dim() - 1))[:batch].contiguous()


def _quantiles(values: list[float]) -> Quantiles:
    points = torch.tensor(values, dtype=torch.float64).quantile(
        torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    )
    return Quantiles(*points.tolist())


def _resident_growth_mib(step) -> float | None:
    """Growth of the peak resident set during ``step``, by the kernel's own high-water mark."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        # Freed heap pages count as resident until they are given back.
        ctypes.CDLL(None).malloc_trim(0)
        # 5 resets the high-water mark to the present size.
        reset.write_text("5")
        before = _status_mib(status, "VmRSS")
        step()
        return _status_mib(status, "VmHWM") - before
    except (OSError, AttributeError):
        return None


def _status_mib(status: Path, field: str) -> float:
    for line in status.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024 / MIB
    raise OSError(f"no {field} in {status}")
