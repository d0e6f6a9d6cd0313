"""Isolated blocks: rows, ratios, and blocks of other packages with our weights."""

import importlib.util
from pathlib import Path

import pytest

from benchmarks import block_measure, results
from tests.benchmarks.small_models import PLAN, by_provider, run

pytestmark = pytest.mark.usefixtures("quick_steps")


@pytest.fixture(scope="module")
def blocks(quick_steps, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """A real run of the blocks of a small network."""
    path = tmp_path_factory.mktemp("blocks") / "run.json"
    code, found = run(path, "--blocks-only", "--settings", "8x8,32x2", "--kind", "dot_product")
    assert code == 0
    return found


def test_blocks_are_measured(blocks: dict) -> None:
    assert blocks["schema"] == results.BLOCKS_SCHEMA
    cases = {(row["case"], row["pool_order"]) for row in blocks["rows"]}
    # The blocks of 32x2 see what those of 8x8 see.
    stages = ("8x8/res3@64", "8x8/res4@64")
    assert cases == {(name, order) for name in stages for order in ("before", "after")}
    assert {tuple(row["also"]) for row in blocks["rows"]} == {("32x2/res3@64",), ("32x2/res4@64",)}
    rows = by_provider(blocks["rows"], case=stages[0], pool_order="before")
    assert list(rows) == list(block_measure.DEFAULT)
    for name in ("naive", "fast", "unfused"):
        row = rows[name]
        assert row["status"] == "ok"
        assert row["shape"] == {"B": 2, "C": 64, "T": 4, "H": 8, "W": 8}
        # The output at least: 2 x 64 x 256 numbers.
        assert row["kept_mib"] > 0.125
        over = rows["naive"]["time_ms"]["p50"] / row["time_ms"]["p50"]
        assert row["speedup_over"]["naive"] == pytest.approx(over, rel=1e-4)
    assert rows["unfused"]["error"].keys() == rows["naive"]["error"].keys()


def test_blocks_of_others_say_why_they_are_missing(blocks: dict) -> None:
    for package, order in (("pytorchvideo", "before"), ("mmcv", "after")):
        other = "after" if order == "before" else "before"
        row = by_provider(blocks["rows"], pool_order=other)[package]
        assert row["status"] == "unserved"
        assert (
            row["reason"] == f"{package} pools {order} the projections, which is another function"
        )
        row = by_provider(blocks["rows"], pool_order=order)[package]
        present = importlib.util.find_spec(package) is not None
        assert row["status"] == ("ok" if present else "unserved")
        assert present or f"{package} cannot be imported" in row["reason"]


def test_without_room_for_naive_our_blocks_are_judged_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        block_measure, "too_large", lambda peak_mib, *_: "no room" if peak_mib > 12 else ""
    )
    # Scores of 1024 x 256, twice in the forward of naive and three times in its backward.
    case = block_measure.BlockCase("long", (4, 32, 4, 16, 16), "softmax", "before")
    rows = by_provider(block_measure.measure_blocks(case, ["naive", "fast"], PLAN))
    assert (rows["naive"]["status"], rows["naive"]["reason"]) == ("unserved", "no room")
    assert rows["fast"]["status"] == "ok"
    assert rows["fast"]["judged_by"] == "chunked"
    monkeypatch.setattr(block_measure, "too_large", lambda *_: "no room")
    rows = by_provider(block_measure.measure_blocks(case, ["naive", "fast"], PLAN))
    assert {row["status"] for row in rows.values()} == {"unserved"}


def test_ratios_are_over_the_best_that_is_not_ours() -> None:
    times = {"naive": 8.0, "fast": 2.0, "unfused": 3.0, "mmcv": 6.0}
    rows = [{"provider": name, "time_ms": {"p50": time}} for name, time in times.items()]
    rows.append({"provider": "pytorchvideo"})
    block_measure.state_ratios(rows)
    assert rows[1]["best_other"] == "mmcv"
    assert rows[1]["speedup_over"] == {"naive": 4.0, "best_other": 3.0}
    assert "speedup_over" not in rows[-1]


def test_blocks_are_reckoned_without_a_run(tmp_path: Path, blocks: dict) -> None:
    more = ["--blocks-only", "--memory-only", "--kind", "dot_product"]
    code, found = run(tmp_path / "run.json", *more)
    assert code == 0
    for row in found["rows"]:
        if row["provider"] in ("pytorchvideo", "mmcv"):
            assert row["status"] == "unserved"
            continue
        key = {name: row[name] for name in ("case", "pool_order")}
        measured = by_provider(blocks["rows"], **key)[row["provider"]]
        assert row["status"] == "reckoned"
        assert row["kept_mib"] == pytest.approx(measured["kept_mib"], rel=1e-3)
