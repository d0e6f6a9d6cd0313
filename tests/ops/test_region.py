"""Region aggregation: its definition, every backend's numbers, and the operator contract."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nlkernels import _ext, explain, region_aggregate
from nlkernels._memory import MIB, PeakMemory
from tests.helpers import SHORT, assert_not_worse

NAMES = ("out", "d_x", "d_weight")
BACKENDS = ("chunked", "auto")
FORMATS = {"ncdhw": torch.contiguous_format, "channels_last": torch.channels_last_3d}
# (shape of x, kernel): frames, heights and widths of 1 and below the kernel's, several items.
CASES = [
    ((2, 3, 4, 6, 5), (3, 3, 3)),
    ((1, 17, 3, 9, 8), (3, 7, 7)),
    ((3, 1, 1, 1, 7), (3, 7, 7)),
    ((1, 64, 2, 8, 1), (1, 3, 3)),
    ((2, 3, 5, 1, 3), (3, 1, 1)),
    ((2, 17, 2, 3, 4), (5, 5, 5)),
    ((2, 4, 3, 2, 2), (1, 1, 1)),
    ((1, 64, 5, 14, 14), (3, 7, 7)),
]

backends = pytest.mark.parametrize("backend", BACKENDS)
cases = pytest.mark.parametrize(("shape", "kernel"), CASES, ids=str)
formats = pytest.mark.parametrize("layout", list(FORMATS))


def tensors(shape, kernel, dtype=torch.float64, layout="ncdhw", device="cpu"):
    """Random x, weight and a gradient for the output."""
    sizes = (shape, (shape[1], *kernel), shape)
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
    x, weight, grad = (t.to(dtype).to(device) for t in drawn)
    return [
        x.contiguous(memory_format=FORMATS[layout]),
        weight,
        grad.contiguous(memory_format=FORMATS[layout]),
    ]


def results(aggregate, x, weight, grad):
    """Output and gradients of aggregate(x, weight)."""
    inputs = [t.detach().requires_grad_() for t in (x, weight)]
    out = aggregate(*inputs)
    return dict(zip(NAMES, (out.detach(), *torch.autograd.grad(out, inputs, grad)), strict=True))


def run(backend):
    return lambda x, weight: region_aggregate(x, weight, backend=backend)


def assert_right(aggregate, operands):
    """Hold output and gradients to the 2x/3x rule.

    Beside the definition in float32, rounded: torch's own bfloat16 convolution of one channel gives
    numbers from memory that nothing wrote (2.13, CPUs with AMX).
    """
    truth = results(run("reference"), *(t.double() for t in operands))
    wide = torch.promote_types(operands[0].dtype, torch.float32)
    same = results(run("reference"), *(t.to(wide) for t in operands))
    got = results(aggregate, *operands)
    for name in NAMES:
        factor = 2 if name == "out" else 3
        assert_not_worse(name, got[name], same[name].to(got[name].dtype), truth[name], factor)
    return got


@cases
def test_reference_is_the_sum_over_neighbours(shape, kernel, device):
    x, weight, _ = tensors(shape, kernel, device=device)
    padded = torch.nn.functional.pad(x, [n for k in reversed(kernel) for n in (k // 2, k // 2)])
    expected = torch.zeros_like(x)
    for i, j, k in itertools.product(*map(range, kernel)):
        part = padded[:, :, i : i + shape[2], j : j + shape[3], k : k + shape[4]]
        expected += weight[:, i, j, k].view(-1, 1, 1, 1) * part
    got = region_aggregate(x, weight, backend="reference")
    assert (got - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", list(SHORT), ids=list(SHORT.values()))
@formats
@cases
@backends
def test_not_worse_than_pytorch(backend, shape, kernel, layout, dtype, device):
    assert_right(run(backend), tensors(shape, kernel, dtype, layout, device))


@formats
@backends
def test_result_and_gradient_have_the_layout_of_x(backend, layout, device):
    x, weight, grad = tensors((2, 8, 3, 4, 5), (3, 3, 3), torch.float32, layout, device)
    got = results(run(backend), x, weight, grad)
    assert got["out"].stride() == got["d_x"].stride() == x.stride()
    got = results(run(backend), x, weight, grad.sum().expand(grad.shape))
    assert got["d_x"].stride() == x.stride() and got["d_weight"].is_contiguous()


def moved(x, how):
    """The same numbers in other memory, NaN around them."""
    batch, channels, frames, height, width = x.shape
    around = x.new_full((batch, channels + 2, frames + 1, height + 2, width + 3), float("nan"))
    last = around.contiguous(memory_format=torch.channels_last_3d)
    if how == "window":
        place = around[:, 1:-1, :frames, 1:-1, 2 : width + 2]
    elif how == "channels_last_window":
        place = last[:, 1:-1, :frames, 1:-1, 2 : width + 2]
    elif how == "transposed":
        place = x.new_empty(batch, channels, width, height, frames).transpose(2, 4)
    elif how == "channels_last_slice":
        place = x.new_full((batch, frames, height, width, channels + 3), float("nan"))
        place = place[..., 1 : channels + 1].permute(0, 4, 1, 2, 3)
    else:
        place = x.new_full((2 * batch, channels + 2, *x.shape[2:]), float("nan"))[::2, 1:-1]
    return place.copy_(x)


@pytest.mark.parametrize(
    ("shape", "kernel"),
    [
        ((1, 48, 4, 56, 56), (3, 7, 7)),
        ((1, 48, 4, 56, 56), (3, 1, 3)),
        ((2, 96, 2, 40, 33), (3, 7, 7)),
        ((2, 96, 2, 40, 33), (3, 1, 3)),
        ((1, 20, 2, 2, 500), (1, 3, 3)),
    ],
    ids=str,
)
def test_frames_of_many_positions(shape, kernel, device):
    # Long chains of products once made the weight's gradient 4.4 times as wrong as torch's.
    assert_right(run("chunked"), tensors(shape, kernel, torch.float32, device=device))


LAYOUTS = ("window", "channels_last_window", "transposed", "channels_last_slice", "slice")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["fp64", "bf16"])
@pytest.mark.parametrize("how", LAYOUTS)
@backends
def test_strides_do_not_matter(backend, how, dtype, device):
    x, weight, grad = tensors((2, 5, 3, 6, 4), (3, 3, 3), dtype, device=device)
    assert_right(run(backend), [moved(x, how), moved(weight[None], how)[0], moved(grad, how)])


@backends
def test_expanded_operands(backend, device):
    x, weight, grad = tensors((1, 4, 3, 5, 4), (3, 3, 3), device=device)
    x, grad = x.expand(3, -1, -1, -1, -1), grad.new_ones(()).expand(3, *grad.shape[1:])
    assert_right(run(backend), [x, weight[:1].expand(4, -1, -1, -1), grad])


@pytest.mark.parametrize("shape", [(0, 3, 2, 4, 4), (2, 3, 0, 4, 4), (2, 3, 2, 4, 0)], ids=str)
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_empty_x_gives_empty_results(backend, shape, device):
    got = results(run(backend), *tensors(shape, (3, 3, 3), device=device))
    assert got["out"].shape == got["d_x"].shape == shape
    assert got["d_weight"].shape == (3, 3, 3, 3) and not got["d_weight"].any()


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("backend", ["reference", "chunked"])
@formats
def test_gradcheck_and_gradgradcheck(backend, layout, device):
    x, weight, _ = tensors((2, 2, 3, 3, 2), (3, 1, 3), layout=layout, device=device)
    inputs = (x.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(run(backend), inputs, nondet_tol=0)
    assert torch.autograd.gradgradcheck(run(backend), inputs, nondet_tol=0)


@pytest.mark.parametrize("wanted", ["11", "10", "01"])
def test_third_order_gradients_equal_the_definitions(wanted):
    def third(backend):
        inputs = [
            t.requires_grad_(flag == "1")
            for t, flag in zip(tensors((2, 3, 2, 4, 3), (3, 3, 3))[:2], wanted, strict=True)
        ]
        wrt = [t for t in inputs if t.requires_grad]
        total = region_aggregate(*inputs, backend=backend).pow(3).sum()
        for _ in range(2):
            grads = torch.autograd.grad(total, wrt, create_graph=True)
            total = sum(g.square().sum() for g in grads)
        return torch.autograd.grad(total, wrt)

    for got, want in zip(third("chunked"), third("reference"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@formats
def test_opcheck(layout):
    x, weight, grad = tensors((2, 3, 3, 4, 5), (3, 3, 3), layout=layout)
    for first, second in ((x, grad), (moved(x, "window"), moved(grad, "transposed"))):
        torch.library.opcheck(
            torch.ops.nlkernels.region_forward.default, (first, weight, "chunked")
        )
        torch.library.opcheck(
            torch.ops.nlkernels.region_backward.default, (second, first, weight, "chunked")
        )


@formats
def test_fullgraph_compile_equals_eager_without_recompiling_for_new_sizes(layout):
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def double(x, weight):
        return region_aggregate(x * 2, weight)

    compiled = torch.compile(double, fullgraph=True, backend="aot_eager", dynamic=True)
    traced = torch.compile(double, fullgraph=True, backend=count, dynamic=True)
    for shape in ((2, 3, 4, 5, 6), (3, 3, 7, 8, 6), (2, 3, 4, 9, 5)):
        operands = tensors(shape, (3, 3, 3), layout=layout)
        expected, got = results(double, *operands), results(compiled, *operands)
        for name in NAMES:
            torch.testing.assert_close(got[name], expected[name], rtol=1e-12, atol=1e-12)
        assert got["out"].stride() == expected["out"].stride()
        with torch.no_grad():
            traced(*operands[:2])
    assert len(graphs) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_casts_operands_and_keeps_sums_wide(dtype, device):
    x, weight, grad = tensors((2, 8, 3, 6, 5), (3, 3, 3), torch.float32, device=device)
    expected = results(run("chunked"), *(t.to(dtype) for t in (x, weight, grad)))

    def cast(x, weight):
        with torch.autocast(device, dtype=dtype):
            return region_aggregate(x, weight, backend="chunked")

    got = results(cast, x, weight, grad.to(dtype))
    assert got["out"].dtype == dtype and torch.equal(got["out"], expected["out"])
    for name in ("d_x", "d_weight"):
        assert got[name].dtype == torch.float32
        assert torch.equal(got[name], expected[name].float())
    with torch.autocast(device, dtype=dtype):
        assert region_aggregate(x.double(), weight.double()).dtype == torch.float64
        inside = results(run("chunked"), *(t.to(dtype) for t in (x, weight, grad)))
    assert all(torch.equal(inside[name], expected[name]) for name in NAMES)


def test_any_operand_may_go_without_a_gradient_and_modes_agree(device):
    x, weight, grad = tensors((2, 3, 3, 4, 4), (3, 3, 3), device=device)
    full = results(run("chunked"), x, weight, grad)
    for position, name in enumerate(("d_x", "d_weight")):
        inputs = [t.detach().requires_grad_(i == position) for i, t in enumerate((x, weight))]
        region_aggregate(*inputs, backend="chunked").backward(grad)
        assert torch.equal(inputs[position].grad, full[name])
        assert inputs[1 - position].grad is None
    with torch.inference_mode():
        assert torch.equal(region_aggregate(x, weight, backend="chunked"), full["out"])


def test_functorch_grad_works_and_vmap_says_no():
    x, weight, _ = tensors((2, 3, 2, 3, 3), (3, 3, 3))
    grad = torch.func.grad(lambda x: region_aggregate(x, weight).sum())(x)
    expected = results(run("reference"), x, weight, torch.ones_like(x))["d_x"]
    torch.testing.assert_close(grad, expected, rtol=1e-11, atol=1e-12)
    with pytest.raises(RuntimeError, match="vmap"):
        torch.vmap(lambda x: region_aggregate(x, weight))(x.expand(3, *x.shape))


@pytest.mark.usefixtures("repeatable")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@backends
def test_repeats_are_bitwise_equal(backend, dtype, device):
    operands = tensors((3, 32, 4, 14, 14), (3, 7, 7), dtype, device=device)
    first = results(run(backend), *operands)
    for _ in range(10):
        again = results(run(backend), *operands)
        assert all(torch.equal(again[name], first[name]) for name in NAMES)


@backends
def test_linear_in_x_and_in_weight(backend, device):
    x, weight, other = tensors((2, 3, 4, 6, 5), (3, 3, 3), device=device)
    out = region_aggregate(x, weight, backend=backend)
    both = region_aggregate(x + 2 * other, weight, backend=backend)
    single = region_aggregate(other, weight, backend=backend)
    torch.testing.assert_close(both, out + 2 * single, rtol=1e-11, atol=1e-12)
    scaled = region_aggregate(x, -3 * weight, backend=backend)
    torch.testing.assert_close(scaled, -3 * out, rtol=1e-11, atol=1e-12)


@backends
def test_an_impulse_shows_the_flipped_kernel_around_it_and_nothing_elsewhere(backend, device):
    _, weight, _ = tensors((1, 2, 1, 1, 1), (3, 5, 3), torch.float32, device=device)
    x = torch.zeros(2, 2, 6, 9, 7, device=device)
    x[1, 1, 3, 4, 2] = 1.0
    out = region_aggregate(x, weight, backend=backend)
    window = out[1, 1, 2:5, 2:7, 1:4].clone()
    assert torch.equal(window, weight[1].flip(0, 1, 2))
    out[1, 1, 2:5, 2:7, 1:4] = 0
    assert not out.any()


@backends
def test_a_bad_number_touches_its_neighbours_and_its_channel_only(backend, device):
    x, weight, grad = tensors((2, 3, 4, 6, 5), (3, 3, 3), torch.float32, device=device)
    clean = results(run(backend), x, weight, grad)
    x[1, 1, 2, 3, 2] = float("nan")
    dirty = results(run(backend), x, weight, grad)
    near = torch.zeros(x.shape, dtype=torch.bool)
    near[1, 1, 1:4, 2:5, 1:4] = True
    assert dirty["out"][near].isnan().all()
    assert torch.equal(dirty["out"][~near], clean["out"][~near])
    for channel in (0, 2):
        assert torch.equal(dirty["d_weight"][channel], clean["d_weight"][channel])


@pytest.mark.parametrize("dtype", list(SHORT), ids=list(SHORT.values()))
@formats
def test_memory_stays_within_the_documented_bound(layout, dtype, device):
    batch, channels, frames, height, width = shape = (3, 32, 4, 20, 20)
    kernel = (3, 5, 5)
    x, weight, grad = tensors(shape, kernel, dtype, layout, device)
    wide = max(dtype.itemsize, 4)
    item, taps = channels * frames * height * width, channels * 75
    half = dtype.itemsize == 2
    copied = layout == "ncdhw" or half
    numbers = 2 * batch * item * copied + item * half + taps
    frames_of_item = (4 + half) * item + 3 * channels * frames * 25 + taps
    if dtype == torch.float64:
        numbers += batch * item * 76
    scratch = MIB // 64
    with PeakMemory(device) as forward:
        region_aggregate(x, weight, backend="chunked")
    out = x.numel() * x.element_size()
    assert forward.live_mib * MIB <= out + wide * numbers + scratch
    arguments = (grad, x, weight, "chunked")
    with PeakMemory(device) as backward:
        torch.ops.nlkernels.region_backward(*arguments)
    results_bytes = out + weight.numel() * weight.element_size()
    most = max(numbers, frames_of_item) * wide
    assert backward.live_mib * MIB <= results_bytes + most + scratch


def test_x_and_weight_are_all_that_is_saved():
    x, weight, _ = tensors((2, 3, 3, 4, 4), (3, 3, 3))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        region_aggregate(x.requires_grad_(), weight)
    assert [t.shape for t in saved] == [x.shape, weight.shape]


def test_flops_are_counted():
    x, weight, grad = tensors((2, 3, 4, 5, 6), (3, 3, 5))
    forward = 2 * x.numel() * 45
    with FlopCounterMode(display=False) as counter:
        results(run("chunked"), x, weight, grad)
    assert counter.get_total_flops() == 3 * forward


def test_explain_gives_a_reason_for_every_backend():
    x, weight, _ = tensors((2, 3, 4, 5, 6), (3, 3, 3))
    explanation = explain("region_aggregate", x, weight)
    assert explanation.backend == ("chunked" if _ext.missing() else "cpp")
    assert set(explanation.reasons) == {"reference", "chunked", "cpp", "triton", "cuda"}
    assert "kernel 3x3x3 float64 on cpu" in str(explanation)
    with pytest.raises(NotImplementedError, match=r"region_aggregate: expected .* use backend="):
        region_aggregate(x, weight, backend="sdpa")
    with pytest.raises(NotImplementedError, match="float64"):
        region_aggregate(x, weight, backend="triton")


def test_environment_names_the_backend(monkeypatch):
    x, weight, _ = tensors((2, 3, 4, 5, 6), (3, 3, 3))
    monkeypatch.setenv("NLKERNELS_BACKEND", "reference")
    assert explain("region_aggregate", x, weight).backend == "reference"
    assert explain("region_aggregate", x, weight, backend="chunked").backend == "chunked"


X, WEIGHT = torch.zeros(2, 3, 4, 5, 6), torch.zeros(3, 3, 3, 3)


@pytest.mark.parametrize(
    ("x", "weight", "error", "message"),
    [
        ([1.0], WEIGHT, TypeError, "expected x to be a tensor, got list; convert"),
        (X.to_sparse(), WEIGHT, TypeError, "dense tensor, got torch.sparse_coo; .*to_dense"),
        (X[0], WEIGHT, ValueError, r"x of 5 dimensions .* got \(3, 4, 5, 6\)"),
        (X, WEIGHT[:, None], ValueError, r"weight of 4 dimensions .* squeeze\(1\)"),
        (X.int(), WEIGHT.int(), TypeError, "one dtype out of float16.* int32"),
        (X, WEIGHT.double(), TypeError, "weight .* float64 on cpu; cast them"),
        (X, WEIGHT.to("meta"), ValueError, r"on one device, got .* meta; move them"),
        (X, WEIGHT[:2], ValueError, r"same channels, .* \(2, 3, 3, 3\)"),
        (X[:, :0], WEIGHT[:0], ValueError, "same channels, not 0"),
        (X, WEIGHT[:, :, :2], ValueError, "odd sizes, got .* pad it"),
        (X, WEIGHT[:, :0], ValueError, "odd sizes, got .* pad it"),
    ],
)
def test_errors_say_what_was_expected_what_came_and_what_to_do(x, weight, error, message):
    with pytest.raises(error, match=f"region_aggregate: .*{message}"):
        region_aggregate(x, weight)
    with pytest.raises(error, match=message):
        explain("region_aggregate", x, weight)


def test_unknown_backend_is_named():
    with pytest.raises(ValueError, match=r"region_aggregate: expected backend .* 'chunked'"):
        region_aggregate(X, WEIGHT, backend="chunk")
