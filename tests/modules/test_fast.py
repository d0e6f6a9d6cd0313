"""The fast path of a block against its layers one after another: numbers, copies, what is kept."""

import copy
import functools

import pytest
import torch
from torch import nn

from nlkernels import NonLocalBlock2d, NonLocalBlock3d
from nlkernels.modules import fast
from nlkernels.modules.presets import PRESETS
from tests.helpers import SHORT, assert_not_worse
from tests.modules.by_hand import BLOCKS, KINDS, POSITIONS, REGION_KINDS, block, features
from tests.modules.test_block_regions import Calls

COPIES = {"clone", "copy_", "_to_copy", "contiguous", "convolution", "max_pool3d_with_indices"}


def twins(**options):
    """One block with and one without the fast path, with equal weights."""
    quick, plain = block(**options), block(**options)
    plain.load_state_dict(quick.state_dict())
    plain.fused = False
    return quick, plain


def outcome(made, x, cotangent):
    """Output, gradients and buffers after a step, by name."""
    x = x.detach().requires_grad_()
    out = made(x)
    parameters = dict(made.named_parameters())
    grads = torch.autograd.grad(out, [x, *parameters.values()], cotangent)
    named = dict(zip(["x", *parameters], grads, strict=True))
    return {"out": out.detach(), **{f"d_{name}": grad for name, grad in named.items()}}


def orders(kind):
    return ("after",) if kind in REGION_KINDS else ("before", "after")


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dims", BLOCKS)
@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_the_layers(kind, dims, training):
    x = features(2, 6, *POSITIONS[dims])
    cotangent = torch.randn_like(x)
    for order in orders(kind):
        quick, plain = (
            made.train(training) for made in twins(dims=dims, kind=kind, pool_order=order)
        )
        got, wanted = outcome(quick, x, cotangent), outcome(plain, x, cotangent)
        for name in wanted:
            torch.testing.assert_close(got[name], wanted[name], rtol=1e-9, atol=1e-10)
        for name, buffer in plain.named_buffers():
            torch.testing.assert_close(quick.get_buffer(name), buffer, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=SHORT.get)
@pytest.mark.parametrize(
    ("kind", "order"), [(kind, order) for kind in KINDS for order in orders(kind)]
)
def test_keeps_the_rule(kind, order, dtype):
    """Over several draws: a sum that happens to cancel in one says nothing of a block."""
    found = [drawn(kind, order, dtype, seed) for seed in range(20)]
    # The batch norm takes the mean off: the gradient of the bias before it is rounding alone.
    for name in found[0][0].keys() - {"d_out.bias"}:
        got, same, truth = (
            torch.stack([each[name] for each in one]) for one in zip(*found, strict=True)
        )
        assert_not_worse(name, got, same, truth, 2 if name == "out" else 3)


def drawn(kind, order, dtype, seed):
    """Outcomes of the fast path, of the definition in the same dtype, and in float64."""
    torch.manual_seed(seed)
    options = {"region_kernel": (3, 3, 3)} if kind in REGION_KINDS else {}
    made = [
        NonLocalBlock3d(24, kind=kind, pool_order=order, zero_init=None, **options)
        for _ in range(3)
    ]
    for parameter in made[0].parameters():
        nn.init.normal_(parameter, std=0.3)
    made[0].to(dtype)
    for each, own in zip(made[1:], (dtype, torch.float64), strict=True):
        each.to(own).load_state_dict(made[0].state_dict())
    made[1].set_backend("reference")
    x, cotangent = (features(1, 24, 2, 6, 6, dtype=dtype) for _ in range(2))
    return [
        outcome(each.train(), x.to(each.out.weight.dtype), cotangent.to(each.out.weight.dtype))
        for each in made
    ]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_takes_it(preset):
    made = NonLocalBlock3d.from_preset(preset, 8)
    assert fast.obstacles(made) == []
    assert "one after another" not in made.explain(torch.zeros(1, 8, 4, 4, 4)).problem


