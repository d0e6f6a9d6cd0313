"""Which backend runs, and what is said about the others."""

import itertools

import pytest
import torch

import nlkernels
from nlkernels import _device, _ext, _operations, _select, explain, nonlocal_attention
from nlkernels._spec import Problem
from nlkernels.ops.softmax import chunked, cpp, sdpa
from tests.helpers import SHORT, Case, operands
from tests.ops.cpp_attention import needs_compiler


def chosen(kind="softmax", dtype=torch.float32, **sizes):
    case = Case(**{"batch": 2, "queries": 64, "keys": 64, "depth": 8, "value_depth": 8} | sizes)
    return explain("nonlocal_attention", *operands(case, dtype)[:3], kind=kind)


def test_explain_gives_a_reason_for_every_backend():
    for kind, backends in (
        ("softmax", {"reference", "chunked", "cpp", "triton", "cuda", "sdpa"}),
        ("dot_product", {"reference", "chunked", "cpp", "triton", "cuda"}),
        ("relu", {"reference", "chunked", "cpp", "triton", "cuda"}),
    ):
        explanation = chosen(kind)
        assert set(explanation.reasons) == backends
        assert all(explanation.reasons.values())
        text = str(explanation)
        assert f"-> {explanation.backend}" in text and "N=64 M=64 D=8" in text


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setattr(_ext, "missing", lambda: "no C++ compiler")
    monkeypatch.setattr(_ext, "loaded_for", lambda: None)


@pytest.fixture
def wide(monkeypatch):
    """As on a CPU whose instruction set the C++ kernels were measured with."""
    monkeypatch.setattr(_ext, "isa_name", lambda: "avx512_bf16")


@needs_compiler
def test_cpp_is_first_on_a_cpu_where_it_was_measured(wide):
    for dtype in SHORT:
        for kind in ("softmax", "relu"):
            for size in (16, 64):
                explanation = chosen(kind, dtype, queries=size, keys=size)
                assert explanation.backend == "cpp" and "the backward" not in str(explanation)
                assert explanation.reasons["chunked"].startswith("slower than cpp: ")
    for dtype, narrow, wide_depth in (
        (torch.float16, "cpp", "cpp"),
        (torch.bfloat16, "chunked", "cpp"),
        (torch.float32, "chunked", "cpp"),
        (torch.float64, "chunked", "cpp"),
    ):
        assert chosen("dot_product", dtype, depth=127).backend == narrow
        assert chosen("dot_product", dtype, depth=128).backend == wide_depth
    deep = chosen("dot_product", torch.bfloat16, depth=257)
    assert deep.backend == "chunked" and "the backward runs in cpp" in str(deep)


@needs_compiler
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_cpp_is_not_first_with_narrow_vectors_or_without_pairs(isa, monkeypatch):
    monkeypatch.setattr(_ext, "isa_name", lambda: isa)
    taken = "cpp" if isa == "avx512" else "chunked"
    for kind in ("softmax", "relu", "dot_product"):
        assert chosen(kind, torch.bfloat16).backend == "chunked"
        assert chosen(kind, torch.float64, depth=128).backend == taken


@pytest.mark.parametrize("isa", ["portable", "avx512_bf16"])
def test_reasons_speak_of_the_backend_they_are_given_for(isa, monkeypatch, no_compiler):
    monkeypatch.setattr(_ext, "isa_name", lambda: isa)
    for kind, dtype in itertools.product(("softmax", "relu", "dot_product"), SHORT):
        explanation = chosen(kind, dtype, depth=128, value_depth=128)
        first = isa == "portable"
        reason = explanation.reasons[explanation.backend]
        assert reason.startswith("next after cpp, which comes first here but cannot run (") != first
        others = [r for name, r in explanation.reasons.items() if name != explanation.backend]
        assert first or not any("times as fast" in reason for reason in others)
        assert "nlkernels: " not in explanation.reasons["cpp"]


@pytest.mark.parametrize("isa", ["avx2", "avx512_bf16"])
def test_table_decides_on_a_cpu_without_a_compiler(isa, no_compiler, monkeypatch):
    monkeypatch.setattr(_ext, "isa_name", lambda: isa)
    few = "sdpa" if isa == "avx2" else "chunked"
    assert chosen(dtype=torch.float32).backend == "sdpa"
    assert chosen(dtype=torch.bfloat16).backend == "chunked"
    assert chosen(dtype=torch.bfloat16, queries=16, keys=16).backend == few
    assert chosen(dtype=torch.float16, queries=16, keys=16).backend == "chunked"
    assert chosen(dtype=torch.float64).backend == "chunked"
    assert "the backward runs in chunked" in chosen(dtype=torch.float32).reasons["sdpa"]
    assert "the backward" not in str(chosen(dtype=torch.bfloat16))
    assert "no C++ compiler" in chosen(dtype=torch.float32).reasons["cpp"]
    assert {chosen(kind).backend for kind in ("relu", "dot_product")} == {"chunked"}


