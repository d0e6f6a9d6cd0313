"""The Triton kernels of max pooling, in Triton's interpreter where there is no GPU."""

import pytest
import torch

pytest.importorskip("triton")

from nlkernels import _device, _ext, _launch, _operations, _select, _trust, _tune, _warmup
from nlkernels._memory import MIB, PeakMemory
from nlkernels.ops.pool import chunked, cpp, op, suite
from nlkernels.ops.pool import triton as kernels
from nlkernels.ops.pool.problem import PoolProblem
from nlkernels.ops.region.problem import like as region_like
from tests.helpers import DEVICE, assert_not_worse
from tests.ops.test_region import FORMATS, LAYOUTS, moved
from tests.ops.winners import WINNERS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Winners of 2, 4 and 8 bits, sizes that are no multiples of windows, bytes or tiles, windows of one
# number, and of so many that they are looked at in a loop.
CASES = [
    ((2, 5, 3, 9, 7), [1, 2, 2]),
    ((1, 17, 4, 5, 6), [2, 2, 2]),
    ((2, 3, 6, 7, 6), [3, 3, 3]),
    ((3, 4, 1, 1, 5), [1, 1, 3]),
    ((2, 6, 5, 3, 2), [4, 1, 1]),
    ((1, 2, 1, 3, 2), [1, 1, 1]),
]

dtypes = pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=list(DTYPES))
formats = pytest.mark.parametrize("layout", list(FORMATS))
cases = pytest.mark.parametrize(("shape", "window"), CASES, ids=str)


