"""The staged forward kernels: accuracy, layouts, tiles, memory."""

import pytest
import torch

pytest.importorskip("triton")

from nlkernels import _launch, _tune
from nlkernels._spec import Problem
from nlkernels.ops.softmax import reference, triton_backward, triton_staged
from tests.helpers import SHORT, Case, assert_not_worse
from tests.ops import staged

pytestmark = pytest.mark.usefixtures("poison")

dtypes = pytest.mark.parametrize("dtype", staged.DTYPES, ids=SHORT.get)
# Both 16-bit dtypes take the same paths.
two_dtypes = pytest.mark.parametrize("dtype", staged.DTYPES[::2], ids=SHORT.get)
CASE = Case(2, 72, 304, 40, 72)


def check(tensors, scale, workspace_mib=None):
    """The 2x rule for out, float64's own statistics for stats."""
    query, key, value, _ = tensors
    out, stats = triton_staged.forward(query, key, value, scale, workspace_mib)
    wide = [t.double() for t in (query, key, value)]
    truth = reference.attention(*wide, scale)
    same = reference.attention(query, key, value, scale)
    assert_not_worse("out", out, same, truth, 2)
    products = wide[0] @ wide[1].mT
    top = products.amax(-1) if scale >= 0 else products.amin(-1)
    total = ((products - top[..., None]) * scale).exp().sum(-1)
    largest = products.abs().amax().item() if products.numel() else 0.0
    torch.testing.assert_close(stats[0].double(), top, rtol=0, atol=1e-5 * largest)
    # An error of a product is an error of the exponent.
    rtol = 1e-5 * (1 + abs(scale) * largest)
    torch.testing.assert_close(stats[1].double(), total, rtol=rtol, atol=0)
    assert out.is_contiguous()
    assert stats.is_contiguous()
    return out, stats


@pytest.mark.parametrize(("case", "dtype"), staged.half(0))
def test_not_worse_than_pytorch(case, dtype, device):
    tensors = staged.made(case, dtype, device)
    check(tensors, case.depth**-0.5)


@two_dtypes
@pytest.mark.parametrize("workspace_mib", [0.05, 1])
def test_several_tiles(dtype, workspace_mib, device):
    check(staged.made(Case(3, 200, 137, 24, 40), dtype, device), 0.3, workspace_mib)


@pytest.mark.gate
@two_dtypes
@pytest.mark.parametrize("architecture", [80, 90])
def test_every_shipped_candidate(dtype, architecture, device):
    skip_newer(architecture, device)
    case = Case(1, 150, 270, 40, 136)
    tensors = staged.made(case, dtype, device)
    problem = Problem.of(*tensors[:3])
    with _launch.pretend(architecture=architecture):
        for name, candidates in triton_staged.KERNELS.items():
            found = candidates(problem, architecture)
            assert 1 <= len(found) <= 6
            for config in found:
                with _tune.forced({name: config}):
                    check(tensors, 0.1)


def skip_newer(architecture, device):
    if device == "cuda" and architecture > _launch.architecture(torch.device(device)):
        pytest.skip(f"this GPU is older than sm_{architecture}")


@two_dtypes
@pytest.mark.parametrize("layout", staged.LAYOUTS)
def test_any_strides(layout, dtype, device):
    tensors = [staged.LAYOUTS[layout](t) for t in staged.made(CASE, dtype, device)]
    check(tensors, 0.2)


@two_dtypes
def test_layouts_mix_and_batches_expand(dtype, device):
    query, key, value, grad = staged.made(CASE, dtype, device)
    key = key[:1].expand(2, -1, -1)
    check([staged.LAYOUTS["channel_first"](query), key, value, grad], 0.2)
    check([query, key, staged.LAYOUTS["inside_channel_first"](value), grad], 0.2)


@two_dtypes
@pytest.mark.parametrize("scale", [0.0, -0.3, 2.0])
def test_any_scale(scale, dtype, device):
    check(staged.made(CASE, dtype, device), scale)


@dtypes
@pytest.mark.parametrize("scale", [1.0, -1.0])
def test_key_tiles_of_hugely_different_weight(scale, dtype, device):
    query, key, value, grad = staged.made(Case(1, 65, 1037, 16, 24), dtype, device)
    # Every key tile's largest score differs from the next one's by thousands, either way.
    steps = torch.linspace(-25, 25, 1037, device=device).cos() * 100
    query[..., 0], key[..., 0] = 100, steps.to(dtype)
    check([query, key, value, grad], scale)
    key[..., 0] = key[..., 0].sort().values
    check([query, key, value, grad], scale)


