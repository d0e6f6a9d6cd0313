"""The state that a forward of dot_product keeps: when, what it holds, what it spares, its bytes."""

import random

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nlkernels import _ext, nonlocal_attention
from nlkernels._memory import MIB, PeakMemory
from nlkernels._spec import Problem
from nlkernels.ops import _cpp, _footprint
from nlkernels.ops.dot_product import chunked, cpp, op, order
from nlkernels.ops.dot_product import reference as definition
from tests.helpers import SHORT, Case, assert_not_worse, operands, results
from tests.ops.cpp_attention import needs_compiler, threads

pytestmark = pytest.mark.usefixtures("poison")

MODULES = {"chunked": chunked, "cpp": cpp}
backends = pytest.mark.parametrize(
    "backend", ["chunked", pytest.param("cpp", marks=needs_compiler)]
)
dtypes = pytest.mark.parametrize("dtype", list(SHORT), ids=list(SHORT.values()))
# Kept; kept in no dtype, as it is larger than a quarter of the operands; in the quadratic order.
KEPT, LARGE, SCORES = Case(2, 300, 90, 20, 12), Case(2, 60, 50, 45, 45), Case(3, 40, 6, 16, 20)
OPERATORS = torch.ops.nlkernels.dot_product_forward, torch.ops.nlkernels.dot_product_backward


def keeps(case, dtype):
    return order.keeps_state(*vars(case).values(), dtype)


@dtypes
def test_the_state_is_kept_where_it_is_small_and_the_order_linear(dtype):
    assert keeps(KEPT, dtype) and not keeps(LARGE, dtype) and not keeps(SCORES, dtype)
    # A quarter of query, key and value, to the byte: 4 A 16 16 = E (16 N + M 32).
    rows = 4 * max(dtype.itemsize, 4) // dtype.itemsize * 16 - 2 * 25
    assert keeps(Case(1, rows, 25, 16, 16), dtype)
    assert not keeps(Case(1, rows - 1, 25, 16, 16), dtype)


@pytest.mark.parametrize("empty", range(5))
def test_nothing_is_kept_of_empty_operands(empty):
    sizes = [2, 300, 200, 8, 4]
    sizes[empty] = 0
    query, key, value, _ = operands(Case(*sizes))
    _, state = OPERATORS[0](query, key, value, 1.0, "chunked", None, True)
    assert state.numel() == 0 and state.shape[1:] == (sizes[3], sizes[4])


def test_a_kept_state_makes_both_passes_linear_and_triton_refuse():
    draw, kept = random.Random(0), 0
    for _ in range(4000):
        sizes = [int(2 ** draw.uniform(0, top)) for top in (3, 10, 9, 9, 9)]
        for dtype in (torch.float32, torch.bfloat16):
            if not order.keeps_state(*sizes, dtype):
                continue
            kept += 1
            for linear, quadratic in (
                order.flops(*sizes),
                order.backward_flops(*sizes, kept=True),
            ):
                assert linear <= quadratic
            assert any(
                "linear" in why for why in op.supports("triton", Problem(*sizes, dtype, "cuda"))
            )
    assert kept > 100


@backends
@dtypes
@pytest.mark.parametrize("keep", [True, False], ids=["keep", "inference"])
@pytest.mark.parametrize("case", [KEPT, LARGE, SCORES], ids=["kept", "large", "scores"])
def test_shape_and_dtype_and_what_the_fakes_say(case, keep, dtype, backend):
    query, key, value, grad = operands(case, dtype)
    arguments = (query, key, value, 0.5, backend, None, keep)
    out, state = OPERATORS[0](*arguments)
    items = case.batch if case == KEPT and keep else 0
    assert state.shape == (items, case.depth, case.value_depth)
    assert state.dtype == torch.promote_types(dtype, torch.float32) and state.is_contiguous()
    if items:
        sums = key.double().mT @ value.double()
        close = 0.02 if dtype == torch.bfloat16 and backend == "chunked" else 1e-5
        torch.testing.assert_close(state.double(), sums, rtol=close, atol=close * 10)
    assert torch.equal(out, OPERATORS[0](*arguments[:-1], not keep)[0])
    if dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(OPERATORS[0].default, arguments)
        torch.library.opcheck(
            OPERATORS[1].default, (grad, query, key, value, state, 0.5, backend, None)
        )


@backends
@dtypes
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(
    "case",
    [KEPT, Case(4, 700, 333, 97, 49), Case(3, 150, 160, 31, 48), Case(1, 900, 1100, 130, 70)],
    ids=str,
)
def test_gradients_are_those_without_it_to_the_last_bit(case, count, dtype, backend):
    module, (query, key, value, grad) = MODULES[backend], operands(case, dtype)
    with threads(count):
        _, state = module.forward(query, key, value, 0.3, keep=True)
        assert state.numel() > 0
        given = module.backward(grad, query, key, value, state, 0.3)
        summed = module.backward(grad, query, key, value, state[:0], 0.3)
        of_zeros = module.backward(grad, query, key, value, torch.zeros_like(state), 0.3)
    for got, want in zip(given, summed, strict=True):
        assert torch.equal(got, want)
    # It is read, for the gradient of the query alone, and not written.
    assert not of_zeros[0].any() and all(map(torch.equal, of_zeros[1:], summed[1:]))
    assert torch.equal(state, module.forward(query, key, value, 0.3, keep=True)[1])


