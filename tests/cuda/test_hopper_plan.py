"""Which Hopper kernel takes which softmax problem, and why none does."""

import pytest
import torch

from nlkernels._spec import Problem
from nlkernels.ops._tiles import staged_tiles
from nlkernels.ops.softmax import cuda_hopper, cuda_hopper_plan, suite
from nlkernels.ops.softmax import cuda_hopper_backward_plan as backward_plan
from nlkernels.ops.softmax.cuda_hopper_backward_plan import Chunk, Plan
from nlkernels.ops.softmax.cuda_hopper_plan import SHARED_LIMIT

HALF = torch.float16

HEADS = ((256, 256), (512, 256), (512, 512), (1024, 512), (1024, 256), (64, 136), (256, 512))


def _problem(keys=784, depth=256, value_depth=256, dtype=torch.bfloat16) -> Problem:
    return Problem(8, 3136, keys, depth, value_depth, dtype, "cuda")


@pytest.mark.parametrize("channel_first", [False, True])
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_every_plan_fits_and_can_make_progress(head, channel_first):
    depth, value_depth = head
    plans = cuda_hopper_plan.alternatives(_problem(300, *head), channel_first)
    assert len(set(plans)) == len(plans) >= 1
    for plan in plans:
        assert plan.shared_bytes(depth) <= SHARED_LIMIT, plan
        # With one slot the last chunk of a tile would wait for itself.
        assert plan.key_slots >= 2, plan
        assert plan.value_slots >= 1, plan
        assert plan.split == (value_depth > 256 or depth > 512)
        assert plan.channel_first == channel_first


@pytest.mark.parametrize(
    ("keys", "width"),
    [(196, 80), (392, 80), (784, 80), (1568, 80), (3136, 80), (320, 80), (64, 64)],
)
def test_tile_width_follows_the_padding(keys, width):
    assert cuda_hopper_plan.plan(_problem(keys)).tile_keys == width


def test_published_heads_fill_shared_memory_as_designed():
    plans = {head: cuda_hopper_plan.plan(_problem(784, *head)) for head in HEADS[:4]}
    slots = {head: (plan.key_slots, plan.value_slots) for head, plan in plans.items()}
    assert slots == {
        (256, 256): (8, 2),
        (512, 256): (8, 1),
        (512, 512): (10, 1),
        (1024, 512): (9, 1),
    }
    assert [plan.streamed for plan in plans.values()] == [False, False, False, True]


