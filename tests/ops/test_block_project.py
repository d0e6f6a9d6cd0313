"""Projections of a block: what attention reads and the gradients, against their definition."""

import math

import pytest
import torch
from torch.nn import functional

from nlkernels import _ext
from nlkernels._memory import MIB, PeakMemory
from nlkernels.ops.block import project, reference
from tests.helpers import SHORT, assert_not_worse
from tests.ops.test_region import FORMATS, moved

pytestmark = pytest.mark.usefixtures("poison")

# Rows of query, key and value; None is what has no weight.
KINDS = {
    "all": (6, 7, 5),
    "gaussian": (None, None, 5),
    "region": (6, None, None),
    "one_row_of_query": (1, 7, 5),
}
WINDOWS = {"unpooled": [], "spatial": [1, 2, 2], "all_axes": [2, 3, 2]}
SHAPE = (2, 10, 4, 6, 5)
# What torch counts of its own small tensors.
SLACK = 4096

backends = pytest.mark.parametrize(
    "backend",
    [
        pytest.param("cpp", marks=pytest.mark.skipif(bool(_ext.missing()), reason=_ext.missing())),
        "chunked",
    ],
)
formats = pytest.mark.parametrize("layout", list(FORMATS))
kinds = pytest.mark.parametrize("kind", list(KINDS))
windows = pytest.mark.parametrize("window", list(WINDOWS.values()), ids=list(WINDOWS))
orders = pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
biased = pytest.mark.parametrize("bias", [False, True], ids=["unbiased", "biased"])


def operands(kind, dtype=torch.float64, layout="ncdhw", bias=True, shape=SHAPE, rows=None):
    """x, and the weight and the bias of each projection; None where there is none."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    x, channels = drawn(*shape).contiguous(memory_format=FORMATS[layout]), shape[1]
    tensors = [x]
    for count in rows or KINDS[kind]:
        if count is None:
            tensors += [None, None]
        else:
            tensors += [drawn(count, channels) * channels**-0.5, drawn(count) if bias else None]
    return tensors


def leaves(tensors, dtype=None):
    """The same as leaves of a graph."""
    return [
        None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors
    ]


def ours(tensors, window, after, backend):
    """What there is of query, key and value, and x."""
    x, *pairs = tensors
    rows = project.project(x, pairs[:2], pairs[2:4], pairs[4:], window, after, backend)
    return present(rows, pairs[4] is not None)


def defined(tensors, window, after):
    rows = reference.project(*tensors, window, after)
    return present((*rows, tensors[0] * 1), tensors[5] is not None)


def plain(tensors, window, after):
    """The definition by torch's matrix products, which are not as exact as its convolutions."""
    x, wq, bq, wk, bk, wv, bv = tensors
    before = functional.max_pool3d(x, window) if window and not after else x

    def rows(source, weight, bias, pools):
        found = source.flatten(2).mT
        if weight is not None:
            found = found @ weight.mT
            found = found if bias is None else found + bias
        if not pools:
            return found
        maps = found.mT.unflatten(2, source.shape[2:])
        return functional.max_pool3d(maps, window).flatten(2).mT

    pools = bool(window) and after
    query, key = rows(x, wq, bq, False), rows(before, wk, bk, pools)
    return present((query, key, rows(before, wv, bv, pools), x * 1), wv is not None)


def present(rows, attends):
    """Query and x alone where there is no value, and so neither key nor attention."""
    return list(rows) if attends else [rows[0], rows[3]]


def gradients(outputs, inputs, dtype=torch.float64, **options):
    """Gradients for random gradients of the outputs, numbers of a dtype."""
    generator = torch.Generator().manual_seed(1)
    grads = [
        torch.randn(t.shape, generator=generator, dtype=torch.float64).to(dtype).to(t.dtype)
        for t in outputs
    ]
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    return torch.autograd.grad(outputs, wanted, grads, **options)


