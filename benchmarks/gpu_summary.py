"""How `auto` stands to the best peer in every problem, and what the design wants of the kernels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

PEERS = (
    "naive",
    "compiled",
    "two_bmm",
    "tiled",
    "sdpa_flash",
    "sdpa_efficient",
    "sdpa_cudnn",
    "flex",
    "ffpa",
    "ffpa_tma",
    "conv3d",
    "masked_dense",
)
FLOOR = ("naive", "compiled", "sdpa_flash", "sdpa_efficient", "sdpa_cudnn", "two_bmm", "conv3d")
"""`auto` has to be at least as fast as the best of these."""

SLACK = 0.95
"""Below this `auto` is slower than a peer by more than what two measurements differ."""

Row = Mapping[str, Any]


class Target(NamedTuple):
    """A rate in TFLOP/s that is wanted on an H200 in bfloat16."""

    what: str
    widths: tuple[int, int]
    passes: str
    tflops: float


TARGETS = (
    Target("softmax 256/256 forward", (256, 256), "forward", 600),
    Target("softmax 256/256 backward", (256, 256), "backward", 530),
    Target("softmax 512/512 forward", (512, 512), "forward", 560),
    Target("softmax 512/512 backward", (512, 512), "backward", 500),
    Target("gaussian 512/256 forward", (512, 256), "forward", 500),
    Target("gaussian 1024/512 forward", (1024, 512), "forward", 500),
)
LONG_QUERIES = 3136
"""Rates are wanted of problems of at least so many queries."""


def floors(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """One entry per problem: `auto`, the best peer, and the worst of both timings' ratios.

    A problem that was measured in several groups (some peers compile, and are timed beside `auto`
    later) is one problem: each ratio is of one group's own times.
    """
    problems: dict[tuple, dict[str, Any]] = {}
    for group in _groups(rows):
        auto = group.get("auto")
        if auto is None:
            continue
        key = tuple(auto[name] for name in ("case", "kind", "dtype", "pass"))
        problem = problems.setdefault(key, {"auto": auto, "ratios": {}, "graph_ratios": {}})
        for name in PEERS:
            if name in group:
                problem["ratios"][name] = _ms(group[name]) / _ms(auto)
                if _graph_ms(auto) and _graph_ms(group[name]):
                    problem["graph_ratios"][name] = _graph_ms(group[name]) / _graph_ms(auto)
    found = []
    for (case, kind, dtype, passes), problem in problems.items():
        entry = {"case": case, "kind": kind, "dtype": dtype, "pass": passes}
        entry |= {"backend": problem["auto"]["backend"], "auto_ms": _ms(problem["auto"])}
        entry["auto_tflops"] = problem["auto"].get("nominal_tflops")
        for field in ("ratios", "graph_ratios"):
            held = {name: r for name, r in problem[field].items() if name in FLOOR}
            best = min(held, key=held.get, default=None)
            entry[field] = problem[field]
            entry["peer" if field == "ratios" else "graph_peer"] = best
            entry["holds" if field == "ratios" else "graph_holds"] = (
                None if best is None else held[best] >= SLACK
            )
        found.append(entry)
    return found


def _groups(rows: Iterable[Row]) -> list[dict[str, Row]]:
    groups: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row.get("status") == "ok" and "time_ms" in row:
            groups.setdefault(row["job"], {})[row["provider"]] = row
    return list(groups.values())


def _ms(row: Row) -> float:
    return row["time_ms"]["p50"]


def _graph_ms(row: Row) -> float | None:
    times = (row.get("graph") or {}).get("time_ms")
    return times["p50"] if times else None


def rates(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Rate of our kernels for every target: the best long problem, or None if none was measured.

    A backward's time is the difference of a group with and one without it.
    """
    best: dict[Target, dict[str, Any]] = {}
    times: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        if row.get("status") != "ok" or row.get("provider") not in ("auto", "triton", "cuda"):
            continue
        if row["dtype"] == "bfloat16" and row["kind"] in ("softmax", "gaussian"):
            key = (row["case"], row["kind"], row["provider"])
            # The first group has both passes of a kernel, the later ones repeat it beside peers.
            times.setdefault(key, {}).setdefault(row["pass"], row)
    for (case, _, provider), passes in times.items():
        for target in TARGETS:
            rate = _rate(target, passes)
            if rate is not None and rate > best.get(target, {"tflops": 0.0})["tflops"]:
                best[target] = {"tflops": rate, "case": case, "provider": provider}
    return [
        {"what": target.what, "target": target.tflops, **best.get(target, {"tflops": None})}
        for target in TARGETS
    ]


def _rate(target: Target, passes: Mapping[str, Row]) -> float | None:
    row = passes.get("forward")
    if row is None or (row["shape"]["D"], row["shape"]["V"]) != target.widths:
        return None
    if row["shape"]["N"] < LONG_QUERIES:
        return None
    if target.passes == "forward":
        return row["nominal_tflops"]
    both = passes.get("forward_backward")
    if both is None or _ms(both) <= _ms(row):
        return None
    flop = both["nominal_tflops"] * _ms(both) - row["nominal_tflops"] * _ms(row)
    return flop / (_ms(both) - _ms(row))


def print_summary(
    summary: Iterable[Mapping[str, Any]], rows: Iterable[Row], missing: list[str]
) -> None:
    """Prints targets, floors and what is missing, the most important last."""
    print("\nnot measured for want of time:" if missing else "\neverything was measured")
    for name in missing:
        print(f"  {name}")
    print("\nauto against the best peer (above 1: auto is faster)")
    for entry in summary:
        print(f"  {floor_line(entry)}")
    print("\nrates wanted on an H200 (bfloat16, TFLOP/s)")
    for rate in rates(list(rows)):
        said = "not measured" if rate["tflops"] is None else f"{rate['tflops']:.0f}"
        print(f"  {rate['what']:28} {said:>12} of {rate['target']:.0f}  {rate.get('case', '')}")


def floor_line(entry: Mapping[str, Any]) -> str:
    """One problem in a line."""
    name = f"{entry['case']} {entry['kind']} {entry['dtype']} {entry['pass']}"
    verdict = {True: "holds", False: "SHORT", None: "?    "}[entry["holds"]]
    parts = [f"{verdict} {name:58} {entry['auto_ms']:8.3f} ms by {entry['backend']}"]
    if entry["peer"]:
        parts.append(f"{entry['ratios'][entry['peer']]:.2f}x {entry['peer']}")
    if entry["graph_peer"]:
        ratio = entry["graph_ratios"][entry["graph_peer"]]
        parts.append(f"in graphs {ratio:.2f}x {entry['graph_peer']}")
    return ", ".join(parts)
