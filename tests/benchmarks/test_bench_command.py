"""`nlk bench`: what it measures, what it refuses, and what it writes."""

import importlib
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nlkernels import cli
from nlkernels.benchmarks import bench_command, model_tables, op_rows, results
from nlkernels.benchmarks.asked import FORMS, block_case, op_cases
from nlkernels.models import list_models
from nlkernels.modules.presets import PRESETS

pytestmark = pytest.mark.usefixtures("quick_steps")

CEILINGS = {"gemm_tflops": {"float32": 0.1}, "peak_gflops": {"": {"float32": 100.0}}}
SMALL = ("--shape", "2,96,32,16,24", "--rounds", "1")


@pytest.fixture(autouse=True)
def known_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's peak takes seconds to measure."""
    found = {**CEILINGS, "copy_gb_s": 10.0}
    monkeypatch.setattr(bench_command, "measured_ceilings", lambda *_: found)


def run(tmp_path: Path, *arguments: str) -> tuple[int, dict]:
    path = tmp_path / "run.json"
    code = cli.main(["bench", *arguments, "--json", str(path)])
    return code, results.load(path) if path.exists() else {}


def test_an_operation_at_any_shape(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="needs pip install 'nlkernels[train]'")
    png = tmp_path / "run.png"
    options = ("--backward", "--providers", "naive,chunked,auto", "--png", str(png))
    code, found = run(tmp_path, "softmax", *SMALL, *options)
    assert code == 0
    assert found["complete"]
    assert found["command"].startswith("nlk bench softmax --shape 2,96,32,16,24")
    rows = {(row["pass"], row["provider"]): row for row in found["rows"]}
    assert len(rows) == 6
    for row in rows.values():
        assert row["shape"] == {"B": 2, "N": 96, "M": 32, "D": 16, "V": 24}
        assert row["time_ms"]["p20"] <= row["time_ms"]["p50"] <= row["time_ms"]["p80"]
        share = row["least_flop"] / row["time_ms"]["p50"] * 1e-6 / 100.0
        assert row["share_of_peak"] == pytest.approx(share, rel=1e-4)
    assert rows["forward", "chunked"]["error"].keys() == {"out"}
    assert len(rows["forward_backward", "chunked"]["error"]) == 4
    printed = capsys.readouterr().out
    assert "of peak" in printed and "peak of this machine:" in printed
    assert png.read_bytes().startswith(b"\x89PNG")


def test_a_wrong_result_gets_no_time(tmp_path, monkeypatch, capsys):
    """Test 41 of the reliability list: what is timed is what was judged."""
    naive = bench_command.KNOWN["cpu"]["naive"]

    def wrong(kind):
        return lambda *operands: 1.001 * naive.function(kind)(*operands)

    known = {"naive": naive, "wrong": replace(naive, name="wrong", function=wrong)}
    monkeypatch.setitem(bench_command.KNOWN, "cpu", known)
    code, found = run(tmp_path, "dot_product", *SMALL, "--providers", "all")
    assert code == 1
    right, refused = found["rows"]
    assert right["status"] == "ok"
    assert refused["status"] == "refused"
    assert "time_ms" not in refused
    assert "more than the allowed" in refused["reason"]
    printed = capsys.readouterr()
    (line,) = (line for line in printed.out.splitlines() if line.split()[:1] == ["wrong"])
    assert " ms" not in line
    assert "refused: wrong: " in printed.err


@pytest.mark.parametrize(
    ("target", "shape"),
    [("concat", "2,96,32,8"), ("region", "1,8,3,8,8"), ("gate", "2,8,3,4,4")],
)
def test_operations_with_forms_of_their_own(target, shape, tmp_path):
    more = ("--taps", "1,3,3") if target == "region" else ()
    options = ("--rounds", "1", "--providers", "default")
    code, found = run(tmp_path, target, "--shape", shape, *more, *options)
    assert code == 0
    status = {row["provider"]: row["status"] for row in found["rows"]}
    assert status["chunked"] == status["auto"] == "ok"
    assert {row["kind"] for row in found["rows"]} == {target}


@pytest.mark.parametrize(
    ("target", "shape"),
    [("pool", "2,5,3,6,7"), ("pointwise", "2,40,12,8"), ("norm", "2,40,12,8")],
)
def test_what_blocks_are_made_of(target, shape, tmp_path):
    more = ("--providers", "naive,chunked,auto", "--rounds", "1", "--backward")
    code, found = run(tmp_path, target, "--shape", shape, *more)
    assert code == 0
    rows = {(row["pass"], row["provider"]): row for row in found["rows"]}
    assert {row["status"] for row in rows.values()} == {"ok"}
    gradients = {"pool": ["grad_x"], "pointwise": ["grad_x", "grad_weight"], "norm": ["grad_z"]}
    assert list(rows["forward_backward", "chunked"]["error"]) == ["out", *gradients[target]]


def test_a_block_of_a_system(tmp_path):
    options = ("--shape", "1,16,4,6,6", "--rounds", "1", "--backward", "--kind", "dot_product")
    code, found = run(tmp_path, "block", "--preset", "caffe2", *options)
    assert code == 0
    rows = {(row["pass"], row["provider"]): row for row in found["rows"]}
    assert rows["training", "fast"]["status"] == "ok"
    assert rows["training", "fast"]["kind"] == "dot_product"
    assert rows["forward", "naive"]["case"] == "caffe2"
    mmcv = rows["forward", "mmcv"]
    assert mmcv["reason"] == "mmcv pools after the projections, which is another function"


