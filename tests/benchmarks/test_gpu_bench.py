"""The GPU measurement without a GPU: its plan, its judging, its resuming, its summary."""

import time
from pathlib import Path

import pytest
import torch

from benchmarks import (
    features,
    gate,
    gpu_bench,
    gpu_plan,
    gpu_summary,
    kernel_rows,
    peers,
    region,
)
from benchmarks.checks import WrongResult
from benchmarks.gpu_plan import Job
from benchmarks.graphs import NotCaptured, capture
from benchmarks.measure import Call, compare
from benchmarks.registry import CASES, Case
from benchmarks.stage import read_rows

CPU = torch.device("cpu")
TINY = Case("tiny", "softmax", 1, 40, 24, 16, 16)
CEILINGS = {"gemm_tflops": {"bfloat16": 1.0}, "copy_gb_s": 1.0}


def test_plan_asks_for_the_targets_first_and_for_every_registered_problem() -> None:
    jobs = gpu_plan.plan()
    assert len({job.name for job in jobs}) == len(jobs)
    first = {(job.case.d, job.case.v) for job in jobs[:8]}
    assert first == {(256, 256), (512, 512), (512, 256), (1024, 512)}
    asked = {(job.case.name, job.case.kind, job.passes) for job in jobs}
    for case in CASES:
        for passes in ("forward", "forward_backward"):
            assert (case.name, case.kind, passes) in asked
    alone = [job.case for job in jobs if job.kind == "kernels"]
    assert {case.d for case in alone if isinstance(case, Case)} == {1, 256, 512, 1024}
    kinds = {"softmax", "gaussian", "relu", "dot_product", "concat", "gate"}
    assert {case.kind for case in alone} == kinds
    providers = {name for job in jobs if job.kind == "attention" for name in job.providers}
    assert providers == set(peers.GPU_PROVIDERS) - {"sdpa_math"}


def test_reduced_plan_has_every_kind_of_job() -> None:
    jobs = gpu_plan.reduced()
    assert {job.kind for job in jobs} == {job.kind for job in gpu_plan.plan()}
    assert all(getattr(job.case, "n", 0) <= 64 for job in jobs)


def options(folder: Path, *more: str):
    return gpu_bench.parse_arguments(["--device", "cpu", "--out", str(folder), *more])


class Silent:
    """A watch that tells nobody."""

    def __init__(self) -> None:
        self.begun: list[str] = []

    def begin(self, item: str, limit_s: float) -> None:
        self.begun.append(item)


def test_rows_of_a_problem(tmp_path: Path) -> None:
    providers = ("naive", "sdpa_flash", "sdpa_cudnn", "chunked", "ffpa", "compiled", "auto")
    job = Job("attention", TINY, "float32", "forward_backward", providers)
    watch = Silent()
    rows = gpu_bench.run(job, CPU, options(tmp_path, "--rounds", "1"), CEILINGS, watch, {})
    found = {row["provider"]: row for row in rows}
    assert list(found) == list(providers)
    assert found["ffpa"]["status"] == found["sdpa_cudnn"]["status"] == "unserved"
    for name in ("naive", "sdpa_flash", "chunked", "compiled", "auto"):
        assert found[name]["status"] == "ok", found[name]
        assert found[name]["graph"]["reason"] == "there are no CUDA graphs on cpu"
        ratio = found[name]["time_ms"]["p50"] / found["auto"]["time_ms"]["p50"]
        assert found[name]["auto_speedup"] == pytest.approx(ratio)
    named = [f"{job.name} :: {name}" for name in ("naive", "sdpa_flash", "chunked", "compiled")]
    assert watch.begun == [job.name, *named, f"{job.name} :: auto", f"{job.name} :: timing"]


