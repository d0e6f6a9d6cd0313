"""The Triton kernels of batch norms, in Triton's interpreter where there is no GPU."""

import pytest
import torch

pytest.importorskip("triton")

from nlkernels import _device, _launch, _operations, _select, _trust, _tune, _warmup
from nlkernels._memory import MIB, PeakMemory
from nlkernels.ops.norm import chunked, op, suite, triton_sums
from nlkernels.ops.norm import triton as kernels
from nlkernels.ops.norm.problem import NormProblem
from nlkernels.ops.pointwise import triton as products
from tests.helpers import DEVICE, runnable
from tests.ops.norm import CASES, EPS, Problem, assert_moments_right, assert_right

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

dtypes = pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=list(DTYPES))
maps = pytest.mark.parametrize("maps", [False, True], ids=["rows", "maps"])


def problem(case, dtype=torch.float32, maps=False, layout="rows", mean=0.0):
    return Problem(case, dtype, maps, layout, mean, device=DEVICE)


# Tails and several tiles; the others take the interpreter a minute.
FEW = [CASES[0]]
MORE = [pytest.param(case, marks=pytest.mark.gate, id=str(case)) for case in CASES[1:]]


@pytest.mark.usefixtures("poison")
@dtypes
@maps
@pytest.mark.parametrize("case", [*FEW, *MORE], ids=str)
def test_statistics_norm_and_gradients(case, maps, dtype):
    assert_right(kernels, problem(case, dtype, maps))


@pytest.mark.usefixtures("poison")
@dtypes
@maps
@pytest.mark.parametrize(
    "layout", ["apart", *(pytest.param(each, marks=pytest.mark.gate) for each in ("maps", "slice"))]
)
def test_strides_do_not_matter_and_nothing_outside_is_read(layout, maps, dtype):
    case = (2, 53, 34)
    wanted = assert_right(kernels, problem(case, dtype, maps))
    got = assert_right(kernels, problem(case, dtype, maps, layout))
    assert all(torch.equal(*pair) for pair in zip(wanted, got, strict=True))


@maps
def test_the_product_is_the_one_without_statistics(maps):
    asked = problem((2, 75, 40), torch.bfloat16, maps)
    z, _ = asked.product(kernels)
    alone = products.product([(asked.features, asked.weight)], asked.shift, None, maps)
    assert torch.equal(z, alone) and z.stride() == alone.stride()


@maps
def test_statistics_are_those_of_what_is_rounded(maps):
    asked = problem((3, 90, 20), torch.bfloat16, maps, mean=200.0)
    # Half of the numbers are rounded by more than they are apart.
    assert_moments_right(kernels, asked)


@maps
@pytest.mark.parametrize("mean", [1e3, -1e4])
def test_a_large_mean_swallows_no_variance(mean, maps):
    asked = problem((2, 300, 20), torch.float32, maps, mean=mean)
    z, moments = asked.product(kernels)
    variance, exact = torch.var_mean(z.double(), (0, 1), correction=0)
    eps = torch.finfo(torch.float32).eps
    assert (moments[0] - exact).abs().max() <= 2 * eps * abs(mean)
    # Means of tiles are rounded, the variance between them by as much.
    assert (moments[1] / variance - 1).abs().max() <= 16 * eps + 4 * eps * abs(mean) * 0.1


def test_channels_of_one_number():
    asked = problem((2, 200, 6))
    asked.weight[:3] = 0
    asked.shift[:3] = torch.tensor([0.0, 0.1, 1e15])
    z, moments = asked.product(kernels)
    eps = torch.finfo(torch.float32).eps
    off = (moments[0] - asked.shift).abs()[:3]
    assert (off <= eps * asked.shift[:3]).all()
    # The mean is rounded, and what is left of the squares is that of its rounding.
    assert (moments[1, :3] <= (2 * eps * asked.shift[:3]) ** 2).all()
    out = kernels.forward(z, moments, asked.gamma, asked.beta, None, EPS)
    assert torch.equal(out[..., 0], asked.beta[0].expand(2, 200))
    close = 1e-6 * asked.gamma[1].abs() + eps * asked.beta[1].abs()
    assert ((out[..., 1] - asked.beta[1]).abs() <= 100 * close).all()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@maps
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_number_spoils_its_channel_only(value, maps):
    asked = problem((2, 150, 20), maps=maps)
    clean = asked.product(kernels)
    asked.shift[4] = value
    z, moments = asked.product(kernels)
    others = [channel for channel in range(20) if channel != 4]
    assert torch.equal(moments[:, others], clean[1][:, others]) and moments[1, 4].isnan()
    out, d_z, d_gamma, d_beta = asked.results(kernels, z, moments)
    for got in (out, d_z, d_gamma):
        assert got[..., others].isfinite().all() and not got[..., 4].isfinite().any()
    assert d_beta.isfinite().all()