def operands(shape, window, dtype=torch.float32, layout="ncdhw"):
    """Random x of few digits, many of which are equal, and a gradient of its pooled numbers."""
    pooled = [*shape[:2], *(n // k for n, k in zip(shape[2:], window, strict=True))]
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(size, generator=generator) for size in (shape, pooled))
    return [
        t.to(dtype).to(DEVICE).contiguous(memory_format=FORMATS[layout])
        for t in ((x * 2).round(), grad)
    ]


def same(got, want):
    """Bitwise, but for which NaN it is and the strides."""
    return torch.equal(got.isnan(), want.isnan()) and torch.equal(
        got.nan_to_num(nan=0.5), want.nan_to_num(nan=0.5)
    )


def assert_same(module, x, grad, window):
    """Hold both passes to what another backend returns, and each to the other's winners."""
    out, winners = kernels.forward(x, window)
    expected, packed = module.forward(x, window)
    assert same(out, expected) and torch.equal(winners, packed)
    assert out.stride() == expected.stride()
    start = torch.randn_like(x)
    got = kernels.backward(grad, packed, start.clone(), window)
    want = module.backward(grad, winners, start.clone(), window)
    assert same(got, want)
    left = torch.ones_like(x, dtype=torch.bool)
    left[:, :, *(slice(n * k) for n, k in zip(grad.shape[2:], window, strict=True))] = False
    assert torch.equal(got[left], start[left])


@pytest.mark.usefixtures("poison")
@dtypes
@formats
@cases
def test_results_and_winners_are_those_of_chunked(shape, window, layout, dtype):
    assert_same(chunked, *operands(shape, window, dtype, layout), window)


@pytest.mark.skipif(DEVICE != "cpu", reason="C++ runs on CPUs only")
@pytest.mark.skipif(bool(_ext.missing()), reason=_ext.missing() or "never")
@dtypes
@formats
@cases
def test_results_and_winners_are_those_of_cpp(shape, window, layout, dtype):
    x, grad = operands(shape, window, dtype, layout)
    x[0, 0, 0, 0, 1] = float("nan")
    assert_same(cpp, x, grad, window)


@dtypes
@formats
def test_the_first_of_equals_wins_and_a_later_nan_replaces(layout, dtype):
    numbers = torch.tensor([numbers for numbers, _ in WINNERS]).view(1, -1, 1, 2, 2)
    x = torch.cat([numbers] * 3, 4).to(dtype).to(DEVICE).contiguous(memory_format=FORMATS[layout])
    out, winners = kernels.forward(x, [1, 2, 2])
    expected, packed = chunked.forward(x, [1, 2, 2])
    assert same(out, expected) and torch.equal(winners, packed)
    d_x = kernels.backward(torch.ones_like(out), winners, torch.zeros_like(x), [1, 2, 2])
    places = d_x[0, :, 0, :, 2:4].flatten(1).argmax(1)
    assert places.tolist() == [place for _, place in WINNERS]
    assert torch.equal(d_x.sum((3, 4)), torch.full_like(d_x.sum((3, 4)), 3.0))


@pytest.mark.usefixtures("poison")
@dtypes
@formats
def test_not_worse_than_pytorch(layout, dtype):
    window = [1, 2, 2]
    x, grad = operands((2, 5, 3, 9, 7), window, dtype, layout)

    def results(backend, *tensors):
        x, grad = tensors
        x = x.detach().requires_grad_()
        out = op.pool(x, window, backend)
        return out.detach(), torch.autograd.grad(out, x, grad)[0]

    got = results("triton", x, grad)
    plain = results("reference", x, grad)
    truth = results("reference", x.double(), grad.double())
    for name, factor, *each in zip(("out", "d_x"), (2, 3), got, plain, truth, strict=True):
        assert_not_worse(name, *each, factor)
    assert got[1].stride() == x.stride()


@pytest.mark.parametrize(
    ("shape", "window", "layout"),
    [
        ((1, 2, 1, 2, 300), [1, 1, 2], "ncdhw"),
        ((1, 1, 1, 40, 8), [1, 2, 2], "ncdhw"),
        ((1, 300, 1, 2, 4), [1, 2, 2], "channels_last"),
        ((2, 3, 4, 12, 16), [1, 2, 2], "channels_last"),
        ((1, 2, 16, 16, 2), [16, 16, 1], "ncdhw"),
        ((1, 5, 2, 18, 2), [1, 17, 1], "channels_last"),
    ],
    ids=str,
)
def test_several_tiles_and_the_largest_windows(shape, window, layout):
    assert_same(chunked, *operands(shape, window, torch.bfloat16, layout), window)


@pytest.mark.parametrize("how", LAYOUTS)
def test_strides_do_not_matter_and_nothing_outside_is_read(how):
    window = [1, 2, 2]
    x, grad = operands((2, 5, 2, 5, 4), window, torch.bfloat16)
    out, winners = kernels.forward(moved(x, how), window)
    assert same(out, kernels.forward(x, window)[0])
    d_x = kernels.backward(moved(grad, how), winners, moved(x, how), window)
    assert same(d_x, chunked.backward(grad, winners, moved(x, how), window))


@pytest.mark.parametrize("layout", ["ncdhw", "channels_last"])
def test_gradients_may_lie_in_another_way_than_x(layout):
    window = [2, 2, 2]
    x, grad = operands((2, 6, 4, 5, 4), window, torch.float32, layout)
    _, winners = kernels.forward(x, window)
    other = FORMATS["channels_last" if layout == "ncdhw" else "ncdhw"]
    for given in (grad.contiguous(memory_format=other), grad.sum().expand(grad.shape)):
        got = kernels.backward(given, winners, torch.zeros_like(x), window)
        assert torch.equal(got, chunked.backward(given, winners, torch.zeros_like(x), window))


@formats
def test_64_bit_offsets_and_repeats_change_no_bit(layout):
    window = [1, 2, 2]
    x, grad = operands((2, 9, 2, 5, 6), window, torch.bfloat16, layout)
    out, winners = kernels.forward(x, window)
    d_x = kernels.backward(grad, winners, x.clone(), window)
    for wide in (True, False):
        with _launch.pretend(wide=wide):
            again = kernels.forward(x, window)
            assert torch.equal(again[0], out) and torch.equal(again[1], winners)
            assert torch.equal(kernels.backward(grad, winners, x.clone(), window), d_x)


def test_positions_beyond_32_bits_are_read_with_64_bit_offsets():
    x = torch.empty(2, 2048, 32, 256, 256, device="meta")
    asked = []

    def collect(kernel, grid, arguments, options):
        asked.append((grid, options))

    with _launch.pretend(architecture=90, launcher=collect):
        out, winners = kernels.forward(x, [1, 2, 2])
        kernels.backward(out, winners, x, [1, 2, 2])
    assert [options["WIDE"] for _, options in asked] == [True, True]
    assert all(grid[0] < 2**31 for grid, _ in asked)


@pytest.mark.parametrize("architecture", [80, 89, 120])
@formats
def test_other_architectures(architecture, layout):
    with _launch.pretend(architecture=architecture):
        assert_same(chunked, *operands((1, 3, 2, 5, 6), [1, 2, 2], layout=layout), [1, 2, 2])


@pytest.mark.parametrize("shape", [(0, 3, 2, 4, 4), (2, 3, 2, 1, 4), (2, 3, 0, 4, 4)], ids=str)
def test_nothing_to_pool_gives_empty_results(shape):
    x, grad = operands(shape, [1, 2, 2])
    out, winners = kernels.forward(x, [1, 2, 2])
    expected, packed = chunked.forward(x, [1, 2, 2])
    assert (out.shape, winners.shape) == (expected.shape, packed.shape)
    assert torch.equal(kernels.backward(grad, winners, x.clone(), [1, 2, 2]), x)


def test_one_launch_for_each_pass():
    launched = []
    x, grad = operands((2, 8, 2, 4, 4), [1, 2, 2])

    def collect(kernel, *_):
        launched.append(kernel.__name__)

    with _launch.pretend(architecture=90, launcher=collect):
        _, winners = kernels.forward(x, [1, 2, 2])
        kernels.backward(grad, winners, x, [1, 2, 2])
    assert launched == ["_pool_forward", "_pool_backward"]


@formats
def test_memory_is_what_is_documented(layout):
    window = [1, 2, 2]
    x, grad = operands((8, 32, 4, 14, 14), window, torch.bfloat16, layout)
    with _launch.pretend(architecture=90, launcher=lambda *_: None):
        with PeakMemory(DEVICE) as forward:
            out, winners = kernels.forward(x, window)
        assert forward.live_mib * MIB <= out.nbytes + winners.nbytes + 1024
        assert winners.nbytes <= out.numel() // 4 + 32 * 8 * 4 * 7
        with PeakMemory(DEVICE) as backward:
            kernels.backward(grad, winners, x, window)
        assert backward.live_mib * MIB <= 1024


@pytest.mark.parametrize("head", [(1, 2, 2, 0), (2, 2, 2, 1)], ids=str)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_verification_accepts_the_kernels(head, direction):
    device = torch.device(DEVICE)
    assert _trust.judge("pool", "triton", head, torch.float32, direction, device) == ""
    for each in (*suite.large(head), *suite.trials(head)):
        asked = PoolProblem(*each.shape, each.window, torch.float32, "cuda", 0, each.channels_last)
        assert op.head(asked) == head
        assert suite.like((suite.operands(each, torch.float32, device)[0], head[:3])) == each


def test_verification_catches_a_kernel_that_takes_the_last_of_equals(monkeypatch):
    def last(x, window):
        flipped = x.flip(4)
        found = chunked.forward(flipped, window)
        return found[0].flip(4), found[1]

    monkeypatch.setattr(kernels, "forward", last)
    device = torch.device(DEVICE)
    wrong = _trust.judge("pool", "triton", (1, 2, 2, 0), torch.float32, "backward", device)
    assert "d_x max error" in wrong


def test_a_problem_that_dispatch_saw_can_be_measured(monkeypatch, tmp_path):
    monkeypatch.setenv("NLKERNELS_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(_device, "MEASURED", (DEVICE,))
    monkeypatch.setattr(_trust, "distrust", lambda *_: "")
    monkeypatch.setattr(_select, "inside", lambda *_: ["chunked", "triton"])
    seen = []
    monkeypatch.setattr(_select, "recorder", lambda *found: seen.append(found))
    x, _ = operands((1, 4, 2, 4, 4), [1, 2, 2], layout="channels_last")
    op.forward(x, [1, 2, 2], "chunked")
    ((name, asked, given),) = seen
    entry = _warmup._measure(name, asked, _warmup._Layout.of(given), _warmup.PASSES)
    assert entry.note == "" and set(entry.ms["backward"]) == {"chunked", "triton"}
    assert set(entry.configs) == set(kernels.KERNELS)


def test_a_forced_configuration_is_the_one_that_runs():
    window = [1, 2, 2]
    x, grad = operands((1, 5, 2, 4, 10), window)
    config = _launch.Config(2, 4, warps=1, stages=1)
    with _tune.forced(dict.fromkeys(kernels.KERNELS, config)):
        assert_same(chunked, x, grad, window)


def test_gradients_are_added_once_where_the_kernel_is_timed():
    window = [1, 2, 2]
    x, grad = operands((1, 5, 2, 4, 10), window)
    _, winners = kernels.forward(x, window)
    with _tune.tuning() as found:
        got = kernels.backward(grad, winners, x.clone(), window)
    assert len(found) == 1
    assert torch.equal(got, chunked.backward(grad, winners, x.clone(), window))


def test_what_is_not_served_is_said():
    x, _ = operands((1, 2, 1, 2, 2), [1, 2, 2])
    with pytest.raises(NotImplementedError, match="not float64"):
        op.pool(x.double(), [1, 2, 2], "triton")
    with pytest.raises(NotImplementedError, match="windows of up to 256"):
        op.pool(x.new_empty(1, 1, 1, 17, 17), [1, 17, 17], "triton")
    wanted = PoolProblem.of(region_like(x), [1, 2, 2])._replace(device="cuda")
    assert _select.preference("pool", wanted)[0][0] == "triton"
    assert "unverified" in _operations.OPERATIONS["pool"].table["cuda"][0]["because"]