def test_sdpa_is_left_where_torch_would_materialise(no_compiler):
    explanation = chosen(value_depth=16)
    assert explanation.backend == "chunked" and "D == V" in explanation.reasons["sdpa"]


@pytest.mark.parametrize("how", ["explain", "call"])
def test_impossible_backend_raises_with_the_reason_that_explain_gives(how):
    query, key, value, _ = operands(Case(2, 9, 7, 5, 3))
    reason = explain("nonlocal_attention", query, key, value).reasons["sdpa"]
    run = (
        nonlocal_attention
        if how == "call"
        else lambda *t, **o: explain("nonlocal_attention", *t, **o)
    )
    with pytest.raises(NotImplementedError) as error:
        run(query, key, value, backend="sdpa")
    assert reason in str(error.value) and "use backend='auto'" in str(error.value)
    with pytest.raises(NotImplementedError, match="always applies a softmax"):
        run(query, key, value, kind="dot_product", backend="sdpa")


def test_gpu_rules_of_sdpa_are_checked_before_torch_is_called():
    problem = Problem(2, 64, 64, 64, 64, torch.float16, "cuda")
    assert sdpa.unsupported(problem) == []
    assert "divisible by 8" in sdpa.unsupported(problem._replace(depth=60))[0]
    assert "float64" in sdpa.unsupported(problem._replace(dtype=torch.float64))[0]
    assert "mps" in sdpa.unsupported(problem._replace(device="mps"))[0]


BACKENDS = {"chunked": chunked, "cpp": cpp, "sdpa": sdpa}


@pytest.mark.parametrize("compiler", [pytest.param(True, marks=needs_compiler), False])
def test_auto_runs_what_explain_names(compiler, monkeypatch, request, wide):
    if not compiler:
        request.getfixturevalue("no_compiler")
    ran = []
    for name, module in BACKENDS.items():
        for direction in ("forward", "backward"):
            original = getattr(module, direction)
            monkeypatch.setattr(
                module,
                direction,
                lambda *a, f=original, n=f"{name} {direction}": (ran.append(n), f(*a))[1],
            )
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        tensors = operands(Case(2, 64, 64, 8, 8), dtype, requires_grad=True)[:3]
        ran.clear()
        nonlocal_attention(*tensors).sum().backward()
        forward = explain("nonlocal_attention", *tensors).backend
        backward = "cpp" if compiler else "chunked"
        assert ran == [f"{forward} forward", f"{backward} backward"]


def test_environment_names_the_backend_unless_the_call_does(monkeypatch):
    tensors = operands(Case(2, 9, 7, 5, 5))[:3]
    monkeypatch.setenv("NLKERNELS_BACKEND", "reference")
    assert explain("nonlocal_attention", *tensors).backend == "reference"
    assert explain("nonlocal_attention", *tensors, backend="chunked").backend == "chunked"
    monkeypatch.setenv("NLKERNELS_BACKEND", "chunkd")
    with pytest.raises(ValueError, match=r"NLKERNELS_BACKEND.*did you mean 'chunked'"):
        nonlocal_attention(*tensors)


def test_block_backend_beats_the_environment(monkeypatch):
    monkeypatch.setenv("NLKERNELS_BACKEND", "sdpa")
    block = nlkernels.NonLocalBlock3d(8, kind="dot_product", zero_init=None)
    x = torch.randn(1, 8, 2, 4, 4)
    with pytest.raises(NotImplementedError, match="dot_product"):
        block(x)
    assert nlkernels.set_nonlocal_backend(block, "chunked") == 1
    assert block(x).shape == x.shape


def test_every_table_names_known_backends_and_says_why():
    assert {"softmax", "dot_product", "relu", "region_aggregate"} <= set(_operations.OPERATIONS)
    for operation in _operations.OPERATIONS.values():
        for rows in operation.table.values():
            for row in rows:
                assert set(row["order"]) <= set(operation.backends)
                assert row["because"] and row["dtypes"]