def assert_close(got, wanted):
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@biased
@formats
@orders
@windows
@kinds
@backends
def test_values_and_gradients_are_the_definitions(backend, kind, window, after, layout, bias):
    tensors = leaves(operands(kind, layout=layout, bias=bias))
    got, wanted = ours(tensors, window, after, backend), defined(tensors, window, after)
    assert_close(got, wanted)
    found = gradients(got, tensors)
    assert_close(found, gradients(wanted, tensors))
    assert found[0].stride() == tensors[0].stride()


@formats
@orders
@windows
@kinds
@backends
def test_gradients_of_gradients_are_the_definitions(backend, kind, window, after, layout):
    def second(run, *options):
        tensors = leaves(operands(kind, layout=layout))
        first = gradients(run(tensors, window, after, *options), tensors, create_graph=True)
        total = sum(t.square().sum() for t in first)
        inputs = [t for t in tensors if t is not None]
        return torch.autograd.grad(total, inputs, materialize_grads=True)

    assert_close(second(ours, backend), second(defined))


@pytest.mark.parametrize("dtype", list(SHORT), ids=SHORT.get)
@formats
@orders
@kinds
@backends
def test_not_worse_than_pytorch(backend, kind, after, layout, dtype):
    tensors = operands(kind, dtype, layout)
    # Beside float32 where PyTorch has no float16 of its own on CPUs.
    wide = torch.float32 if dtype == torch.float16 else dtype
    for window in ([], [1, 2, 2]):
        found = []
        for run, of, options in (
            (ours, dtype, (backend,)),
            (plain, wide, ()),
            (defined, torch.float64, ()),
        ):
            leaf = leaves(tensors, of)
            out = run(leaf, window, after, *options)
            # Where rounding decides which of two numbers is the larger, gradients go elsewhere.
            judged = not (window and after and dtype.itemsize < 8)
            grads = list(gradients(out, leaf, dtype)) if judged else []
            # Biases together: the error of a single number is small by luck.
            matrices = [grad for grad in grads if grad.dim() > 1]
            vectors = [grad for grad in grads if grad.dim() == 1]
            found.append((out, matrices + ([torch.cat(vectors)] if vectors else [])))
        for name, factor, *each in zip(("output", "gradient"), (2, 3), *found, strict=True):
            for number, (got, same, truth) in enumerate(zip(*each, strict=True)):
                assert_not_worse(f"{name} {number}", got, same.to(dtype), truth, factor)


@orders
@windows
@kinds
@backends
def test_what_is_frozen_gets_no_gradient(backend, kind, window, after, monkeypatch):
    whole = leaves(operands(kind))
    full = gradients(ours(whole, window, after, backend), whole)
    full = dict(zip([i for i, t in enumerate(whole) if t is not None], full, strict=True))
    asked = set()

    def watched(module, name):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given: asked.add(name) or function(*given))

    watched(project._pointwise, "outer")
    watched(project, "_input_gradient")
    for wanted in ({0}, set(range(1, 7)), {0, 2, 5}, {3}):
        tensors = leaves(operands(kind))
        for number, tensor in enumerate(tensors):
            if tensor is not None:
                tensor.requires_grad_(number in wanted)
        taken = [i for i, t in enumerate(tensors) if t is not None and t.requires_grad]
        if not taken:
            continue
        asked.clear()
        for number, got in zip(
            taken, gradients(ours(tensors, window, after, backend), tensors), strict=True
        ):
            torch.testing.assert_close(got, full[number], rtol=1e-12, atol=1e-12)
        expected = {"_input_gradient"} if 0 in wanted else set()
        assert asked == expected | ({"outer"} if wanted - {0} else set())


@pytest.mark.parametrize("how", ["window", "channels_last_window", "transposed", "slice"])
@orders
@backends
def test_strides_of_x_do_not_matter(backend, after, how):
    tensors = operands("all")
    expected = ours(tensors, [1, 2, 2], after, backend)
    tensors[0] = moved(tensors[0], how)
    assert_close(ours(tensors, [1, 2, 2], after, backend), expected)
    leaf = leaves(tensors)
    again = leaves([moved(leaf[0].detach(), how), *tensors[1:]])
    found = gradients(ours(again, [1, 2, 2], after, backend), again)
    assert_close(found, gradients(defined(leaf, [1, 2, 2], after), leaf))