def test_a_lost_provider_is_a_failure_and_the_others_are_measured(tmp_path: Path) -> None:
    job = Job("attention", TINY, "float32", "forward", ("naive", "chunked"))
    lost = {"chunked": "did not come back in time"}
    rows = gpu_bench.run(job, CPU, options(tmp_path, "--rounds", "1"), CEILINGS, Silent(), lost)
    assert [row["status"] for row in rows] == ["ok", "failed"]
    assert rows[1]["reason"] == "did not come back in time"


def test_a_provider_that_is_lost_again_and_again_is_not_called_any_more() -> None:
    job = Job("attention", TINY, "float32", "forward", ("naive", "chunked", "auto"))
    lost = {f"other {number} :: auto": "hung" for number in range(gpu_bench.MOST_LOSSES)}
    assert list(gpu_bench.lost_of(job, lost)) == ["auto"]
    lost = {"other :: auto": "hung", f"{job.name} :: chunked": "crashed", "third": "broke"}
    assert gpu_bench.lost_of(job, lost) == {"chunked": "crashed"}
    assert gpu_bench.lost_of(job, {job.name: "killed"}) == {"": "killed"}


def test_a_job_that_was_lost_itself_is_one_failed_row(tmp_path: Path) -> None:
    job = Job("attention", TINY, "float32", "forward", ("naive",))
    (row,) = gpu_bench.run(job, CPU, options(tmp_path), CEILINGS, Silent(), {"": "killed"})
    assert (row["status"], row["reason"]) == ("failed", "killed")


def test_peer_that_raises_does_not_serve_and_ours_fails() -> None:
    class Accepting:
        def check(self, name: str, results: dict, slack: float) -> dict:
            return {}

    def broken() -> dict:
        raise KeyError("shared memory")

    head = {"case": "x", "kind": "softmax", "dtype": "float32", "pass": "forward", "shape": {}}
    calls = {"peer": Call(broken, optional=True), "ours": Call(broken)}
    rows = compare(head, calls, Accepting(), CPU, rounds=1)
    assert [row["status"] for row in rows] == ["unserved", "failed"]
    assert all("shared memory" in row["reason"] for row in rows)


def test_no_graph_without_a_gpu() -> None:
    with pytest.raises(NotCaptured, match="no CUDA graphs on cpu"):
        capture(dict, CPU)


def test_child_goes_on_where_another_stopped(tmp_path: Path) -> None:
    arguments = [
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
        "--rounds",
        "1",
        "--jobs",
        "contiguous region",
    ]
    child = [*arguments, "--child", str(time.time())]
    assert gpu_bench.main([*child, "--most", "1"]) == 0
    first = read_rows(tmp_path / "bench.jsonl")
    assert gpu_bench.main(child) == 0
    rows = read_rows(tmp_path / "bench.jsonl")
    assert rows[: len(first)] == first
    events = [row["event"] for row in rows]
    assert events.count("start") == events.count("ceilings") == 1
    done = [row["job"] for row in rows if row["event"] == "job"]
    assert done == [job.name for job in gpu_bench.jobs_of(gpu_bench.parse_arguments(arguments))]
    conv3d = [row for row in rows if row.get("provider") == "conv3d"]
    assert len(conv3d) == len(done)
    for row in conv3d:
        assert row["status"] == "ok"
        assert row["share_of_copy"] > 0
        assert row["shape"]["KH"] == 3


def test_time_that_is_over_leaves_the_rest_as_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
        "--jobs",
        "/contiguous region",
        "--budget",
        "-1",
    ]
    assert gpu_bench.main([*arguments, "--child", str(time.time())]) == 0
    assert gpu_bench.finish(gpu_bench.parse_arguments(arguments), cut=False) == 1
    end = read_rows(tmp_path / "bench.jsonl")[-1]
    assert len(end["missing"]) == 2
    assert end["missing"][0] in capsys.readouterr().out


