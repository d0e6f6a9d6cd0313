"""The CUDA kernels of region aggregation: on a GPU, else in the emulation, their own sources."""

import pytest
import torch

from nlkernels import region_aggregate
from nlkernels.ops.region import cuda as kernels
from nlkernels.ops.region import op, suite
from nlkernels.ops.region.problem import RegionProblem
from tests.helpers import DEVICE, SHORT
from tests.ops.cuda_kernels import ORDERS, kernels_run, running  # noqa: F401
from tests.ops.test_region import (
    FORMATS,
    LAYOUTS,
    NAMES,
    assert_right,
    moved,
    results,
    run,
    tensors,
)

pytestmark = [pytest.mark.gate, pytest.mark.usefixtures("kernels_run")]

# Sizes of 1 and below the kernel's and a tile's, tails in every direction, tiles of every width:
# 3x7x7 and 3x3x3 have kernels of their own, then any size.
CASES = [
    ((2, 17, 3, 9, 8), (3, 7, 7)),
    ((3, 1, 1, 1, 7), (3, 7, 7)),
    ((1, 5, 5, 17, 15), (3, 7, 7)),
    ((1, 2, 2, 33, 29), (3, 7, 7)),
    ((1, 3, 2, 4, 3), (3, 3, 3)),
    ((1, 70, 5, 7, 7), (3, 3, 3)),
    ((2, 3, 3, 30, 28), (3, 3, 3)),
    ((1, 1, 1, 1, 1), (1, 1, 1)),
    ((2, 5, 2, 6, 5), (1, 3, 5)),
    ((1, 3, 2, 17, 20), (3, 1, 1)),
    ((1, 2, 4, 3, 16), (5, 5, 3)),
    ((1, 18, 3, 9, 9), (3, 15, 15)),
]
DTYPES = {name: dtype for dtype, name in SHORT.items() if dtype != torch.float64}
dtypes = pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=list(DTYPES))
formats = pytest.mark.parametrize("layout", list(FORMATS))


def operands(shape, kernel, dtype=torch.float32, layout="ncdhw"):
    return tensors(shape, kernel, dtype, layout, DEVICE)


def direct(x, weight, grad):
    """Results of the module itself, without dispatch."""
    both = (kernels.forward(x, weight), *kernels.backward(grad, x, weight))
    return dict(zip(NAMES, both, strict=True))


@pytest.mark.usefixtures("poison")
@dtypes
@formats
@pytest.mark.parametrize(("shape", "kernel"), CASES, ids=str)
def test_not_worse_than_pytorch(shape, kernel, layout, dtype):
    given = operands(shape, kernel, dtype, layout)
    got = assert_right(run("cuda"), given)
    assert got["out"].stride() == got["d_x"].stride() == given[0].stride()


@dtypes
@pytest.mark.parametrize("head", suite.HEADS, ids=str)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_suite_passes(head, direction, dtype):
    from nlkernels import _trust

    assert _trust.judge(op.NAME, "cuda", head, dtype, direction, torch.device(DEVICE)) == ""


@pytest.mark.parametrize("kernel", [(3, 3, 3), (3, 7, 7), (1, 3, 5)], ids=str)
@formats
def test_the_order_of_threads_and_repeats_change_no_bit(layout, kernel):
    given = operands((2, 20, 3, 9, 16), kernel, torch.bfloat16, layout)
    first = direct(*given)
    for order in (*ORDERS, 0):
        with running(order):
            again = direct(*given)
        assert all(torch.equal(again[name], first[name]) for name in NAMES)


@pytest.mark.parametrize("kernel", [(3, 3, 3), (1, 3, 1)], ids=str)
@formats
def test_parts_of_several_tiles(layout, kernel):
    channels = {"ncdhw": 600, "channels_last": 2100}[layout] if kernel[0] == 3 else 600
    given = operands((9, channels, 1, 2, 2), kernel, torch.float32, layout)
    assert_right(run("cuda"), given)