def test_layers_that_are_watched_or_replaced_run_by_themselves():
    x, seen = features(1, 6, 2, 4, 4), []
    made = block()
    handle = made.phi.register_forward_hook(lambda *args: seen.append(args))
    made(x)
    assert len(seen) == 1
    assert "phi has hooks" in made.explain(x).problem
    handle.remove()
    assert fast.obstacles(made) == []
    made.theta = nn.Sequential(made.theta)
    assert fast.obstacles(made) == ["theta is a Sequential"]
    assert fast.obstacles(block(backend="reference")) == ["the backend reference is the definition"]
    assert "256 numbers" in fast.obstacles(block(pool=(3, 10, 10)))[0]
    made = block()
    made.fused = False
    assert fast.obstacles(made) == ["its attribute fused is False"]


def is_apart(made, x):
    return "one after another, as the input is small" in made.explain(x).problem


@pytest.mark.parametrize("kind", ["softmax", "dot_product"])
def test_small_inputs_go_layer_after_layer(as_measured, kind):
    made = NonLocalBlock3d(32, kind=kind, zero_init=None).eval()
    small, large = features(1, 32, 4, 8, 8).float(), torch.zeros(4, 32, 16, 8, 9)
    for x, apart in ((small, True), (large, False)):
        assert is_apart(made, x) == apart
    quick = copy.deepcopy(made)
    quick.fused = True
    assert not is_apart(quick, small)
    torch.testing.assert_close(made(small), quick(small))


def test_what_small_inputs_does_not_hold_for(as_measured):
    x = features(1, 32, 2, 8, 8)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert not is_apart(NonLocalBlock3d(32).to(dtype), x.to(dtype))
    made = NonLocalBlock3d(32)
    assert is_apart(made, x.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not is_apart(made, x.float())
    made.recompute = True
    assert not is_apart(made, x.float())
    assert not is_apart(NonLocalBlock3d(32, kind="relu"), x.float())
    explained = NonLocalBlock3d(32)
    explained.fused = False
    assert "its attribute fused is False" in explained.explain(x.float()).problem


def test_compiled_and_exported_graphs_hold_few_passes(as_measured):
    made, x = NonLocalBlock3d(32).eval(), features(1, 32, 2, 8, 8).float()
    program = torch.export.export(made, (x,))
    names = {str(node.target) for node in program.graph.nodes}
    assert any("nlkernels.pointwise" in name for name in names)
    assert not any("convolution" in name or "conv3d" in name for name in names)


def test_another_norm_runs_by_itself():
    seen = []

    class Watching(nn.GroupNorm):
        def forward(self, features):
            seen.append(features)
            return super().forward(features)

    quick, plain = twins(norm=functools.partial(Watching, 3))
    x = features(2, 6, 2, 4, 4)
    torch.testing.assert_close(quick(x), plain(x))
    assert len(seen) == 2 and fast.obstacles(quick) == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["ncdhw", "channels_last", "frames"])
def test_copies_nothing(layout, kind):
    x = features(2, 6, 4, 4, 6)
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last_3d)
    if layout == "frames":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    made = block(kind=kind).eval()
    if layout == "frames" and kind == "gaussian":
        return  # its query is x, whose positions no operand of the attention can describe
    with Calls() as calls:
        out = made(x)
    assert out.stride() == x.stride()
    assert not COPIES & set(calls.counts)