def timed(provider: str, ms: float, job: str = "a", graph: float | None = None, **more) -> dict:
    return {
        "case": "x",
        "kind": "softmax",
        "dtype": "bfloat16",
        "pass": "forward",
        "shape": {"B": 1, "N": 8192, "M": 8192, "D": 512, "V": 512},
        "job": job,
        "provider": provider,
        "backend": "triton" if provider == "auto" else None,
        "status": "ok",
        "time_ms": {"p20": ms, "p50": ms, "p80": ms},
        "graph": {"time_ms": graph and {"p50": graph}, "reason": ""},
        "nominal_tflops": 600 / ms,
        **more,
    }


def test_floor_is_the_best_peer_within_each_group() -> None:
    rows = [
        timed("naive", 4.0),
        timed("sdpa_efficient", 3.0, graph=2.0),
        timed("auto", 2.0, graph=4.0),
        # Later, on a machine that had become twice as slow.
        timed("compiled", 3.6, "a compiled"),
        timed("flex", 2.0, "a compiled"),
        timed("auto", 4.0, "a compiled"),
        timed("conv3d", 1.0, "b", status="refused"),
    ]
    (floor,) = gpu_summary.floors(rows)
    assert floor["ratios"] == {
        "naive": 2.0,
        "sdpa_efficient": 1.5,
        "compiled": 0.9,
        "flex": 0.5,
    }
    assert (floor["peer"], floor["holds"]) == ("compiled", False)
    assert (floor["graph_peer"], floor["graph_holds"]) == ("sdpa_efficient", False)
    assert "SHORT" in gpu_summary.floor_line(floor)


def test_backward_rate_is_that_of_the_difference() -> None:
    rows = [
        timed("triton", 1.0),
        timed("triton", 3.0, "b", **{"pass": "forward_backward", "nominal_tflops": 700.0}),
        timed("naive", 0.1),
    ]
    found = {rate["what"]: rate["tflops"] for rate in gpu_summary.rates(rows)}
    assert found["softmax 512/512 forward"] == 600.0
    assert found["softmax 512/512 backward"] == pytest.approx((3 * 700 - 600) / 2)
    assert found["softmax 256/256 forward"] is None


