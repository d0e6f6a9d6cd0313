"""The constructor: parameters, initialisation, what a repr says, and what is refused."""

import functools
import inspect
import re

import pytest
import torch

from nlkernels import NonLocalBlock1d, NonLocalBlock2d, NonLocalBlock3d, set_nonlocal_backend
from nlkernels.modules.layers import Affine
from nlkernels.modules.options import BlockOptions
from tests.modules.by_hand import BLOCKS, KINDS, REGION_KINDS

REGION = {"kind": "region_softmax", "region_kernel": (3, 3, 3)}


def count(dim, **options):
    with torch.device("meta"):
        made = NonLocalBlock3d(dim, **options)
    return sum(parameter.numel() for parameter in made.parameters())


@pytest.mark.parametrize(
    ("dim", "options", "parameters"),
    [
        (512, {}, 526_592),
        (1024, {}, 2_101_760),
        (512, {"kind": "dot_product"}, 526_592),
        (512, {"out_bias": False}, 526_080),
        (1024, {"out_bias": False}, 2_100_736),
        (512, {"norm": None, "zero_init": "weight"}, 525_568),
        (1024, {"norm": None, "zero_init": "weight"}, 2_099_712),
        (512, {"norm": "affine"}, 526_592),
        (512, {"kind": "gaussian", "out_bias": False}, 263_424),
        (1024, {"kind": "gaussian", "out_bias": False}, 1_051_136),
        (512, {"kind": "region_softmax"}, 301_568),
        (1024, REGION, 1_065_984),
        (480, {}, 462_960),
        (512, {"kind": "concat"}, 526_592 + 512),
        (512, {"qkv_bias": False}, 526_592 - 3 * 256),
    ],
)
def test_parameter_counts_of_the_published_blocks(dim, options, parameters):
    assert count(dim, **options) == parameters


def test_names_of_parameters():
    def names(**options):
        with torch.device("meta"):
            return {name.split(".")[0] for name in NonLocalBlock3d(8, **options).state_dict()}

    assert names() == {"theta", "phi", "g", "out", "norm"}
    assert names(kind="gaussian") == {"g", "out", "norm"}
    assert names(kind="concat") == {"theta", "phi", "g", "out", "norm", "concat_weight"}
    for kind in REGION_KINDS:
        assert names(kind=kind) == {"theta", "region", "out", "norm"}
    assert names(norm=None, zero_init="weight") == {"theta", "phi", "g", "out"}


def test_input_size_puts_the_memory_into_the_repr():
    for size in ((4, 6, 8), (2, 8, 4, 6, 8)):
        made = NonLocalBlock3d(8, input_size=size)
        assert f"N x M = {4 * 6 * 8} x {4 * 3 * 4}" in repr(made)
    assert "N x M" not in repr(NonLocalBlock3d(8))


def test_every_option_is_a_keyword_and_known():
    parameters = inspect.signature(NonLocalBlock3d).parameters
    assert tuple(parameters) == ("dim", *BlockOptions._fields)
    kinds = {parameters[name].kind for name in BlockOptions._fields}
    assert kinds == {inspect.Parameter.KEYWORD_ONLY}


@pytest.mark.parametrize("kind", KINDS)
def test_defaults_by_dimension(kind):
    for dims, pool, region in ((1, (2,), (7,)), (2, (2, 2), (7, 7)), (3, (1, 2, 2), (3, 7, 7))):
        made = BLOCKS[dims](10, kind=kind)
        assert made.dims == dims and made.inner == 5 and made.pool_size == pool
        assert made.region_kernel == (region if kind in REGION_KINDS else None)
        assert made.pool_order == ("after" if kind in REGION_KINDS else "before")
        assert made.scale is None and made.backend is None and made.is_nonlocal
    assert NonLocalBlock3d(1, kind=kind).inner == 1


def test_initialisations():
    def deviation(parameter):
        return parameter.std().item()

    normal = NonLocalBlock3d(256)
    assert deviation(normal.theta.weight) == pytest.approx(0.01, rel=0.05)
    assert deviation(normal.out.weight) == pytest.approx(0.01, rel=0.05)
    assert not normal.g.bias.any() and not normal.out.bias.any()
    assert deviation(NonLocalBlock3d(256, init=0.25).g.weight) == pytest.approx(0.25, rel=0.05)
    mixed = NonLocalBlock2d(256, init="kaiming", out_init=0.02)
    assert deviation(mixed.phi.weight) == pytest.approx((2 / 128) ** 0.5, rel=0.05)
    assert deviation(mixed.out.weight) == pytest.approx(0.02, rel=0.05)
    torchs = NonLocalBlock1d(256, init="default", out_init="kaiming")
    assert deviation(torchs.theta.weight) == pytest.approx((1 / 3 / 256) ** 0.5, rel=0.05)
    assert torchs.theta.bias.any() and not torchs.out.bias.any()
    assert deviation(torchs.out.weight) == pytest.approx((2 / 256) ** 0.5, rel=0.05)


