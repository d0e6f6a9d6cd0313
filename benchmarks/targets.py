"""What is wanted of the C++ kernels, as ratios to other implementations in the same run.

The ratios were set on a CPU that executes AVX-512 at full width. One that takes two cycles for the
same may be unable to reach them: `bound` says what a ratio would be if the kernel ran at the whole
measured peak of this machine (or copy rate, where that is nearer). A ratio that is missed is
missed all the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .region import ONE_CLIP
from .registry import CASES

LONG = "c2d_r50_128x1/res3@224"
SDPA = ("sdpa_flash", "sdpa_efficient", "sdpa_cudnn", "sdpa_math")
NAIVE = ("naive",)
EITHER = (*SDPA, *NAIVE)

SHAPES = {
    (case.name, case.kind): {"B": case.batch, "N": case.n, "M": case.m, "D": case.d, "V": case.v}
    for case in CASES
} | {(ONE_CLIP.name, ONE_CLIP.kind): ONE_CLIP.shape}
"""What is asked is asked at the registered sizes: rows of another batch say nothing."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Target:
    """`cpp` is to be so many times as fast as the fastest of the baselines.

    Attributes:
        kind, dtype, passes: Which problems.
        over: The baselines in a word.
        baselines: Their providers.
        asked: The ratio.
        case: Name of the one case; "" for every registered case of the kind.
    """

    kind: str
    dtype: str
    passes: str
    over: str
    baselines: tuple[str, ...]
    asked: float
    case: str = ""


def _softmax(kind: str, *, sdpa: bool) -> list[Target]:
    found = []
    for passes, over_sdpa, over_either in (
        ("forward", 3.5, 1.6),
        ("forward_backward", 2.5, 1.4),
    ):
        if sdpa:
            found.append(Target(kind, "bfloat16", passes, "SDPA", SDPA, over_sdpa))
        found.append(Target(kind, "bfloat16", passes, "naive", NAIVE, 1.0))
        found.append(Target(kind, "float32", passes, "SDPA and naive", EITHER, over_either))
    return found


TARGETS = (
    Target("softmax", "bfloat16", "forward", "SDPA", SDPA, 4.0, LONG),
    Target("softmax", "bfloat16", "forward", "naive", NAIVE, 1.5, LONG),
    Target("softmax", "bfloat16", "forward_backward", "SDPA", SDPA, 3.5, LONG),
    Target("softmax", "bfloat16", "forward_backward", "naive", NAIVE, 2.0, LONG),
    *(
        Target("region", "float32", "forward_backward", over, (provider,), asked, ONE_CLIP.name)
        for over, provider, asked in (
            ("conv3d(groups=C)", "conv3d", 20.0),
            ("three conv2d", "slices_2d", 3.5),
        )
    ),
    Target("concat", "float32", "forward", "naive", NAIVE, 40.0, LONG),
    *_softmax("softmax", sdpa=True),
    # No SDPA backend but the materialising one serves D != V on a CPU.
    *_softmax("gaussian", sdpa=False),
    *(
        Target("dot_product", dtype, passes, "two bmm", ("two_bmm",), 1.0)
        for dtype in ("float32", "bfloat16")
        for passes in ("forward", "forward_backward")
    ),
)


@dataclass(frozen=True)
class Outcome:
    """A target on one case.

    Attributes:
        target: What is wanted.
        case: Name of the case.
        got: The measured ratio; None where `cpp` or the baselines were not measured.
        share: Share of the nearer ceiling that `cpp` reached; None where it was not measured.
        of: That ceiling: "peak" or "copy".
        wrong: Why the result of `cpp` was refused, or that it raised: a miss, too.
    """

    target: Target
    case: str
    got: float | None = None
    share: float | None = None
    of: str = ""
    wrong: str = ""

    @property
    def holds(self) -> bool:
        """Whether the ratio that was asked for was measured."""
        return self.got is not None and self.got >= self.target.asked

    @property
    def bound(self) -> float | None:
        """The ratio at the whole of the ceiling; None where that was not measured."""
        return self.got / self.share if self.got is not None and self.share else None

    @property
    def attainable(self) -> float:
        """The smaller of what is asked and what the machine allows."""
        asked = self.target.asked
        return asked if self.bound is None else min(asked, self.bound)


def outcomes(report: Mapping[str, Any]) -> list[Outcome]:
    """Every target on every case it is stated for, measured or not."""
    problems: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in report["rows"]:
        key = (row["case"], row["kind"], row["dtype"], row["pass"])
        if row["status"] != "unserved" and row["shape"] == SHAPES.get(key[:2]):
            problems.setdefault(key, {})[row["provider"]] = row
    return [
        _outcome(target, case, problems.get((case, target.kind, target.dtype, target.passes), {}))
        for target in TARGETS
        for case in _cases(target)
    ]


def _cases(target: Target) -> list[str]:
    if target.case:
        return [target.case]
    return [case.name for case in CASES if case.kind == target.kind]


def _outcome(target: Target, case: str, rows: Mapping[str, Row]) -> Outcome:
    timed = {name: row for name, row in rows.items() if row["status"] == "ok"}
    baselines = [_ms(timed[name]) for name in target.baselines if name in timed]
    if "cpp" in rows and "cpp" not in timed:
        return Outcome(target, case, wrong=f"{rows['cpp']['status']}: {rows['cpp']['reason']}")
    if "cpp" not in timed or not baselines:
        return Outcome(target, case)
    own = timed["cpp"]
    shares = {name: own.get(f"share_of_{name}") or 0.0 for name in ("peak", "copy")}
    nearer = max(shares, key=shares.__getitem__)
    known = own.get("share_of_peak") is not None
    got = min(baselines) / _ms(own)
    return Outcome(target, case, got, *((shares[nearer], nearer) if known else ()))


def _ms(row: Row) -> float:
    return row["time_ms"]["p50"]


def print_outcomes(found: list[Outcome], peaks: Mapping[str, Mapping[str, float]]) -> None:
    """A line for each measured outcome, and how many there are of each sort."""
    print("\nwanted of cpp: ratio asked, ratio got, share of this machine's ceiling, and what the")
    print("ratio would be at the whole of it (bound)")
    for isa, rates in peaks.items():
        said = ", ".join(f"{dtype} {rate:.0f}" for dtype, rate in rates.items())
        print(f"peak of {isa} in GFLOP/s: {said}")
    measured = [outcome for outcome in found if outcome.got is not None or outcome.wrong]
    for outcome in measured:
        print(_line(outcome))
    missed = [outcome for outcome in measured if not outcome.holds]
    beyond = sum(outcome.attainable < outcome.target.asked for outcome in missed)
    print(
        f"{len(measured) - len(missed)} hold, {len(missed)} are missed, {beyond} of these beyond "
        f"this machine's ceiling; {len(found) - len(measured)} were not measured"
    )


def _line(outcome: Outcome) -> str:
    target = outcome.target
    text = (
        f"{'holds ' if outcome.holds else 'MISSED'} {target.kind:11} {target.dtype:8} "
        f"{target.passes:16} {outcome.case:31} over {target.over:16} asked {target.asked:5.2f} "
    )
    if outcome.got is None:
        return text + outcome.wrong
    text += f"got {outcome.got:6.2f}"
    if outcome.share is None:
        return f"{text}  share not measured"
    text += f"  {outcome.share:4.0%} of {outcome.of}"
    if outcome.holds:
        return text
    return f"{text}, bound {outcome.bound:.2f}, attainable {outcome.attainable:.2f}"