@formats
@orders
@backends
def test_strides_of_one_item_are_those_of_its_layout(backend, after, layout):
    # Torch's batch norm tells layouts apart by the stride of a single item, too.
    tensors = leaves(operands("all", layout=layout, shape=(1, *SHAPE[1:])))
    d_x = gradients(ours(tensors, [1, 2, 2], after, backend), tensors)[0]
    assert d_x.stride() == torch.empty_like(tensors[0]).stride()


@kinds
@backends
def test_an_empty_batch_gives_empty_rows_and_no_gradients(backend, kind):
    tensors = leaves(operands(kind, shape=(0, *SHAPE[1:])))
    outputs = ours(tensors, [1, 2, 2], False, backend)
    assert all(t.numel() == 0 for t in outputs)
    assert all(not t.any() for t in gradients(outputs, tensors))


@formats
@orders
@pytest.mark.parametrize("window", [[], [1, 2, 2]], ids=["unpooled", "pooled"])
@kinds
def test_opcheck(kind, window, after, layout):
    operators = torch.ops.nlkernels
    x, wq, bq, wk, bk, wv, bv = operands(kind, torch.float32, layout, shape=(2, 5, 2, 4, 5))
    given = (x, wq, bq, wk, bk, wv, bv, window, after, "chunked")
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(operators.block_project.default, given, test_utils=checks)
    query, key, value, key_winners, value_winners = operators.block_project(*given)
    # An operand that is x itself has a gradient all the same.
    rows = [x.flatten(2).mT if t.numel() == 0 else t for t in (query, key, value)]
    grads = [torch.randn_like(t) for t in (*rows, x)]
    arguments = (*grads, x, wq, wk, wv, key_winners, value_winners, window, after)
    for wanted in ([True, True], [True, False], [False, True]):
        torch.library.opcheck(
            operators.block_project_backward.default,
            (*arguments, wanted, "chunked"),
            test_utils=checks,
        )


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_opcheck_with_dynamic_shapes(after):
    given = (*operands("all", torch.float32), [1, 2, 2], after, "chunked")
    torch.library.opcheck(torch.ops.nlkernels.block_project.default, given)


@pytest.mark.skipif(bool(_ext.missing()), reason=_ext.missing() or "never")
@formats
@orders
@pytest.mark.parametrize("window", [[], [1, 2, 2]], ids=["unpooled", "pooled"])
def test_memory_is_what_is_documented(window, after, layout):
    shape, rows = (2, 64, 4, 28, 28), (32, 32, 48)
    tensors = operands("all", torch.float32, layout, shape=shape, rows=rows)
    batch, channels, *sizes = shape
    positions = math.prod(sizes)
    pooled = positions // 4 if window else positions
    given = (*tensors, window, after, "cpp")
    with PeakMemory() as forward:
        query, key, value, *winners = torch.ops.nlkernels.block_project(*given)
    made = sum(t.nbytes for t in (query, key, value, *winners))
    # The workspace of one product at a time, of 128 positions for each thread.
    deepest = 3 * (channels + 16)
    workspace = 4 * (3 * 48 * deepest + torch.get_num_threads() * (128 * deepest + 96 * 512))
    extra = 0
    if window:
        extra = 4 * batch * (positions * (rows[1] + rows[2]) if after else channels * pooled)
    assert forward.live_mib * MIB <= made + extra + workspace + SLACK
    x, wq, _, wk, _, wv, _ = tensors
    grads = [torch.randn_like(t) for t in (query, key, value, x)]
    arguments = (*grads, x, wq, wk, wv, *winners, window, after, [True, True], "cpp")
    with PeakMemory() as backward:
        found = torch.ops.nlkernels.block_project_backward(*arguments)
    made = sum(t.nbytes for t in found)
    if window and not after:
        extra = 2 * extra + batch * channels * pooled
    # Sums over positions: 1 MiB of packed positions, and sums beside the results.
    sums = 2**20 * 1.2 + 4 * 3 * 48 * (channels + 32)
    assert backward.live_mib * MIB <= made + extra + max(workspace, sums) + SLACK
