"""The Triton kernels of the concatenation, in Triton's interpreter where there is no GPU."""

import pytest
import torch

pytest.importorskip("triton")

from nlkernels import _launch, _trust, _tune
from nlkernels.ops.concat import op, suite
from nlkernels.ops.concat import triton as kernels
from nlkernels.ops.concat.problem import problem as described
from tests import concat
from tests.concat import NAMES, collected, naive
from tests.helpers import SHORT, assert_not_worse
from tests.ops.staged import DTYPES, LAYOUTS, POSITIONS, Peak, pairwise

pytestmark = [
    pytest.mark.usefixtures("poison"),
    # What becomes of infinities and NaN is tested, in the interpreter by numpy.
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),
]

# Several chunks, and several tiles of channels, from few rows and channels.
SHORT_CHUNKS = {"concat_scan": _launch.Config(16, 16, 16)}
WIDTHS = (1, 3, 16, 40, 64, 80, 128, 256, 1024)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
short_chunks = pytest.mark.usefixtures("in_short_chunks")


@pytest.fixture
def in_short_chunks():
    with _tune.forced(SHORT_CHUNKS):
        yield


def operands(sizes, dtype=torch.float32, device="cpu", shift=0.0):
    return concat.operands(sizes, dtype, device, shift)


def direct(query_score, key_score, value, grad):
    """Results of the module itself, without dispatch."""
    out = kernels.forward(query_score, key_score, value)
    grads = kernels.backward(grad, query_score, key_score, value)
    return dict(zip(NAMES, (out, *grads), strict=True))


def check(tensors):
    """The 2x/3x rule, and results that are laid out as the operator's fakes say."""
    got = direct(*tensors)
    same, truth = naive(*tensors), naive(*(t.double() for t in tensors))
    for name, result in got.items():
        assert_not_worse(name, result, same[name], truth[name], 2 if name == "out" else 3)
        assert result.is_contiguous()
    return got


def cases():
    """Small problems, then a pairwise cover of sizes, widths and dtypes for the gate."""
    single, half, brain = DTYPES
    small = [
        (4, 1, 63, 3, single),
        (2, 17, 65, 40, single),
        (1, 63, 65, 64, brain),
    ]
    cover = [(4, 65, 1, 16, half), (1, 127, 16, 80, brain), (2, 15, 2, 130, half)]
    # The largest sizes beside small ones only.
    cover += [(1, 1037, 1, 64, single), (1, 1037, 16, 40, brain), (1, 15, 1037, 80, single)]
    sizes = [n for n in POSITIONS if n < 1037]
    for queries, keys, channels, dtype in pairwise(sizes, sizes, WIDTHS, DTYPES):
        # Enough numbers that the errors of PyTorch's own are not small by luck.
        batch = 3 if min(queries, keys) < 64 and channels < 64 else 1
        cover.append((batch, queries, keys, channels, dtype))
    return [
        pytest.param(
            sizes,
            dtype,
            id=f"B{sizes[0]}-N{sizes[1]}-M{sizes[2]}-V{sizes[3]}-{SHORT[dtype]}",
            marks=[pytest.mark.gate] * (number >= len(small)),
        )
        for number, (*sizes, dtype) in enumerate(small + cover)
    ]


@pytest.mark.parametrize(("sizes", "dtype"), cases())
def test_not_worse_than_pytorch(sizes, dtype, device):
    check(operands(sizes, dtype, device))


@pytest.mark.parametrize("sign", ["signed", pytest.param("positive", marks=pytest.mark.gate)])
@pytest.mark.parametrize(
    ("sizes", "shift"),
    [((1, 65, 130, 8), shift) for shift in (0.0, 1000.0)]
    + [
        pytest.param((1, 1037, 2113, 16), shift, marks=pytest.mark.gate)
        for shift in (0.0, 100.0, 1000.0, -3.0)
    ],
    ids=str,
)
def test_shifted_scores_and_values_of_one_sign(sizes, sign, shift, device):
    tensors = operands(sizes, device=device, shift=shift)
    if sign == "positive":
        tensors[2:] = (t.abs() for t in tensors[2:])
    check(tensors)