@maps
def test_expanded_gradient_no_base_and_parameters_of_other_dtypes(maps):
    asked = problem((3, 40, 18), torch.bfloat16, maps)
    asked.grad = asked.drawn(3, 1, 1).expand(3, 40, 18)
    asked.base = torch.zeros(3, 40, 18, dtype=torch.bfloat16, device=DEVICE)
    z, moments, out, *_ = assert_right(kernels, asked)
    gamma, beta = (torch.stack([t, t], 1).float()[:, 0] for t in (asked.gamma, asked.beta))
    assert torch.equal(out, kernels.forward(z, moments, gamma, beta, None, EPS))


@pytest.mark.usefixtures("poison")
@maps
@dtypes
@pytest.mark.parametrize("programs", [1, 3, 1024])
def test_halves_are_the_whole_and_runs_change_nothing_but_rounding(
    programs, dtype, maps, monkeypatch
):
    asked = problem((5, 77, 29), dtype, maps)
    z, moments = asked.product(kernels)
    d_z, sums = kernels.backward(asked.grad, z, asked.gamma, moments, EPS)
    monkeypatch.setattr(triton_sums, "PROGRAMS", programs)
    half = kernels.sums(asked.grad, z, moments, EPS)
    eps = torch.finfo(moments.dtype).eps
    torch.testing.assert_close(half, sums, rtol=20 * eps, atol=100 * eps)
    other = kernels.gradient(asked.grad, z, asked.gamma, moments, half / (5 * 77), EPS)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(other, d_z, rtol=4 * eps, atol=20 * eps)
    assert other.stride() == d_z.stride()


def test_more_tiles_than_are_put_together_at_once():
    # 70 items of one tile, more than the 64 of a step; the last position of each counts as much.
    asked = problem((70, 3, 5))
    assert_moments_right(kernels, asked)


@maps
def test_64_bit_offsets_and_repeats_change_no_bit(maps):
    asked = problem((2, 90, 20), torch.bfloat16, maps)
    results = []
    for wide in (None, True, False):
        with _launch.pretend(wide=wide):
            z, moments = asked.product(kernels)
            results.append((z, moments, *asked.results(kernels, z, moments)))
    for again in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(results[0], again, strict=True))


@pytest.mark.parametrize("architecture", runnable(80, 89, 120))
@maps
def test_other_architectures(architecture, maps):
    with _launch.pretend(architecture=architecture):
        assert_right(kernels, problem((2, 40, 24), torch.bfloat16, maps))


def collected(call):
    """Kernels, grids and constants of what a call would launch on a Hopper GPU."""
    asked = []

    def collect(kernel, grid, _, options):
        asked.append((kernel.__name__, grid, options))

    with _launch.pretend(architecture=90, launcher=collect):
        call()
    return asked


@maps
def test_launches(maps):
    rows = torch.empty(8, 3136, 256, device="meta", dtype=torch.bfloat16)
    weight, shift = rows.new_empty(512, 256), rows.new_empty(512, dtype=torch.float32)
    moments = shift.new_empty(2, 512)

    def names(call):
        return [name for name, *_ in collected(call)]

    product, put = collected(lambda: kernels.product(rows, weight, shift, maps))
    assert (product[0], product[2]["MOMENTS"], put[0]) == ("_product_kernel", True, "_put_together")
    assert put[1] == (32,)
    with _launch.pretend(architecture=90, launcher=lambda *_: None):
        z, _ = kernels.product(rows, weight, shift, maps)
    assert names(lambda: kernels.forward(z, moments, shift, shift, z, EPS)) == ["_norm_forward"]
    backward = names(lambda: kernels.backward(z, z, shift, moments, EPS))
    assert backward == ["_norm_sums", "_outer_combine", "_norm_gradient"]


def test_items_beyond_32_bits_are_read_with_64_bit_offsets():
    z = torch.empty(2, 2**21 + 2, 1024, device="meta", dtype=torch.bfloat16)
    gamma, moments = z.new_empty(1024), z.new_empty(2, 1024, dtype=torch.float32)
    for call in (
        lambda: kernels.forward(z, moments, gamma, gamma, None, EPS),
        lambda: kernels.backward(z, z, gamma, moments, EPS),
    ):
        assert all(options.get("WIDE", True) for _, _, options in collected(call))


@maps
@pytest.mark.parametrize("case", [(0, 4, 6), (2, 0, 6)], ids=str)
def test_nothing_gives_empty_results(case, maps):
    asked = problem(case, maps=maps)
    z, moments = asked.product(kernels)
    assert z.shape == case and moments.isnan().all()
    out, d_z, d_gamma, d_beta = asked.results(kernels, z, moments)
    assert out.shape == d_z.shape == case and not d_gamma.any() and not d_beta.any()


