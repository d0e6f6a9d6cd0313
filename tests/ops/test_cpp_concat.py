"""The C++ kernels of the concatenation: every path of them, and every instruction set."""

import math

import pytest
import torch

from nlkernels import _ext, explain, nonlocal_concat
from nlkernels._memory import MIB, PeakMemory
from nlkernels.ops.concat import cpp, op
from tests.concat import NAMES, naive, operands, results, run
from tests.helpers import SHORT, assert_not_worse
from tests.ops import isas
from tests.ops.test_concat import BAD, assert_right, extreme, moved, spoiled

pytestmark = pytest.mark.skipif(bool(_ext.missing()), reason=_ext.missing() or "never")

DTYPES = tuple(SHORT)
POSITIONS = (1, 2, 15, 16, 17, 63, 65, 127, 1037)
# Channels of one narrow block, one wide, several, and tails of either width.
WIDTHS = (1, 3, 16, 40, 64, 80, 128, 130, 512)
# Steps of the stairs that one task takes, in csrc/cpu/concat_plan.h.
CHUNK = 4096

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)


def direct(query_score, key_score, value, grad):
    """Results of the module itself, without dispatch."""
    out = cpp.forward(query_score, key_score, value)
    grads = cpp.backward(grad, query_score, key_score, value)
    return dict(zip(NAMES, (out, *grads), strict=True))


def cover():
    """Any two sizes, a size and a width, and either and a dtype meet: (B, N, M, V), dtype."""
    for i, queries in enumerate(POSITIONS):
        for j, keys in enumerate(POSITIONS):
            channels = WIDTHS[(i + j) % len(WIDTHS)]
            # Enough numbers that the errors of PyTorch's own are not small by luck.
            batch = 4 if min(queries, keys) * channels < 2048 else 1
            yield (batch, queries, keys, channels), DTYPES[(i + 2 * j) % len(DTYPES)]


def same_bits(got, expected):
    return all(torch.equal(got[name], expected[name]) for name in NAMES)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    ("case", "dtype"), list(cover()), ids=lambda x: SHORT.get(x) or "x".join(map(str, x))
)
def test_not_worse_than_pytorch(case, dtype):
    got = assert_right(run("cpp"), operands(case, dtype))
    assert all(t.is_contiguous() for t in got.values())


@pytest.mark.gate
@pytest.mark.parametrize("isa", isas.ISAS)
def test_every_instruction_set_of_this_machine(isa, monkeypatch):
    isas.use(isa, monkeypatch)
    for case, dtype in [*cover(), ((1, 2 * CHUNK, 20, 70), torch.float32)]:
        assert_right(run("cpp"), operands(case, dtype))
    for name in ("large", "one_huge_score", "large_values"):
        for dtype in DTYPES:
            assert all(t.isfinite().all() for t in direct(*extreme(name, dtype, "cpu")).values())


@pytest.mark.usefixtures("poison")
def test_gradcheck_and_gradgradcheck():
    for case in ((2, 7, 5, 3), (1, 4, 9, 18)):
        inputs = [t.requires_grad_() for t in operands(case)[:3]]
        assert torch.autograd.gradcheck(run("cpp"), inputs, nondet_tol=0)
    inputs = [t.requires_grad_() for t in operands((1, 3, 2, 2))[:3]]
    assert torch.autograd.gradgradcheck(run("cpp"), inputs, nondet_tol=0)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=SHORT.get)
@pytest.mark.parametrize("case", [(1, 3 * CHUNK - 40, 40, 20), (2, 60, CHUNK, 70)], ids=str)
def test_several_chunks_of_the_stairs(case, dtype):
    assert_right(run("cpp"), operands(case, dtype))


@pytest.mark.parametrize("case", [(1, CHUNK - 7, 7, 5), (1, CHUNK - 7, 8, 5)], ids=str)
def test_as_many_steps_as_a_chunk_and_one_more(case):
    assert_right(run("cpp"), operands(case, torch.float32))


