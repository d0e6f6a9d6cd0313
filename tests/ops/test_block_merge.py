"""The end of a block, z = x + norm(weight y + bias), against its definition."""

import math
import socket
import time
from collections import Counter

import pytest
import torch
from torch import distributed, multiprocessing
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from nlkernels import _ext
from nlkernels._memory import MIB, PeakMemory
from nlkernels.ops.block import merge, reference
from nlkernels.ops.region.problem import is_channels_last
from tests.helpers import SHORT, assert_not_worse
from tests.ops.test_region import FORMATS, moved

NORMS = ("none", "affine", "fixed", "batch")
SHAPE, ROWS, EPS = (2, 10, 4, 6, 5), 7, 1e-5
# What torch counts of its own small tensors.
SLACK = 4096

poisoned = pytest.mark.usefixtures("poison")
backends = pytest.mark.parametrize(
    "backend",
    [
        pytest.param("cpp", marks=pytest.mark.skipif(bool(_ext.missing()), reason=_ext.missing())),
        "chunked",
    ],
)
biased = pytest.mark.parametrize("bias", [False, True], ids=["unbiased", "biased"])
formats = pytest.mark.parametrize("layout", list(FORMATS))
keeps = pytest.mark.parametrize("keep", [False, True], ids=["computed_again", "kept"])
norms = pytest.mark.parametrize("norm", NORMS)
residuals = pytest.mark.parametrize("residual", [True, False], ids=["residual", "no_x"])


def operands(
    norm, dtype=torch.float64, layout="ncdhw", bias=True, residual=True, shape=SHAPE, seed=0
):
    """y, x, weight, bias, gamma, beta, mean and variance; None where there is none."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    batch, channels, *sizes = shape
    y, x = drawn(batch, math.prod(sizes), ROWS), drawn(*shape)
    weight, of_channels = drawn(channels, ROWS) * ROWS**-0.5, drawn(4, channels)
    gamma, beta, mean = of_channels[:3] if norm != "none" else (None, None, None)
    var = drawn(channels).square() + 0.5
    if norm != "fixed":
        mean = var = None
    x = x.contiguous(memory_format=FORMATS[layout]) if residual else None
    found = (y, x, weight, of_channels[3] if bias else None, gamma, beta, mean, var)
    return [None if t is None else t.to(dtype) for t in found]


def leaves(tensors, dtype=None):
    """The same, all but fixed statistics as leaves of a graph."""
    found = [None if t is None else t.detach().to(dtype or t.dtype) for t in tensors]
    for tensor in found[:6]:
        if tensor is not None:
            tensor.requires_grad_()
    return found


def ours(tensors, norm, keep, backend, sizes=SHAPE[2:]):
    """The result and the statistics."""
    y, x, weight, bias, gamma, beta, mean, var = tensors
    asked = merge.Norm(gamma, beta, mean, var, EPS, norm == "batch")
    return merge.merge(y, x, sizes, weight, bias, asked, keep, backend)


def defined(tensors, norm, sizes=SHAPE[2:]):
    out = reference.merge(*tensors, EPS, norm == "batch")
    return out if tensors[1] is not None else out.unflatten(2, sizes)


def plain(tensors, norm):
    """The definition by torch's modules, the product laid out as x: rounding depends on it."""
    y, x, weight, bias, gamma, beta, mean, var = tensors
    z = reference.merge(y, None, weight, bias, *[None] * 4, EPS, False).unflatten(2, SHAPE[2:])
    last = FORMATS["channels_last"] if is_channels_last(x) else torch.contiguous_format
    z = z.contiguous(memory_format=last)
    if norm in ("batch", "fixed"):
        z = functional.batch_norm(z, mean, var, gamma, beta, norm == "batch", 0.0, EPS)
    elif norm == "affine":
        z = z * lifted(gamma) + lifted(beta)
    return x + z


def lifted(channels):
    return channels[:, None, None, None]


