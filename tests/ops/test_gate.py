"""Context pooling and the channel gate: its definition, and every backend's numbers."""

import pytest
import torch

from nlkernels import channel_gate
from nlkernels.ops.gate import op, reference
from nlkernels.ops.gate.suite import LAYOUTS, laid_out
from tests.helpers import SHORT, assert_not_worse

NAMES = ("out", "d_x", "d_weight")
BACKENDS = ("chunked", "auto")
# One, two and three axes of positions; one channel, one position, several items.
SHAPES = [
    (2, 17, 5, 7, 3),
    (3, 64, 2, 14, 14),
    (7, 1, 3, 2, 5),
    (2, 8, 1, 1, 1),
    (4, 33, 65),
    (2, 16, 15, 17),
    (1, 130, 1037),
]

backends = pytest.mark.parametrize("backend", BACKENDS)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def tensors(shape, dtype=torch.float64, layout="ncdhw", device="cpu", mean=0.0):
    """Random x, weight of logits of deviation 1, and a gradient for the context."""
    generator = torch.Generator().manual_seed(0)
    sizes = (shape, shape[1:2], shape[:2])
    drawn = [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
    x, weight, grad = drawn[0] + mean, drawn[1] * shape[1] ** -0.5, drawn[2]
    x, weight, grad = (t.to(dtype).to(device) for t in (x, weight, grad))
    return [laid_out(x, layout), weight, grad]


def results(pool, x, weight, grad):
    """Context and gradients of pool(x, weight)."""
    inputs = [t.detach().requires_grad_() for t in (x, weight)]
    out = pool(*inputs)
    return dict(zip(NAMES, (out.detach(), *torch.autograd.grad(out, inputs, grad)), strict=True))


def run(backend):
    return lambda x, weight: op.pool(x, weight, backend=backend)


def assert_right(pool, operands):
    """Hold context and gradients to the 2x/3x rule."""
    truth = results(run("reference"), *(t.double() for t in operands))
    same = results(run("reference"), *operands)
    got = results(pool, *operands)
    for name in NAMES:
        assert_not_worse(name, got[name], same[name], truth[name], 2 if name == "out" else 3)
    return got


@shapes
def test_reference_is_the_weighted_mean(shape, device):
    x, weight, _ = tensors(shape, device=device)
    rows = x.flatten(2)
    shares = torch.einsum("bcp,c->bp", rows, weight).add(0.3).exp()
    expected = torch.einsum("bcp,bp->bc", rows, shares) / shares.sum(1, keepdim=True)
    got = reference.pool(x, weight, weight.new_full((1,), 0.3))
    assert (got - expected).abs().max() <= 1e-12 * expected.abs().max()


@shapes
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_gate_adds_a_function_of_the_context_to_every_position(backend, shape, device):
    x, weight, _ = tensors(shape, device=device)
    bias = weight.new_full((1,), 0.7)
    got = channel_gate(x, weight, bias, transform=lambda c: c.sin(), backend=backend)
    added = reference.pool(x, weight).sin().view(*shape[:2], *[1] * (len(shape) - 2))
    torch.testing.assert_close(got, x + added, rtol=1e-11, atol=1e-12)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("mean", [0.0, 4.0])
@pytest.mark.parametrize("dtype", list(SHORT), ids=list(SHORT.values()))
@pytest.mark.parametrize(
    ("shape", "layout"),
    [(shape, layout) for shape in SHAPES for layout in LAYOUTS[: 3 if len(shape) > 4 else 1]],
    ids=str,
)
@pytest.mark.parametrize("backend", ["chunked"])
def test_not_worse_than_pytorch(backend, shape, layout, dtype, mean, device):
    assert_right(run(backend), tensors(shape, dtype, layout, device, mean))


@layouts
@backends
def test_gradient_has_the_layout_of_x(backend, layout, device):
    x, weight, grad = tensors((2, 8, 3, 4, 5), torch.float32, layout, device)
    assert results(run(backend), x, weight, grad)["d_x"].stride() == x.stride()


def moved(x, how):
    """The same numbers in other memory, NaN around them."""
    batch, channels, frames, height, width = x.shape
    around = x.new_full((batch, channels + 2, frames + 1, height + 2, width + 3), float("nan"))
    last = around.contiguous(memory_format=torch.channels_last_3d)
    if how == "window":
        place = around[:, 1:-1, :frames, 1:-1, 2 : width + 2]
    elif how == "channels_last_window":
        place = last[:, 1:-1, :frames, 1:-1, 2 : width + 2]
    elif how == "transposed":
        place = x.new_empty(batch, channels, width, height, frames).transpose(2, 4)
    elif how == "frames_slice":
        place = x.new_full((batch, 2 * frames, channels + 3, height, width), float("nan"))
        place = place[:, ::2, 1 : channels + 1].transpose(1, 2)
    elif how == "channels_last_slice":
        place = x.new_full((batch, frames, height, width, channels + 3), float("nan"))
        place = place[..., 1 : channels + 1].permute(0, 4, 1, 2, 3)
    else:
        place = x.new_full((2 * batch, channels + 2, *x.shape[2:]), float("nan"))[::2, 1:-1]
    return place.copy_(x)


PLACES = (
    "window",
    "channels_last_window",
    "transposed",
    "frames_slice",
    "channels_last_slice",
    "slice",
)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["fp64", "bf16"])
@pytest.mark.parametrize("how", PLACES)
@backends
def test_strides_do_not_matter(backend, how, dtype, device):
    x, weight, grad = tensors((2, 5, 3, 6, 4), dtype, device=device)
    weight, grad = (torch.stack((t, t), -1)[..., 0] for t in (weight, grad))
    assert_right(run(backend), [moved(x, how), weight, grad])