@dtypes
def test_levels_that_reach_over_chunks(dtype):
    query_score, key_score, value, grad = operands((2, 4500, 200, 6), dtype)
    query_score, key_score = query_score.round(), key_score.round()
    got = assert_right(run("cpp"), (query_score, key_score, value, grad))
    assert got["out"].isfinite().all()


@pytest.mark.parametrize("shift", [0.0, 100.0, -100.0, 1000.0, -1000.0])
def test_error_is_below_the_definitions_however_far_the_scores_lie_from_zero(shift):
    query_score, key_score, value, grad = operands((2, 900, 500, 64), torch.float32)
    tensors = (query_score + shift, key_score - shift, value, grad)
    truth, same = naive(*(t.double() for t in tensors)), naive(*tensors)
    for name, got in direct(*tensors).items():
        error, allowed = ((t.double() - truth[name]).norm() for t in (got, same[name]))
        assert error <= allowed, name


@dtypes
@pytest.mark.parametrize("step", [0.5, 4.0, math.inf], ids=["many", "most", "all"])
def test_equal_scores_and_sums_of_exactly_zero(step, dtype):
    query_score, key_score, value, grad = operands((2, 150, 90, 8), dtype)
    if step == math.inf:
        query_score, key_score = torch.ones_like(query_score), -torch.ones_like(key_score)
        key_score[1] = 2
    else:
        # Both zeros: -0 must not rank below 0.
        query_score, key_score = ((t / step).round() * step for t in (query_score, key_score))
        assert (query_score == 0).any() and (key_score == 0).any()
    got = assert_right(run("cpp"), (query_score, key_score, value, grad))
    if step == math.inf:
        assert all(not got[name][0].any() for name in NAMES)


@pytest.mark.parametrize("constant", ["query_score", "key_score"])
def test_constant_rows(constant):
    tensors = operands((2, 1500, 300, 8), torch.float32)
    tensors[constant == "key_score"].fill_(0.25)
    assert_right(run("cpp"), tensors)


@dtypes
@pytest.mark.parametrize("name", ["large", "one_huge_score", "denormal", "large_values"])
def test_extreme_values_stay_finite_and_right(name, dtype):
    tensors = extreme(name, dtype, "cpu")
    truth = naive(*(t.double() for t in tensors))
    same = naive(*(t.to(torch.promote_types(dtype, torch.float32)) for t in tensors))
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    for key, got in direct(*tensors).items():
        if name == "denormal" and key in ("out", "d_value"):
            assert (got.double() - truth[key]).abs().max() <= 8 * smallest
            continue
        keep = truth[key].abs() <= torch.finfo(dtype).max
        assert got[keep].isfinite().all(), f"{key} is not finite"
        rounded = same[key].to(dtype)
        assert_not_worse(key, got[keep], rounded[keep], truth[key][keep], 3)


@dtypes
def test_the_largest_values_stay_finite(dtype):
    query_score, key_score, value, grad = operands((1, 5, 70, 16), dtype)
    query_score.fill_(0.25)
    key_score.fill_(0.25)
    largest = torch.finfo(dtype).max
    out = cpp.forward(query_score, key_score, value.fill_(largest))
    torch.testing.assert_close(out, value[:, :5] / 2)
    d_value = cpp.backward(grad.fill_(largest), query_score, key_score, value)[2]
    torch.testing.assert_close(d_value, value * (5 / 70 / 2))