def test_auto_on_a_gpu_is_torchs_attention_unless_it_must_repeat():
    problem = Problem(2, 1024, 1024, 64, 64, torch.bfloat16, "cuda")
    assert _select.choose("softmax", problem) == "sdpa"
    assert _select.choose("softmax", problem._replace(depth=60)) == "chunked"
    assert _select.choose("softmax", problem._replace(dtype=torch.float64)) == "chunked"
    assert _select.choose("dot_product", problem) == "chunked"
    assert _select.choose("relu", problem) == "chunked"
    torch.use_deterministic_algorithms(True)
    try:
        assert _select.choose("softmax", problem) == "chunked"
        assert "repeatable" in _select.explain("softmax", problem, "auto").reasons["chunked"]
    finally:
        torch.use_deterministic_algorithms(False)


def test_triton_is_refused_with_the_reason_and_the_remedy():
    problem = Problem(2, 1024, 1024, 64, 64, torch.bfloat16, "cuda")
    if not torch.cuda.is_available():
        reason = _select.explain("softmax", problem, "auto").reasons["triton"]
        assert "there is no usable GPU" in reason
    tensors = operands(Case(2, 9, 7, 5, 3))[:3]
    with pytest.raises(NotImplementedError, match="not float64"):
        nonlocal_attention(*tensors, backend="triton")


def test_modules_given_by_name_are_imported_at_first_use():
    assert _operations.implementation("softmax", "chunked") is chunked
    assert _operations.loaded("nlkernels.ops.softmax.chunked") is chunked


def test_torchs_attention_is_chosen_outside_the_operator_on_gpus_only(monkeypatch):
    tensors = operands(Case(2, 64, 64, 8, 8), torch.float32)[:3]
    assert _select.outside("softmax", *tensors) == "auto"
    asked = []

    def choose(op, problem, inside=None, direction="forward"):
        asked.append(direction)
        return "sdpa"

    monkeypatch.setattr(_device, "MEASURED", ("cpu",))
    monkeypatch.setattr(_select, "choose", choose)
    assert _select.outside("softmax", *tensors) == "sdpa"
    tensors[1].requires_grad_()
    assert _select.outside("softmax", *tensors) == "sdpa"
    with torch.no_grad():
        _select.outside("softmax", *tensors)
    assert asked == ["forward", "training", "forward"]
    assert _select.outside("dot_product", *tensors) == "auto"


def test_the_choice_outside_the_operator_can_be_traced(monkeypatch):
    monkeypatch.setattr(_device, "MEASURED", ("cpu",))

    def run(query, key, value):
        return query * len(_select.outside("softmax", query, key, value))

    compiled = torch.compile(run, fullgraph=True, backend="eager", dynamic=True)
    for depth, chosen in ((8, "sdpa"), (9, "auto")):
        tensors = operands(Case(2, 64, 64, depth, 8), torch.float32, requires_grad=True)[:3]
        assert torch.equal(compiled(*tensors), tensors[0] * len(chosen))


def test_a_measurement_never_puts_torchs_attention_into_repeatable_programs(monkeypatch):
    row = {"order": ["sdpa", "triton", "chunked"], "because": "measured"}
    monkeypatch.setattr(_select, "measured", lambda *_: row)
    problem = Problem(2, 64, 64, 64, 64, torch.bfloat16, "cuda")
    assert [b for b, _ in _select.preference("softmax", problem)] == row["order"]
    torch.use_deterministic_algorithms(True)
    try:
        assert [b for b, _ in _select.preference("softmax", problem)] == ["triton", "chunked"]
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_choice_for_a_gpu_can_be_traced():
    def run(query, key, value):
        problem = Problem.of(query, key, value)._replace(device="cuda")
        return query * len(_select.choose("softmax", problem))

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for queries in (9, 33):
        tensors = operands(Case(2, queries, 7, 8, 8), torch.float32)[:3]
        assert torch.equal(compiled(*tensors), tensors[0] * len("sdpa"))


@pytest.mark.parametrize(
    "backend",
    ["reference", "chunked", "sdpa", pytest.param("cpp", marks=needs_compiler), "auto"],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d], ids=str)
def test_block_runs_and_explains_every_backend(backend, layout, monkeypatch, wide):
    ran = []
    for name, module in BACKENDS.items():
        forward = module.forward
        monkeypatch.setattr(
            module, "forward", lambda *a, f=forward, n=name: (ran.append(n), f(*a))[1]
        )
    block = nlkernels.NonLocalBlock3d(8, zero_init=None, temporal_group=2).eval()
    x = torch.randn(2, 8, 4, 6, 6).contiguous(memory_format=layout)
    expected = block(x)
    nlkernels.set_nonlocal_backend(block, backend)
    ran.clear()
    torch.testing.assert_close(block(x), expected)
    named = block.explain(x).backend
    assert ran == ([] if named == "reference" else [named])
    fastest = "sdpa" if _ext.missing() else "cpp"
    assert named == (fastest if backend == "auto" else backend)
