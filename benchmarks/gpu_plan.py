"""What the stage `bench` measures on a GPU, the most wanted first: time may end it anywhere.

Attention shapes are those of registry.py at batches that fill a large GPU, and one long problem of
512 channels that no published network has. The aggregation and the gate of region-based blocks are
measured at the shapes of their network.

dot_product is asked at clips of few keys too: only there do scores cost fewer operations than two
library products in the linear order, and only there can its kernels be worth keeping.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .gate import LAYERS as GATE_LAYERS
from .gate import GateCase
from .measure import PASSES
from .peers import COMPILED, QUICK, SWEEP
from .region import LAYERS as REGION_LAYERS
from .region import RegionCase
from .registry import CASES, Case, select_cases

REGION_PROVIDERS = ("conv3d", "masked_dense", "chunked", "triton", "cuda", "auto")
GATE_PROVIDERS = ("naive", "chunked", "triton", "cuda", "auto")

LONG = Case("long_512", "softmax", 4, 8192, 8192, 512, 512)
# res4 and res5 of 4 frames at 224 px, keys pooled: M below D V / (D + V).
FEW_KEYS = tuple(
    Case(f"few_keys_{width}", "dot_product", 8, 4 * size**2, size**2, width, width)
    for size, width in ((14, 512), (7, 1024))
)


# Kinds that are measured at a shape of softmax with kernels of their own.
OWN_KERNELS = ("relu", "dot_product", "concat", "gate")


@dataclass(frozen=True)
class Job:
    """One problem for some providers, or one question about our kernels.

    Attributes:
        kind: "attention", "region", "gate", "kernels" (each kernel alone) or "configurations"
            (every candidate of every kernel).
        case: The problem.
        dtype: Name of the dtype.
        passes: "forward" or "forward_backward".
        providers: Who is measured; for attention and region.
        limit_s: Longest time of one provider's first calls, compilation included.
    """

    kind: str
    case: Case | RegionCase | GateCase
    dtype: str
    passes: str
    providers: tuple[str, ...] = ()
    limit_s: float = 30.0

    @property
    def name(self) -> str:
        """Unique within a plan."""
        what = {COMPILED: " compiled", SWEEP: " workspaces"}.get(self.providers, "")
        kind = self.case.kind if self.kind == "attention" else self.kind
        if self.kind in ("kernels", "configurations") and self.case.kind in OWN_KERNELS:
            kind = f"{self.case.kind} {kind}"
        return f"{self.case.name} {kind}{what} {self.dtype} {self.passes}"


def plan() -> list[Job]:
    """All jobs, in order."""
    res3 = _case("c2d_r50_128x1/res3@224", "softmax", 4)
    res4 = _case("c2d_r50_128x1/res4@224", "softmax", 8)
    gaussian_res3 = _case("c2d_r50_128x1/res3@224", "gaussian", 4)
    gaussian_res4 = _case("c2d_r50_128x1/res4@224", "gaussian", 8)
    short = [_case(f"c2d_r50_8x8/{stage}@224", "softmax", 8) for stage in ("res3", "res4")]
    wanted = [res3, LONG, gaussian_res3, gaussian_res4]
    region = [case for layer in REGION_LAYERS for case in layer]
    relu, concat = (_case("c2d_r50_128x1/res3@224", kind, 4) for kind in ("relu", "concat"))
    unnormalised = [relu, concat, _case("rnl_r50_8seg/layer3@224", "relu", 8), *FEW_KEYS]
    wider = [
        res4,
        _case("c2d_r50_128x1/res3@256", "softmax", 2),
        _case("rnl_r50_8seg/layer2@224", "softmax", 4),
        _case("c2d_r50_128x1/res3@224", "dot_product", 4),
    ]
    jobs = [
        *_quick(wanted, "bfloat16"),
        *_region([case for case in region if case.taps == (3, 7, 7)], "bfloat16"),
        *_quick(short, "bfloat16"),
        *_quick(unnormalised, "bfloat16"),
        *_gate(GATE_LAYERS[:2], "bfloat16"),
        *(Job("kernels", case, "bfloat16", PASSES[1]) for case in (LONG, res3, gaussian_res4)),
        *(
            Job("kernels", case, "bfloat16", PASSES[1])
            for case in (*unnormalised[:4], GATE_LAYERS[0])
        ),
        Job("attention", LONG, "bfloat16", PASSES[0], SWEEP),
        *(Job("attention", c, "bfloat16", PASSES[1], SWEEP) for c in (LONG, res3, gaussian_res4)),
        *_compiled([*wanted, *short], "bfloat16"),
        *_quick(wider, "bfloat16"),
        *_gate(GATE_LAYERS[2:], "bfloat16"),
        *_region([case for case in region if case.taps != (3, 7, 7)], "bfloat16"),
        *(Job("configurations", case, "bfloat16", PASSES[1]) for case in (res3, LONG, *region[:2])),
        Job("configurations", relu, "bfloat16", PASSES[1]),
        *_compiled(wider[:3], "bfloat16"),
        *_quick([res3, LONG], "float16"),
        *_quick([res3, LONG], "float32"),
    ]
    # Their batch differs from the registry's, their question does not.
    known = {(job.case.name, job.case.kind) for job in jobs}
    rest = [case for case in CASES if (case.name, case.kind) not in known]
    return jobs + _quick(rest, "bfloat16")


def reduced() -> list[Job]:
    """The same kinds of jobs at sizes that an interpreter manages: for a run without a GPU."""
    seen = set()
    jobs = []
    for job in plan():
        what = (job.kind, job.case.kind, job.providers, job.passes)
        if what in seen or job.dtype != "bfloat16":
            continue
        seen.add(what)
        jobs.append(replace(job, case=_small(job.case)))
    return jobs


def _small(case: Case | RegionCase | GateCase) -> Case | RegionCase | GateCase:
    if isinstance(case, GateCase):
        return replace(case, batch=1, channels=24, positions=(2, 3, 5))
    if isinstance(case, RegionCase):
        # The interpreter's time is that of the taps.
        return replace(case, batch=1, channels=4, positions=(2, 3, 4), taps=(1, 3, 3))
    return replace(case, batch=1, n=49, m=21)


def _case(name: str, kind: str, batch: int) -> Case:
    (case,) = select_cases([name], [kind], batch)
    return case


def _quick(cases: list[Case], dtype: str) -> list[Job]:
    return [Job("attention", case, dtype, passes, QUICK) for passes in PASSES for case in cases]


def _compiled(cases: list[Case], dtype: str) -> list[Job]:
    return [
        Job("attention", case, dtype, passes, COMPILED, limit_s=90)
        for case in cases
        for passes in PASSES
    ]


def _gate(cases: Sequence[GateCase], dtype: str) -> list[Job]:
    return [Job("gate", c, dtype, passes, GATE_PROVIDERS) for c in cases for passes in PASSES]


def _region(cases: list[RegionCase], dtype: str) -> list[Job]:
    return [
        Job("region", case, dtype, passes, REGION_PROVIDERS) for case in cases for passes in PASSES
    ]