def test_sums_of_scores_beyond_float32_do_not_overflow():
    query_score, key_score, value, grad = operands((1, 40, 30, 4), torch.float32)
    query_score, key_score = query_score.abs() * 1e38, key_score.abs() * 1e38
    tensors = (query_score, key_score, value * 1e-38, grad)
    assert (query_score.amax() + key_score.amax()).isinf()
    truth = naive(*(t.double() for t in tensors))["out"]
    torch.testing.assert_close(cpp.forward(*tensors[:3]).double(), truth, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("sizes", [(0, 5, 4, 3), (2, 0, 4, 3), (2, 5, 0, 3)], ids=str)
def test_empty_operands_give_zeros(sizes):
    tensors = operands(sizes)
    got = direct(*tensors)
    assert [t.shape for t in got.values()] == [t.shape for t in (tensors[3], *tensors[:3])]
    assert not any(t.any() for t in got.values())


@dtypes
@pytest.mark.parametrize("channels", [12, 64, 70])
@pytest.mark.parametrize("how", ["transposed", "sliced"])
def test_strides_do_not_matter_and_nothing_outside_is_read(how, channels, dtype):
    tensors = operands((2, 70, 33, channels), dtype)
    assert same_bits(direct(*(moved(t, how) for t in tensors)), direct(*tensors))


@dtypes
def test_unaligned_operands(dtype):
    tensors = operands((2, 70, 33, 64), dtype)
    off = [torch.cat([t.new_full((1,), math.nan), t.flatten()])[1:].view(t.shape) for t in tensors]
    assert same_bits(direct(*off), direct(*tensors))


def test_expanded_and_flipped_operands():
    query_score, key_score, value, grad = operands((1, 20, 9, 4))
    tensors = [t.expand(3, *t.shape[1:]) for t in (query_score, key_score, value)]
    got = assert_right(run("cpp"), [*tensors, grad.new_ones(()).expand(3, 20, 4)])
    assert torch.equal(got["out"][0], got["out"][2])
    column, first = query_score[:, :1].expand(1, 20), value[..., :1].expand(1, 9, 4)
    assert_right(run("cpp"), [column, key_score, first, grad])


def test_keys_may_be_permuted_and_values_added():
    query_score, key_score, value, _ = operands((2, 30, 24, 8), torch.float32)
    plain = cpp.forward(query_score, key_score, value)
    order = torch.randperm(24)
    permuted = cpp.forward(query_score, key_score[:, order], value[:, order])
    torch.testing.assert_close(permuted, plain, rtol=1e-6, atol=1e-6)
    both = cpp.forward(query_score, key_score, value + value.flip(1))
    other = cpp.forward(query_score, key_score, value.flip(1))
    torch.testing.assert_close(both, plain + other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_query_score_touches_its_own_row_only(bad):
    clean, dirty, _ = spoiled("cpp", 0, (1, 7), bad, "cpu")
    others = torch.arange(200) != 7
    for name in ("out", "d_query_score"):
        assert torch.equal(dirty[name][0], clean[name][0])
        assert torch.equal(dirty[name][1, others], clean[name][1, others])
    assert torch.equal(dirty["d_value"][0], clean["d_value"][0])
    if bad == -math.inf:
        assert not dirty["out"][1, 7].any() and not dirty["d_query_score"][1, 7]
        assert dirty["d_value"].isfinite().all()
    else:
        assert not dirty["out"][1, 7].isfinite().any()
        assert not dirty["d_value"][1].isfinite().any()
    if bad != bad:
        assert dirty["out"][1, 7].isnan().all()


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_key_score_stays_in_its_batch_item(bad):
    clean, dirty, _ = spoiled("cpp", 1, (1, 7), bad, "cpu")
    others = torch.arange(40) != 7
    assert all(torch.equal(dirty[name][0], clean[name][0]) for name in NAMES)
    torch.testing.assert_close(dirty["d_value"][1, others], clean["d_value"][1, others])
    if bad == -math.inf:
        assert all(dirty[name].isfinite().all() for name in NAMES)
        assert not dirty["d_value"][1, 7].any() and not dirty["d_key_score"][1, 7]
    else:
        assert not dirty["out"][1].isfinite().any()
        assert not dirty["d_value"][1, 7].isfinite().any()
    if bad != bad:
        assert dirty["out"][1].isnan().all()


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_value_or_gradient_touches_those_that_see_it_only(bad):
    clean, dirty, tensors = spoiled("cpp", 2, (1, 7), bad, "cpu")
    sees = torch.zeros(2, 200, dtype=torch.bool)
    sees[1] = tensors[0][1] + tensors[1][1, 7] > 0
    assert sees[1].any() and not sees[1].all()
    for name in ("out", "d_query_score"):
        assert torch.equal(dirty[name][~sees], clean[name][~sees])
        assert not dirty[name][sees].isfinite().any()
    assert torch.equal(dirty["d_value"], clean["d_value"])
    clean, dirty, tensors = spoiled("cpp", 3, (1, 7), bad, "cpu")
    sees = torch.zeros(2, 40, dtype=torch.bool)
    sees[1] = tensors[0][1, 7] + tensors[1][1] > 0
    assert sees[1].any() and not sees[1].all()
    for name in ("d_key_score", "d_value"):
        assert torch.equal(dirty[name][~sees], clean[name][~sees])
        assert not dirty[name][sees].isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=SHORT.get)
@pytest.mark.parametrize("query", [*BAD, 0.5])
@pytest.mark.parametrize("key", [*BAD, 0.5])
def test_what_is_not_finite_in_the_definition_is_not_finite(query, key, dtype):
    query_score, key_score, value, grad = operands((1, 9, 7, 3), dtype)
    query_score[0, ::4], key_score[0, ::3] = query, key
    tensors = (query_score, key_score, value, grad)
    expected, got = naive(*tensors), direct(*tensors)
    for name in ("out", "d_value"):
        assert torch.equal(got[name].isfinite(), expected[name].isfinite()), name


@dtypes
@pytest.mark.parametrize("case", [(3, 700, 130, 130), (1, 5000, 3500, 70)], ids=str)
def test_repeats_threads_and_other_items_change_no_bit(case, dtype):
    tensors = operands(case, dtype)
    first = direct(*tensors)
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3, 16):
            torch.set_num_threads(number)
            assert same_bits(direct(*tensors), first), number
    finally:
        torch.set_num_threads(threads)
    for item in range(case[0]):
        alone = direct(*(t[item : item + 1] for t in tensors))
        assert all(torch.equal(alone[name][0], first[name][item]) for name in NAMES)


