"""The Triton kernels of region aggregation, in Triton's interpreter where there is no GPU."""

import pytest
import torch

pytest.importorskip("triton")

from nlkernels import _launch, _tune, region_aggregate
from nlkernels._memory import MIB, PeakMemory
from nlkernels.ops.region import triton as kernels
from nlkernels.ops.region.problem import RegionProblem
from tests.helpers import DEVICE
from tests.ops.test_region import (
    LAYOUTS,
    NAMES,
    assert_right,
    moved,
    results,
    run,
    tensors,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Frames, heights and widths of 1 and below the kernel's; channels that leave tails.
CASES = [
    ((2, 3, 2, 4, 3), (3, 3, 3), "fp32"),
    ((1, 17, 1, 2, 2), (3, 7, 7), "bf16"),
    ((2, 1, 1, 1, 7), (1, 3, 3), "fp16"),
    ((1, 64, 3, 2, 1), (3, 1, 1), "bf16"),
    ((1, 3, 2, 1, 2), (5, 5, 3), "fp16"),
    ((3, 4, 1, 3, 3), (1, 1, 1), "fp32"),
]

dtypes = pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=list(DTYPES))
formats = pytest.mark.parametrize("layout", ["ncdhw", "channels_last"])


def operands(shape, kernel, dtype=torch.float32, layout="ncdhw"):
    return tensors(shape, kernel, dtype, layout, DEVICE)


def direct(x, weight, grad):
    """Results of the module itself, without dispatch."""
    return dict(
        zip(
            NAMES,
            (kernels.forward(x, weight), *kernels.backward(grad, x, weight)),
            strict=True,
        )
    )


@pytest.mark.usefixtures("poison")
@formats
@pytest.mark.parametrize(
    ("shape", "kernel", "dtype"),
    CASES + [((1, 3, 2, 3, 2), (1, 3, 3), dtype) for dtype in DTYPES],
    ids=str,
)
def test_not_worse_than_pytorch(shape, kernel, layout, dtype):
    given = operands(shape, kernel, DTYPES[dtype], layout)
    got = assert_right(run("triton"), given)
    assert got["out"].stride() == got["d_x"].stride() == given[0].stride()


def shipped():
    """(kernel name, configuration, dtype, layout), each configuration of a published size once."""
    found = {}
    for architecture in (80, 89, 90, 120):
        for layout in ("ncdhw", "channels_last"):
            for shape in ((2, 64, 4, 28, 28), (1, 16, 2, 3, 1)):
                for dtype in (torch.float32, torch.bfloat16):
                    problem = RegionProblem(
                        *shape, (3, 3, 3), dtype, "cuda", 0, layout == "channels_last"
                    )
                    for name, candidates in kernels.KERNELS.items():
                        configs = candidates(problem, architecture)
                        assert 1 <= len(configs) <= 6
                        for config in configs:
                            found.setdefault((name, config, layout), dtype)
    return [(name, config, dtype, layout) for (name, config, layout), dtype in found.items()]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("name", "config", "dtype", "layout"), shipped(), ids=str)
def test_every_shipped_configuration(name, config, dtype, layout):
    given = operands((1, 3, 1, 9, 3), (1, 3, 1), dtype, layout)
    with _tune.forced({name: config}):
        assert_right(run("triton"), given)


@pytest.mark.parametrize("architecture", [80, 89, 120])
@formats
def test_other_architectures(architecture, layout):
    with _launch.pretend(architecture=architecture):
        assert_right(run("triton"), operands((2, 3, 2, 2, 3), (1, 3, 3), layout=layout))


@pytest.mark.parametrize("how", LAYOUTS)
def test_strides_do_not_matter_and_nothing_outside_is_read(how):
    x, weight, grad = operands((1, 5, 2, 3, 3), (1, 3, 3), torch.bfloat16)
    assert_right(run("triton"), [moved(x, how), moved(weight[None], how)[0], moved(grad, how)])


def test_expanded_operands():
    x, weight, grad = operands((1, 4, 2, 3, 3), (1, 3, 3))
    x, grad = x.expand(2, -1, -1, -1, -1), grad.new_ones(()).expand(2, *grad.shape[1:])
    assert_right(run("triton"), [x, weight[:1].expand(4, -1, -1, -1), grad])