@needs_compiler
@pytest.mark.parametrize("workspace_mib", [0, None])
@dtypes
def test_cpp_reads_a_state_as_it_lies(dtype, workspace_mib):
    query, key, value, grad = operands(Case(5, 70, 60, 24, 20), dtype)
    state = torch.full((5, 24, 20), torch.nan, dtype=torch.promote_types(dtype, torch.float32))
    _cpp.forward(_cpp.LINEAR, query, key, value, 0.3, workspace_mib, state)
    arguments = (_cpp.LINEAR, grad, query, key, value, 0.3, workspace_mib)
    moved = state.mT.contiguous().mT
    for got, want in zip(_cpp.backward(*arguments, moved), _cpp.backward(*arguments), strict=True):
        assert torch.equal(got, want)


@needs_compiler
@dtypes
@pytest.mark.parametrize("passes", [("chunked", "cpp"), ("cpp", "chunked")], ids="-".join)
def test_one_backend_reads_the_state_of_another(passes, dtype):
    """As `auto` combines them: held to the 2x/3x rule."""
    tensors = operands(Case(2, 400, 300, 64, 48), dtype)
    query, key, value, grad = tensors
    _, state = OPERATORS[0](query, key, value, 0.5, passes[0], None, True)
    assert state.numel() > 0
    got = OPERATORS[1](grad, query, key, value, state, 0.5, passes[1], None)
    define = lambda *qkv: definition.attention(*qkv, 0.5)  # noqa: E731
    same, truth = results(define, tensors), results(define, [t.double() for t in tensors])
    for name, result in zip(("d_query", "d_key", "d_value"), got, strict=True):
        assert_not_worse(name, result, same[name], truth[name], 3)


@backends
@dtypes
def test_kept_bytes_and_peaks_are_those_documented(dtype, backend):
    case = Case(2, 3000, 900, 96, 64)
    tensors = operands(case, dtype, requires_grad=True)
    size, wide = dtype.itemsize, max(dtype.itemsize, 4)
    out_bytes, state_bytes = 2 * 3000 * 64 * size, 2 * 96 * 64 * wide
    run = lambda: nonlocal_attention(*tensors[:3], kind="dot_product", backend=backend)  # noqa: E731
    if backend == "cpp":
        _ext.load()
    with PeakMemory() as forward:
        out = run()
    assert round(forward.kept_mib * MIB) == out_bytes + state_bytes
    with PeakMemory() as backward:
        grads = torch.autograd.grad(out, tensors[:3], tensors[3])
    grad_bytes = sum(t.numel() for t in grads) * size
    del out
    with torch.no_grad(), PeakMemory() as inference:
        out = run()
    assert round(inference.kept_mib * MIB) == out.numel() * size
    problem = Problem.of(*tensors[:3])
    needs = {
        direction: _footprint.workspace("dot_product", backend, direction, problem)
        for direction in ("forward", "backward")
    }
    assert inference.live_mib * MIB <= out_bytes + needs["forward"]
    assert forward.live_mib * MIB <= out_bytes + state_bytes + needs["forward"]
    assert backward.live_mib * MIB <= grad_bytes + needs["backward"]
    both = _footprint.bound("dot_product", (backend, backend), problem)
    assert both == max(needs.values()) + state_bytes


def test_a_tensor_that_asks_for_no_gradient_keeps_nothing():
    query, key, value, _ = operands(KEPT)
    with FlopCounterMode(display=False) as counter:
        out = nonlocal_attention(query.requires_grad_(), key, value, kind="dot_product")
        out.sum().backward()
    with_state = order.flops(*vars(KEPT).values())[0]
    with_state += order.backward_flops(*vars(KEPT).values(), kept=True)[0]
    assert counter.get_total_flops() == with_state
    with PeakMemory() as peak:
        out = nonlocal_attention(query.detach(), key, value, kind="dot_product")
    assert round(peak.kept_mib * MIB) == out.numel() * 8


def test_relu_has_no_state():
    forward, backward = (getattr(torch.ops.nlkernels, f"relu_{d}") for d in ("forward", "backward"))
    schemas = forward.default._schema, backward.default._schema
    assert [len(schema.returns) for schema in schemas] == [1, 3]
    assert not any(a.name in ("state", "keep") for schema in schemas for a in schema.arguments)


def test_compiled_training_is_traced_once_with_and_once_without():
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def run(query, key, value):
        return nonlocal_attention(query * 2, key, value, kind="dot_product", backend="chunked")

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    counted = torch.compile(run, fullgraph=True, backend=count, dynamic=True)
    seen = set()
    for queries, keys in ((9, 7), (33, 7), (4, 3), (200, 100), (5, 3)):
        case = Case(2, queries, keys, 4, 3)
        tensors = operands(case)
        seen.add(keeps(case, torch.float64))
        eager, got = results(run, tensors), results(compiled, tensors)
        assert all(torch.equal(got[name], eager[name]) for name in eager)
        counted(*(t.requires_grad_() for t in tensors[:3]))
    assert len(seen) == 2 and len(graphs) == 2


@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
def test_an_exported_program_takes_any_sizes_and_keeps_nothing(strict):
    class Model(torch.nn.Module):
        def forward(self, query, key, value):
            return nonlocal_attention(query, key, value, kind="dot_product", backend="chunked")

    queries, keys = (torch.export.Dim(name, min=2, max=10_000) for name in ("n", "m"))
    sizes = {"query": {1: queries}, "key": {1: keys}, "value": {1: keys}}
    leaves = tuple(operands(KEPT, requires_grad=True)[:3])
    program = torch.export.export(Model(), leaves, dynamic_shapes=sizes, strict=strict)
    for case in (KEPT, Case(2, 3, 4, 20, 12)):
        tensors = operands(case)[:3]
        assert torch.equal(program.module()(*tensors), Model()(*tensors))