def gradients(out, inputs, dtype=torch.float64, **options):
    """Gradients for a random gradient of the result, numbers of a dtype."""
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(dtype).to(out.dtype)
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    return torch.autograd.grad(out, wanted, grad, **options)


def assert_close(got, wanted):
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@poisoned
@residuals
@biased
@formats
@keeps
@norms
@backends
def test_values_and_gradients_are_the_definitions(backend, norm, keep, layout, bias, residual):
    tensors = leaves(operands(norm, layout=layout, bias=bias, residual=residual))
    (got, mean, var), wanted = ours(tensors, norm, keep, backend), defined(tensors, norm)
    assert_close([got], [wanted])
    assert_close(gradients(got, tensors), gradients(wanted, tensors))
    if residual:
        assert got.stride() == tensors[1].stride()
    if norm == "batch":
        z = reference.merge(tensors[0], None, *tensors[2:4], *[None] * 4, EPS, False)
        assert_close([mean, var], [z.mean((0, 2)), z.var((0, 2))])
        assert not mean.requires_grad and not var.requires_grad
    else:
        assert mean.numel() == var.numel() == 0


@residuals
@biased
@formats
@norms
@backends
def test_gradients_of_gradients_are_the_definitions(backend, norm, layout, bias, residual):
    def second(run, *options):
        tensors = leaves(operands(norm, layout=layout, bias=bias, residual=residual))
        out = run(tensors, norm, *options)
        first = gradients(out[0] if options else out, tensors, create_graph=True)
        total = sum(t.square().sum() for t in first)
        inputs = [t for t in tensors[:6] if t is not None]
        return torch.autograd.grad(total, inputs, materialize_grads=True)

    for got, wanted in zip(second(ours, True, backend), second(defined), strict=True):
        # Second derivatives of a batch norm are sums of hundreds.
        largest = wanted.abs().max().item()
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10 * (1 + largest))


@poisoned
@pytest.mark.parametrize("dtype", list(SHORT), ids=SHORT.get)
@formats
@keeps
@norms
@backends
def test_not_worse_than_pytorch(backend, norm, keep, layout, dtype):
    """Over several draws: a channel's sum that happens to cancel in one says nothing."""
    draws = []
    for seed in range(8):
        tensors = operands(norm, dtype, layout, seed=seed)
        found = []
        for run, of in (
            (lambda t: ours(t, norm, keep, backend)[0], dtype),
            (lambda t: plain(t, norm), dtype),
            (lambda t: defined(t, norm), torch.float64),
        ):
            leaf = leaves(tensors, of)
            out = run(leaf)
            found.append([out.detach(), *gradients(out, leaf, dtype)])
        draws.append(found)
    for number in range(len(draws[0][0])):
        got, same, truth = (torch.stack([draw[i][number] for draw in draws]) for i in range(3))
        if norm == "batch" and number == 4:
            # The bias: zero but for rounding, as large as PyTorch's own.
            assert got.abs().max() <= 10 * same.abs().max() + 100 * torch.finfo(dtype).eps
            continue
        factor = 3 if number else 2
        assert_not_worse(f"result {number}", got, same.to(dtype), truth, factor)


