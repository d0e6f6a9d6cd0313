"""Measures the forms of one network against each other: judged, weighed, timed in turns.

Before anything is allocated every form takes a step without data: its FLOPs and its peak memory are
known then, and one that does not fit is not started.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nlkernels import set_nonlocal_backend
from nlkernels.training.measure import overhead
from nlkernels.training.memory import largest_batch

from .measure import PEER_SLACK, Call, compare
from .model_cases import VARIANTS, ModelCase, make_clips, named_blocks, unfuse
from .model_judge import ModelJudge, Results
from .model_steps import Network, Reckoned
from .providers import available_mib

THIRD_BATCH = 4
"""Checks the line through the peaks of batch 1 and 2, where it fits."""

COMPILED = {"compiled_naive": "naive"}
"""Compiled variant -> the one that is compiled."""

OTHERS = ("none", "grouped_naive")
"""What computes another function than the network that judges."""

MARGIN = 1.1
"""What a step may need over its reckoned peak: scratch of convolutions is not in that."""


class Plan(NamedTuple):
    """How cases are measured.

    Attributes:
        dtype: "float32", or "bfloat16" for autocast.
        passes: "training" or "forward".
        device: Where.
        rounds: Interleaved rounds, one sample of every variant each.
        seed: Of weights and clips.
        channels_last: Whether clips and weights are in that memory format.
        fits_gib: Memory whose largest batch is asked for; None asks for none.
    """

    dtype: str
    passes: str
    device: torch.device
    rounds: int
    seed: int = 0
    channels_last: bool = False
    fits_gib: float | None = None


def measure_models(
    case: ModelCase, variants: Sequence[str], plan: Plan, *, memory_only: bool = False
) -> list[dict[str, Any]]:
    """A row for each variant of a case.

    Args:
        case: Network, clips and blocks.
        variants: Keys of `VARIANTS`.
        plan: How they are measured.
        memory_only: Run nothing: memory and FLOPs are reckoned from sizes.

    Returns:
        Rows as `benchmarks/README.md` describes them.
    """
    asked = {
        name: Reckoned(case, name, plan.dtype, plan.passes)
        for name in dict.fromkeys(COMPILED.get(name, name) for name in variants)
    }
    reckoned = {name: asked[COMPILED.get(name, name)] for name in variants}
    head = {
        "case": case.name,
        "kind": case.kind,
        "dtype": plan.dtype,
        "pass": plan.passes,
        "shape": dict(zip("BTHW", (case.batch, *case.clip_shape()[2:]), strict=True)),
        "blocks": case.blocks,
        "width": case.width,
        "channels_last": plan.channels_last,
    }
    if memory_only:
        rows = [_reckoned_row(head, name, one) for name, one in reckoned.items()]
    else:
        rows = _Run(case, plan, reckoned).rows(head)
    for row in rows:
        one = reckoned[row["provider"]]
        row |= _counts(row["provider"], one, plan.device)
        if plan.fits_gib is not None and "fits" not in row and row["provider"] not in COMPILED:
            row["fits"] = fits(one, plan.fits_gib)
    state_overheads(rows)
    return rows


def _reckoned_row(head: Mapping[str, Any], name: str, reckoned: Reckoned) -> dict[str, Any]:
    if name in COMPILED:
        reason = "what compiled code takes is not known without a run"
        return {**head, "provider": name, "status": "unserved", "reason": reason}
    row = {**head, "provider": name, "status": "reckoned"}
    row["reason"] = "from the sizes of tensors, nothing ran"
    return row | {"peak_mib": reckoned.peak_mib(reckoned.case.batch), "device_peak_mib": None}


def _counts(name: str, reckoned: Reckoned, device: torch.device) -> dict[str, Any]:
    """What no measurement changes: parameters, state, FLOPs and sizes of the attention."""
    attention, batch = reckoned.attention(device), reckoned.case.batch
    sizes = dict.fromkeys(f"{one.queries} x {one.keys}" for one in attention)
    return {
        "backend": ", ".join(dict.fromkeys(one.backend for one in attention)) or None,
        "attention": list(sizes),
        "description": VARIANTS[name],
        "parameters": reckoned.parameters,
        "state_mib": reckoned.state_mib,
        "published_gflop": reckoned.multiply_adds() / 1e9,
        "executed_gflop": reckoned.flop(batch) / batch / 1e9,
        "reckoned_mib": reckoned.peak_mib(batch),
    }


class _Run:
    """One case with data: the networks that fit, all with the weights of the one that judges."""

    def __init__(self, case: ModelCase, plan: Plan, reckoned: Mapping[str, Reckoned]) -> None:
        self.case, self.plan, self.reckoned = case, plan, reckoned
        states_mib = sum(one.state_mib for one in reckoned.values())
        self.reasons = {
            name: too_large(self._judged_mib(one), states_mib, plan.device)
            for name, one in reckoned.items()
        }
        self.networks: dict[str, Network] = {}

    def _judged_mib(self, reckoned: Reckoned) -> float:
        """Peak of a step, in float32 as well: there is the truth."""
        peak_mib = reckoned.peak_mib(self.case.batch)
        return peak_mib if self.plan.dtype == "float32" else 2 * peak_mib

    def rows(self, head: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Judged, weighed and timed; what does not fit is unserved."""
        started = [name for name, reason in self.reasons.items() if not reason]
        if not started:
            return [
                {**head, "provider": name, "status": "unserved", "reason": reason}
                for name, reason in self.reasons.items()
            ]
        clips, labels = self._clips(self.case.batch)
        # Scores that do not fit are left to the other independent form.
        judged_by = "naive" if "naive" in started else "chunked"
        if started == ["none"]:
            judged_by = "none"
        right = self._right(judged_by, clips)
        for name in started:
            same = name == judged_by
            self.networks[name] = right if same else self._with_weights(name, right, clips)
        calls = {
            name: Call(dict, reason) if reason else self._call(name, clips, labels)
            for name, reason in self.reasons.items()
        }
        judge = ModelJudge(
            lambda clips: right.step(right.model, clips, labels),
            self._wide(right, labels),
            named_blocks(right.model),
            clips,
            forms={
                name: named_blocks(network.model)
                for name, network in self.networks.items()
                if name not in COMPILED
            },
            unjudged=OTHERS,
        )
        rows = compare(head, calls, judge, self.plan.device, rounds=self.plan.rounds)
        torch._dynamo.reset()
        for row in rows:
            if row["status"] == "ok":
                row["judged_by"] = None if row["provider"] in OTHERS else judged_by
                if self.plan.fits_gib is not None and row["provider"] not in COMPILED:
                    row["fits"] = self._fits(row["provider"])
        return rows

    def _clips(self, batch: int) -> tuple[Tensor, Tensor]:
        clips, labels = make_clips(self.case, batch, self.plan.seed)
        clips = clips.to(self.plan.device, memory_format=self._format)
        return clips, labels.to(self.plan.device)

    @property
    def _format(self) -> torch.memory_format:
        last = self.plan.channels_last
        return torch.channels_last_3d if last else torch.contiguous_format

    def _network(self, variant: str) -> Network:
        case, plan = self.case, self.plan
        network = Network.make(case, variant, plan.dtype, plan.passes, plan.seed)
        model = network.model.to(plan.device, memory_format=self._format)
        return Network.of(model, plan.passes)

    def _right(self, judged_by: str, clips: Tensor) -> Network:
        """The network that the others are held against; its running statistics fit the clips."""
        network = self._network("none" if judged_by == "none" else "naive")
        if judged_by == "chunked":
            set_nonlocal_backend(network.model, "chunked")
            unfuse(network.model)
        self._settle(network.model, clips)
        return network

    def _wide(self, right: Network, labels: Tensor) -> Callable[[Tensor], Results] | None:
        """A step of the judging network in float32; None where it is in float32 anyway."""
        if self.plan.dtype == "float32":
            return None
        return lambda clips: right.step(right.model.model, clips, labels)

    def _settle(self, model: nn.Module, clips: Tensor) -> None:
        if self.plan.passes == "forward":
            settle(model, clips)

    def _with_weights(self, name: str, right: Network, clips: Tensor) -> Network:
        network = self._network(COMPILED.get(name, name))
        if name == "none":
            self._settle(network.model, clips)
        else:
            network.model.load_state_dict(right.model.state_dict())
        return network

    def _call(self, name: str, clips: Tensor, labels: Tensor) -> Call:
        network = self.networks[name]
        compiled = name in COMPILED
        call = torch.compile(network.model, dynamic=False) if compiled else network.model
        slack = PEER_SLACK if compiled else 1.0
        return Call(lambda: network.step(call, clips, labels), optional=compiled, slack=slack)

    def _fits(self, name: str) -> dict[str, Any]:
        network, reckoned = self.networks[name], self.reckoned[name]
        batches = [1, 2]
        if not too_large(reckoned.peak_mib(THIRD_BATCH), 0.0, self.plan.device):
            batches.append(THIRD_BATCH)
        peaks = {batch: network.peak_mib(*self._clips(batch)) for batch in batches}
        return _fit(peaks, network.state_mib, self.plan.fits_gib, measured=True)


