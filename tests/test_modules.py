"""The non-local block: its function for every option, initialisation, memory and attention maps."""

import importlib.util
import itertools
import os
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from nlkernels import NonLocalBlock3d, set_nonlocal_backend
from nlkernels._memory import MIB, PeakMemory
from tests.helpers import KINDS

GOLDEN = Path(os.environ.get("NLKERNELS_GOLDEN", Path(__file__).parents[2] / "shared" / "golden"))


def block(device="cpu", dtype=torch.float64, **options):
    """A block whose every parameter and statistic matters."""
    made = NonLocalBlock3d(6, **{"zero_init": None, "init": "default", **options})
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    if made.norm is not None:
        torch.nn.init.uniform_(made.norm.running_var, 0.5, 2)
        torch.nn.init.normal_(made.norm.running_mean)
    return made.to(device, dtype)


def clip(*shape, device="cpu", dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, device=device)


def by_hand(made, x):
    """The block written out with einsum and explicit matrices."""

    def project(conv, t):
        weight = conv.weight.flatten(1)
        bias = 0 if conv.bias is None else conv.bias[:, None]
        flat = torch.einsum("oc,bcn->bon", weight, t.flatten(2)) + bias
        return flat.unflatten(2, t.shape[2:])

    def pool(t):
        return t if made.pool_size is None else F.max_pool3d(t, made.pool_size)

    before = made.pool_order == "before"
    theta = x if made.kind == "gaussian" else project(made.theta, x)
    if made.kind == "gaussian":
        phi = pool(x)
    else:
        phi = project(made.phi, pool(x)) if before else pool(project(made.phi, x))
    g = project(made.g, pool(x)) if before else pool(project(made.g, x))
    scores = torch.einsum("bdn,bdm->bnm", theta.flatten(2), phi.flatten(2))
    if made.scale is not None:
        scores = scores * made.scale
    elif made.kind == "softmax":
        scores = scores / made.inner**0.5
    weights = scores / scores.shape[2] if made.kind == "dot_product" else scores.softmax(-1)
    y = torch.einsum("bnm,bdm->bdn", weights, g.flatten(2)).unflatten(2, x.shape[2:])
    z = project(made.out, y)
    return x + (z if made.norm is None else made.norm(z)), weights


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("backend", ["reference", "chunked", "auto"])
@pytest.mark.parametrize("pool", [(1, 2, 2), (2, 1, 3), None], ids=str)
@pytest.mark.parametrize("pool_order", ["before", "after"])
@pytest.mark.parametrize("kind", KINDS)
def test_block_equals_the_formula(kind, pool_order, pool, backend, device):
    options = {"kind": kind, "pool": pool, "pool_order": pool_order, "backend": backend}
    variants = [
        {},
        {"norm": None, "inner": 5, "out_bias": False},
        {"scale": 0.3, "qkv_bias": False},
    ]
    for extra, training in itertools.product(variants, (True, False)):
        made = block(device, **options, **extra).train(training)
        x = clip(2, 6, 4, 5, 7, device=device)
        torch.testing.assert_close(made(x), by_hand(made, x)[0], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(
    "options", [{}, {"scale": 0.3}, {"pool_order": "after"}, {"pool": None}], ids=str
)
@pytest.mark.parametrize("kind", KINDS)
def test_attention_map_is_a_row_of_the_matrix(kind, options, device):
    made = block(device, kind=kind, **options).eval()
    x = clip(2, 6, 3, 5, 7, device=device)
    weights = by_hand(made, x)[1]
    grid = (3, 5, 7) if made.pool is None else (3, 2, 3)
    for t, h, w in [(0, 0, 0), (1, 4, 6), (2, 2, 3)]:
        row = made.attention_map(x, (t, h, w))
        assert row.shape == (2, *grid)
        expected = weights[:, (t * 5 + h) * 7 + w].unflatten(1, grid)
        torch.testing.assert_close(row, expected, rtol=1e-10, atol=1e-12)


def test_attention_map_needs_one_row_of_memory_only():
    made = NonLocalBlock3d(16, pool=None).eval()
    x = torch.randn(1, 16, 8, 24, 24)
    positions = 8 * 24 * 24
    with torch.no_grad(), PeakMemory() as peak:
        made.attention_map(x, (3, 5, 7))
    assert peak.live_mib * MIB <= 4 * positions * (made.inner + 4)
    assert peak.live_mib * MIB < 4 * positions**2 / 100


@pytest.mark.parametrize("kind", KINDS)
def test_temporal_groups_equal_each_chunk_alone(kind, device):
    made = block(device, kind=kind, temporal_group=2).eval()
    whole = block(device, kind=kind).eval()
    whole.load_state_dict(made.state_dict())
    x = clip(2, 6, 6, 4, 4, device=device)
    chunks = torch.cat([whole(part) for part in x.split(2, dim=2)], dim=2)
    torch.testing.assert_close(made(x), chunks, rtol=1e-11, atol=1e-12)
    assert not torch.allclose(made(x), whole(x))
    row = made.attention_map(x, (3, 1, 1))
    torch.testing.assert_close(row, whole.attention_map(x[:, :, 2:4], (1, 1, 1)))
    short = x[:, :, :2]
    torch.testing.assert_close(made(short), whole(short))


def test_pool_orders_are_different_functions():
    before, after = block(pool_order="before"), block(pool_order="after")
    after.load_state_dict(before.state_dict())
    x = clip(1, 6, 2, 4, 4)
    assert not torch.allclose(before.eval()(x), after.eval()(x))


def test_scale_folds_into_theta():
    made, folded = block(), block(scale=1.0)
    folded.load_state_dict(made.state_dict())
    with torch.no_grad():
        folded.theta.weight *= made.inner**-0.5
        folded.theta.bias *= made.inner**-0.5
    x = clip(1, 6, 2, 4, 4)
    torch.testing.assert_close(made.eval()(x), folded.eval()(x))


@pytest.mark.parametrize(
    "options", [{}, {"norm": None, "zero_init": "weight"}], ids=["gamma", "weight"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_new_block_is_the_identity_and_learns(kind, options):
    made = NonLocalBlock3d(6, kind=kind, **options)
    x, target = torch.randn(2, 6, 2, 4, 4), torch.randn(2, 6, 2, 4, 4)
    assert torch.equal(made(x), x)
    optimiser = torch.optim.SGD(made.parameters(), lr=0.5)
    losses = []
    for step in range(20):
        loss = F.mse_loss(made(x), target)
        optimiser.zero_grad()
        loss.backward()
        if step == 0:
            switch = made.out.weight if options else made.norm.weight
            assert switch.grad.abs().max() > 0
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_initialisations():
    normal = NonLocalBlock3d(256)
    assert abs(normal.theta.weight.std().item() - 0.01) < 1e-3 and not normal.g.bias.any()
    kaiming = NonLocalBlock3d(256, init="kaiming")
    assert abs(kaiming.phi.weight.std().item() - (2 / 128) ** 0.5) < 5e-3
    open_block = NonLocalBlock3d(8, zero_init=None)
    assert bool((open_block.norm.weight == 1).all()) and open_block.out.weight.any()


def test_parameter_counts_of_the_published_blocks():
    def count(dim, **options):
        return sum(p.numel() for p in NonLocalBlock3d(dim, **options).parameters())

    assert count(512) == 526_592 and count(1024) == 2_101_760
    assert count(512, out_bias=False) == 526_080
    assert count(512, norm=None, zero_init="weight") == 525_568
    assert count(512, kind="gaussian", out_bias=False) == 263_424


@pytest.mark.parametrize("group", [None, 1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_channels_last_is_kept_and_equal(kind, group, device):
    made = block(device, kind=kind, temporal_group=group).eval()
    x = clip(2, 6, 4, 6, 6, device=device)
    last = x.contiguous(memory_format=torch.channels_last_3d)
    out = made(last)
    torch.testing.assert_close(out, made(x), rtol=1e-11, atol=1e-12)
    assert out.is_contiguous(memory_format=torch.channels_last_3d)
    assert made(x).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_fast_block_keeps_a_fraction_of_the_naive_blocks_memory(dtype, device):
    made = NonLocalBlock3d(32).to(device, dtype)
    x = clip(2, 32, 8, 20, 20, device=device, dtype=dtype).requires_grad_()
    peaks = {}
    for backend in ("reference", "chunked"):
        set_nonlocal_backend(made, backend)
        with PeakMemory(device) as peak:
            made(x).sum().backward()
        peaks[backend] = peak.live_mib
    assert peaks["chunked"] < peaks["reference"] / 2


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_block_compiles_without_graph_break(backend):
    torch._dynamo.reset()
    made = block(temporal_group=2, backend="chunked").train()
    twin = block(temporal_group=2, backend="chunked").train()
    twin.load_state_dict(made.state_dict())
    x = clip(2, 6, 4, 4, 4)
    compiled = torch.compile(twin, fullgraph=True, backend=backend)
    got, expected = compiled(x), made(x)
    torch.testing.assert_close(got, expected)
    got.square().sum().backward()
    expected.square().sum().backward()
    for a, b in zip(twin.parameters(), made.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-9)


def test_repr_says_what_matters():
    text = repr(NonLocalBlock3d(8, kind="dot_product", temporal_group=4, backend="chunked"))
    for part in ("inner=4", "kind=dot_product", "(1, 2, 2) before", "temporal_group=4", "chunked"):
        assert part in text


@pytest.mark.parametrize(
    ("case", "names", "options"),
    [
        ("tn_even_eval", {"bn": "norm"}, {}),
        ("ptv_softmax_pool122_bn_even_eval", {"conv_": ""}, {}),
        ("ptv_dot_product_pool122_bn_even_train", {"conv_": ""}, {"kind": "dot_product"}),
        (
            "ah_embedded_gaussian_3d_sub_bn_odd_eval",
            {"W.0": "out", "W.1": "norm", ".0.": "."},
            {"pool_order": "after", "scale": 1.0},
        ),
        (
            "ah_gaussian_3d_sub_bn_even_train",
            {"W.0": "out", "W.1": "norm", ".0.": "."},
            {"kind": "gaussian", "pool_order": "after"},
        ),
    ],
)
def test_golden_vectors_of_published_blocks(case, names, options):
    path = GOLDEN / f"{case}.json"
    if not path.is_file():
        pytest.skip("the golden vectors are not beside this checkout (NLKERNELS_GOLDEN names them)")
    procedural = _procedural()
    record, state, inputs = procedural.load(str(path))
    renamed = {}
    for name, array in state.items():
        for old, new in names.items():
            name = name.replace(old, new)
        renamed[name] = torch.as_tensor(array)
    x = torch.as_tensor(inputs["x"]).double().requires_grad_()
    made = NonLocalBlock3d(x.shape[1], inner=renamed["g.weight"].shape[0], **options).double()
    made.load_state_dict(renamed)
    made.train(record["mode"] == "train")
    out = made(x)
    assert procedural.compare(record["outputs"]["out"], out.detach().numpy()) < 1e-9
    cotangent = procedural.clip(tuple(out.shape), "grad")
    (out * torch.as_tensor(cotangent).double()).sum().backward()
    assert procedural.compare(record["outputs"]["grad:x"], x.grad.numpy()) < 1e-9


def _procedural():
    spec = importlib.util.spec_from_file_location("procedural", GOLDEN / "procedural.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
