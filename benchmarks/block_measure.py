"""Measures isolated non-local blocks against those of other packages, with the same weights.

Blocks that pool before their projections and blocks that pool behind them compute different things:
a case is one of the two, and only who computes the same is compared.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from nlkernels import NonLocalBlock3d
from nlkernels._memory import PeakMemory
from nlkernels.training.memory import state_mib

from .measure import PEER_SLACK, Call, compare
from .model_cases import ModelCase, build, named_blocks, switch, unfuse
from .model_judge import Judge, Results, block_results, group_of_block
from .model_measure import COMPILED, Plan, too_large
from .reckoned import ReckonedMemory

PROVIDERS = {
    "naive": "ours, layer by layer, holding the N x M matrix (backend reference)",
    "fast": "ours as it is by default (backend auto)",
    "unfused": "ours, backend auto, layer by layer",
    "pytorchvideo": "pytorchvideo's block",
    "mmcv": "mmcv's block",
    "compiled_naive": "torch.compile of naive",
}
DEFAULT = tuple(name for name in PROVIDERS if name != "compiled_naive")
OURS = ("fast", "unfused")
RECKONED = ("naive", *OURS)

ORDERS = ("before", "after")
POOL = (1, 2, 2)
_STAGES = {"layer2": "res3", "layer3": "res4"}


@dataclass(frozen=True)
class BlockCase:
    """A block where a network has one.

    Attributes:
        name: `<setting>/<stage>@<size>`.
        shape: Of its input, (B, C, T, H, W).
        kind: Affinity.
        order: "before" or "after": where keys and values are pooled.
        also: Other settings whose blocks see the same input.
        preset: System whose options the block has; "" for those of the two published orders.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    order: str
    also: tuple[str, ...] = ()
    preset: str = ""


def block_cases(cases: Sequence[ModelCase], orders: Sequence[str]) -> list[BlockCase]:
    """The inputs of the blocks of networks, each once: res3 and res4."""
    found: dict[tuple[Any, ...], BlockCase] = {}
    for case in cases:
        for stage, shape in _inputs(case).items():
            name = f"{case.setting}/{stage}@{case.size}"
            for order in orders:
                key = (shape, order)
                if key in found:
                    known = found[key]
                    others = dict.fromkeys([*known.also, name])
                    others.pop(known.name, None)
                    found[key] = replace(known, also=tuple(others))
                else:
                    found[key] = BlockCase(name, shape, case.kind, order)
    return list(found.values())


def _inputs(case: ModelCase) -> dict[str, tuple[int, ...]]:
    """Stage -> shape of what its blocks get."""
    shapes: dict[str, tuple[int, ...]] = {}
    with FakeTensorMode(), torch.no_grad():
        model = build(case, "naive", "float32")
        for name, block in named_blocks(model).items():
            stage = _STAGES[name.split(".")[0]]
            block.register_forward_pre_hook(
                lambda _, inputs, stage=stage: shapes.update({stage: tuple(inputs[0].shape)})
            )
        model(torch.empty(case.clip_shape()))
    return shapes


def make_block(case: BlockCase, seed: int = 0) -> NonLocalBlock3d:
    """Our block of a case, with weights that leave no part of it without effect."""
    torch.manual_seed(seed)
    if case.preset:
        options = {"kind": case.kind} if case.kind else {}
        return NonLocalBlock3d.from_preset(
            case.preset, case.shape[1], init="default", zero_init=None, **options
        )
    return NonLocalBlock3d(
        case.shape[1],
        kind=case.kind or "softmax",
        pool=POOL,
        pool_order=case.order or None,
        out_bias=case.order == "before",
        init="default",
        zero_init=None,
    )


def _pytorchvideo(case: BlockCase, ours: NonLocalBlock3d) -> nn.Module:
    package = importlib.import_module("pytorchvideo.layers.nonlocal_net")
    block = package.create_nonlocal(
        dim_in=ours.dim, dim_inner=ours.inner, pool_size=POOL, instantiation=case.kind
    )
    block.load_state_dict(ours.to_foreign("pytorchvideo", kind=case.kind, pool=POOL))
    return block


def _mmcv(case: BlockCase, ours: NonLocalBlock3d) -> nn.Module:
    package = importlib.import_module("mmcv.cnn.bricks.non_local")
    block = package.NonLocal3d(
        ours.dim, sub_sample=True, norm_cfg={"type": "BN3d"}, mode=_MMCV_MODES[case.kind]
    )
    block.load_state_dict(ours.to_foreign("mmaction_slowonly", kind=case.kind))
    return block


_MMCV_MODES = {
    "softmax": "embedded_gaussian",
    "gaussian": "gaussian",
    "dot_product": "dot_product",
    "concat": "concatenation",
}

