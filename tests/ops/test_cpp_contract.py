"""The C++ backend of attention seen from outside: tracing, autograd, memory, signals, threads."""

import itertools
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from nlkernels import _ext, nonlocal_attention
from nlkernels._memory import MIB, PeakMemory
from nlkernels._spec import Problem
from nlkernels.ops import _cpp
from tests.helpers import KINDS, SHORT, Case, operands, results
from tests.ops import cpp_attention
from tests.ops.cpp_attention import assert_equal, made, needs_compiler, ways

pytestmark = [needs_compiler, pytest.mark.usefixtures("poison")]

ROOT = Path(__file__).resolve().parents[2]
kinds = pytest.mark.parametrize("kind", KINDS)
low_dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


def attention(kind, **options):
    return lambda *qkv: nonlocal_attention(*qkv, kind=kind, backend="cpp", **options)


@kinds
def test_opcheck(kind):
    tensors = operands(Case(2, 5, 3, 4, 6), torch.float32)
    name = kind if kind in ("dot_product", "relu") else "softmax"
    forward, backward = (
        getattr(torch.ops.nlkernels, f"{name}_{d}") for d in ("forward", "backward")
    )
    for query, key, value, grad in (tensors, [t.mT.contiguous().mT for t in tensors]):
        arguments = (query, key, value, 0.5, "cpp", None)
        arguments += (True,) if name == "dot_product" else ()
        torch.library.opcheck(forward.default, arguments)
        found = forward(*arguments)
        kept = {"softmax": found, "dot_product": found[1:], "relu": ()}[name]
        arguments = (grad, query, key, value, *kept, 0.5, "cpp", None)
        torch.library.opcheck(backward.default, arguments)


@kinds
def test_fullgraph_compile_equals_eager_without_recompiling_for_new_sizes(kind):
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    run = attention(kind, scale=0.3)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    counted = torch.compile(run, fullgraph=True, backend=count, dynamic=True)
    for queries, keys in ((9, 7), (33, 7), (65, 20)):
        tensors = operands(Case(2, queries, keys, 8, 12), torch.float32)
        assert_equal(results(compiled, tensors), results(run, tensors))
        with torch.no_grad():
            counted(*tensors[:3])
    assert len(graphs) == 1


@kinds
def test_export_keeps_one_operator(kind):
    class Model(torch.nn.Module):
        def forward(self, query, key, value):
            return nonlocal_attention(query, key, value, kind=kind, backend="cpp")

    inputs = tuple(operands(Case(2, 20, 9, 8, 8), torch.float32)[:3])
    program = torch.export.export(Model(), inputs)
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert len([n for n in names if "nlkernels" in n]) == 1
    assert torch.equal(program.module()(*inputs), Model()(*inputs))


@kinds
def test_only_operands_output_and_statistics_are_saved(kind):
    tensors = operands(Case(2, 50, 30, 16, 24), torch.bfloat16, requires_grad=True)[:3]
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.setdefault(t.data_ptr(), t.numel() * t.element_size()) and t, lambda t: t
    ):
        attention(kind)(*tensors)
    expected = 2 * 2 * (50 * 16 + 30 * 16 + 30 * 24)
    if kind in ("softmax", "gaussian"):
        expected += 2 * 2 * 50 * 24 + 2 * 2 * 50 * 4
    assert sum(saved.values()) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@kinds
def test_gradients_of_gradients_equal_the_definitions(kind, dtype):
    def penalty(backend):
        tensors = operands(Case(2, 20, 15, 8, 6), dtype, requires_grad=True)[:3]
        out = nonlocal_attention(*tensors, kind=kind, scale=0.3, backend=backend)
        first = torch.autograd.grad(out.square().sum(), tensors, create_graph=True)
        total = sum(g.float().square().sum() for g in first)
        return torch.autograd.grad(total, tensors)

    close = 1e-3 if dtype == torch.float32 else 0.1
    for got, want in zip(penalty("cpp"), penalty("reference"), strict=True):
        largest = want.abs().max().item()
        torch.testing.assert_close(got, want, rtol=close, atol=close * largest)


