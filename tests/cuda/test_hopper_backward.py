"""The Hopper backward kernels in the model of the machine, held to the 3x rule."""

import pytest
import torch

from benchmarks import hopper_plans
from nlkernels._spec import Problem
from nlkernels.ops import _cuda_attention
from nlkernels.ops._tiles import padded
from nlkernels.ops.softmax import (
    chunked,
    cuda,
    cuda_hopper,
    cuda_hopper_backward,
    staged_backward,
)
from nlkernels.ops.softmax.cuda_hopper_backward_plan import (
    FEWEST_SLOTS,
    Chunk,
    alternatives,
    unserved,
)
from tests.cuda.hopper import emulation
from tests.helpers import Case
from tests.ops import staged

pytestmark = pytest.mark.gate

HALF, BRAIN = torch.float16, torch.bfloat16


def _operands(sizes, dtype, channel_first=False, seed=0):
    tensors = staged.made(Case(*sizes), dtype, seed=seed)
    return [t.mT.contiguous().mT for t in tensors] if channel_first else tensors


def _plans(tensors, channel_first=False):
    query, key, value, _ = tensors
    return alternatives(Problem.of(query, key, value), Chunk(*query.shape[:2], 2), channel_first)


def _gradients(tensors, scale, plan=None, workspace_mib=None, kept=None):
    *qkv, grad = tensors
    out, stats = kept or chunked.forward(*qkv, scale)
    return cuda_hopper_backward.backward(grad, *qkv, out, stats, scale, workspace_mib, plan)


def _judge(got, tensors, scale):
    staged.judge(dict(zip(staged.NAMES[1:], got, strict=True)), tensors, scale)


def _check(tensors, scale, *options, seed=0, kept=None):
    with emulation(seed) as model:
        got = _gradients(tensors, scale, *options, kept=kept)
    _judge(got, tensors, scale)
    return got, model.plans


@pytest.mark.parametrize(
    ("sizes", "dtype", "channel_first", "scale"),
    [
        ((2, 130, 200, 256, 256), BRAIN, False, 256**-0.5),
        ((1, 136, 129, 512, 256), HALF, False, 0.04),
        ((1, 65, 197, 512, 512), BRAIN, False, -(512**-0.5)),
        ((1, 9, 193, 1024, 512), HALF, False, 1024**-0.5),
        ((1, 97, 331, 72, 136), BRAIN, False, -0.05),
        ((1, 20, 90, 104, 1032), HALF, False, 0.1),
        ((2, 136, 200, 256, 256), HALF, True, 0.07),
        ((1, 8, 72, 1024, 512), BRAIN, True, 0.03),
    ],
    ids=str,
)
def test_every_plan_passes_the_rule(sizes, dtype, channel_first, scale):
    tensors = _operands(sizes, dtype, channel_first)
    assert not unserved(Problem.of(*tensors[:3]))
    for seed, plan in enumerate(_plans(tensors, channel_first)):
        with emulation(seed) as model:
            assert model.hopper_d_scores_shared(plan) == plan.shared_bytes()
            # By turns what either forward keeps.
            own = seed % 2 and cuda_hopper.serves(*tensors[:3])
            kept = cuda_hopper.forward(*tensors[:3], scale) if own else None
            got = _gradients(tensors, scale, plan, kept=kept)
        assert plan in model.plans
        _judge(got, tensors, scale)


def test_every_tail_of_the_keys():
    for keys in (1, 7, 16, 63, 64, 65, 127, 128, 129, 159, 160, 161, 191, 192, 193, 330):
        tensors = _operands((1, 5, keys, 64, 64), (BRAIN, HALF)[keys % 2], seed=keys)
        for plan in (plan for plan in _plans(tensors) if plan.cluster == 1):
            (d_query, *_), _ = _check(tensors, 0.1, plan, seed=keys)
            assert keys > 1 or not d_query.any()


def test_results_do_not_depend_on_the_order_of_events():
    tensors = _operands((1, 140, 330, 128, 320), BRAIN)
    for plan in _plans(tensors):
        # The narrowest ring waits most often; several tiles of a block use it again.
        narrow = plan._replace(slots=FEWEST_SLOTS)
        results = []
        for seed, (each, blocks) in enumerate([(plan, 2), (narrow, 2), (narrow, 4)]):
            with emulation(seed, blocks):
                results.append(_gradients(tensors, 0.05, each))
        for got in results[1:]:
            assert all(map(torch.equal, got, results[0])), plan