# Package, kinds, where it pools, how its block is made of ours.
_FOREIGN: dict[str, tuple[str, tuple[str, ...], str, Callable[..., nn.Module]]] = {
    "pytorchvideo": ("pytorchvideo", ("softmax", "dot_product"), "before", _pytorchvideo),
    "mmcv": ("mmcv", tuple(_MMCV_MODES), "after", _mmcv),
}


def reason(case: BlockCase, provider: str) -> str:
    """Why a package's block does not serve a case; "" if it does."""
    if provider not in _FOREIGN:
        return ""
    package, kinds, order, _ = _FOREIGN[provider]
    if case.kind not in kinds:
        return f"{package} has no block of kind {case.kind}"
    if case.order != order:
        return f"{package} pools {order} the projections, which is another function"
    if case.preset:
        ours = make_block(case)
        if ours.pool_size != POOL or ours.scale is not None:
            return f"{package} is measured with pools of {POOL} and its own scale"
    try:
        importlib.import_module(package)
    except ImportError as error:
        return f"{package} cannot be imported: {error}; make .venv-foreign/ready has it"
    return ""


def make_provider(case: BlockCase, provider: str, ours: NonLocalBlock3d) -> nn.Module:
    """A provider's block with the weights of ours."""
    if provider in _FOREIGN:
        return _FOREIGN[provider][3](case, ours)
    block = make_block(case)
    block.load_state_dict(ours.state_dict())
    if provider == "unfused":
        unfuse(block)
    else:
        switch(block, COMPILED.get(provider, provider))
    return block


def measure_blocks(
    case: BlockCase, providers: Sequence[str], plan: Plan, *, memory_only: bool = False
) -> list[dict[str, Any]]:
    """A row for each provider of a case.

    Args:
        case: The block and its input.
        providers: Keys of `PROVIDERS`.
        plan: How they are measured; pass "training" is forward and backward of one block.
        memory_only: Run nothing: memory is reckoned from sizes.

    Returns:
        Rows as `benchmarks/README.md` describes them.
    """
    head = {
        "case": case.name,
        "kind": case.kind,
        "dtype": plan.dtype,
        "pass": plan.passes,
        "shape": dict(zip("BCTHW", case.shape, strict=True)),
        "pool_order": case.order,
        "also": list(case.also),
        "channels_last": plan.channels_last,
    }
    reckoned = {name: _reckon(case, name, plan) for name in RECKONED}
    if memory_only:
        rows = [_reckoned_row(head, name, reckoned) for name in providers]
    else:
        rows = _Run(case, plan).rows(head, _reasons(case, plan, providers, reckoned))
    for row in rows:
        row["description"] = PROVIDERS[row["provider"]]
        row["backend"] = _backend(case, row["provider"], plan)
    state_ratios(rows)
    return rows


def _reckon(case: BlockCase, provider: str, plan: Plan) -> dict[str, float]:
    """Peak of a call of ours and what it keeps for the backward, without running it."""
    with FakeTensorMode():
        block = make_provider(case, provider, make_block(case))
        x, grad = torch.empty(case.shape), torch.empty(case.shape)
        call = _Form(block, plan)
        with ReckonedMemory() as peak:
            call.results(x, grad)
        return {
            "peak_mib": peak.live_mib,
            "kept_mib": call.kept_mib(x, ReckonedMemory()),
            "state_mib": state_mib(block),
        }


def _reasons(
    case: BlockCase,
    plan: Plan,
    providers: Sequence[str],
    reckoned: Mapping[str, Mapping[str, float]],
) -> dict[str, str]:
    """Why each provider is not started: another function, no package, no room; "" where it is."""
    found = {}
    for name in providers:
        # Blocks of others hold the N x M matrix as naive does; the truth of bfloat16 is in float32.
        needs = reckoned[name if name in OURS else "naive"]
        peak_mib = needs["peak_mib"] * (1 if plan.dtype == "float32" else 2)
        found[name] = reason(case, name) or too_large(peak_mib, needs["state_mib"], plan.device)
    return found


