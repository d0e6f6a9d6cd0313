"""Section ``optim`` of a configuration: the optimiser, its schedule, what is trained and how.

Each published recipe's choices are named options here, so that a configuration can state them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class OptimConfig:
    """How the parameters move."""

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    """Optimiser."""
    lr: float = 0.1
    """Learning rate after warm-up."""
    lr_batch: int | None = None
    """Batch that ``lr`` is meant for: the rate is lr * batch / lr_batch; unset takes ``lr``."""
    momentum: float = 0.9
    """Momentum (sgd only)."""
    dampening: float = 0.0
    """Share of a gradient that momentum leaves out (sgd without nesterov only)."""
    nesterov: bool = True
    """Nesterov's form of momentum (sgd only)."""
    weight_decay: float = 1e-4
    """Weight decay."""
    decay: Literal["weights", "all", "caffe2", "tsm", "rnl"] = "weights"
    """What decays: ``weights`` of layers, ``all``, ``caffe2`` all but norms, ``tsm`` and ``rnl``
    weights while biases move twice as fast."""
    fc_lr5: bool = True
    """Classifier's weight at 5 times and its bias at 10 times the rate (decay tsm and rnl only)."""
    schedule: Literal["cosine", "step", "multistep", "plateau", "constant"] = "cosine"
    """Shape of the learning rate after warm-up."""
    unit: Literal["step", "epoch"] = "step"
    """Unit of milestones, lengths, cosine_period and warmup; an epoch is a pass over the clips."""
    milestones: tuple[int, ...] = ()
    """From these on the learning rate is multiplied by ``gamma`` (``schedule: step`` only)."""
    gamma: float = 0.1
    """Factor at a milestone (``schedule: step``), or where tests stop improving (``plateau``)."""
    lengths: tuple[int, ...] = ()
    """How long each of ``rates`` holds; the last one holds to the end (multistep only)."""
    rates: tuple[float, ...] = ()
    """Factors of the learning rate, one after the other (``schedule: multistep`` only)."""
    patience: int = 2
    """Tests in a row without a lower loss that are put up with (``schedule: plateau`` only)."""
    cosine_from: Literal["warmup", "start"] = "warmup"
    """Where the cosine starts: behind the warm-up, or at the first step of all."""
    cosine_every: Literal["step", "epoch"] = "step"
    """Whether the cosine falls with every step, or only from epoch to epoch."""
    cosine_period: float | None = None
    """Where the cosine reaches zero; unset is the end of the training."""
    warmup: int = 0
    """Length of the linear warm-up."""
    warmup_start: float = 0.0
    """Share of the rate that the warm-up starts from."""
    warmup_form: Literal["last", "first", "both"] = "last"
    """Step that meets an end of the warm-up exactly: ``last`` has the whole rate, ``first`` the
    share ``warmup_start``, ``both`` does both."""
    warmup_every: Literal["step", "epoch"] = "step"
    """Whether the warm-up rises with every step, or only from epoch to epoch, whose first and last
    are then what ``warmup_form`` speaks of (``unit: epoch`` only)."""
    warmup_to: Literal["lr", "schedule"] = "lr"
    """Whether the warm-up rises to ``lr`` or to what the schedule has at its end."""
    steps: int | None = None
    """Length of the training in steps; set this or ``epochs``."""
    epochs: float | None = None
    """Length of the training in passes over the training clips; set this or ``steps``."""
    batch: int = 32
    """Clips per step, of all processes and parts together."""
    accumulate: int = 1
    """Parts of a step's clips that go through the network one after the other."""
    clip_norm: float | None = None
    """Largest Euclidean norm of all gradients, longer ones are shortened; unset leaves them."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of layers in training (autocast), float16 with scaled losses; weights and tests: float32."""
    max_skips: int = 20
    """Most steps in a row that are left out while the scale is found (``precision: float16``)."""
    ema: float | None = None
    """Decay of a moving average of the weights, which is then tested; unset keeps none."""
    norms: Literal["batch", "running", "frozen", "partial"] = "batch"
    """Batch norms use each batch's statistics, their ``running`` ones, these with ``frozen``
    factors, or frozen ones but for the first and those of blocks (``partial``)."""
    sync_norms: bool = False
    """Batch norms share statistics between processes (GPUs only)."""
    precise_norms: int = 0
    """Batches whose mean statistics replace the running ones before tests and checkpoints."""
    freeze: tuple[str, ...] = ()
    """Patterns of names of parameters that are not trained, such as ``'layer1.*'``."""
    only_nonlocal: bool = False
    """Train blocks, their gates and the classifier alone."""
    ft_begin_index: int | None = None
    """Freeze as inception_nl's flag of this name does: layers of a smaller number, the factors of
    most norms, and most branches of mixed layers; unset does nothing."""


MINIMUM = {
    "optim.lr_batch": 1,
    "optim.patience": 0,
    "optim.warmup": 0,
    "optim.steps": 1,
    "optim.batch": 1,
    "optim.accumulate": 1,
    "optim.max_skips": 0,
    "optim.precise_norms": 0,
    "optim.ft_begin_index": 0,
}
POSITIVE = ("optim.epochs", "optim.cosine_period", "optim.clip_norm")
NOT_NEGATIVE = (
    "optim.lr",
    "optim.weight_decay",
    "optim.momentum",
    "optim.dampening",
    "optim.gamma",
    "optim.warmup_start",
)