@formats
def test_64_bit_offsets_and_repeats_change_no_bit(layout):
    given = operands((2, 3, 2, 2, 3), (1, 3, 3), torch.bfloat16, layout)
    narrow = direct(*given)
    for wide in (True, False):
        with _launch.pretend(wide=wide):
            again = direct(*given)
        assert all(torch.equal(again[name], narrow[name]) for name in NAMES)


@pytest.mark.parametrize("programs", [1, 6, 1024])
@formats
def test_splits_of_the_weights_gradient_change_nothing_but_rounding(programs, layout, monkeypatch):
    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    given = operands((5, 2, 1, 3, 9), (1, 3, 1), torch.float32, layout)
    with _tune.forced({"region_weight_grad": _launch.Config(8, 2, 2)}):
        assert_right(run("triton"), given)


@pytest.mark.parametrize("shape", [(0, 3, 2, 4, 4), (2, 3, 2, 0, 4)], ids=str)
def test_empty_x_gives_empty_results(shape):
    got = results(run("triton"), *operands(shape, (3, 3, 3)))
    assert got["out"].shape == got["d_x"].shape == shape
    assert got["d_weight"].shape == (3, 3, 3, 3) and not got["d_weight"].any()


def test_gradients_of_gradients_are_the_definitions():
    def penalty(backend):
        inputs = [t.requires_grad_() for t in operands((1, 2, 2, 3, 2), (1, 3, 3))[:2]]
        out = region_aggregate(*inputs, backend=backend)
        first = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), inputs)

    for got, want in zip(penalty("triton"), penalty("reference"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@formats
def test_an_impulse_shows_the_flipped_kernel(layout):
    x, weight, _ = operands((1, 2, 3, 8, 4), (3, 3, 3), layout=layout)
    x.zero_()[0, 1, 1, 6, 2] = 1.0
    out = region_aggregate(x, weight, backend="triton")
    assert torch.equal(out[0, 1, :, 5:8, 1:4], weight[1].flip(0, 1, 2))
    out[0, 1, :, 5:8, 1:4] = 0
    assert not out.any()


def test_a_bad_number_touches_its_neighbours_and_its_channel_only():
    given = operands((1, 3, 2, 5, 4), (1, 3, 3))
    clean = direct(*given)
    given[0][0, 1, 0, 2, 1] = float("nan")
    dirty = direct(*given)
    near = torch.zeros(given[0].shape, dtype=torch.bool, device=DEVICE)
    near[0, 1, 0, 1:4, :3] = True
    assert dirty["out"][near].isnan().all()
    assert torch.equal(dirty["out"][~near], clean["out"][~near])
    for channel in (0, 2):
        assert torch.equal(dirty["d_weight"][channel], clean["d_weight"][channel])


@formats
@dtypes
def test_memory_is_what_is_documented(dtype, layout):
    shape, kernel = (8, 32, 4, 14, 14), (3, 7, 7)
    scratch = 4 * 60 * 60 + 512  # torch transposes matrices by tiles of 60 x 60
    x, weight, grad = operands(shape, kernel, dtype, layout)
    size, taps = dtype.itemsize, 32 * 147
    with _launch.pretend(architecture=90, launcher=lambda *_: None):
        config = kernels.KERNELS["region_weight_grad"](RegionProblem.of(x, weight), 90)[0]
        columns = 4 * -(-14 // config.depth) * 14
        tiles = 8 * -(-columns // config.rows)
        splits = min(tiles, 1024 // (3 * -(-32 // config.columns)))
        copied = size * taps * (layout == "channels_last")
        with PeakMemory(DEVICE) as forward:
            kernels.forward(x, weight)
        assert forward.live_mib * MIB <= x.numel() * size + copied + scratch
        with PeakMemory(DEVICE) as backward:
            kernels.backward(grad, x, weight)
        extra = backward.live_mib * MIB - x.numel() * size - taps * size
        assert extra <= max(copied, 4 * taps * (splits + 1)) + scratch
        grad = moved(grad, "transposed")
        with PeakMemory(DEVICE) as mixed:
            kernels.backward(grad, x, weight)
        extra = (mixed.live_mib - backward.live_mib) * MIB
        assert extra <= x.numel() * size + scratch


def test_what_is_not_served_is_said():
    x, weight, _ = operands((1, 2, 1, 18, 2), (1, 17, 1))
    with pytest.raises(NotImplementedError, match="kh of at most 15, not 17"):
        region_aggregate(x, weight, backend="triton")
    with pytest.raises(NotImplementedError, match="not float64"):
        region_aggregate(x.double(), weight.double()[:, :, :3], backend="triton")