@pytest.mark.gate
@short_chunks
def test_more_chunks_than_the_carry_kernel_takes_at_a_time(device):
    check(operands((1, 9, 33 * 16 + 1, 3), torch.float16, device))


@short_chunks
@pytest.mark.parametrize(
    "scores",
    [
        "tied",
        "zero",
        *(pytest.param(s, marks=pytest.mark.gate) for s in ("all equal", "never above zero")),
    ],
)
def test_sums_of_zero_are_left_out_and_ties_are_not(scores, device):
    tensors = operands((2, 17, 40, 16), device=device)
    change = {
        "tied": lambda t: t.round(),
        "all equal": lambda t: torch.full_like(t, 0.7),
        "never above zero": lambda t: -t.abs(),
        "zero": lambda t: torch.zeros_like(t),
    }[scores]
    tensors[:2] = (change(t) for t in tensors[:2])
    got = check(tensors)
    if scores in ("never above zero", "zero"):
        assert not any(result.any() for result in got.values())


@pytest.mark.gate
@short_chunks
@dtypes
def test_huge_scores(dtype, device):
    tensors = operands((2, 17, 40, 16), dtype, device)
    tensors[0], tensors[1] = tensors[0].sign() * 1e4, tensors[1] * 2500
    check(tensors)


@short_chunks
@dtypes
def test_the_largest_values_stay_finite(dtype, device):
    query_score, key_score, value, _ = operands((1, 5, 70, 16), dtype, device)
    largest = 3e38 if dtype == torch.float32 else torch.finfo(dtype).max
    query_score.fill_(0.25)
    key_score.fill_(0.25)
    out = kernels.forward(query_score, key_score, value.fill_(largest))
    torch.testing.assert_close(out, value[:, :5] / 2)


@pytest.mark.gate
@short_chunks
def test_strides_do_not_matter_and_nothing_outside_is_read(device):
    query_score, key_score, value, grad = operands((2, 8, 24, 8), torch.bfloat16, device)
    expected = direct(query_score, key_score, value, grad)
    for layout, moved in LAYOUTS.items():
        scores = (moved(torch.stack([t, t], 2))[..., 0] for t in (query_score, key_score))
        got = direct(*scores, moved(value), moved(grad))
        for name in NAMES:
            assert torch.equal(got[name], expected[name]), (layout, name)
            assert got[name].is_contiguous(), (layout, name)


@short_chunks
def test_expanded_operands(device):
    one = operands((1, 9, 24, 5), device=device)
    for tensors in (
        [*(t.expand(2, *t.shape[1:]) for t in one[:3]), one[3][:, :1, :1].expand(2, 9, 5)],
        [one[0][:, :1].expand(1, 9), one[1], one[2][..., :1].expand(1, 24, 5), one[3]],
    ):
        got, expected = direct(*tensors), direct(*(t.contiguous() for t in tensors))
        assert all(torch.equal(got[name], expected[name]) for name in NAMES)


@short_chunks
@pytest.mark.usefixtures("repeatable")
@pytest.mark.parametrize(
    "layout", ["inside_off_by_one", pytest.param("channel_first", marks=pytest.mark.gate)]
)
def test_64_bit_offsets_and_repeats_change_no_bit(layout, device):
    tensors = operands((2, 17, 24, 5), torch.bfloat16, device)
    tensors[2:] = (LAYOUTS[layout](t) for t in tensors[2:])
    first = direct(*tensors)
    for wide in (None, True):
        with _launch.pretend(wide=wide):
            again = direct(*tensors)
        assert all(torch.equal(again[name], first[name]) for name in NAMES)


def test_values_that_lie_far_apart_get_64_bit_offsets():
    query_score, key_score, value, grad = operands((2, 5, 4, 16), device="meta")
    far = torch.empty_strided(value.shape, (2**31, 16, 1), device="meta")
    wide = {
        name: [o["WIDE"] for _, o in collected(call) if "WIDE" in o]
        for name, call in {
            "near": lambda: kernels.forward(query_score, key_score, value),
            "far": lambda: kernels.forward(query_score, key_score, far),
            "backward": lambda: kernels.backward(grad, query_score, key_score, far),
        }.items()
    }
    assert wide["near"] == [False] * 3
    # What is gathered from is never the value itself, but the last kernel reads it again.
    assert wide["far"] == [True, True, False]
    assert wide["backward"] == [True, True, False, False, False, True]