@pytest.mark.parametrize("wanted", list(itertools.product("01", repeat=3))[1:7])
@kinds
def test_any_subset_may_require_gradients(kind, wanted):
    tensors = operands(Case(2, 20, 15, 8, 6), torch.float32)
    full = results(attention(kind), tensors)
    inputs = [
        t.detach().requires_grad_(flag == "1") for t, flag in zip(tensors[:3], wanted, strict=True)
    ]
    attention(kind)(*inputs).backward(tensors[3])
    for tensor, name in zip(inputs, ("d_query", "d_key", "d_value"), strict=True):
        assert tensor.grad is None or torch.equal(tensor.grad, full[name])
        assert (tensor.grad is None) == (not tensor.requires_grad)


@low_dtypes
@kinds
def test_autocast_runs_the_kernels_in_its_dtype(kind, dtype):
    tensors = operands(Case(2, 40, 50, 16, 16), torch.float32)
    expected = results(attention(kind), [t.to(dtype) for t in tensors])

    def run(*qkv):
        with torch.autocast("cpu", dtype=dtype):
            return attention(kind)(*qkv)

    got = results(run, [*tensors[:3], tensors[3].to(dtype)])
    assert got["out"].dtype == dtype and torch.equal(got["out"], expected["out"])
    assert torch.equal(got["d_key"], expected["d_key"].float())


@kinds
def test_checkpointing_inference_mode_and_no_grad_change_nothing(kind):
    tensors = operands(Case(2, 40, 30, 16, 16), torch.float32)
    plain = results(attention(kind), tensors)
    kept = results(lambda *qkv: checkpoint(attention(kind), *qkv, use_reentrant=False), tensors)
    assert_equal(kept, plain)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(attention(kind)(*tensors[:3]), plain["out"])


# Many small items, long rows, many rows, wide channels; items whose queries outnumber their keys.
MEASURED = [
    Case(500, 40, 9, 16, 16),
    Case(2, 3000, 700, 64, 40),
    Case(1, 40, 20_000, 16, 24),
    Case(1, 300, 200, 512, 1000),
    Case(160, 2730, 20, 16, 16),
    Case(3, 1, 1, 1, 1),
]


