"""warmup: verifies and measures what a model needs, and leaves the model as it was."""

import random
import time
from types import SimpleNamespace

import pytest
import torch

import nlkernels
from nlkernels import _cache, _select, _trust, _tune, _warmup
from nlkernels._spec import Problem
from nlkernels.models import create_model
from nlkernels.ops.softmax import chunked
from tests import fake_backend
from tests.fake_backend import FAST, HUGE, SLOW, forget, kernel

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own, and no memory of other tests."""
    monkeypatch.setenv("NLKERNELS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("NLKERNELS_AUTOTUNE", raising=False)
    forget()
    yield tmp_path / "cache"
    forget()


def tunable() -> SimpleNamespace:
    """A right backend whose kernel sleeps in its default configuration."""

    def forward(query, key, value, scale, workspace_mib=None):
        problem = Problem.of(query, key, value)
        wait = kernel(seconds=0.001 if problem.queries == 72 else 0.0)
        _tune.run_best("fake_kernel", problem, query.device, (SLOW, HUGE, FAST), wait)
        return chunked.forward(query, key, value, scale)

    def backward(*arguments):
        time.sleep(0.02)
        return chunked.backward(*arguments)

    return SimpleNamespace(forward=forward, backward=backward)


class Model(torch.nn.Module):
    """Brings operands (2,72,16), (2,18,16), channel-first, to the operation "fake"."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query = (x * self.weight).mT
        key = query[:, :18]
        module = _select.module("fake", "auto", "forward", query, key, key)
        with torch.no_grad():
            return module.forward(query, key, key, 0.25)[0]


@pytest.fixture
def fake(monkeypatch):
    fake_backend.install(tunable, monkeypatch.setitem, monkeypatch.setattr)


def test_warmup_verifies_and_measures_what_the_model_meets(fake):
    model = Model()
    report = nlkernels.warmup(model, (2, 16, 72))
    (entry,) = report.entries
    assert entry.verdicts == {"triton forward": "", "triton backward": ""}
    assert "measured" in entry.configs["fake_kernel"] and "rows=32" in entry.configs["fake_kernel"]
    assert {name: set(times) for name, times in entry.ms.items()} == {
        "forward": {"triton", "chunked"},
        "backward": {"triton", "chunked"},
        "training": {"chunked"},
    }
    assert "B=2 N=72 M=18" in str(report) and "triton forward: verified" in str(report)
    # The sleeping backward loses here, whatever the shipped table says.
    _cache.forget()
    assert _select.choose("fake", entry.problem, direction="backward") == "chunked"
    assert _select.preference("fake", entry.problem._replace(queries=65))[0][1].startswith(
        "measured on this GPU"
    )
    assert _select.preference("fake", entry.problem._replace(queries=64))[0][1] == "in this test"
    with _trust.held():
        reason = _select.explain("fake", entry.problem, "triton").reasons["triton"]
    assert "configurations: measured by warmup (fake_kernel rows=32" in reason


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_what_cannot_be_measured_is_noted(error, fake, monkeypatch):
    def fails(*arguments):
        raise error("no kernel image")

    monkeypatch.setattr(_warmup, "_time", fails)
    (entry,) = nlkernels.warmup(Model(), (2, 16, 72)).entries
    assert "measured in part, or not at all" in entry.note and "no kernel image" in entry.note
    assert entry.verdicts["triton forward"] == "" and not _cache.section(CPU)["timings"]


def test_a_program_whose_default_device_is_another_can_warm_up():
    with torch.device("meta"):
        report = nlkernels.warmup(torch.nn.Linear(3, 3, device="cpu"), (2, 3))
    assert not report.entries


def test_warmup_with_autotune_off_only_verifies(fake, cache, monkeypatch):
    monkeypatch.setenv("NLKERNELS_AUTOTUNE", "off")
    (entry,) = nlkernels.warmup(Model(), (2, 16, 72), backward=False).entries
    assert entry.verdicts == {"triton forward": ""} and not entry.ms
    assert "NLKERNELS_AUTOTUNE=off" in entry.note and not cache.exists()


def test_autotune_full_measures_at_the_first_use(fake, monkeypatch):
    x, state = torch.randn(2, 16, 72), torch.get_rng_state()
    Model()(x)
    assert not _cache.section(CPU)["timings"]
    monkeypatch.setenv("NLKERNELS_AUTOTUNE", "full")
    measured = []
    measure = _warmup._measure
    monkeypatch.setattr(_warmup, "_measure", lambda *a: (measured.append(a[0]), measure(*a))[1])
    for _ in range(2):
        Model()(x)
    assert measured == ["fake"] and _cache.section(CPU)["timings"]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_measurement_can_be_traced(fake):
    def run(query):
        problem = Problem.of(query, query[:, :18], query[:, :18])
        return query * len(_select.choose("fake", problem, direction="backward"))

    x = torch.ones(2, 72, 16)
    compiled = torch.compile(run, fullgraph=True, backend="eager", dynamic=True)
    assert compiled(x)[0, 0, 0] == len("chunked"), "nothing verified, nothing measured"
    nlkernels.warmup(Model(), (2, 16, 72))
    row = _select.measured("fake", Problem.of(x, x[:, :18], x[:, :18]), "backward")
    row["order"] = ["triton", "chunked"]
    assert compiled(x)[0, 0, 0] == len("triton")


class Untidy(torch.nn.Module):
    """Changes all that a forward may: statistics, random states, a buffer it replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nlkernels.NonLocalBlock3d(8, zero_init=None)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls = self.calls + 1
        return self.block(torch.nn.functional.dropout(x)) * random.random()


@pytest.mark.parametrize("name", ["block", "untidy", "c2d_tiny"])
def test_warmup_leaves_the_model_as_it_was(name):
    if name == "c2d_tiny":
        model, shape = create_model("c2d_tiny", num_classes=4, blocks=2), (2, 3, 4, 32, 32)
    else:
        model, shape = (
            (Untidy() if name == "untidy" else nlkernels.NonLocalBlock3d(8)),
            (2, 8, 2, 6, 6),
        )
    model.train()
    next(model.children()).eval()
    model(torch.randn(shape)).sum().backward()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    flags = [module.training for module in model.modules()]
    random_states = torch.get_rng_state(), random.getstate()

    report = nlkernels.warmup(model, shape)

    assert report.entries and all("nothing to tune on a cpu" in e.note for e in report.entries)
    assert model.state_dict().keys() == state.keys()
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        assert (parameter.grad is None) == (grad is None)
        assert grad is None or torch.equal(parameter.grad, grad)
    assert flags == [module.training for module in model.modules()]
    assert torch.equal(torch.get_rng_state(), random_states[0])
    assert random.getstate() == random_states[1]
    assert _select.recorder is None


def test_warmup_after_a_failing_model_records_nothing_more():
    with pytest.raises(RuntimeError):
        nlkernels.warmup(torch.nn.Linear(3, 4), (2, 5))
    assert _select.recorder is None


@pytest.mark.parametrize(
    ("arguments", "error", "part"),
    [
        (("model", (1,)), TypeError, "expected a module, got str"),
        ((torch.nn.Identity(), (0, 3)), ValueError, "positive sizes"),
        ((torch.nn.Identity(), (2.5,)), ValueError, "positive sizes"),
    ],
)
def test_wrong_use_of_warmup(arguments, error, part):
    with pytest.raises(error, match=part):
        nlkernels.warmup(*arguments)
