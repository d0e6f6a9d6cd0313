"""A benchmark that times wrong code is worthless: right results pass, wrong ones are refused."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.checks import FACTORS, Judge, draw_sample, eager, step, truth_of
from benchmarks.measure import make_operands, measure
from benchmarks.providers import PROVIDERS, Provider
from benchmarks.registry import KINDS, Case, select_cases

CPU = torch.device("cpu")


def tiny(kind: str) -> Case:
    return Case("tiny", kind, 3, 260, 130, {"gaussian": 24, "concat": 1}.get(kind, 16), 16)


def operands_of(case: Case, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return make_operands(case, dtype, CPU, seed=1)


@pytest.mark.parametrize("kind", KINDS)
def test_truth_is_that_of_float64_autograd(kind: str) -> None:
    case = tiny(kind)
    operands = operands_of(case, torch.float64)
    sample = draw_sample(case, CPU, seed=3)
    truth = truth_of(case, operands, sample, "forward_backward")
    query, key, value = (t.clone().requires_grad_() for t in operands[:3])
    if kind == "concat":
        scores = query + key.mT
    else:
        scores = torch.einsum("bnd,bmd->bnm", query, key) * case.scale
    if kind in ("relu", "concat"):
        scores = scores.relu()
    weights = scores.softmax(-1) if kind in ("softmax", "gaussian") else scores / case.m
    out = torch.einsum("bnm,bmv->bnv", weights, value)
    grads = torch.autograd.grad(out, (query, key, value), operands[3])
    whole = dict(zip(FACTORS, (out.detach(), *grads), strict=True))
    assert truth.keys() == whole.keys()
    for name, expected in whole.items():
        torch.testing.assert_close(truth[name], sample.take(name, expected), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_right_results_pass(kind: str, dtype: torch.dtype) -> None:
    case = tiny(kind)
    operands = operands_of(case, dtype)
    judge = Judge(case, operands, "forward_backward")

    def reordered(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        return eager(query * scale, key.flip(1), value.flip(1), 1.0, kind=kind)

    for function in (lambda *a: eager(*a, kind=kind), reordered):
        errors = judge.check("right", step(function, case, operands, "forward_backward")())
        assert errors.keys() == FACTORS.keys()


def unscaled(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    return eager(query, key, value, 1.0, kind="softmax")


def missing_last_key(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    return eager(query, key[:, :-1], value[:, :-1], scale, kind="softmax")


def rounded_weights(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    weights = torch.softmax(query @ key.transpose(1, 2) * scale, dim=-1)
    return weights.half().float() @ value


def stale_key(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    out = eager(query, key, value, scale, kind="softmax")
    return out + (eager(query, key.detach(), value, scale, kind="softmax") - out) / 2


def nan_row(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    out = eager(query, key, value, scale, kind="softmax").clone()
    out[1, 7] = float("nan")
    return out


def unwritten_row(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """The middle batch item is outside the sample: only agreement between providers sees it."""
    out = eager(query, key, value, scale, kind="softmax").clone()
    out[1, 7] = 0.0
    return out


def half_result(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    return eager(query, key, value, scale, kind="softmax").bfloat16()


@pytest.mark.parametrize(
    "wrong",
    [unscaled, missing_last_key, rounded_weights, stale_key, nan_row, unwritten_row, half_result],
    ids=lambda function: function.__name__,
)
def test_wrong_provider_is_refused(wrong: Callable[..., Tensor]) -> None:
    case = tiny("softmax")
    right = Provider("right", lambda kind: lambda *a: eager(*a, kind=kind), lambda *a: "")
    other = Provider("wrong", lambda kind: wrong, lambda *a: "")
    rows = measure(case, [right, other], "float32", "forward_backward", CPU, rounds=1)
    assert [row["status"] for row in rows] == ["ok", "refused"]
    assert "wrong: " in rows[1]["reason"]
    assert "time_ms" not in rows[1]


@pytest.mark.parametrize("kind", ["relu", "concat"])
def test_wrong_side_of_the_kink_is_refused(kind: str) -> None:
    """One key's gradient passes where its score is negative: nothing else is wrong."""
    case = tiny(kind)

    def leaky(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        out = eager(query, key, value, scale, kind=kind)
        through = query.sum(-1, keepdim=True) * value[:, :1] / case.m
        return out + (through - through.detach()) * 0.01

    right = Provider("right", lambda kind: lambda *a: eager(*a, kind=kind), lambda *a: "")
    other = Provider("wrong", lambda kind: leaky, lambda *a: "")
    rows = measure(case, [right, other], "float32", "forward_backward", CPU, rounds=1)
    assert [row["status"] for row in rows] == ["ok", "refused"]
    assert "grad_query" in rows[1]["reason"]


@pytest.mark.parametrize("kind", ["relu", "concat"])
def test_every_provider_of_the_kind_is_right(kind: str) -> None:
    providers = [PROVIDERS[name] for name in ("naive", "tiled", "chunked", "auto", "sdpa_flash")]
    rows = measure(tiny(kind), providers, "float32", "forward_backward", CPU, rounds=1)
    served = {row["provider"] for row in rows if row["status"] == "ok"}
    assert served == {"naive", "chunked", "auto"} | ({"tiled"} if kind == "concat" else set())
    assert {row["status"] for row in rows} == {"ok", "unserved"}
    assert all(row["peak_mib"] > row["output_mib"] for row in rows if row["provider"] in served)


def test_form_that_does_not_fit_is_not_run() -> None:
    (case,) = select_cases(["acceptance"], ["concat"])
    reason = PROVIDERS["tiled"].reason(case, torch.float32, CPU)
    assert "materialises B*2V*N*M" in reason


def test_provider_that_raises_is_reported() -> None:
    def broken(*arguments: object) -> Tensor:
        raise RuntimeError("no kernel image")

    provider = Provider("broken", lambda kind: broken, lambda *a: "")
    (row,) = measure(tiny("softmax"), [provider], "float32", "forward", CPU, rounds=1)
    assert (row["status"], row["reason"]) == ("failed", "RuntimeError: no kernel image")


def test_unserved_case_is_not_run() -> None:
    def never(*arguments: object) -> Tensor:
        raise AssertionError("an unserved case was run")

    provider = Provider("picky", lambda kind: never, lambda *a: "only on Sundays")
    (row,) = measure(tiny("softmax"), [provider], "float32", "forward", CPU, rounds=1)
    assert (row["status"], row["reason"]) == ("unserved", "only on Sundays")


def test_exact_error_of_the_limit() -> None:
    """The allowed error grows with the dtype's own: bfloat16 may err where float32 may not."""
    case = tiny("softmax")
    allowed = {
        dtype: Judge(case, operands_of(case, dtype), "forward").limits["out"].rms_error
        for dtype in (torch.float32, torch.bfloat16)
    }
    assert 1e-8 < allowed[torch.float32] < 1e-5 < 1e-3 < allowed[torch.bfloat16] < 5e-2
