"""The tables that `bench_models` prints: a case in a few lines, what it costs at a glance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .text import wrapped

Row = Mapping[str, Any]

_MODEL_HEAD = (
    "variant",
    "ms (p20 .. p80)",
    "over none",
    "over naive",
    "MiB",
    "over none",
    "GFLOP/clip",
    "published",
)


def print_models(rows: Sequence[Row]) -> None:
    """What the forms of one network cost, and what they cost over the network without blocks."""
    first = rows[0]
    print(f"\n{_head(first)}  {first['blocks']} blocks{_width(first)}")
    sizes = next((row["attention"] for row in rows if row["attention"]), [])
    if sizes:
        print(f"attention N x M: {', '.join(sizes)}")
    fits = [row["fits"] for row in rows if row.get("fits") is not None]
    lines = [[*_MODEL_HEAD, f"batch in {fits[0]['gib']:g} GiB" if fits else ""]]
    for row in rows:
        found = row.get("fits")
        lines.append(
            [
                _label(row),
                *_timed(row),
                *_memory(row),
                f"{row['executed_gflop']:.2f}",
                f"{row['published_gflop']:.2f}",
                "" if found is None else "any" if found["batch"] is None else str(found["batch"]),
            ]
        )
    print(_aligned(lines))
    _print_notes(rows)
    if fits:
        print(f"  {_line_of_batches(fits)}")
    print(end="", flush=True)


def print_blocks(rows: Sequence[Row]) -> None:
    """What one block costs, ours and those of others."""
    first = rows[0]
    also = f"  also {', '.join(first['also'])}" if first["also"] else ""
    print(f"\n{_head(first)}  pooled {first['pool_order']} the projections{also}")
    lines = [
        ["provider", "ms (p20 .. p80)", "over naive", "over best other", "peak MiB", "kept MiB"]
    ]
    for row in rows:
        over = row.get("speedup_over", {})
        best = row.get("best_other")
        lines.append(
            [
                _label(row),
                _time(row),
                _ratio(over.get("naive")),
                _ratio(over.get("best_other")) + (f" ({best})" if best else ""),
                _number(row.get("peak_mib")),
                _number(row.get("kept_mib")),
            ]
        )
    print(_aligned(lines))
    _print_notes(rows)
    print(end="", flush=True)


def _head(row: Row) -> str:
    shape = " ".join(f"{letter}={size}" for letter, size in row["shape"].items())
    layout = "  channels last" if row["channels_last"] else ""
    return f"{row['case']}  {row['kind']}  {row['dtype']}  {row['pass']}  {shape}{layout}"


def _width(row: Row) -> str:
    return "" if row["width"] == 1 else f"  width {row['width']:g}"


def _label(row: Row) -> str:
    backend = f" ({row['backend']})" if row["backend"] else ""
    return f"{row['provider']}{backend}"


def _timed(row: Row) -> list[str]:
    """Time, what of it is over the network without blocks, and the speed over naive."""
    over = row["over_none"]
    more = ""
    if over["ms"] is not None and row["provider"] != "none":
        more = f"{over['ms']:+.1f} ms ({over['ms_percent']:+.1f}%)"
    speed = row.get("speedup_over", {}).get("naive")
    text = _ratio(speed)
    if row.get("blocks_speedup") is not None and row["provider"] != "naive":
        text += f" (blocks {row['blocks_speedup']:.2f}x)"
    return [_time(row), more, text]


def _memory(row: Row) -> list[str]:
    """Peak memory and what of it is over the network without blocks."""
    over = row["over_none"]
    if "peak_mib" not in row:
        return [f"reckoned {row['reckoned_mib']:.1f}", ""]
    more = ""
    if over["mib"] is not None and row["provider"] != "none":
        more = f"{over['mib']:+.1f} MiB ({over['mib_percent']:+.1f}%)"
    return [f"{row['peak_mib']:.1f}", more]


def _time(row: Row) -> str:
    if "time_ms" not in row:
        return "" if row["status"] == "reckoned" else row["status"]
    times = row["time_ms"]
    return f"{times['p50']:.2f} ({times['p20']:.2f} .. {times['p80']:.2f})"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _print_notes(rows: Sequence[Row]) -> None:
    """How far results are off, and why some have no time; a reason of several rows once."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["status"] != "ok":
            reasons.setdefault((row["status"], row["reason"]), []).append(row["provider"])
        elif row["error"] and row["provider"] != row["judged_by"]:
            print(f"  {row['provider']} is off {row['judged_by']} by {_off(row['error'])}")
    for (status, reason), names in reasons.items():
        print(wrapped(f"  {', '.join(names)} {status}: {reason}"))


def _off(errors: Mapping[str, Mapping[str, float]]) -> str:
    worst = max(error["relative"] / error["allowed"] for error in errors.values())
    said = ", ".join(f"{error['relative']:.1e} ({group})" for group, error in errors.items())
    return f"{said}: at most {worst:.2f} of what is allowed"


def _line_of_batches(fits: Sequence[Mapping[str, Any]]) -> str:
    points = ", ".join(fits[0]["peaks_mib"])
    how = " or ".join(dict.fromkeys(found["peaks"] for found in fits))
    text = f"batches: reckoned from peaks at B={points}, which were {how}"
    off = [abs(found["deviation"]) for found in fits if found["deviation"] is not None]
    return text + (f"; the last is {max(off):.1%} off the line of the first two" if off else "")


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    """Columns below each other, the first to the left, the others to the right; no empty ones."""
    kept = [column for column in range(len(lines[0])) if any(line[column] for line in lines[1:])]
    shown = [[line[column] for column in kept] for line in lines]
    widths = [max(len(line[column]) for line in shown) for column in range(len(kept))]
    return "\n".join(
        "  ".join(
            ["", line[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        )
        for line in shown
    )