@pytest.mark.parametrize(
    ("init", "deviation"),
    [("normal", 0.01), (0.5, 0.5), ("kaiming", 2**0.5), ("default", (1 / 3 / 1024) ** 0.5)],
)
def test_concat_weight_starts_like_a_convolution_to_one_channel(init, deviation):
    weight = NonLocalBlock2d(1024, kind="concat", init=init).concat_weight
    assert weight.shape == (2, 512)
    assert weight.std().item() == pytest.approx(deviation, rel=0.1)
    weight = NonLocalBlock2d(1024, kind="concat", out_init=init).concat_weight
    assert weight.std().item() == pytest.approx(deviation, rel=0.1)


def test_zero_inits():
    gamma = NonLocalBlock3d(8)
    assert not gamma.norm.weight.any() and not gamma.norm.bias.any() and gamma.out.weight.any()
    weight = NonLocalBlock3d(8, zero_init="weight", init="default")
    assert not weight.out.weight.any() and not weight.out.bias.any()
    assert bool((weight.norm.weight == 1).all())
    x = torch.randn(1, 8, 2, 4, 4)
    assert torch.equal(weight(x), x) and torch.equal(weight.eval()(x), x)
    open_block = NonLocalBlock3d(8, zero_init=None)
    assert bool((open_block.norm.weight == 1).all()) and open_block.out.weight.any()


def test_norms():
    made = NonLocalBlock2d(8, norm_eps=0.5, norm_momentum=0.2)
    assert isinstance(made.norm, torch.nn.BatchNorm2d)
    assert (made.norm.eps, made.norm.momentum) == (0.5, 0.2)
    assert NonLocalBlock1d(8, norm_momentum=None).norm.momentum is None
    assert isinstance(NonLocalBlock1d(8).norm, torch.nn.BatchNorm1d)
    assert isinstance(NonLocalBlock3d(8, norm=torch.nn.SyncBatchNorm).norm, torch.nn.SyncBatchNorm)
    group = NonLocalBlock3d(8, norm=functools.partial(torch.nn.GroupNorm, 2)).norm
    assert isinstance(group, torch.nn.GroupNorm) and not group.weight.any()
    affine = NonLocalBlock3d(8, norm="affine", zero_init=None)
    assert isinstance(affine.norm, Affine)
    assert list(affine.norm.state_dict()) == ["weight", "bias"]
    bare = functools.partial(torch.nn.InstanceNorm3d, affine=False)
    assert NonLocalBlock3d(8, norm=bare, zero_init="weight").norm.weight is None


@pytest.mark.parametrize("dims", BLOCKS)
@pytest.mark.parametrize("kind", KINDS)
def test_repr_says_what_matters(kind, dims):
    group = {"temporal_group": 4} if dims == 3 else {}
    made = BLOCKS[dims](8, kind=kind, backend="chunked", **group)
    text = repr(made)
    parts = ["8, inner=4", f"kind={kind}", f"{made.pool_size} {made.pool_order}", "backend=chunked"]
    parts += [f"temporal_group={4}"] if group else []
    parts += [f"region={made.region_kernel}"] if kind in REGION_KINDS else []
    for part in parts:
        assert part in text
    assert "no pool" in repr(BLOCKS[dims](8, kind=kind, pool=None))
    assert "l2norm" in repr(NonLocalBlock3d(8, **REGION, region_l2norm=True))


@pytest.mark.parametrize(
    "options",
    [{}, {"norm": "affine"}, {"zero_init": "weight"}, {"norm": None, "zero_init": "weight"}],
    ids=str,
)
def test_repr_says_whether_the_output_is_still_zero(options):
    made = NonLocalBlock3d(8, **options)
    assert "output still zero" in repr(made)
    switch = made.out if "zero_init" in options else made.norm
    with torch.no_grad():
        switch.weight[3] = 0.1
    assert "output not zero" in repr(made)
    made = NonLocalBlock3d(8, **options)
    with torch.no_grad():
        (made.out if made.norm is None else made.norm).bias[1] = 0.1
    assert "output not zero" in repr(made)
    with torch.device("meta"):
        assert "zero" not in repr(NonLocalBlock3d(8, **options))
    assert "output not zero" in repr(NonLocalBlock3d(8, **{**options, "zero_init": None}))


def test_switching_the_backend_reaches_every_dimension():
    blocks = torch.nn.ModuleList([cls(8, kind=kind) for cls in BLOCKS.values() for kind in KINDS])
    assert set_nonlocal_backend(blocks, "chunked") == 21
    assert {made.backend for made in blocks} == {"chunked"}


def module(dim):
    return "no module"