@backends
def test_expanded_operands(backend, device):
    x, weight, grad = tensors((1, 4, 3, 5, 4), device=device)
    spread = x[:, :, :, :1].expand(3, -1, -1, 5, -1)
    operands = [spread, weight[:1].expand(4), grad.sum().expand(3, 4)]
    assert_right(run(backend), operands)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_empty_batch_gives_empty_results(backend, device):
    x, weight, grad = tensors((0, 3, 2, 4, 4), device=device)
    got = results(run(backend), x, weight, grad)
    assert got["out"].shape == (0, 3) and got["d_x"].shape == x.shape
    assert got["d_weight"].shape == (3,) and not got["d_weight"].any()


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@backends
def test_extreme_values_stay_finite(backend, dtype, device):
    x, weight, grad = tensors((4, 16, 3, 5, 7), dtype, device=device)
    x[0] *= 1e4  # huge logits
    x[1] = 3.0  # all positions alike
    x[2, :, 1, 2, 3] = 60 * weight.sign()  # one position wins
    x[3] *= 1e-6  # all shares alike
    got = results(run(backend), x, weight, grad)
    assert all(t.isfinite().all() for t in got.values())
    assert_right(run(backend), [x[1:], weight, grad[1:]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@backends
def test_sums_of_the_largest_numbers_stay_finite(backend, dtype, device):
    x, weight, grad = tensors((2, 4, 5, 10, 20), dtype, device=device)
    x = x.sign() * 1e36
    got = results(run(backend), x, weight * 0, grad)
    truth = results(run("reference"), *(t.double() for t in (x, weight * 0, grad)))
    # The weight's gradient is beyond float32; in out, numbers of both signs cancel.
    for name, largest in (("out", 1e36), ("d_x", truth["d_x"].abs().max())):
        error = (got[name].double() - truth[name]).abs().max()
        assert error <= 2 * torch.finfo(dtype).eps * largest


@backends
def test_constant_positions_give_their_value_and_the_mean_gradient(backend, device):
    x, weight, grad = tensors((2, 9, 2, 3, 4), device=device)
    x = x[:, :, :1, :1, :1].expand_as(x)
    got = results(run(backend), x, weight, grad)
    torch.testing.assert_close(got["out"], x[:, :, 0, 0, 0])
    expected = (grad / 24)[..., None, None, None].expand_as(x)
    torch.testing.assert_close(got["d_x"], expected)
    assert got["d_weight"].abs().max() < 1e-13


@backends
def test_order_of_positions_shift_and_split_of_the_batch_change_nothing(backend, device):
    x, weight, grad = tensors((3, 6, 4, 5, 2), device=device)
    whole = results(run(backend), x, weight, grad)
    order = torch.randperm(40, device=device)
    mixed = results(run(backend), x.flatten(2)[..., order], weight, grad)
    torch.testing.assert_close(mixed["out"], whole["out"])
    torch.testing.assert_close(mixed["d_x"], whole["d_x"].flatten(2)[..., order])
    # A direction that is the same at every position shifts all logits alike.
    shifted = results(run(backend), torch.cat((x, torch.ones_like(x[:, :1])), 1),
                      torch.cat((weight, weight.new_full((1,), 50.0))),
                      torch.cat((grad, grad[:, :1] * 0), 1))  # fmt: skip
    torch.testing.assert_close(shifted["out"][:, :-1], whole["out"])
    torch.testing.assert_close(shifted["d_weight"][:-1], whole["d_weight"])
    for item in range(3):
        alone = results(run(backend), x[item : item + 1], weight, grad[item : item + 1])
        assert torch.equal(alone["out"][0], whole["out"][item])
        assert torch.equal(alone["d_x"][0], whole["d_x"][item])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@backends
def test_a_bad_number_touches_its_item_only(backend, value, device):
    x, weight, grad = tensors((3, 4, 3, 6, 5), torch.float32, device=device)
    clean = results(run(backend), x, weight, grad)
    x[1, 2, 1, 3, 2] = value
    weight[2] = abs(weight[2])
    clean = results(run(backend), x.nan_to_num(0, 0, 0), weight, grad)
    dirty = results(run(backend), x, weight, grad)
    truth = results(run("reference"), x.double(), weight.double(), grad.double())
    assert torch.equal(dirty["out"].isnan(), truth["out"].isnan())
    for item in (0, 2):
        assert torch.equal(dirty["out"][item], clean["out"][item])
        assert torch.equal(dirty["d_x"][item], clean["d_x"][item])