def _reckoned_row(
    head: Mapping[str, Any], name: str, reckoned: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
    row = {**head, "provider": name, "status": "unserved"}
    if name not in reckoned:
        return row | {"reason": "only our own blocks are reckoned without a run"}
    row |= {"status": "reckoned", "reason": "from the sizes of tensors, nothing ran"}
    return row | {**reckoned[name], "device_peak_mib": None}


def _backend(case: BlockCase, provider: str, plan: Plan) -> str | None:
    if provider in _FOREIGN:
        return None
    with FakeTensorMode():
        block = make_provider(case, provider, make_block(case))
        dtype, training = getattr(torch, plan.dtype), plan.passes == "training"
        return block.footprint(case.shape, dtype, plan.device, training).backend


class _Form:
    """A block, or compiled code of it, and how it is called."""

    def __init__(self, block: nn.Module, plan: Plan, *, compiled: bool = False) -> None:
        self.block = block.train(plan.passes == "training")
        self._call = torch.compile(block, dynamic=False) if compiled else block
        self._plan = plan

    def results(self, x: Tensor, grad: Tensor, *, wide: bool = False) -> Results:
        """Output, and gradients of input and weights where the pass has a backward.

        Args:
            x: (B, C, T, H, W), float32.
            grad: Gradient of the output.
            wide: Compute in float32 in any case.
        """
        with contextlib.nullcontext() if wide else self._autocast():
            wanted = grad if self.block.training else None
            return block_results(self.block, x, wanted, call=self._call)

    def kept_mib(self, x: Tensor, memory: PeakMemory | ReckonedMemory) -> float | None:
        """What is alive between forward and backward beside input and weights, output included."""
        if not self.block.training:
            return None
        x = x.detach().requires_grad_()
        with memory, self._autocast():
            out = self._call(x)
        del out
        return memory.kept_mib

    def _autocast(self) -> torch.autocast:
        enabled = self._plan.dtype == "bfloat16"
        return torch.autocast(self._plan.device.type, torch.bfloat16, enabled=enabled)


class _Run:
    """One case with data."""

    def __init__(self, case: BlockCase, plan: Plan) -> None:
        self.case, self.plan = case, plan
        generator = torch.Generator().manual_seed(plan.seed)
        last = torch.channels_last_3d if plan.channels_last else torch.contiguous_format
        self.x, self.grad = (
            torch.randn(case.shape, generator=generator).to(plan.device, memory_format=last)
            for _ in range(2)
        )
        self.memory_format = last

    def rows(self, head: Mapping[str, Any], reasons: Mapping[str, str]) -> list[dict[str, Any]]:
        """Judged, weighed and timed, but for those with a reason."""
        if all(reasons.values()):
            return [
                {**head, "provider": name, "status": "unserved", "reason": why}
                for name, why in reasons.items()
            ]
        ours = make_block(self.case, self.plan.seed)
        right = self._form(ours, "naive")
        # Scores that do not fit are left to the other independent form.
        judged_by = "chunked" if reasons.get("naive") else "naive"
        if judged_by == "chunked":
            right.block.set_backend("chunked")
        judge = Judge.of(
            lambda x: right.results(x, self.grad),
            self.x,
            group_of_block,
            wide=None
            if self.plan.dtype == "float32"
            else lambda x: right.results(x, self.grad, wide=True),
        )
        forms, calls = {}, {}
        for name, why in reasons.items():
            if why:
                calls[name] = Call(dict, why)
                continue
            forms[name] = form = self._form(ours, name)
            peer = name not in (*OURS, "naive")
            calls[name] = Call(
                lambda form=form: self._results(form),
                optional=peer,
                slack=PEER_SLACK if peer else 1.0,
            )
        rows = compare(head, calls, judge, self.plan.device, rounds=self.plan.rounds)
        for row in rows:
            if row["status"] == "ok":
                memory = PeakMemory(self.plan.device)
                row["kept_mib"] = forms[row["provider"]].kept_mib(self.x, memory)
                row["judged_by"] = judged_by
        torch._dynamo.reset()
        return rows

    def _form(self, ours: NonLocalBlock3d, name: str) -> _Form:
        block = make_provider(self.case, name, ours)
        block = block.to(self.plan.device, memory_format=self.memory_format)
        return _Form(block, self.plan, compiled=name in COMPILED)

    def _results(self, form: _Form) -> Results:
        results = form.results(self.x, self.grad)
        if isinstance(form.block, NonLocalBlock3d):
            return results
        return {name: results[name] for name in ("out", "x") if name in results}


def state_ratios(rows: Sequence[dict[str, Any]]) -> None:
    """Adds to the timed rows of a case the speed over naive and over the best that is not ours."""
    medians = {row["provider"]: row["time_ms"]["p50"] for row in rows if "time_ms" in row}
    others = {name: time for name, time in medians.items() if name not in OURS}
    best = min(others, key=others.get) if others else None
    for row in rows:
        if "time_ms" in row:
            own = row["time_ms"]["p50"]
            row["best_other"] = best
            row["speedup_over"] = {
                "naive": medians["naive"] / own if "naive" in medians else None,
                "best_other": others[best] / own if best is not None else None,
            }