@maps
def test_memory_is_what_is_documented(maps):
    asked = problem((8, 196, 256), torch.bfloat16, maps)
    with _launch.pretend(architecture=90, launcher=lambda *_: None):
        with PeakMemory(DEVICE) as product:
            z, moments = asked.product(kernels)
        parts = 8 * 4 * 8 * 256
        assert product.live_mib * MIB <= z.nbytes + moments.nbytes + parts + 1024
        with PeakMemory(DEVICE) as sums:
            kernels.sums(asked.grad, z, moments, EPS)
        assert sums.live_mib * MIB <= 8 * 256 * (1024 + 1) + 1024
        with PeakMemory(DEVICE) as forward:
            out = kernels.forward(z, moments, asked.gamma, asked.beta, asked.base, EPS)
        assert forward.live_mib * MIB <= out.nbytes + 1024


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("head", [(16, 0), (32, 1)])
def test_verification_accepts_the_kernels(head, direction):
    device = torch.device(DEVICE)
    assert _trust.judge("norm", "triton", head, torch.float32, direction, device) == ""
    for head in suite.HEADS:
        for each in (*suite.large(head), *suite.trials(head)):
            asked = NormProblem(*each[:3], torch.float32, "cuda", 0, each.maps)
            assert op.head(asked) == head


@pytest.mark.parametrize("name", ["product", "forward", "backward", "sums"])
def test_verification_catches_kernels_that_forget_a_tail(name, monkeypatch):
    right = getattr(kernels, name)

    def product(features, weight, shift, maps):
        z, _ = right(features, weight, shift, maps)
        return z, chunked.moments(z[:, :-1])

    def forward(z, moments, gamma, beta, base, eps):
        out = right(z, moments, gamma, beta, base, eps)
        out[:, -1] = 0
        return out

    def backward(grad, z, gamma, moments, eps):
        return right(grad[:, :-1], z[:, :-1], gamma, moments, eps)

    def sums(grad, z, moments, eps):
        return right(grad[:, :-1], z[:, :-1], moments, eps)

    wrong = {"product": product, "forward": forward, "backward": backward, "sums": sums}
    monkeypatch.setattr(kernels, name, wrong[name])
    direction = "forward" if name in ("product", "forward") else "backward"
    verdict = _trust.judge(
        "norm", "triton", (16, 0), torch.float32, direction, torch.device(DEVICE)
    )
    assert verdict


@maps
def test_a_problem_that_dispatch_saw_can_be_measured(maps, monkeypatch, tmp_path):
    monkeypatch.setenv("NLKERNELS_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(_device, "MEASURED", (DEVICE,))
    monkeypatch.setattr(_trust, "distrust", lambda *_: "")
    monkeypatch.setattr(_select, "inside", lambda *_: ["chunked", "triton"])
    seen = []
    monkeypatch.setattr(_select, "recorder", lambda *found: seen.append(found))
    asked = problem((1, 24, 20), maps=maps)
    z, moments = asked.product(chunked)
    torch.ops.nlkernels.norm_backward(z, z, asked.gamma, moments, EPS, "chunked")
    for name, found, given in (each for each in seen if each[0] == "norm"):
        trial, _ = _warmup._alike(name, _warmup._Layout.of(given))
        assert (trial.channels, trial.maps) == (20, maps)
        entry = _warmup._measure(name, found, _warmup._Layout.of(given), _warmup.PASSES)
        assert entry.note == "" and set(entry.ms["backward"]) == {"chunked", "triton"}
        assert set(kernels.KERNELS) <= set(entry.configs)


def test_what_is_not_served_is_said():
    asked = problem((1, 4, 6), torch.float64)
    with pytest.raises(NotImplementedError, match="not float64"):
        asked.product(kernels)
    wanted = NormProblem(8, 3136, 512, torch.bfloat16, "cuda", 0)
    assert _select.preference("norm", wanted)[0][0] == "triton"
    assert "unverified" in _operations.OPERATIONS["norm"].table["cuda"][0]["because"]


def test_every_configuration_of_published_channels_is_one_of_a_few():
    for architecture in (80, 90):
        for channels in (64, 512, 1024, 2048):
            for dtype in DTYPES.values():
                for lies in (False, True):
                    asked = NormProblem(2, 3136, channels, dtype, "cuda", 0, lies)
                    for candidates in kernels.KERNELS.values():
                        configs = candidates(asked, architecture)
                        assert all(512 <= each.rows * each.columns <= 4096 for each in configs)
    assert _tune.bucket("norm_sums", asked, torch.device(DEVICE))