def up(number, multiple=48):
    return -(-number // multiple) * multiple


@pytest.mark.parametrize("workspace_mib", [0, 3, None, 1e9])
@pytest.mark.parametrize("dtype", list(SHORT), ids=list(SHORT.values()))
@pytest.mark.parametrize("case", MEASURED, ids=str)
@ways
def test_workspace_is_within_the_documented_bound(way, case, dtype, workspace_mib):
    batch, queries, keys, depth, value_depth = vars(case).values()
    native, isa = _ext.load(), _ext.isa()
    meta = [
        torch.empty(batch, n, c, dtype=dtype, device="meta")
        for n, c in ((queries, depth), (keys, depth), (keys, value_depth))
    ]
    affinity = cpp_attention.WAYS[way].affinity
    problem = _cpp._problem(native, affinity, *meta, 1.0, workspace_mib)
    forward = native.attention_forward_workspace(isa, problem)
    backward = native.attention_backward_workspace(isa, problem)
    budget = (10 if workspace_mib is None else workspace_mib) * MIB
    threads, wide = torch.get_num_threads(), max(dtype.itemsize, 4)
    m, d, v = up(keys), up(depth), up(value_depth)
    slack = 64 * 9 * (threads + 1)
    if way == "linear":
        positions = min(up(max(queries, keys)), max(96, 2**20 // (2 * (d + v)))) + 2
        item = 2 * wide * positions * max(d, v) + 3 * wide * d * v
        own = threads * 96 * 2 * wide * max(d, v)
        limit = max(item, 2 * min(4 * MIB, budget / 2)) + own + slack
        assert forward <= limit and backward <= limit * 1.5
        return
    item = wide * m * (d + v)
    row = wide * (m + v + d)
    assert forward <= max(item + threads * 12 * row, budget) + slack
    rows = max(12, min(192, 2**20 // (2 * wide * keys)))
    item = wide * m * (2 * d + v) + wide * m * (d + v)
    superblock_row = wide * (2 * m + d + v)
    own = threads * rows * wide * (2 * m + 2 * d + v)
    superblock = superblock_row * min(up(queries), up(2 * threads * rows, 256))
    assert backward <= max(item + superblock, 2 * budget, 0) + own + slack or (
        batch > 1 and backward <= 5 * 4 * MIB + own + slack
    )


@ways
def test_nothing_is_allocated_but_outputs_and_workspace(way):
    tensors = made(Case(2, 300, 200, 40, 24), torch.bfloat16)
    affinity = cpp_attention.WAYS[way].affinity
    native = _ext.load()
    problem = _cpp._problem(native, affinity, *tensors[:3], 1.0, None)
    with PeakMemory() as peak:
        _cpp.forward(affinity, *tensors[:3], 1.0, None)
    outputs = 2 * 2 * 300 * 24 + (2 * 2 * 300 * 4 if way == "softmax" else 0)
    workspace = native.attention_forward_workspace(_ext.isa(), problem)
    assert peak.live_mib * MIB <= outputs + workspace + 64
    with PeakMemory() as peak:
        _cpp.backward(affinity, tensors[3], *tensors[:3], 1.0, None)
    outputs = 2 * sum(t.numel() for t in tensors[:3])
    workspace = native.attention_backward_workspace(_ext.isa(), problem)
    assert peak.live_mib * MIB <= outputs + workspace + 64


LONG_CALL = """
import signal, torch
from nlkernels import nonlocal_attention
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it for what they put aside
query, key = torch.randn(1, 60_000, 64), torch.randn(1, 60_000, 64)
nonlocal_attention(query[:, :9], key[:, :9], key[:, :9], backend="cpp")
print("calls", flush=True)
try:
    nonlocal_attention(query, key, key, backend="cpp")
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""

# Small operands: torch's own pool of threads does not survive a fork.
FORKS = """
import os, torch
from tests.ops.cpp_attention import made, run
from tests.helpers import Case
torch.set_num_threads(2)
tensors = made(Case(2, 200, 30, 16, 16), torch.float32)
expected = run("softmax", tensors, 0.3)
child = os.fork()
if child == 0:
    got = run("softmax", tensors, 0.3)
    os._exit(0 if all(torch.equal(got[name], expected[name]) for name in got) else 1)
assert os.waitpid(child, 0)[1] == 0
print("equal")
"""


def start(script):
    command = [sys.executable, "-c", script]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_ctrl_c_ends_a_long_call_within_a_second():
    process = start(LONG_CALL)
    assert process.stdout.readline() == "calls\n"
    time.sleep(0.7)
    assert process.poll() is None
    begin = time.perf_counter()
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "interrupted\n"
    waited = time.perf_counter() - begin
    process.communicate(timeout=60)
    assert waited < 3  # machines may be busy


def test_a_forked_child_computes_the_same():
    process = start(FORKS)
    try:
        said, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert said == "equal\n"


def test_two_threads_of_python_call_at_once():
    problems = [
        (way, made(Case(2, 300, 150, 24, 16), torch.float32, seed=i))
        for i, way in enumerate(cpp_attention.WAYS)
    ]
    expected = [cpp_attention.run(way, tensors, 0.3) for way, tensors in problems]
    wrong = []

    def call(number):
        for _ in range(5):
            for (way, tensors), right in zip(problems, expected, strict=True):
                try:
                    assert_equal(cpp_attention.run(way, tensors, 0.3), right)
                except Exception as error:
                    wrong.append(f"{number}, {way}: {error}")

    callers = [threading.Thread(target=call, args=(number,)) for number in range(2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_other_threads_of_python_go_on_during_a_call():
    tensors = made(Case(1, 4000, 4000, 64, 64), torch.float32)
    done, counts = threading.Event(), []

    def count():
        while not done.is_set():
            counts.append(time.perf_counter())
            time.sleep(0.001)

    counter = threading.Thread(target=count)
    counter.start()
    start = time.perf_counter()
    _cpp.forward(_cpp.SOFTMAX, *tensors[:3], 0.1, None)
    end = time.perf_counter()
    done.set()
    counter.join()
    assert sum(start < at < end for at in counts) >= 3


def test_what_it_does_not_serve_is_refused_with_the_reason(monkeypatch):
    tensors = operands(Case(1, 9, 7, 4, 4))[:3]
    assert _ext.unserved(Problem(1, 9, 7, 4, 4, torch.float32, "cuda")) == [
        "its kernels run on CPUs only"
    ]
    monkeypatch.setattr(_ext, "missing", lambda: "no compiler: install g++")
    with pytest.raises(NotImplementedError, match="no compiler: install g"):
        nonlocal_attention(*tensors, backend="cpp")