@pytest.mark.parametrize("form", features.FORMATS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_region_rows_and_its_judge(dtype: str, form: str) -> None:
    case = region.RegionCase("tiny", 2, 64, (3, 5, 4), (3, 3, 5), form)
    names = ("conv3d", "masked_dense", "slices_2d", "chunked")
    options = {"rounds": 1, "ceilings": CEILINGS, "names": names}
    rows = features.measure(region.OPERATION, case, dtype, "forward_backward", CPU, **options)
    found = {row["provider"]: row for row in rows}
    assert [row["status"] for row in rows] == ["ok"] * 4
    assert found["conv3d"]["error"].keys() == set(features.NAMES)
    operands = features.make_operands(case, getattr(torch, dtype), CPU)
    judge = region.RegionJudge(operands, "forward_backward")
    right = features.step(region.conv3d, operands, "forward_backward")()
    judge.check("right", right)
    for name in features.NAMES:
        wrong = {key: value.clone() for key, value in right.items()}
        # Channel 1 is outside the sample.
        (wrong[name] if name == "grad_weight" else wrong[name].transpose(0, 1))[1] *= 1.5
        with pytest.raises(WrongResult, match=name):
            judge.check("wrong", wrong)


@pytest.mark.parametrize("form", features.FORMATS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gate_rows_and_its_judge(dtype: str, form: str) -> None:
    case = gate.GateCase("tiny", 2, 24, (3, 5, 4), form)
    names = ("naive", "chunked", "auto")
    options = {"rounds": 1, "ceilings": CEILINGS, "names": names}
    rows = features.measure(gate.OPERATION, case, dtype, "forward_backward", CPU, **options)
    assert [row["status"] for row in rows] == ["ok"] * 3, rows
    assert rows[2]["backend"] in ("chunked", "cpp")
    assert all(row["share_of_copy"] > 0 for row in rows)
    operands = features.make_operands(case, getattr(torch, dtype), CPU)
    judge = gate.GateJudge(operands, "forward_backward")
    right = features.step(gate.naive, operands, "forward_backward")()
    judge.check("right", right)
    for name in features.NAMES:
        wrong = {key: value.clone() for key, value in right.items()}
        wrong[name][(0,) * wrong[name].dim()] += 0.5
        with pytest.raises(WrongResult, match=name):
            judge.check("wrong", wrong)


def test_region_truth_is_that_of_float64_autograd() -> None:
    case = region.RegionCase("tiny", 2, 3, (4, 5, 6), (3, 1, 5), "contiguous")
    operands = features.make_operands(case, torch.float64, CPU)
    truth = region.truth_of(*operands)
    results = features.step(region.conv3d, operands, "forward_backward")()
    for name, exact in zip(features.NAMES, truth, strict=True):
        torch.testing.assert_close(results[name], exact)


@pytest.mark.parametrize("widths", [(40, 24), (264, 72)], ids=["fused", "staged"])
def test_each_kernel_alone(widths: tuple[int, int]) -> None:
    pytest.importorskip("triton")
    case = Case("tiny", "softmax", 1, 40, 24, *widths)
    begun: list[str] = []
    rows = kernel_rows.kernel_rows(case, "float32", CPU, rounds=1, gemm=1.0, begin=begun.append)
    assert begun == ["recording", "timing"]
    kernels = {(row["pass"], row["kernel"]): row for row in rows}
    backward = kernels["backward", "_d_scores_kernel"]
    forward = "_scores_kernel" if max(widths) > 256 else "attend"
    for row in (backward, kernels["forward", forward]):
        assert row["tflops"] == pytest.approx(row["share_of_gemm"]) and row["tflops"] > 0
        assert row["launches"] >= 1
        assert row["options"]["num_warps"] >= 1
    for passes in ("forward", "backward"):
        assert kernels[passes, "whole pass"]["launches"] == 0
        assert kernels[passes, "whole pass"]["tflops"] > 0


@pytest.mark.parametrize(
    ("case", "forward", "backward"),
    [
        (Case("tiny", "relu", 1, 40, 24, 40, 24), {"_fused_kernel"}, {"_weights_kernel"}),
        (Case("tiny", "dot_product", 1, 40, 6, 40, 24), {"_fused_kernel"}, {"_weights_kernel"}),
        (
            Case("tiny", "concat", 1, 40, 24, 1, 24),
            {"_sums_kernel", "_carry_kernel", "_scan_kernel", "_gather_kernel"},
            {"_sums_kernel", "_carry_kernel", "_scan_kernel", "_gather_kernel"},
        ),
        (
            gate.GateCase("tiny", 1, 24, (2, 3, 5), "contiguous"),
            {"_gate_read", "_gate_combine"},
            {"_gate_read", "_gate_combine", "_gate_write"},
        ),
    ],
    ids=["relu", "dot_product", "concat", "gate"],
)
def test_each_kernel_of_the_other_operations(case, forward: set, backward: set) -> None:
    pytest.importorskip("triton")
    rows = kernel_rows.kernel_rows(
        case, "float32", CPU, rounds=1, gemm=1.0, begin=lambda name: None
    )
    for passes, kernels in (("forward", forward), ("backward", backward)):
        found = {row["kernel"] for row in rows if row["pass"] == passes}
        assert kernels | {"whole pass"} <= found
    named = {row["kernel"] for row in rows}
    assert ("library products in the linear order" in named) == (case.kind == "dot_product")


def test_every_candidate_of_every_kernel() -> None:
    pytest.importorskip("triton")
    rows = kernel_rows.configuration_rows(
        TINY, "float32", CPU, rounds=1, gemm=None, begin=lambda name: None, lost={}
    )
    assert {row["provider"].partition(":")[0] for row in rows} == {
        "softmax_fused",
        "softmax_d_scores",
    }
    assert all(row["status"] == "ok" for row in rows), rows