@pytest.mark.gate
@dtypes
@pytest.mark.parametrize("case", [(2, 784, 196, 512), (1, 9000, 3000, 70), (3, 5, 4, 3)], ids=str)
def test_memory_is_what_the_docstring_says(case, dtype):
    tensors = operands(case, dtype)
    batch, queries, keys, channels = case
    steps, blocks = queries + keys, -(-channels // 64)
    wide, chunks = 8 if dtype == torch.float64 else 4, -(-steps // CHUNK)
    ranks = batch * (2 * (wide + 4) * steps + 64) + 512
    with PeakMemory("cpu") as forward:
        out = cpp.forward(*tensors[:3])
    extra = forward.live_mib * MIB - out.nbytes
    assert 0 < extra <= ranks + (chunks > 1) * 1024 * batch * chunks * blocks
    with PeakMemory("cpu") as backward:
        grads = cpp.backward(tensors[3], *tensors[:3])
    extra = backward.live_mib * MIB - sum(t.nbytes for t in grads)
    more = 8 * batch * steps * blocks + (chunks > 1) * 1536 * batch * chunks * blocks
    assert 0 < extra <= ranks + more


def test_opcheck():
    query_score, key_score, value, grad = operands((2, 5, 4, 3))
    arguments = query_score, key_score, value.mT.contiguous().mT, "cpp"
    operators = torch.ops.nlkernels
    torch.library.opcheck(operators.concat_forward.default, arguments)
    torch.library.opcheck(operators.concat_backward.default, (grad, *arguments))


def test_autograd_and_compilation_give_what_the_module_gives():
    tensors = operands((1, 9, 20, 5), torch.float32)
    expected = direct(*tensors)
    compiled = torch.compile(run("cpp"), fullgraph=True, backend="aot_eager")
    for attend in (run("cpp"), compiled):
        assert same_bits(results(attend, *tensors), expected)


def test_why_it_does_not_run(monkeypatch):
    tensors = operands((1, 3, 4, 2))[:3]
    assert explain("nonlocal_concat", *tensors, backend="cpp").backend == "cpp"
    problem = op._operations.OPERATIONS[op.NAME].describe(*tensors)
    assert op.supports("cpp", problem._replace(device="cuda")) == ["its kernels run on CPUs only"]
    monkeypatch.setattr(_ext, "missing", lambda: "there is no compiler; install g++")
    with pytest.raises(NotImplementedError, match="there is no compiler; install g"):
        nonlocal_concat(*tensors, backend="cpp")
