"""The staged backward kernels: accuracy, layouts, tiles, memory."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from nlkernels import _launch, _tune
from nlkernels._spec import Problem
from nlkernels.ops.softmax import chunked, triton_backward, triton_fused, triton_staged
from tests.helpers import SHORT, Case
from tests.ops import staged

pytestmark = pytest.mark.usefixtures("poison")

# Both 16-bit dtypes take the same paths.
two_dtypes = pytest.mark.parametrize("dtype", staged.DTYPES[::2], ids=SHORT.get)
CASE = Case(2, 72, 304, 40, 72)


def check(tensors, scale, workspace_mib=None):
    got = staged.run(tensors, scale, workspace_mib)
    staged.judge(got, tensors, scale)
    for name, operand in zip(staged.NAMES[1:], tensors, strict=False):
        assert got[name].stride() == torch.empty_like(operand).stride()
    return got


@pytest.mark.parametrize(("case", "dtype"), staged.half(1))
def test_not_worse_than_pytorch(case, dtype, device):
    check(staged.made(case, dtype, device), case.depth**-0.5)


@two_dtypes
@pytest.mark.parametrize("workspace_mib", [0.05, 1])
def test_several_tiles(dtype, workspace_mib, device):
    check(staged.made(Case(3, 200, 137, 24, 40), dtype, device), 0.3, workspace_mib)


@pytest.mark.gate
@two_dtypes
@pytest.mark.parametrize("architecture", [80, 90])
def test_every_shipped_candidate(dtype, architecture, device):
    if device == "cuda" and architecture > _launch.architecture(torch.device(device)):
        pytest.skip(f"this GPU is older than sm_{architecture}")
    for keys in (270, 60):
        tensors = staged.made(Case(1, 150, keys, 40, 136), dtype, device)
        problem = Problem.of(*tensors[:3])
        with _launch.pretend(architecture=architecture):
            for name, candidates in triton_backward.KERNELS.items():
                found = candidates(problem, architecture)
                assert 1 <= len(found) <= 6
                for config in found:
                    with _tune.forced({name: config}):
                        check(tensors, 0.1)


@two_dtypes
@pytest.mark.parametrize("mean", [1, 8])
@pytest.mark.parametrize("sharp", [0.1, 3])
def test_keys_and_values_far_from_zero(sharp, mean, dtype, device):
    query, key, value, grad = staged.made(Case(1, 65, 400, 16, 24), torch.float64, device)
    tensors = [t.to(dtype) for t in (query, key + mean, value + mean, grad)]
    check(tensors, sharp)


@pytest.mark.parametrize("scale", [0.25, -0.25])
@pytest.mark.parametrize("keys", [1, 2, 60, 400])
@pytest.mark.parametrize("dtype", staged.DTYPES, ids=SHORT.get)
def test_statistics_of_rounded_products_will_do(dtype, keys, scale, device):
    tensors = staged.made(Case(1, 64, keys, 16, 24), dtype, device)
    tensors[0] *= 16
    out, stats = triton_staged.forward(*tensors[:3], scale)
    stats = stats.to(torch.bfloat16).float()
    grads = triton_backward.backward(tensors[3], *tensors[:3], out, stats, scale)
    staged.judge(dict(zip(staged.NAMES[1:], grads, strict=True)), tensors, scale)


@two_dtypes
def test_statistics_of_products_added_in_another_order_will_do(dtype, device):
    tensors = staged.made(Case(1, 64, 200, 64, 32), dtype, device)
    tensors[0] *= 30
    out, stats = triton_fused.forward(*tensors[:3], 1.0)
    grads = triton_backward.backward(tensors[3], *tensors[:3], out, stats, 1.0)
    staged.judge(dict(zip(staged.NAMES[1:], grads, strict=True)), tensors, 1.0)


def test_products_of_chunked_are_not_rounded_on_gpus(monkeypatch):
    rows = SimpleNamespace(shape=(2, 9, 8), device=torch.device("cuda"), mT=None)
    made = []
    monkeypatch.setattr(torch, "bmm", lambda *_, out, **__: made.append(out.dtype) or out)
    chunked._Tile(torch.bfloat16, torch.device("cpu"), matrices=1).product(0, rows, rows)
    assert made == [torch.float32]


@two_dtypes
@pytest.mark.parametrize("layout", staged.LAYOUTS)
def test_any_strides(layout, dtype, device):
    tensors = [staged.LAYOUTS[layout](t) for t in staged.made(CASE, dtype, device)]
    check(tensors, 0.2)


@pytest.mark.gate
@two_dtypes
def test_layouts_mix_and_expand(dtype, device):
    query, key, value, grad = staged.made(CASE, dtype, device)
    channel_first = staged.LAYOUTS["channel_first"]
    check([channel_first(query), key[:1].expand(2, -1, -1), value, grad], 0.2)
    check([query, key, channel_first(value), channel_first(grad)], 0.2, 0.1)
    check([query, key, value, grad[:1, :1, :1].expand_as(grad)], 0.2)
    check([query, key, value, grad[:, :1].expand_as(grad)], 0.2)


@two_dtypes
@pytest.mark.parametrize("scale", [0.0, -0.3, 2.0])
def test_any_scale(scale, dtype, device):
    got = check(staged.made(CASE, dtype, device), scale, 0.2)
    if scale == 0:
        assert not got["d_query"].any()
        assert not got["d_key"].any()


@two_dtypes
@pytest.mark.parametrize("scale", [1.0, -1.0])
def test_scores_of_ten_thousand(scale, dtype, device):
    query, key, value, grad = staged.made(Case(1, 65, 300, 16, 24), dtype, device)
    query[..., 0], key[..., 0] = 100, torch.linspace(-25, 25, 300, device=device).cos() * 100
    check([query, key, value, grad], scale)


@two_dtypes
def test_repeats_and_wide_offsets_are_bitwise_equal(dtype, device):
    for layout in ("inside_aligned", "sliced"):
        tensors = [staged.LAYOUTS[layout](t) for t in staged.made(CASE, dtype, device)]
        first = staged.run(tensors, 0.2)
        again = staged.run(tensors, 0.2)
        with _launch.pretend(wide=True):
            wide = staged.run(tensors, 0.2)
        for name in staged.NAMES:
            assert torch.equal(first[name], again[name])
            assert torch.equal(first[name], wide[name])


@two_dtypes
@pytest.mark.parametrize("place", [0, 3], ids=["query", "grad"])
def test_nan_stays_in_its_row_of_d_query(place, dtype, device):
    tensors = staged.made(CASE, dtype, device)
    clean = staged.run(tensors, 0.2)["d_query"]
    tensors[place][1, 7, 3] = float("nan")
    got = staged.run(tensors, 0.2)["d_query"]
    assert got[1, 7].isnan().all()
    got[1, 7] = clean[1, 7]
    assert torch.equal(got, clean)


@pytest.mark.parametrize("case", [Case(0, 5, 3, 8, 8), Case(2, 0, 3, 8, 8), Case(2, 5, 1, 8, 9)])
def test_few_or_no_rows(case, device):
    got = check(staged.made(case, torch.float16, device), 0.5)
    assert not got["d_query"].any()
    if not case.queries:
        assert not got["d_value"].any()


@pytest.mark.parametrize(("case", "dtype", "mib"), staged.MEASURED, ids=str)
def test_memory_is_what_the_docstring_says(case, dtype, mib):
    query, key, value, grad = (t.to(dtype) for t in staged.meta(case))
    with _launch.pretend(architecture=90, launcher=lambda *_: None):
        out, stats = triton_staged.forward(query, key, value, 0.1)
        peak = staged.Peak(query, key, value, grad, out, stats)
        with peak:
            grads = triton_backward.backward(grad, query, key, value, out, stats, 0.1, mib)
    size, positions = dtype.itemsize, case.batch * case.queries
    rows = min(staged.rows_of_a_tile(case, 2 * size, size, mib), positions)
    allowed = 2 * size * rows * (case.keys + -case.keys % 8)
    allowed += 4 * positions + 12 * rows * -(-case.keys // 64)
    if dtype != torch.float32 and rows < case.queries:
        allowed += 4 * case.keys * (case.depth + case.value_depth)
    extra = peak.bytes - sum(t.nbytes for t in grads)
    assert 0 < extra <= allowed, (extra, allowed)