def test_number_of_launches():
    query_score, key_score, value, grad = operands((2, 500, 300, 160), device="meta")
    rows = ["_sums_kernel", "_carry_kernel", "_scan_kernel", "_gather_kernel"]
    forward = collected(lambda: kernels.forward(query_score, key_score, value))
    backward = collected(lambda: kernels.backward(grad, query_score, key_score, value))
    assert [name for name, _ in forward] == rows
    assert [name for name, _ in backward] == rows * 2


@short_chunks
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_query_score_touches_its_row_only(bad, device):
    tensors = operands((2, 17, 24, 5), device=device)
    clean = direct(*tensors)
    tensors[0][1, 7] = bad
    dirty, truth = direct(*tensors), naive(*tensors)
    rows = torch.ones(2, 17, dtype=torch.bool, device=device)
    rows[1, 7] = False
    for name in ("out", "d_query_score"):
        assert torch.equal(dirty[name][rows], clean[name][rows])
    for name in ("d_key_score", "d_value"):
        assert torch.equal(dirty[name][0], clean[name][0])
    for name in NAMES:
        assert torch.equal(dirty[name].isfinite(), truth[name].isfinite()), name
    if bad != bad:
        assert dirty["out"][1, 7].isnan().all() and dirty["d_value"][1].isnan().all()


