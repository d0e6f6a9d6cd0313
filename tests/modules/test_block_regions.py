"""The region kinds: nothing is projected, aggregated, cast, copied or saved twice."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from nlkernels import NonLocalBlock1d, NonLocalBlock2d, NonLocalBlock3d, functional
from nlkernels.modules import fast
from nlkernels.modules.layers import RegionAggregation
from tests.modules.by_hand import block, by_hand, features

KINDS = ("region_softmax", "region_relu")


class Calls(TorchDispatchMode):
    """Counts calls of operators by name."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_one_projection_and_one_aggregation(kind):
    made = block(kind=kind, backend="chunked")
    with Calls() as calls:
        made(features(2, 6, 4, 5, 7))
    assert calls.counts["block_project"] == calls.counts["norm_product"] == 1  # theta and out
    assert calls.counts["region_forward"] == 1
    assert "_to_copy" not in calls.counts and "convolution" not in calls.counts
    with Calls() as calls:
        block(kind=kind, region_kernel=(1, 1, 1), backend="chunked")(features(2, 6, 4, 5, 7))
    assert calls.counts["block_project"] == 1 and "region_forward" not in calls.counts


@pytest.mark.parametrize("kind", KINDS)
def test_layers_one_after_another_project_and_aggregate_once(kind):
    made = block(kind=kind, backend="chunked")
    made.fused = False
    with Calls() as calls:
        made(features(2, 6, 4, 5, 7))
    assert calls.counts["convolution"] == 2  # theta and out
    assert calls.counts["region_forward"] == 1
    assert calls.counts["clone"] == 1  # the attended rows, for out
    assert "_to_copy" not in calls.counts


@pytest.mark.parametrize("kernel", [(3, 1, 5), (1, 1, 1)])
@pytest.mark.parametrize("l2norm", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_query_and_key_are_one_tensor(kind, l2norm, kernel, monkeypatch):
    given = []

    def record(*operands, **options):
        given.append(operands)
        return attention(*operands, **options)

    attention = functional.nonlocal_attention
    monkeypatch.setattr(functional, "nonlocal_attention", record)
    made = block(kind=kind, region_kernel=kernel, region_l2norm=l2norm, pool=None)
    x = features(2, 6, 4, 5, 7)
    torch.testing.assert_close(made(x), by_hand(made, x)[0])
    query, key, value = given[0]
    assert query is key
    assert (value is query) == (kernel == (1, 1, 1) and not l2norm)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved(kind, autocast, fused):
    """x, u, s and what the attention returns, each map once: what out returns is computed again.

    For layers one after another also what out returns, and out's input, a copy of these rows.
    """
    made = block(kind=kind, dtype=torch.float32, pool=None, backend="chunked", inner=6)
    made.fused = fused
    x = features(2, 6, 4, 6, 6, dtype=torch.float32)
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with (
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        made(x)
    size = x.numel() * (2 if autocast else 4)
    maps = [nbytes for nbytes, _ in storages.values() if nbytes >= size]
    # relu saves no output of the attention, out's input is that.
    whole = 4 if fused else 6 if kind == "region_softmax" else 5
    assert len(maps) == whole
    assert set(maps) == {size}


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_with_one_tensor_as_query_key_and_value(kind):
    torch._dynamo.reset()
    made = block(kind=kind, region_kernel=(1, 1, 1), pool=None).eval()
    x = features(2, 6, 2, 3, 4).requires_grad_()
    got = torch.compile(made, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, made(x))
    ours, expected = (torch.autograd.grad(out.square().sum(), x)[0] for out in (got, made(x)))
    torch.testing.assert_close(ours, expected)


def test_lengths_are_taken_in_float32():
    made = block(
        kind="region_relu", region_l2norm=True, region_kernel=(1, 1, 1), dtype=torch.float16
    )
    with torch.no_grad():
        made.theta.weight.mul_(2000)  # squares beyond the range of float16
    query, _, _ = fast.operands(made, features(1, 6, 1, 2, 2, dtype=torch.float16))
    lengths = query.double().square().sum(2).sqrt()
    torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=2e-3, atol=0)


@pytest.mark.parametrize(
    ("cls", "shape", "kernel", "convolve"),
    [
        (NonLocalBlock1d, (9,), (3,), F.conv1d),
        (NonLocalBlock2d, (6, 9), (3, 5), F.conv2d),
        (NonLocalBlock3d, (4, 6, 9), (3, 5, 1), F.conv3d),
    ],
)
def test_aggregation_is_a_depthwise_convolution(cls, shape, kernel, convolve):
    made = cls(8, kind="region_softmax", region_kernel=kernel).double()
    u = features(2, 4, *shape)
    padding = [size // 2 for size in kernel]
    expected = convolve(u, made.region.weight[:, None], padding=padding, groups=4)
    torch.testing.assert_close(made.region(u), expected)


@pytest.mark.parametrize(("channels", "group"), [(256, 32), (64, 32), (48, 48), (8, 8)])
def test_weights_start_within_the_bound_of_the_dense_tensor(channels, group):
    kernel = (3, 7, 7)
    weight = RegionAggregation(channels, kernel).weight
    dense = torch.empty(channels, group, *kernel)
    torch.nn.init.xavier_uniform_(dense)
    bound = math.sqrt(6 / (147 * (group + channels)))
    assert 0.99 * bound < dense.abs().max() <= bound
    assert 0.97 * bound < weight.abs().max() <= bound


def test_other_initialisations_of_regions():
    def deviation(init):
        made = NonLocalBlock3d(128, kind="region_softmax", init=init, region_kernel=(3, 3, 3))
        return made.region.weight.std().item()

    assert deviation("normal") == pytest.approx(0.01, rel=0.1)
    assert deviation(0.3) == pytest.approx(0.3, rel=0.1)
    assert deviation("kaiming") == pytest.approx((2 / 27) ** 0.5, rel=0.1)


def test_backend_that_only_attends_leaves_the_aggregation_its_own():
    made = block(kind="region_softmax", backend="sdpa", pool=None)
    x = features(2, 6, 2, 4, 4)
    torch.testing.assert_close(made(x), by_hand(made, x)[0])
    assert made.explain(x).backend == "sdpa"


def test_no_parameters_without_a_neighbourhood():
    made = NonLocalBlock3d(8, kind="region_softmax", region_kernel=(1, 1, 1))
    assert made.region is None
    assert {name.split(".")[0] for name in made.state_dict()} == {"theta", "out", "norm"}