class Operators(TorchDispatchMode):
    """Counts how often each operator of this package runs."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function.name().removeprefix("nlkernels::")] += 1
        return function(*args, **(kwargs or {}))


@keeps
@norms
@backends
def test_what_is_frozen_gets_no_gradient(backend, norm, keep):
    whole = leaves(operands(norm))
    full = gradients(ours(whole, norm, keep, backend)[0], whole)
    full = dict(zip([i for i, t in enumerate(whole[:6]) if t is not None], full, strict=True))
    for wanted in ({0}, {1}, {2, 3, 4, 5}, {0, 3}, {1, 4}):
        tensors = leaves(operands(norm))
        for number, tensor in enumerate(tensors[:6]):
            if tensor is not None:
                tensor.requires_grad_(number in wanted)
        taken = [i for i, t in enumerate(tensors) if t is not None and t.requires_grad]
        out = ours(tensors, norm, keep, backend)[0]
        with Operators() as called:
            got = gradients(out, tensors)
        for number, grad in zip(taken, got, strict=True):
            torch.testing.assert_close(grad, full[number], rtol=1e-12, atol=1e-12)
        of_weight = bool(set(taken) & {2, 3} if norm == "batch" else set(taken) - {0, 1})
        of_y = 0 in wanted
        again = norm == "batch" and not keep and taken != [1]
        assert called.counts["pointwise_outer"] == of_weight, wanted
        assert called.counts["pointwise"] == of_y + again, wanted


@poisoned
@pytest.mark.parametrize("how", ["window", "channels_last_window", "transposed", "slice"])
@norms
@backends
def test_strides_of_operands_do_not_matter(backend, norm, how):
    plain = leaves(operands(norm))
    y, x, *others = operands(norm)
    around = y.new_full((2, y.shape[1], 2 * ROWS + 1), float("nan"))[..., 1::2].copy_(y)
    given = leaves([around, moved(x, how), *others])
    got, wanted = ours(given, norm, True, backend)[0], ours(plain, norm, True, backend)[0]
    assert_close([got], [wanted])
    assert_close(gradients(got, given), gradients(wanted, plain))
    grad = torch.ones((), dtype=torch.float64).expand(wanted.shape)
    inputs = [[t for t in each[:6] if t is not None] for each in (given, plain)]
    again = ours(given, norm, True, backend)[0], ours(plain, norm, True, backend)[0]
    assert_close(
        torch.autograd.grad(again[0], inputs[0], grad),
        torch.autograd.grad(again[1], inputs[1], grad.contiguous()),
    )


@formats
@norms
@backends
def test_gradients_of_one_item_that_lie_anyhow(backend, norm, layout):
    # The stride of a single item tells torch's batch norm layouts apart.
    shape = (1, *SHAPE[1:])
    tensors = leaves(operands(norm, layout=layout, shape=shape))
    out, wanted = ours(tensors, norm, True, backend)[0], defined(tensors, norm)
    assert out.stride() == tensors[1].contiguous(memory_format=FORMATS[layout]).stride()
    inputs = [t for t in tensors[:6] if t is not None]
    for of_grad in FORMATS.values():
        grad = torch.randn(shape, dtype=torch.float64).contiguous(memory_format=of_grad)
        got = torch.autograd.grad(out, inputs, grad, retain_graph=True)
        assert_close(got, torch.autograd.grad(wanted, inputs, grad, retain_graph=True))


@pytest.mark.parametrize("norm", ["none", "affine", "fixed"])
@backends
def test_an_empty_batch_gives_an_empty_map_and_no_gradients(backend, norm):
    tensors = leaves(operands(norm, shape=(0, *SHAPE[1:])))
    out = ours(tensors, norm, True, backend)[0]
    assert out.shape == (0, *SHAPE[1:])
    assert all(not t.any() for t in gradients(out, tensors))


@pytest.mark.skipif(bool(_ext.missing()), reason=_ext.missing() or "never")
@keeps
@norms
def test_memory_is_what_is_documented(norm, keep):
    shape = (2, 64, 4, 28, 28)
    tensors = leaves(operands(norm, torch.float32, shape=shape))
    whole, threads = 4 * math.prod(shape), torch.get_num_threads()
    workspace = 4 * (48 * 2 * 72 + threads * (128 * 72 + 192 * 128)) + 4 * 64 * ROWS
    # Statistics of blocks of positions.
    workspace += (norm == "batch") * 16 * 64 * 2 * (4 * 28 * 28 // 96 + threads)
    with PeakMemory() as forward:
        out = ours(tensors, norm, keep, "cpp", shape[2:])[0]
    batch = norm == "batch"
    assert forward.live_mib * MIB <= (1 + batch) * whole + workspace + SLACK
    kept = (1 + (batch and keep)) * whole
    assert abs(forward.kept_mib * MIB - kept) <= SLACK
    grad = torch.randn(shape)
    with PeakMemory() as backward:
        torch.autograd.grad(out, [t for t in tensors[:6] if t is not None], grad)
    made = sum(t.nbytes for t in tensors[:6] if t is not None) - whole  # x's is that of the result
    # Gradient of the product, and the product again; sums by some 1 MiB of positions.
    extra = batch * (1 + (not keep)) * whole
    assert backward.live_mib * MIB <= made + extra + max(workspace, 1.3 * MIB) + SLACK


# ---- several processes ---------------------------------------------------------------------------


def worker(rank, port, split, shape, keep, queue):
    """Results of one of the processes that share out a batch."""
    torch.set_num_threads(1)
    store = f"tcp://127.0.0.1:{port}"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=len(split))
    y, x, *others = operands("batch", shape=shape)
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    start = sum(split[:rank])
    own = slice(start, start + split[rank])
    y, x, weight, bias, gamma, beta, *_ = tensors = leaves([y[own], x[own], *others])
    norm = merge.Norm(gamma, beta, eps=EPS, batch=True, group=distributed.group.WORLD)
    out, mean, var = merge.merge(y, x, shape[2:], weight, bias, norm, keep, "chunked")
    grads = torch.autograd.grad(out, tensors[:6], grad[own])
    refused = ""
    again, *_ = merge.merge(y, x, shape[2:], weight, bias, norm, keep, "chunked")
    try:
        torch.autograd.grad(again.sum(), y, create_graph=True)
    except NotImplementedError as error:
        refused = str(error)
    found = [t.detach().numpy() for t in (out, mean, var, *grads)]
    queue.put((rank, found, refused))
    distributed.barrier()
    distributed.destroy_process_group()


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()),
    reason="torch.distributed has no gloo",
)
@pytest.mark.parametrize(
    ("split", "keep"),
    [((3, 1), True), pytest.param((2, 3), False, marks=pytest.mark.gate)],
    ids=["3_and_1", "2_and_3"],
)
def test_processes_together_are_one_with_the_whole_batch(split, keep):
    shape = (sum(split), 10, 2, 4, 3)
    tensors = leaves(operands("batch", shape=shape))
    out, mean, var = ours(tensors, "batch", True, "chunked", shape[2:])
    expected = [t.detach() for t in (out, mean, var)] + list(gradients(out, tensors))
    context = multiprocessing.get_context("spawn")
    queue, port = context.SimpleQueue(), free_port()
    processes = [
        context.Process(target=worker, args=(rank, port, split, shape, keep, queue))
        for rank in range(len(split))
    ]
    for process in processes:
        process.start()
    try:
        results = received(queue, processes)
        for process in processes:
            process.join(60)
    finally:
        for process in processes:
            process.kill()
    assert [process.exitcode for process in processes] == [0] * len(split)
    parts = [[torch.from_numpy(t) for t in found] for _, found, _ in sorted(results, key=first)]
    for one, other in zip(*(part[1:3] for part in parts), strict=True):
        assert torch.equal(one, other)
    # Batches side by side; statistics; gradients of what all processes share.
    got = [torch.cat([part[i] for part in parts]) for i in (0, 3, 4)]
    assert_close(got, [expected[i] for i in (0, 3, 4)])
    assert_close(parts[0][1:3], expected[1:3])
    for number in range(5, 9):
        assert_close([sum(part[number] for part in parts)], [expected[number]])
    assert all("got create_graph=True" in refused for *_, refused in results)


def first(result):
    return result[0]


def received(queue, processes, limit_s=120):
    """What each process put; fails when one died before."""
    results, end = [], time.monotonic() + limit_s
    while len(results) < len(processes):
        if not queue.empty():
            results.append(queue.get())
            continue
        assert all(process.exitcode in (None, 0) for process in processes), "a process died"
        assert time.monotonic() < end, f"no answer within {limit_s} s"
        time.sleep(0.02)
    return results