@short_chunks
@pytest.mark.parametrize("keys", [24, pytest.param(1, marks=pytest.mark.gate)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_key_score_touches_its_batch_item_only(bad, keys, device):
    tensors = operands((2, 17, keys, 5), device=device)
    clean = direct(*tensors)
    tensors[1][1, keys // 2] = bad
    tensors[0][1, 3] = -20.0
    dirty, truth = direct(*tensors), naive(*tensors)
    for name in NAMES:
        assert torch.equal(dirty[name][0], clean[name][0])
        assert torch.equal(dirty[name].isfinite(), truth[name].isfinite()), name
    if bad != bad:
        assert dirty["out"][1].isnan().all()


@short_chunks
def test_several_bad_scores_stay_inside_and_in_their_batch_item(device):
    tensors = operands((2, 17, 24, 5), device=device)
    clean = direct(*tensors)
    for scores in tensors[:2]:
        scores[1, ::3] = float("nan")
        scores[1, 1::6] = float("inf")
        scores[1, 4::6] = float("-inf")
    dirty = direct(*tensors)
    assert dirty["out"][1].isnan().all()
    for name in NAMES:
        assert torch.equal(dirty[name][0], clean[name][0])


@short_chunks
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_value_touches_the_rows_that_weigh_it_in_its_channel(bad, device):
    query_score, key_score, value, grad = operands((2, 17, 24, 5), device=device)
    key_score[1, 9] = 0.1
    clean = direct(query_score, key_score, value, grad)
    value[1, 9, 4] = bad
    dirty = direct(query_score, key_score, value, grad)
    weighed = torch.zeros(2, 17, 5, dtype=torch.bool, device=device)
    weighed[1, :, 4] = query_score[1] + key_score[1, 9] > 0
    assert weighed.any() and not weighed[1, :, 4].all()
    assert not dirty["out"][weighed].isfinite().any()
    assert torch.equal(dirty["out"][~weighed], clean["out"][~weighed])
    # The scores' gradients are over channels, and the value's is not its own.
    rows = weighed.any(2)
    assert torch.equal(dirty["d_query_score"][~rows], clean["d_query_score"][~rows])
    assert torch.equal(dirty["d_value"], clean["d_value"])


@pytest.mark.parametrize("sizes", [(0, 5, 4, 3), (2, 0, 4, 3), (2, 5, 0, 3)], ids=str)
def test_empty_operands_give_zeros(sizes, device):
    tensors = operands(sizes, device=device)
    got = direct(*tensors)
    shapes = [t.shape for t in (tensors[3], *tensors[:3])]
    assert [result.shape for result in got.values()] == shapes
    assert not any(result.any() for result in got.values())


@short_chunks
def test_keys_may_be_permuted_and_values_added(device):
    query_score, key_score, value, _ = operands((2, 17, 24, 5), device=device)
    out = kernels.forward(query_score, key_score, value)
    order = torch.randperm(24, device=device)
    again = kernels.forward(query_score, key_score[:, order], value[:, order])
    torch.testing.assert_close(again, out, rtol=1e-5, atol=1e-5)
    other = value.roll(1, 1)
    both = kernels.forward(query_score, key_score, value + other)
    torch.testing.assert_close(
        both, out + kernels.forward(query_score, key_score, other), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(
        kernels.forward(query_score[1:], key_score[1:], value[1:]), out[1:], rtol=0, atol=0
    )


@dtypes
@pytest.mark.parametrize(
    "sizes", [(8, 3136, 784, 256), (2, 300, 2000, 64), (3, 65, 64, 17), (1, 1, 1, 1)], ids=str
)
def test_memory_is_what_the_docstring_says(sizes, dtype):
    batch, queries, keys, channels = sizes
    *inputs, grad = operands(sizes, dtype, "meta")
    with _launch.pretend(architecture=90, launcher=lambda *_: None):
        with Peak(*inputs) as forward:
            out = kernels.forward(*inputs)
        with Peak(*inputs, grad) as backward:
            grads = kernels.backward(grad, *inputs)

    def sums(rows, planes):
        return batch * channels * (4 * planes * rows + 16 * -(-rows // 64))

    extra = forward.bytes - out.nbytes
    assert 0 < extra <= sums(keys, 2) + batch * (20 * keys + 8 * queries)
    extra = backward.bytes - sum(t.nbytes for t in grads)
    ranks = 24 * batch * (queries + keys)
    assert 0 < extra <= max(sums(queries, 2), sums(keys, 1)) + ranks


@pytest.mark.parametrize("width", [1, 20, 64, 256, 1000])
def test_one_configuration_serves_all_architectures(width):
    problem = described(*operands((1, 30, 150, width), torch.bfloat16, "meta")[:3])
    for candidates in kernels.KERNELS.values():
        (config,) = candidates(problem, 90)
        assert [config] == candidates(problem, 80) == candidates(problem, 120)


def test_chunks_of_any_length_agree(device):
    tensors = operands((1, 33, 70, 5), device=device)
    for rows, columns, step in ((32, 64, 8), (128, 32, 64)):
        with _tune.forced({"concat_scan": _launch.Config(rows, columns, step)}):
            check(tensors)


@pytest.mark.gate
@dtypes
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("head", suite.HEADS[:1], ids=str)
def test_the_suite_that_verifies_gpus_passes(head, direction, dtype, device):
    place = torch.device(device)
    assert _trust.judge(op.NAME, "triton", head, dtype, direction, place) == ""


@short_chunks
def test_opcheck(device):
    query_score, key_score, value, grad = operands((1, 5, 4, 3), device=device)
    arguments = query_score, key_score, value.mT.contiguous().mT, "triton"
    operators = torch.ops.nlkernels
    torch.library.opcheck(operators.concat_forward.default, arguments)
    torch.library.opcheck(operators.concat_backward.default, (grad, *arguments))


@short_chunks
def test_autograd_and_compilation_give_what_the_module_gives(device):
    tensors = operands((1, 9, 20, 5), device=device)
    expected = direct(*tensors)

    def run(*inputs):
        return op.attend(*inputs, "triton")

    for attend in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        inputs = [t.detach().requires_grad_() for t in tensors[:3]]
        out = attend(*inputs)
        grads = torch.autograd.grad(out, inputs, tensors[3])
        for name, got in zip(NAMES, (out, *grads), strict=True):
            assert torch.equal(got, expected[name])


@short_chunks
def test_gradients_of_gradients_are_the_definitions(device):
    def penalty(backend):
        inputs = [t.requires_grad_() for t in operands((1, 9, 7, 4), device=device)[:3]]
        out = op.attend(*inputs, backend)
        first = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), inputs)

    for got, want in zip(penalty("triton"), penalty("reference"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