@pytest.mark.gate
@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [
        ("tsm_r50", "1,3,8,64,64", "softmax"),
        ("rnl_tsm_r50", "2,3,8,64,64", "region_softmax"),
        ("inception_nl_flow", "1,2,16,64,64", "softmax"),
        ("i3d_r50_32x4", "1,3,8,64,64", "softmax"),
    ],
)
def test_a_network(name, shape, kind, tmp_path):
    blocks = "2" if name.startswith("inception") else "5"
    options = ("--width", "0.125", "--blocks", blocks, "--rounds", "1")
    code, found = run(tmp_path, "model", name, "--shape", shape, *options, "--backward")
    assert code == 0
    rows = {(row["pass"], row["provider"]): row for row in found["rows"]}
    assert {provider for _, provider in rows} == {"none", "naive", "fast"}
    fast = rows["training", "fast"]
    assert (fast["case"], fast["kind"], fast["status"]) == (name, kind, "ok")
    assert fast["error"]


def test_what_can_be_measured_is_listed(capsys):
    assert cli.main(["bench", "--list"]) == 0
    printed = capsys.readouterr().out
    for word in (*FORMS, *PRESETS, "c2d_r50_128x1/res3@224", "sdpa_flash", "masked_dense"):
        assert word in printed
    assert op_cases("softmax", "c2d_r50_128x1/res3@224", None, False)[0].n == 12544


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_case(preset):
    case = block_case(preset, None, "1,16,4,14,14")
    assert (case.kind, case.order) == (
        PRESETS[preset].options["kind"],
        PRESETS[preset].options["pool_order"],
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "expected a target, got none"),
        (("softmix",), "target: expected some of softmax,"),
        (("softmax", "--shape", "1,2,3"), "shape: expected B,N,M,D,V, 5 sizes above 0"),
        (("softmax", "--shape", "res9"), "or a registered problem of softmax, got 'res9'"),
        (("softmax", "--taps", "3,3,3"), "taps: expected none with softmax"),
        (("pool", "--taps", "9,2,2"), "taps: expected a window within T,H,W"),
        (("region", "--taps", "2,3,3", "--shape", "1,4,3,5,5"), "taps: expected odd sizes"),
        (("softmax", "--preset", "tsm"), "preset: expected none with the operation softmax"),
        (("block", "--preset", "tsn"), "preset: expected one of caffe2,"),
        (("model",), "expected the name of a network behind model"),
        (("model", "c2d_tiny", "--blocks", "0"), "expected a network with non-local blocks"),
        (("softmax", "--providers", "fa3"), "providers: expected some of"),
        (("softmax", "--rounds", "0"), "rounds: expected at least 1"),
        (("softmax", "--dtype", "float16"), "dtype: expected float32 or bfloat16 on a CPU"),
        (("block", "--dtype", "float16"), "dtype: expected some of float32, bfloat16"),
        (("softmax", "--png", "/no/such/folder/a.png"), "png: expected a file in a folder"),
        *([] if torch.cuda.is_available() else [(("gate", "--device", "cuda"), "no GPU")]),
    ],
)
def test_mistakes_are_named_before_any_work(arguments, said, monkeypatch, capsys):
    monkeypatch.setattr(bench_command, "measured_ceilings", lambda *_: pytest.fail("work began"))
    assert cli.main(["bench", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_every_network_has_a_name_that_bench_knows():
    zoo = importlib.import_module("nlkernels.benchmarks.zoo_cases")
    assert "i3d_r50_8x8" in list_models()
    assert zoo.zoo_case("i3d_r50_8x8", shape=None, blocks=1, kind=None, width=0.125).shape == (
        1,
        3,
        8,
        224,
        224,
    )


def test_modules_find_each_other_under_either_name():
    """An installation has no package `benchmarks`: it is `nlkernels.benchmarks` there."""
    for path in Path(bench_command.__file__).parent.glob("*.py"):
        assert not re.search(r"^\s*(from|import) benchmarks\b", path.read_text(), re.M), path


def test_json_is_valid_for_other_readers(tmp_path):
    run(tmp_path, "relu", *SMALL, "--providers", "naive")
    assert json.loads((tmp_path / "run.json").read_text())["schema"] == results.SCHEMA


def test_reasons_are_shown_whole_and_wrapped(capsys) -> None:
    reason = " ".join(f"word{number}" for number in range(60))
    row = {"case": "x", "kind": "softmax", "dtype": "float32", "pass": "forward", "shape": {"B": 1}}
    row |= {"provider": "cpp", "backend": None, "status": "unserved", "reason": reason}
    op_rows.print_rows([row])
    model_tables._print_notes([row])
    for printed in capsys.readouterr().out.split("  cpp")[1:]:
        assert printed.split()[:1] == ["unserved:"] and printed.split()[1:] == reason.split()
        lines = printed.splitlines()
        assert len(lines) > 3 and max(map(len, lines)) <= 120
        assert all(line.startswith("      word") for line in lines[1:])