@pytest.mark.parametrize("channel_first", [False, True])
@pytest.mark.parametrize("rows", [37, 128])
def test_chunks_add_up(rows, channel_first):
    tensors = _operands((2, 136, 200, 64, 72), BRAIN, channel_first)
    mib = rows * padded(200) * 4 / 2**20
    _, plans = _check(tensors, 0.1, None, mib)
    assert len(plans) == 2 * -(-136 // rows)


def test_nothing_is_written_beyond_the_workspace():
    tensors = _operands((2, 150, 331, 64, 64), HALF)
    *qkv, grad = tensors
    out, stats = chunked.forward(*qkv, 0.1)
    size, before = (2, 140, padded(331)), 64
    for plan in _plans(tensors):
        buffer = torch.full((2 * before + 2 * 2 * 140 * padded(331),), 7.0, dtype=HALF)
        weights, d_scores = buffer[before:-before].view(2, *size)[..., :331]
        with emulation():
            chunks = cuda_hopper_backward._Chunks(grad, qkv[0], out, stats, 0.1, plan, False)
            chunks.fill(weights, d_scores, grad, *qkv, (slice(0, 2), slice(7, 147)))
        assert (buffer[:before] == 7).all() and (buffer[-before:] == 7).all()
        # Rows of the chunk: each sums to 1.
        torch.testing.assert_close(weights.float().sum(2), torch.ones(2, 140), rtol=0, atol=2e-3)


def test_right_statistics_need_no_correction(monkeypatch):
    """A correction makes up for a wrong delta, too."""
    monkeypatch.setattr(staged_backward, "CORRECTED_ABOVE", float("inf"))
    tensors = _operands((2, 70, 330, 64, 64), BRAIN)
    for plan in (plan for plan in _plans(tensors) if plan.cluster == 1):
        _check(tensors, 0.2, plan, 0.05)


@pytest.mark.parametrize("dtype", [BRAIN, HALF], ids=str)
@pytest.mark.parametrize("mean", [1, 8])
@pytest.mark.parametrize("sharp", [0.1, 3])
def test_keys_and_values_far_from_zero(sharp, mean, dtype):
    query, key, value, grad = _operands((1, 65, 400, 64, 64), torch.float64)
    tensors = [t.to(dtype) for t in (query, key + mean, value + mean, grad)]
    _check(tensors, sharp / 2)


@pytest.mark.parametrize("scale", [0.1, -0.1])
@pytest.mark.parametrize("keys", [2, 60, 400])
def test_statistics_of_rounded_products_will_do(keys, scale):
    tensors = _operands((1, 64, keys, 64, 64), BRAIN)
    tensors[0] *= 16
    out, stats = chunked.forward(*tensors[:3], scale)
    _check(tensors, scale, kept=(out, stats.to(BRAIN).float()))


@pytest.mark.parametrize("scale", [0.0, -0.0, 1e-46, 3.0, -3.0])
@pytest.mark.parametrize("keys", [90, 300])
def test_extreme_scales(scale, keys):
    got, _ = _check(_operands((1, 66, keys, 64, 64), BRAIN), scale)
    if scale == 0:
        assert not got[0].any() and not got[1].any()


@pytest.mark.parametrize("keys", [100, 300])
@pytest.mark.parametrize("place", [0, 3], ids=["query", "grad"])
def test_nan_stays_in_its_row_of_d_query(place, keys):
    tensors = _operands((2, 70, keys, 64, 64), BRAIN)
    with emulation():
        clean = _gradients(tensors, 0.2)[0]
        tensors[place][1, 7, 3] = float("nan")
        got = _gradients(tensors, 0.2)[0]
    assert got[1, 7].isnan().all()
    got[1, 7] = clean[1, 7]
    assert torch.equal(got, clean)


@pytest.mark.parametrize("channel_first", [False, True])
def test_gradients_of_any_strides(channel_first):
    *qkv, grad = _operands((2, 72, 200, 64, 72), BRAIN, channel_first)
    swapped = grad.contiguous() if channel_first else grad.mT.contiguous().mT
    odd = staged.LAYOUTS["inside_off_by_one"](grad)
    for each in (swapped, odd, grad[:, :1].expand_as(grad), grad[:1, :1, :1].expand_as(grad)):
        _check([*qkv, each], 0.1)


def test_unfit_plans_are_refused():
    tensors = _operands((1, 5, 90, 64, 64), BRAIN)
    plan = _plans(tensors)[0]
    for each in (
        {"tile_keys": 96},
        {"slots": 3},
        {"slots": 20},
        {"cluster": 4},
        {"channel_first": True},
    ):
        with emulation(), pytest.raises(RuntimeError, match="failed with 1"):
            _gradients(tensors, 0.1, plan._replace(**each))


def test_the_comparison_of_plans_tells_wrong_gradients():
    *qkv, grad = _operands((1, 20, 90, 64, 64), BRAIN)
    kept = chunked.forward(*qkv, 1 / 8)

    def run(scale):
        return lambda: cuda_hopper_backward.backward(grad, *qkv, *kept, scale)[0]

    with emulation():
        assert hopper_plans._fault(qkv, run(1 / 8), grad) == ""
        assert "error" in hopper_plans._fault(qkv, run(1 / 4), grad)


def test_who_runs_a_backward(monkeypatch):
    *qkv, grad = tensors = _operands((1, 20, 40, 64, 64), BRAIN)
    kept = chunked.forward(*qkv, 0.1)
    with emulation() as model:
        _judge(cuda.backward(grad, *qkv, *kept, 0.1), tensors, 0.1)
    assert len(model.plans) == 1
    monkeypatch.setattr(_cuda_attention, "backward", lambda *_: "portable")
    with emulation():
        assert cuda.backward(grad, *qkv, *kept, 0.1, 0) == "portable"
        single = [t.float() for t in qkv]
        assert cuda.backward(grad.float(), *single, *kept, 0.1) == "portable"
