"""The Hopper forward kernels in the model of the machine, held to the 2x rule."""

import pytest
import torch

from benchmarks import hopper_plans
from nlkernels._rule import OUTPUT
from nlkernels._spec import Problem
from nlkernels.ops.softmax import cuda_hopper, cuda_hopper_plan, reference
from tests.cuda.hopper import emulation
from tests.helpers import assert_not_worse

pytestmark = pytest.mark.gate

HALF, BRAIN = torch.float16, torch.bfloat16


def _operands(sizes, dtype, channel_first=False, seed=0, spread=1.0):
    batch, queries, keys, depth, value_depth = sizes
    generator = torch.Generator().manual_seed(seed)
    shapes = ((queries, depth), (keys, depth), (keys, value_depth))
    made = [torch.randn(batch, *each, generator=generator).to(dtype) for each in shapes]
    made[1] *= spread
    return [t.mT.contiguous().mT for t in made] if channel_first else made


def _check(operands, scale, got):
    """Hold out to the 2x rule, stats to the rounding of float32 sums."""
    out, (top, total) = got
    truth = reference.attention(*(t.double() for t in operands), scale)
    assert_not_worse("out", out, reference.attention(*operands, scale), truth, OUTPUT)
    query, key, _ = (t.double() for t in operands)
    products = query @ key.mT
    extreme = products.amin(-1) if scale < 0 else products.amax(-1)
    close = 1e-6 * products.abs().amax().item() * query.shape[2] ** 0.5
    torch.testing.assert_close(top.double(), extreme, rtol=0, atol=close)
    weighed = torch.exp(scale * (products - top.double()[..., None])).sum(-1)
    rtol = 1e-5 + 4 * abs(scale) * close
    torch.testing.assert_close(total.double(), weighed, rtol=rtol, atol=0)


@pytest.mark.parametrize(
    ("sizes", "dtype", "channel_first", "scale"),
    [
        ((2, 130, 170, 256, 256), BRAIN, False, 256**-0.5),
        ((1, 97, 331, 200, 136), HALF, False, -0.05),
        ((1, 65, 197, 512, 256), HALF, False, 0.04),
        ((2, 136, 200, 256, 256), BRAIN, True, 0.07),
        ((1, 72, 136, 192, 200), HALF, True, 0.07),
        ((1, 129, 150, 512, 512), BRAIN, False, 512**-0.5),
        ((1, 70, 141, 1024, 512), HALF, False, 1024**-0.5),
        ((1, 33, 130, 1000, 264), BRAIN, False, -0.03),
        ((1, 72, 136, 512, 512), HALF, True, 0.04),
        ((1, 8, 72, 1024, 512), BRAIN, True, 0.03),
        ((2, 1, 1, 64, 512), BRAIN, False, 1.0),
    ],
    ids=str,
)
def test_every_plan_passes_the_rule(sizes, dtype, channel_first, scale):
    operands = _operands(sizes, dtype, channel_first)
    problem = Problem.of(*operands)
    assert not cuda_hopper_plan.unserved(problem)
    for seed, plan in enumerate(cuda_hopper_plan.alternatives(problem, channel_first)):
        with emulation(seed) as model:
            assert model.hopper_forward_shared(plan, sizes[3]) == plan.shared_bytes(sizes[3])
            _check(operands, scale, cuda_hopper.forward(*operands, scale, plan))
            assert model.plans == [plan]


@pytest.mark.parametrize(("head", "dtype"), [((64, 136), BRAIN), ((64, 512), HALF)], ids=str)
def test_every_tail_of_the_keys(head, dtype):
    for keys in (1, 7, 16, 17, 63, 64, 65, 79, 80, 81, 111, 112, 113, 127, 129, 160, 161, 225):
        operands = _operands((1, 5, keys, *head), dtype, seed=keys)
        plans = cuda_hopper_plan.alternatives(Problem.of(*operands))
        for plan in {plan.tile_keys: plan for plan in plans if plan.cluster == 1}.values():
            with emulation(seed=keys):
                _check(operands, 0.1, cuda_hopper.forward(*operands, 0.1, plan))


@pytest.mark.parametrize("head", [(256, 256), (512, 512), (1024, 512)], ids=str)
def test_results_do_not_depend_on_the_order_of_events(head):
    operands = _operands((3, 70, 130, *head), BRAIN)
    plans = cuda_hopper_plan.alternatives(Problem.of(*operands))
    for plan in (plans[0], next(plan for plan in plans if plan.cluster == 2)):
        # The narrowest rings wait most often; several tiles of a block use them again.
        narrow = plan._replace(key_slots=2, value_slots=1)
        results = []
        for seed, (each, blocks) in enumerate([(plan, 2), (narrow, 2), (narrow, 4), (plan, 8)]):
            with emulation(seed, blocks):
                results.append(cuda_hopper.forward(*operands, 0.05, each))
        for out, stats in results[1:]:
            assert torch.equal(out, results[0][0])
            assert torch.equal(stats, results[0][1])


def test_a_ring_of_one_slot_is_seen_as_a_deadlock():
    operands = _operands((1, 5, 90, 256, 256), BRAIN)
    plan = cuda_hopper_plan.plan(Problem.of(*operands))._replace(key_slots=1)
    with emulation(), pytest.raises(RuntimeError, match="failed with 719"):
        cuda_hopper.forward(*operands, 0.1, plan)


@pytest.mark.parametrize("head", [(256, 256), (512, 512)], ids=str)
@pytest.mark.parametrize("scale", [0.0, -0.0, 1e-46, 30.0, -30.0])
def test_extreme_scales(head, scale):
    operands = _operands((1, 66, 90, *head), BRAIN, spread=3.0)
    with emulation():
        _check(operands, scale, cuda_hopper.forward(*operands, scale))


def test_sums_of_the_largest_values_stay_finite():
    query, key, value = _operands((1, 4, 200, 256, 256), BRAIN)
    value = torch.full_like(value, torch.finfo(BRAIN).max)
    with emulation():
        out, _ = cuda_hopper.forward(query * 0, key, value, 1.0)
    assert torch.equal(out, value[:, :4])


def test_the_comparison_of_plans_tells_wrong_results():
    operands = _operands((1, 20, 90, 256, 256), BRAIN)

    def run(scale):
        return lambda: cuda_hopper.forward(*operands, scale)[0]

    with emulation():
        assert hopper_plans._fault(operands, run(1 / 16)) == ""
        assert "error" in hopper_plans._fault(operands, run(1 / 8))


def test_unfit_plans_are_refused():
    operands = _operands((1, 5, 90, 256, 256), BRAIN)
    plan = cuda_hopper_plan.plan(Problem.of(*operands))
    for wrong in ({"tile_keys": 48}, {"key_slots": 40}, {"cluster": 4}, {"streamed": True}):
        with emulation(), pytest.raises(RuntimeError, match="failed with 1"):
            cuda_hopper.forward(*operands, 0.1, plan._replace(**wrong))