def settle(model: nn.Module, clips: Tensor) -> None:
    """Give the batch norms of a model the statistics of clips: without them values explode."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta, training = [norm.momentum for norm in norms], model.training
    for norm in norms:
        norm.momentum = 1.0
    model.train()
    with torch.no_grad():
        model(clips)
    model.train(training)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def too_large(peak_mib: float, states_mib: float, device: torch.device) -> str:
    """Why a step is not started; "" where it fits.

    Args:
        peak_mib: Reckoned peak of the step.
        states_mib: What all networks of the comparison hold.
        device: Where it would run.
    """
    free = available_mib(device)
    needed = MARGIN * (peak_mib + states_mib)
    if needed <= free:
        return ""
    return (
        f"a step needs about {needed / 1024:.1f} GiB, {free / 1024:.1f} GiB are free; "
        "lower --batch, or ask for --memory-only"
    )


def fits(reckoned: Reckoned, gib: float) -> dict[str, Any]:
    """The largest batch that a memory holds, of a network that does not run."""
    peaks = {batch: reckoned.peak_mib(batch, clips=True) for batch in (1, 2, THIRD_BATCH)}
    return _fit(peaks, reckoned.state_mib, gib, measured=False)


def _fit(
    peaks_mib: Mapping[int, float], held_mib: float, gib: float, *, measured: bool
) -> dict[str, Any]:
    found = largest_batch(peaks_mib, state_mib=held_mib, gib=gib)
    return {
        "gib": gib,
        "batch": found.batch,
        "fixed_mib": found.fixed_mib,
        "clip_mib": found.clip_mib,
        "peaks_mib": {str(batch): peak for batch, peak in found.peaks_mib.items()},
        "deviation": found.deviation,
        "peaks": "measured" if measured else "reckoned",
        "text": str(found),
    }


def state_overheads(rows: Iterable[dict[str, Any]]) -> None:
    """Adds to the rows of one case what they cost over the network without blocks, and over naive.

    `over_none` holds the difference and the percentage of time and of peak memory; None where the
    network without blocks, or the row itself, has none. `blocks_speedup` divides what naive blocks
    cost over it by what the row's blocks cost.
    """
    rows = list(rows)
    found = {row["provider"]: row for row in rows}
    none, naive = found.get("none", {}), found.get("naive", {})
    for row in rows:
        row["over_none"] = {
            "ms": None,
            "ms_percent": None,
            "mib": None,
            "mib_percent": None,
        }
        if "peak_mib" in row and "peak_mib" in none:
            more = overhead(row["peak_mib"], none["peak_mib"])
            row["over_none"] |= {"mib": more.difference, "mib_percent": more.percent}
        if "time_ms" in row and "time_ms" in none:
            more = overhead(row["time_ms"]["p50"], none["time_ms"]["p50"])
            row["over_none"] |= {"ms": more.difference, "ms_percent": more.percent}
        if "time_ms" in row:
            own = row["time_ms"]["p50"]
            row["clips_per_s"] = 1e3 * row["shape"]["B"] / own
            slower = naive["time_ms"]["p50"] if "time_ms" in naive else None
            row["speedup_over"] = {"naive": slower / own if slower is not None else None}
    state_speedups_of_blocks(rows, naive)


def state_speedups_of_blocks(rows: Iterable[dict[str, Any]], naive: Mapping[str, Any]) -> None:
    """Adds `blocks_speedup`; None where blocks cost nothing that is measured."""
    for row in rows:
        costs = [one.get("over_none", {}).get("ms") for one in (naive, row)]
        known = all(cost is not None and cost > 0 for cost in costs)
        row["blocks_speedup"] = costs[0] / costs[1] if known else None