@pytest.mark.filterwarnings("ignore:(invalid value|All-NaN):RuntimeWarning")
@dtypes
@pytest.mark.parametrize("scale", [1.0, -1.0])
def test_key_tiles_of_infinite_products_weigh_nothing(scale, dtype, device):
    query, key, value, _ = staged.made(Case(1, 3, 700, 16, 24), dtype, device)
    query[:], key[..., 1:] = scale, 0
    key[:, :300, 0] = float("-inf")
    out, stats = triton_staged.forward(query, key, value, scale)
    same = reference.attention(query, key, value, scale)
    truth = reference.attention(*(t.double() for t in (query, key, value)), scale)
    assert_not_worse("out", out, same, truth, 2)
    assert stats.isfinite().all()
    key[..., 0] = float("-inf")
    out, _ = triton_staged.forward(query, key, value, scale)
    assert out.isnan().all()


@two_dtypes
@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_the_largest_values_stay_finite(scale, dtype, device):
    query, key, value, _ = staged.made(Case(1, 17, 700, 16, 24), dtype, device)
    largest = 3e38 if dtype == torch.float32 else torch.finfo(dtype).max
    out, _ = triton_staged.forward(query / 8, key / 8, value.fill_(largest), scale)
    torch.testing.assert_close(out, value[:, :17])


@two_dtypes
def test_repeats_and_wide_offsets_are_bitwise_equal(dtype, device):
    for layout in ("inside_aligned", "sliced"):
        qkv = [staged.LAYOUTS[layout](t) for t in staged.made(CASE, dtype, device)[:3]]
        first = triton_staged.forward(*qkv, 0.2, 0.1)
        again = triton_staged.forward(*qkv, 0.2, 0.1)
        with _launch.pretend(wide=True):
            wide = triton_staged.forward(*qkv, 0.2, 0.1)
        for a, b, c in zip(first, again, wide, strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a, c)


@two_dtypes
def test_nan_stays_in_its_row(dtype, device):
    query, key, value, _ = staged.made(CASE, dtype, device)
    clean, _ = triton_staged.forward(query, key, value, 0.2)
    query[1, 7, 3] = float("nan")
    out, _ = triton_staged.forward(query, key, value, 0.2)
    assert out[1, 7].isnan().all()
    out[1, 7] = clean[1, 7]
    assert torch.equal(out, clean)


@pytest.mark.parametrize("case", [Case(0, 5, 3, 8, 8), Case(2, 0, 3, 8, 8), Case(2, 5, 1, 8, 9)])
def test_few_or_no_rows(case, device):
    out, stats = check(staged.made(case, torch.float16, device), 0.5)
    assert out.shape == (case.batch, case.queries, case.value_depth)
    assert stats.shape == (2, case.batch, case.queries)


def test_aligned_operands_are_described_and_others_are_not(device):
    used = []

    def collect(kernel, grid, arguments, options):
        used.append([v for k, v in options.items() if k in ("QUERY", "KEY", "VALUE", "WEIGHTS")])

    query, key, value, _ = staged.made(CASE, torch.bfloat16, device)
    shifted = staged.LAYOUTS["inside_off_by_one"](value)
    with _launch.pretend(architecture=90, launcher=collect):
        triton_staged.forward(query, staged.LAYOUTS["inside_channel_first"](key), shifted, 0.2)
    assert used == [[1, 2, 1], [], [0, 0]]
    used.clear()
    with _launch.pretend(architecture=80, launcher=collect):
        triton_staged.forward(query, key, value, 0.2)
    assert used == [[0, 0, 0], [], [0, 0]]


@pytest.mark.parametrize(("case", "dtype", "mib"), staged.MEASURED, ids=str)
def test_memory_is_what_the_docstring_says(case, dtype, mib):
    qkv = [t.to(dtype) for t in staged.meta(case)[:3]]
    peak = staged.Peak(*qkv)
    with _launch.pretend(architecture=90, launcher=lambda *_: None), peak:
        out, stats = triton_staged.forward(*qkv, 0.1, mib)
    size = dtype.itemsize
    rows = min(staged.rows_of_a_tile(case, size, size, mib), case.batch * case.queries)
    allowed = size * rows * (case.keys + -case.keys % 8) + 8 * rows * -(-case.keys // 64)
    extra = peak.bytes - out.nbytes - stats.nbytes
    assert 0 < extra <= allowed, (extra, allowed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=SHORT.get)
def test_architectures_share_the_tested_candidates(dtype):
    problem = Problem(1, 150, 270, 40, 136, dtype, "cuda")
    for candidates in (triton_staged.KERNELS | triton_backward.KERNELS).values():
        for architecture in (86, 89, 120):
            assert candidates(problem, architecture) == candidates(problem, 80)
        assert candidates(problem, 100) == candidates(problem, 90)