def bare(dim):
    return torch.nn.BatchNorm3d(dim, affine=False)


REFUSED = {
    "kind": ({"kind": "region"}, "did you mean 'region_relu'"),
    "pool_length": ({"pool": (2, 2)}, "three positive sizes (t, h, w) or None, got (2, 2)"),
    "pool_zero": ({"pool": (0, 2, 2)}, "three positive sizes (t, h, w) or None, got (0, 2, 2)"),
    "pool_text": ({"pool": "two"}, "got 'two'; the published blocks use (1, 2, 2)"),
    "order_region": ({**REGION, "pool_order": "before"}, "pool_order 'after' with kind"),
    "kernel_kind": ({"region_kernel": (3, 3, 3)}, "no region_kernel with kind 'softmax'"),
    "kernel_even": ({**REGION, "region_kernel": (3, 4, 3)}, "all odd, got (3, 4, 3)"),
    "kernel_length": ({**REGION, "region_kernel": (3, 3)}, "three positive sizes (t, h, w)"),
    "l2norm_kind": ({"region_l2norm": True}, "region_l2norm with kind region_softmax or"),
    "l2norm_type": ({**REGION, "region_l2norm": 1}, "region_l2norm to be a bool, got 1"),
    "concat_scale": ({"kind": "concat", "scale": 1.0}, "no scale with kind 'concat', got 1.0"),
    "scale": ({"scale": float("inf")}, "scale to be a finite number, got inf"),
    "bias": ({"qkv_bias": None}, "qkv_bias to be a bool, got None"),
    "out_bias": ({"out_bias": "yes"}, "out_bias to be a bool, got 'yes'"),
    "norm": ({"norm": "layer"}, "norm to be one of batch, affine, got 'layer'"),
    "norm_eps": ({"norm_eps": -1e-5}, "norm_eps to be a finite number of 0 or more"),
    "norm_momentum": ({"norm_momentum": 2}, "norm_momentum to be a number from 0 to 1 or None"),
    "norm_bare": ({"norm": bare}, "norm with a weight for zero_init='gamma'"),
    "zero_init": ({"zero_init": "beta"}, "zero_init to be one of gamma, weight, got 'beta'"),
    "gamma": ({"norm": None}, "use zero_init='weight'"),
    "init": ({"init": "xavier"}, "init to be one of normal, kaiming, default, got 'xavier'"),
    "init_number": ({"init": -1.0}, "or a standard deviation, got -1.0"),
    "out_init": ({"out_init": "zero"}, "out_init to be one of normal, kaiming, default"),
    "input_size": ({"input_size": (4, 4)}, "input_size (T, H, W) or (B, 8, T, H, W), got (4, 4)"),
    "input_channels": ({"input_size": (2, 4, 4, 8, 8)}, "or (B, 8, T, H, W), got (2, 4, 4, 8, 8)"),
    "input_pool": ({"input_size": (4, 1, 8)}, "input of at least (1, 2, 2) to pool, got (4, 1"),
    "group": ({"temporal_group": 0}, "positive number of frames, got 0"),
    "inner": ({"inner": True}, "inner of 1 or more, got True"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_options_are_refused(name):
    options, message = REFUSED[name]
    with pytest.raises(ValueError, match=f"NonLocalBlock3d: expected .*{re.escape(message)}"):
        NonLocalBlock3d(8, **options)


def test_norm_that_is_no_module():
    with pytest.raises(TypeError, match=r"expected norm\(8\) to be a module, got str; pass"):
        NonLocalBlock3d(8, norm=module)


def test_norm_that_is_a_module_already():
    with pytest.raises(TypeError, match=r"norm to make a module from the channels, got .*; pass"):
        NonLocalBlock3d(8, norm=torch.nn.BatchNorm3d(8))


def test_other_dimensions_refuse_what_they_lack():
    with pytest.raises(ValueError, match="NonLocalBlock2d: expected no temporal_group, got 4"):
        NonLocalBlock2d(8, temporal_group=4)
    with pytest.raises(ValueError, match=r"NonLocalBlock1d: .* one positive size \(l\) or None"):
        NonLocalBlock1d(8, pool=(2, 2))
    with pytest.raises(ValueError, match=r"NonLocalBlock2d: expected \(B, 8, H, W\), got \(1, 8,"):
        NonLocalBlock2d(8)(torch.zeros(1, 8, 2, 4, 4))
    with pytest.raises(ValueError, match=r"query \(y, x\) inside \(4, 4\), got \(0, 0, 0\)"):
        NonLocalBlock2d(8).attention_map(torch.zeros(1, 8, 4, 4), (0, 0, 0))
    with pytest.raises(ValueError, match="temporal_group of at least 2 frames to pool, got 1"):
        NonLocalBlock3d(8, temporal_group=1, pool=(2, 2, 2))