def _not_in(*values: Any) -> Callable[[Any], bool]:
    return lambda value: value not in values


def _is(unset: Any) -> Callable[[Any], bool]:
    return lambda value: value == unset


# (key that is ignored, key that decides, does the resolved value of that key ignore it?)
IGNORED_WHEN = (
    ("optim.momentum", "optim.name", _not_in("sgd")),
    ("optim.dampening", "optim.name", _not_in("sgd")),
    ("optim.nesterov", "optim.name", _not_in("sgd")),
    ("optim.fc_lr5", "optim.decay", _not_in("tsm", "rnl")),
    ("optim.milestones", "optim.schedule", _not_in("step")),
    ("optim.gamma", "optim.schedule", _not_in("step", "plateau")),
    ("optim.lengths", "optim.schedule", _not_in("multistep")),
    ("optim.rates", "optim.schedule", _not_in("multistep")),
    ("optim.patience", "optim.schedule", _not_in("plateau")),
    ("optim.cosine_from", "optim.schedule", _not_in("cosine")),
    ("optim.cosine_every", "optim.schedule", _not_in("cosine")),
    ("optim.cosine_period", "optim.schedule", _not_in("cosine")),
    ("optim.warmup_start", "optim.warmup", _is(0)),
    ("optim.warmup_form", "optim.warmup", _is(0)),
    ("optim.warmup_every", "optim.warmup", _is(0)),
    ("optim.warmup_to", "optim.warmup", _is(0)),
    ("optim.max_skips", "optim.precision", _not_in("float16")),
)


def check_optim(optim: OptimConfig) -> None:
    """Raise ValueError for values of the section that cannot work together."""
    if (optim.steps is None) == (optim.epochs is None):
        both = "neither" if optim.steps is None else "both"
        raise ValueError(
            f"config: expected one of optim.steps and optim.epochs, got {both}; "
            "set one and give the other as null"
        )
    if optim.name == "sgd" and optim.nesterov and optim.momentum == 0:
        raise ValueError(
            "config: expected optim.momentum > 0 with optim.nesterov, got 0; "
            "set optim.nesterov=false"
        )
    if optim.name == "sgd" and optim.nesterov and optim.dampening != 0:
        raise ValueError(
            f"config: expected optim.dampening 0 with optim.nesterov, got {optim.dampening}; "
            "set optim.nesterov=false"
        )
    if optim.batch % optim.accumulate != 0:
        raise ValueError(
            f"config: expected optim.batch to be a multiple of optim.accumulate, got {optim.batch} "
            f"and {optim.accumulate}; parts of a step have equally many clips"
        )
    if optim.ema is not None and not 0 <= optim.ema < 1:
        raise ValueError(
            f"config: expected 0 <= optim.ema < 1, got {optim.ema}; set for example optim.ema=0.999"
        )
    _check_schedule(optim)
    _check_training(optim)


def _check_schedule(optim: OptimConfig) -> None:
    if optim.schedule == "multistep" and (
        not optim.rates or len(optim.rates) != len(optim.lengths) or min(optim.lengths) < 1
    ):
        raise ValueError(
            "config: expected optim.lengths >= 1 and optim.rates, one of each per part, with "
            f"optim.schedule=multistep, got {list(optim.lengths)} and {list(optim.rates)}; write "
            "for example optim.lengths=[150000,150000,100000] optim.rates=[1,0.1,0.01]"
        )
    if any(not rate >= 0 for rate in optim.rates):
        raise ValueError(
            f"config: expected optim.rates >= 0, got {list(optim.rates)}; they are factors of "
            "optim.lr"
        )
    if (
        list(optim.milestones) != sorted(set(optim.milestones))
        or min(optim.milestones, default=0) < 0
    ):
        raise ValueError(
            f"config: expected optim.milestones that grow, got {list(optim.milestones)}; "
            "sort them, each once"
        )
    if optim.warmup_every == "epoch" and optim.unit == "step":
        raise ValueError(
            "config: expected optim.unit=epoch with optim.warmup_every=epoch, got step; count "
            "warm-up and milestones in epochs"
        )
    by_step = optim.unit == "step" or optim.warmup_every == "epoch"
    if optim.warmup_form == "both" and optim.warmup == 1 and by_step:
        raise ValueError(
            "config: expected optim.warmup of 2 steps or more with optim.warmup_form=both, got 1; "
            "one step cannot meet both ends"
        )


def _check_training(optim: OptimConfig) -> None:
    if optim.only_nonlocal and optim.ft_begin_index is not None:
        raise ValueError(
            "config: expected one of optim.only_nonlocal and optim.ft_begin_index, got both; "
            "set optim.ft_begin_index=null"
        )
    if optim.norms in ("running", "frozen") and (optim.precise_norms or optim.sync_norms):
        name = "precise_norms" if optim.precise_norms else "sync_norms"
        raise ValueError(
            f"config: expected optim.{name} unset with optim.norms={optim.norms}, got "
            f"{getattr(optim, name)}; such norms use no statistics of batches"
        )