@pytest.mark.parametrize("kind", ["softmax", "concat"])
def test_frames_of_clips_are_groups_too(kind):
    x = features(2, 6, 4, 5, 6).transpose(1, 2).contiguous().transpose(1, 2)
    quick, plain = twins(kind=kind, temporal_group=2)
    for made in (quick, plain):
        made.eval()
    torch.testing.assert_close(quick(x), plain(x), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("pool", [(2, 2, 2), (3, 1, 1)])
@pytest.mark.parametrize("kind", ["softmax", "gaussian", "region_relu"])
def test_windows_end_where_groups_do(kind, pool):
    quick, plain = twins(kind=kind, pool=pool, temporal_group=4)
    x = features(2, 6, 8, 4, 4)
    torch.testing.assert_close(quick(x), plain(x), rtol=1e-9, atol=1e-10)


def kept_bytes(made, x):
    """Bytes that are saved for the backward beyond x and parameters, each storage once."""
    own = {t.untyped_storage().data_ptr() for t in (x, *made.parameters(), *made.buffers())}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = made(x)
    return sum(nbytes for nbytes, _ in storages.values()), out


@pytest.mark.parametrize("backend", ["auto", "chunked"])
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("positions", [(2, 8, 8), (2, 32, 32)], ids=["short", "long"])
def test_what_is_kept(positions, order, backend):
    made = block(dtype=torch.float32, inner=4, pool_order=order, backend=backend).train()
    x = features(2, 6, *positions, dtype=torch.float32).requires_grad_()
    n, m, inner = x[0, 0].numel(), x[0, 0].numel() // 4, made.inner
    found, out = kept_bytes(made, x)
    expected = 4 * 2 * (n + m) * 2 * inner + 2 * 4 * 2 * n
    if order == "after":
        expected += 2 * 2 * m * inner // 4
    if m < 5 * made.dim:
        expected += 4 * x.numel()
    channels = 4 * (made.dim * (inner + 8) + 3 * inner * (made.dim + 1))
    assert expected <= found <= expected + channels
    out.sum().backward()


def test_recomputed_operands_are_not_kept():
    made = block(dtype=torch.float32, pool=None, norm="affine")
    x = features(2, 6, 2, 8, 8, dtype=torch.float32).requires_grad_()
    kept, whole = kept_bytes(made, x)
    made.recompute = True
    less, again = kept_bytes(made, x)
    assert less < kept / 3
    names = ["x", *dict(made.named_parameters())]
    grads = [torch.autograd.grad(out.sum(), [x, *made.parameters()]) for out in (whole, again)]
    for name, a, b in zip(names, *grads, strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("momentum", [0.1, None, 1.0])
def test_running_statistics_are_torchs(momentum):
    quick, plain = twins(norm_momentum=momentum)
    for number in range(3):
        x = features(2, 6, 2, 4, 4) * (number + 1) + number
        quick(x), plain(x)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(quick.get_buffer(name), buffer, rtol=1e-12, atol=0)
    for made in (quick, plain):
        made.norm.eval()
    torch.testing.assert_close(quick(x), plain(x), rtol=1e-10, atol=1e-11)


def test_statistics_of_one_number_are_refused():
    made = block(2, pool=None).train()
    with pytest.raises(ValueError, match="expected more than one position while the batch norm"):
        made(features(1, 6, 1, 1))
    assert made.eval()(features(1, 6, 1, 1)).shape == (1, 6, 1, 1)


def test_frozen_parameters_have_no_gradient():
    made = block()
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(name.startswith("norm"))
    x = features(1, 6, 2, 4, 4)
    made(x).sum().backward()
    assert {name for name, p in made.named_parameters() if p.grad is not None} == {
        "norm.weight",
        "norm.bias",
    }


def test_gradients_of_gradients():
    quick, plain = twins(temporal_group=2)
    x = features(1, 6, 4, 4, 4)
    seconds = []
    for made in (quick, plain):
        own = x.clone().requires_grad_()
        first = torch.autograd.grad(made(own).square().sum(), own, create_graph=True)[0]
        first.square().sum().backward()
        seconds.append([own.grad, *(p.grad for p in made.parameters())])
    for a, b in zip(*seconds, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("kind", KINDS)
def test_compiles_whole(kind, order):
    if order not in orders(kind):
        return
    torch._dynamo.reset()
    made, twin = twins(kind=kind, pool_order=order)
    twin.fused = True
    x = features(2, 6, 2, 4, 4)
    got, expected = torch.compile(twin, fullgraph=True, backend="aot_eager")(x), made(x)
    torch.testing.assert_close(got, expected)
    got.square().sum().backward()
    expected.square().sum().backward()
    for a, b in zip(twin.parameters(), made.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-9)
    for name, buffer in made.named_buffers():
        torch.testing.assert_close(twin.get_buffer(name), buffer)


def test_images_keep_channels_last():
    x = features(2, 6, 8, 8).to(memory_format=torch.channels_last)
    made = NonLocalBlock2d(6).double().eval()
    assert made(x).is_contiguous(memory_format=torch.channels_last)