@pytest.mark.parametrize("head", HEADS[:4], ids=str)
def test_verification_runs_every_default_plan(head):
    large = suite.large(head)
    exact = [t for t in (*large, *suite.trials(head)) if (t.depth, t.value_depth) == head]
    read = [t for t in exact if not (t.channel_first and (t.queries % 8 or t.keys % 8))]
    ran = {cuda_hopper_plan.plan(_problem(t.keys, *head), t.channel_first) for t in read}
    for keys in range(1, 1000):
        for channel_first in (False, True):
            assert cuda_hopper_plan.plan(_problem(keys, *head), channel_first) in ran
    # Of 132 blocks some take a second tile of queries, without which a barrier's phases never turn.
    assert any(t.batch * -(-t.queries // 128) > 132 for t in large)


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (_problem(dtype=torch.float32), "bfloat16 and float16, not float32"),
        (_problem(value_depth=64), "V = 64 would leave half"),
        (_problem(value_depth=520), "V = 520 is more than"),
        (_problem(value_depth=252), "no multiple of the 8"),
        (_problem(depth=32), "D = 32 would leave most"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_reasons(problem, reason):
    assert reason in cuda_hopper_plan.unserved(problem)


def test_operands_of_other_machines_and_layouts_are_left_to_other_kernels(monkeypatch):
    query = key = value = torch.zeros(1, 64, 256, dtype=torch.bfloat16)
    assert "compute capability 9.0, not 8.0" in cuda_hopper.unserved(query, key, value)
    monkeypatch.setattr("nlkernels._cuda.architecture", lambda tensor: 90)
    assert cuda_hopper.serves(query, key, value)
    first = torch.zeros(1, 256, 64, dtype=torch.bfloat16).mT
    assert cuda_hopper.serves(first, first, first)
    assert "cannot read query" in cuda_hopper.unserved(first, key, value)
    odd = torch.zeros(1, 64, 260, dtype=torch.bfloat16)[:, :, 4:]
    assert "cannot read key" in cuda_hopper.unserved(query, odd, value)
    assert "nothing to compute" in cuda_hopper.unserved(query[:, :0], key, value)
    # The stride of a single item is never used.
    single = torch.zeros(64 * 256, dtype=torch.bfloat16).as_strided((1, 64, 256), (3, 256, 1))
    assert cuda_hopper.serves(single, single, single)


def _chunk(problem: Problem, multiprocessors: int = 132) -> Chunk:
    sizes = (problem.batch, problem.queries, problem.keys)
    items, rows = next(staged_tiles(*sizes, 4, 2, None))
    return Chunk(items.stop - items.start, rows.stop - rows.start, multiprocessors)


@pytest.mark.parametrize("head", HEADS, ids=str)
def test_every_backward_plan_fits_and_can_make_progress(head):
    problem = _problem(784, *head)
    for channel_first in (False, True):
        plans = backward_plan.alternatives(problem, _chunk(problem), channel_first)
        assert len(set(plans)) == len(plans) >= 1
        for plan in plans:
            assert plan.shared_bytes() <= SHARED_LIMIT < plan._replace(slots=99).shared_bytes()
            assert plan.slots > backward_plan.FEWEST_SLOTS, plan
            assert plan.channel_first == channel_first
        alone = backward_plan.candidates(problem, _chunk(problem), channel_first)
        assert alone == [plan for plan in plans if plan.cluster == 1]


@pytest.mark.parametrize(
    ("batch", "queries", "keys", "width"),
    [(8, 3136, 784, 64), (8, 12544, 3136, 160), (8, 784, 196, 64), (1, 100352, 25088, 192)],
)
def test_backward_tiles_follow_waves_and_padding(batch, queries, keys, width):
    problem = Problem(batch, queries, keys, 256, 256, torch.bfloat16, "cuda")
    assert backward_plan.candidates(problem, _chunk(problem))[0].tile_keys == width


def test_clocks_of_backward_tiles():
    clocks = {width: Plan(False, width).clocks() for width in (192, 160, 128, 64)}
    assert clocks == {192: (768, 832), 160: (640, 736), 128: (512, 640), 64: (256, 448)}


@pytest.mark.parametrize("head", HEADS[:4], ids=str)
def test_verification_runs_every_backward_plan(head):
    widths = set()
    for trial in suite.large(head):
        # In every configuration (`_trust`): of each of these chunks, in several tiles of keys.
        problem = Problem(*trial[:3], *head, torch.bfloat16, "cuda")
        plans = backward_plan.candidates(problem, _chunk(problem), trial.channel_first)
        widths |= {plan for plan in plans if plan.key_tiles(trial.keys) > 1}
    every = {
        plan
        for channel_first in (False, True)
        for plan in backward_plan.candidates(_problem(), _chunk(_problem()), channel_first)
    }
    assert widths == every
    # Some blocks of 132 take a second tile, and some problem is computed in several chunks.
    problems = [Problem(*t[:3], *head, HALF, "cuda") for t in suite.large(head)]
    assert max(p.batch * -(-p.queries // 128) * -(-p.keys // 192) for p in problems) > 132
    assert any(p.queries > _chunk(p).rows for p in problems)


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (_problem(dtype=torch.float32), "bfloat16 and float16, not float32"),
        (_problem(value_depth=32), "V = 32 would leave most"),
        (_problem(depth=32), "D = 32 would leave most"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_reasons_of_the_backward(problem, reason):
    assert reason in backward_plan.unserved(problem)
    assert backward_plan.unserved(_problem(value_depth=1024)) == ""
