"""What a block computes, for every kind and option, and its maps, groups, formats and memory."""

import functools
import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from nlkernels import NonLocalBlock3d, set_nonlocal_backend
from nlkernels._memory import MIB, PeakMemory
from tests.helpers import SHORT, assert_not_worse
from tests.modules.by_hand import BLOCKS, KINDS, POSITIONS, REGION_KINDS, block, by_hand, features

POOLS = {1: ((2,), (3,), None), 2: ((2, 2), (1, 3), None), 3: ((1, 2, 2), (2, 1, 3), None)}
NORMS = {
    "batch": {},
    "none": {"norm": None, "inner": 5, "out_bias": False},
    "affine": {"norm": "affine", "qkv_bias": False},
    "group": {"norm": functools.partial(torch.nn.GroupNorm, 3)},
}


def orders(kind):
    return ("after",) if kind in REGION_KINDS else ("before", "after")


def extras(kind):
    """Options that only some kinds have."""
    yield {}
    if kind != "concat":
        yield {"scale": 0.3}
        yield {"scale": 0.0}
    if kind in REGION_KINDS:
        yield {"region_l2norm": True}
        yield {"region_kernel": (1, 1, 1)}


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("backend", ["reference", "chunked", "auto"])
@pytest.mark.parametrize("dims", BLOCKS)
@pytest.mark.parametrize("kind", KINDS)
def test_block_equals_the_formula(kind, dims, backend, device):
    x = features(2, 6, *POSITIONS[dims], device=device)
    default, *other_pools = POOLS[dims]
    pairs = [*((default, norm) for norm in NORMS.values()), *((pool, {}) for pool in other_pools)]
    for order, (pool, norm) in itertools.product(orders(kind), pairs):
        options = {"kind": kind, "pool": pool, "pool_order": order, "backend": backend, **norm}
        made = block(dims, device, **options)
        for training in (True, False) if norm == {} else (False,):
            made.train(training)
            expected = by_hand(made, x)[0]
            torch.testing.assert_close(made(x), expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("kind", KINDS)
def test_options_of_some_kinds(kind, backend, device):
    x = features(2, 6, 2, 5, 4, device=device)
    for extra, order in itertools.product(extras(kind), orders(kind)):
        made = block(3, device, kind=kind, pool_order=order, backend=backend, **extra).eval()
        torch.testing.assert_close(made(x), by_hand(made, x)[0], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("pool", [None, "default"])
@pytest.mark.parametrize("dims", BLOCKS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_those_of_the_formula(kind, dims, pool, device):
    made = block(dims, device, kind=kind, pool=pool).train()
    x = features(2, 6, *POSITIONS[dims], device=device).requires_grad_()
    cotangent = torch.randn_like(x)
    got, expected = (
        torch.autograd.grad(call(x), [x, *made.parameters()], cotangent)
        for call in (made, lambda x: by_hand(made, x)[0])
    )
    for name, a, b in zip(["x", *dict(made.named_parameters())], got, expected, strict=True):
        torch.testing.assert_close(
            a, b, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("dims", BLOCKS)
@pytest.mark.parametrize("kind", KINDS)
def test_maps_are_the_affinity(kind, dims, device):
    x = features(2, 6, *POSITIONS[dims], device=device)
    for extra, order, pool in itertools.product(extras(kind), orders(kind), POOLS[dims][1:]):
        if "region_kernel" in extra:
            extra = {"region_kernel": (1,) * dims}
        made = block(dims, device, kind=kind, pool=pool, pool_order=order, **extra).eval()
        out, weights = made(x, return_map=True)
        assert torch.equal(out, made(x))
        torch.testing.assert_close(weights, by_hand(made, x)[1], rtol=1e-10, atol=1e-12)
        grid = [n // p for n, p in zip(x.shape[2:], made.pool_size or (1,) * dims, strict=True)]
        for position in [(0,) * dims, (1,) * dims, tuple(n - 1 for n in x.shape[2:])]:
            row = made.attention_map(x, position)
            number = torch.arange(x[0, 0].numel()).view(x.shape[2:])[position].item()
            expected = weights[:, number].unflatten(1, grid)
            torch.testing.assert_close(row, expected, rtol=1e-10, atol=1e-12)


def test_positions_of_maps_are_integers_of_any_library():
    made, x = block(3), features(1, 6, 2, 4, 4)
    row = made.attention_map(x, (1, 2, 3))
    for query in ([np.int64(1), np.uint8(2), 3], tuple(torch.tensor([1, 2, 3]))):
        assert torch.equal(made.attention_map(x, query), row)
    for query in ((True, 2, 3), (np.True_, 2, 3), (1.0, 2, 3), (1, 2), (-1, 2, 3), 1):
        with pytest.raises(ValueError, match=r"expected query \(t, y, x\) inside \(2, 4, 4\), got"):
            made.attention_map(x, query)


@pytest.mark.parametrize("kind", KINDS)
def test_maps_of_half_precision_are_wide(kind):
    made = block(kind=kind, dtype=torch.bfloat16, pool=None).eval()
    x = features(1, 6, 2, 3, 3, dtype=torch.bfloat16)
    row, (_, weights) = made.attention_map(x, (0, 1, 2)), made(x, return_map=True)
    assert row.dtype == weights.dtype == torch.float32
    wide = block(kind=kind, pool=None).eval()
    wide.load_state_dict(made.state_dict())
    expected = by_hand(wide, x.double())[1]
    error = (weights.double() - expected).abs().max()
    assert error < 0.05 * expected.abs().max()
    torch.testing.assert_close(row.flatten(1), weights[:, 5])


@pytest.mark.parametrize("kind", KINDS)
def test_attention_map_needs_one_row_of_memory_only(kind):
    made = NonLocalBlock3d(16, kind=kind, pool=None).eval()
    x = torch.randn(1, 16, 8, 24, 24)
    positions = 8 * 24 * 24
    with torch.no_grad(), PeakMemory() as peak:
        made.attention_map(x, (3, 5, 7))
    maps = 5 if kind in REGION_KINDS else 1
    assert peak.live_mib * MIB <= 4 * positions * (maps * made.inner + 4)
    assert peak.live_mib * MIB < 4 * positions**2 / 100


@pytest.mark.parametrize("kind", KINDS)
def test_temporal_groups_equal_each_chunk_alone(kind, device):
    made = block(3, device, kind=kind, temporal_group=2).eval()
    whole = block(3, device, kind=kind).eval()
    whole.load_state_dict(made.state_dict())
    x = features(2, 6, 6, 4, 4, device=device)
    parts = [whole(part, return_map=True) for part in x.split(2, dim=2)]
    out, weights = made(x, return_map=True)
    torch.testing.assert_close(made(x), out, rtol=0, atol=0)
    chunks = torch.cat([part for part, _ in parts], dim=2)
    torch.testing.assert_close(out, chunks, rtol=1e-11, atol=1e-12)
    assert not torch.allclose(out, whole(x))
    for item, weight in enumerate(weights):
        expected = torch.block_diag(*(matrix[item] for _, matrix in parts))
        torch.testing.assert_close(weight, expected, rtol=1e-11, atol=1e-12)
    row = made.attention_map(x, (3, 1, 1))
    torch.testing.assert_close(row, whole.attention_map(x[:, :, 2:4], (1, 1, 1)))
    short = x[:, :, :2]
    torch.testing.assert_close(made(short), whole(short))


def test_pool_orders_are_different_functions():
    before, after = block(pool_order="before"), block(pool_order="after")
    after.load_state_dict(before.state_dict())
    x = features(1, 6, 2, 4, 4)
    assert not torch.allclose(before.eval()(x), after.eval()(x))


def test_scale_folds_into_theta():
    made, folded = block(), block(scale=1.0)
    folded.load_state_dict(made.state_dict())
    with torch.no_grad():
        folded.theta.weight *= made.inner**-0.5
        folded.theta.bias *= made.inner**-0.5
    x = features(1, 6, 2, 4, 4)
    torch.testing.assert_close(made.eval()(x), folded.eval()(x))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm": "affine"},
        {"norm": functools.partial(torch.nn.GroupNorm, 2)},
        {"norm": None, "zero_init": "weight"},
    ],
    ids=["gamma", "affine", "group", "weight"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_new_block_is_the_identity_and_learns(kind, options):
    made = NonLocalBlock3d(6, kind=kind, **options)
    x, target = torch.randn(2, 6, 2, 4, 4), torch.randn(2, 6, 2, 4, 4)
    assert torch.equal(made(x), x)
    optimiser = torch.optim.SGD(made.parameters(), lr=0.3)
    losses = []
    for step in range(20):
        loss = F.mse_loss(made(x), target)
        optimiser.zero_grad()
        loss.backward()
        if step == 0:
            switch = made.out.weight if "zero_init" in options else made.norm.weight
            assert switch.grad.abs().max() > 0
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(parameter.grad is not None for parameter in made.parameters())


@pytest.mark.parametrize("group", [None, 1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_channels_last_is_kept_and_equal(kind, group, device):
    for dims, last in ((3, torch.channels_last_3d), (2, torch.channels_last)):
        if dims == 2 and group:
            continue
        made = block(dims, device, kind=kind, temporal_group=group).eval()
        x = features(2, 6, *(4, 6, 6)[3 - dims :], device=device)
        out = made(x.contiguous(memory_format=last))
        torch.testing.assert_close(out, made(x), rtol=1e-11, atol=1e-12)
        assert out.is_contiguous(memory_format=last)
        assert made(x).is_contiguous()


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [*((kind, torch.float32) for kind in KINDS), ("softmax", torch.bfloat16)],
    ids=str,
)
def test_fast_block_keeps_a_fraction_of_the_naive_blocks_memory(kind, dtype, device):
    options = {"region_kernel": (3, 3, 3)} if kind in REGION_KINDS else {}
    made = NonLocalBlock3d(32, kind=kind, **options).to(device, dtype)
    x = features(2, 32, 8, 20, 20, device=device, dtype=dtype).requires_grad_()
    peaks = {}
    for backend in ("reference", "chunked"):
        set_nonlocal_backend(made, backend)
        with PeakMemory(device) as peak:
            made(x).sum().backward()
        peaks[backend] = peak.live_mib
    assert peaks["chunked"] < peaks["reference"] / 2


@pytest.mark.parametrize("kind", KINDS)
def test_block_compiles_without_graph_break(kind):
    torch._dynamo.reset()
    made = block(kind=kind, temporal_group=2, backend="chunked").train()
    twin = block(kind=kind, temporal_group=2, backend="chunked").train()
    twin.load_state_dict(made.state_dict())
    x = features(2, 6, 4, 4, 4)
    got, expected = torch.compile(twin, fullgraph=True, backend="aot_eager")(x), made(x)
    torch.testing.assert_close(got, expected)
    got.square().sum().backward()
    expected.square().sum().backward()
    for a, b in zip(twin.parameters(), made.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_runs_and_differentiates(kind, device):
    made = block(3, device, torch.float32, kind=kind).eval()
    x = features(2, 6, 2, 4, 4, device=device, dtype=torch.float32)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = made(x)
    expected = made(x)
    assert out.dtype == torch.float32
    assert (out - expected).abs().max() < 0.05 * (expected - x).abs().max()
    out.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in made.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=SHORT.get)
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_keeps_the_rule(kind, dtype, device):
    made = block(3, device, dtype, kind=kind).eval()
    exact = block(3, device, kind=kind).eval()
    exact.load_state_dict(made.state_dict())
    x = features(2, 6, 2, 6, 6, device=device, dtype=dtype)
    out = {}
    for backend in ("reference", "chunked"):
        set_nonlocal_backend(made, backend)
        out[backend] = made(x).detach()
    truth = by_hand(exact, x.double())[0].detach()
    assert_not_worse(kind, out["chunked"], out["reference"], truth, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_empty_batch_and_inference_mode(kind, device):
    made = block(3, device, kind=kind).eval()
    assert made(features(0, 6, 2, 4, 4, device=device)).shape == (0, 6, 2, 4, 4)
    x = features(1, 6, 2, 4, 4, device=device)
    with torch.inference_mode():
        torch.testing.assert_close(made(x), made(x.clone()), rtol=0, atol=0)


def test_explain_names_what_runs():
    x = features(1, 6, 2, 4, 4)
    for kind in KINDS:
        said = block(kind=kind, backend="chunked").explain(x)
        assert said.backend == "chunked" and "reference" in said.reasons
        assert ("chunked aggregates regions" in said.problem) == (kind in REGION_KINDS)