@pytest.mark.parametrize("kernel", [(3, 3, 3), (3, 1, 1)], ids=str)
@pytest.mark.parametrize("how", LAYOUTS)
def test_strides_do_not_matter_and_nothing_outside_is_read(how, kernel):
    x, weight, grad = operands((2, 5, 2, 4, 3), kernel, torch.bfloat16)
    assert_right(run("cuda"), [moved(x, how), moved(weight[None], how)[0], moved(grad, how)])
    assert_right(run("cuda"), [moved(x, how), weight, grad])


def test_expanded_operands():
    x, weight, grad = operands((1, 4, 3, 5, 4), (3, 3, 3))
    x, grad = x.expand(3, -1, -1, -1, -1), grad.new_ones(()).expand(3, *grad.shape[1:])
    assert_right(run("cuda"), [x, weight[:1].expand(4, -1, -1, -1), grad])


def test_more_items_than_a_grid_is_high():
    x, weight, _ = operands((65537, 1, 1, 1, 1), (1, 1, 1))
    assert torch.equal(kernels.forward(x, weight), x * weight.view(1))


@pytest.mark.parametrize("shape", [(0, 3, 2, 4, 4), (2, 3, 2, 0, 4)], ids=str)
def test_empty_x_gives_empty_results(shape):
    got = results(run("cuda"), *operands(shape, (3, 3, 3)))
    assert got["out"].shape == got["d_x"].shape == shape
    assert got["d_weight"].shape == (3, 3, 3, 3) and not got["d_weight"].any()


@pytest.mark.parametrize("kernel", [(3, 3, 3), (3, 5, 3)], ids=str)
@formats
def test_an_impulse_shows_the_flipped_kernel(layout, kernel):
    x, weight, _ = operands((1, 2, 3, 9, 4), kernel, layout=layout)
    x.zero_()[0, 1, 1, 5, 2] = 1.0
    out = region_aggregate(x, weight, backend="cuda")
    rows = slice(5 - kernel[1] // 2, 6 + kernel[1] // 2)
    assert torch.equal(out[0, 1, :, rows, 1:4], weight[1].flip(0, 1, 2))
    out[0, 1, :, rows, 1:4] = 0
    assert not out.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
@formats
def test_a_bad_number_touches_its_neighbours_and_its_channel_only(layout, bad):
    given = operands((1, 3, 2, 5, 4), (3, 3, 3), layout=layout)
    clean = direct(*given)
    given[0][0, 1, 0, 2, 1] = bad
    dirty = direct(*given)
    near = torch.zeros(given[0].shape, dtype=torch.bool, device=DEVICE)
    near[0, 1, :, 1:4, :3] = True
    assert not dirty["out"][near].isfinite().any()
    assert torch.equal(dirty["out"][~near], clean["out"][~near])
    for channel in (0, 2):
        assert torch.equal(dirty["d_weight"][channel], clean["d_weight"][channel])


def test_gradients_of_gradients_are_the_definitions():
    def penalty(backend):
        inputs = [t.requires_grad_() for t in operands((1, 2, 2, 3, 2), (1, 3, 3))[:2]]
        out = region_aggregate(*inputs, backend=backend)
        first = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), inputs)

    for got, want in zip(penalty("cuda"), penalty("reference"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_what_is_not_served_is_said():
    x, weight, _ = operands((1, 2, 1, 18, 2), (1, 17, 1))
    with pytest.raises(NotImplementedError, match="at most 15, not 1x17x1"):
        region_aggregate(x, weight, backend="cuda")
    with pytest.raises(NotImplementedError, match="not float64"):
        region_aggregate(x.double(), weight.double()[:, :, :3], backend="cuda")
    problem = RegionProblem.of(x, weight[:, :, :3])
    assert op.supports("cuda", problem) == []
    assert "not on mps" in op.supports("cuda", problem._replace(device="mps"))[0]
