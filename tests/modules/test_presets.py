"""The presets against a table of the published systems' blocks."""

import pytest
import torch

from nlkernels import NonLocalBlock1d, NonLocalBlock2d, NonLocalBlock3d
from nlkernels.modules.options import BlockOptions
from nlkernels.modules.presets import PRESETS, preset_options
from tests.modules.by_hand import BLOCKS, KINDS

HALF = (1, 2, 2)
# kind, pool, order, scale, bias of out, norm's weight at the start (None: no norm), identity, and
# the initialisations of theta and out.
TABLE = {
    "caffe2": ("softmax", HALF, "before", None, True, 0, True, "normal", "normal"),
    "caffe2_dot": ("dot_product", HALF, "before", None, True, 0, True, "normal", "normal"),
    "caffe2_affine": ("softmax", HALF, "before", None, True, None, True, "normal", "zero"),
    "tushar": ("softmax", HALF, "before", None, True, 1, False, "kaiming", "kaiming"),
    "inception_nl": ("softmax", HALF, "before", None, True, 0, True, "kaiming", "kaiming"),
    "slowfast": ("softmax", HALF, "before", None, True, 0, True, "kaiming", "kaiming"),
    "pytorchvideo": ("softmax", None, "before", None, True, 1, False, "default", "default"),
    "alexhex7": ("softmax", HALF, "after", 1.0, True, 0, True, "default", "default"),
    "tsm": ("softmax", HALF, "after", 1.0, True, 0, True, "default", "default"),
    "mmaction_i3d": ("softmax", HALF, "after", 1.0, False, 0, True, "normal", "kaiming"),
    "mmaction_slowonly": ("softmax", HALF, "after", None, False, 0, True, "normal", "kaiming"),
    "mindspore": ("dot_product", HALF, "after", 1.0, False, 1, False, "normal", "normal"),
    "rnl": ("region_softmax", None, "after", 1.0, True, 0, True, "default", "default"),
}
DIM, INNER = 256, 128


def deviation(init, fan_in, fan_out):
    """Standard deviation of a 1x1 convolution's weight."""
    return {
        "normal": 0.01,
        "kaiming": (2 / fan_out) ** 0.5,
        "default": (1 / 3 / fan_in) ** 0.5,
        "zero": 0.0,
    }[init]


def test_all_published_systems_are_there():
    assert set(PRESETS) == set(TABLE)


@pytest.mark.parametrize("name", TABLE)
def test_preset_is_that_systems_block(name):
    kind, pool, order, scale, out_bias, gamma, identity, init, out_init = TABLE[name]
    made = NonLocalBlock3d.from_preset(name, DIM)
    assert (made.kind, made.pool_size, made.pool_order) == (kind, pool, order)
    assert (made.scale, made.inner, made.temporal_group) == (scale, INNER, None)
    assert made.theta.bias is not None
    assert (made.out.bias is not None) == out_bias
    if gamma is None:
        assert made.norm is None
    else:
        assert bool((made.norm.weight == gamma).all()) and not made.norm.bias.any()
        eps = 1.0000001e-5 if name.startswith("caffe2") else 1e-5
        assert (made.norm.eps, made.norm.momentum) == (eps, 0.1)
    expected = deviation(init, DIM, INNER)
    assert made.theta.weight.std().item() == pytest.approx(expected, rel=0.05)
    assert made.theta.bias.any() == (init == "default")
    expected = deviation(out_init, INNER, DIM)
    assert made.out.weight.std().item() == pytest.approx(expected, rel=0.05)
    x = torch.randn(1, DIM, 2, 4, 4)
    assert torch.equal(made(x), x) == identity
    repository, _, file = PRESETS[name].source.partition(": ")
    assert repository.count("/") == 1 and ".py" in file


def test_region_preset():
    made = NonLocalBlock3d.from_preset("rnl", 64)
    assert made.region_kernel == (3, 7, 7) and not made.region_l2norm
    res4 = NonLocalBlock3d.from_preset(
        "rnl", 64, kind="region_relu", region_kernel=(3, 3, 3), region_l2norm=True, pool=HALF
    )
    assert (res4.kind, res4.region_kernel, res4.pool_size) == ("region_relu", (3, 3, 3), HALF)


@pytest.mark.parametrize("name", TABLE)
def test_presets_in_one_and_two_dimensions(name):
    for cls, pool in ((NonLocalBlock1d, (2,)), (NonLocalBlock2d, (2, 2))):
        made = cls.from_preset(name, 8)
        assert made.pool_size == (None if TABLE[name][1] is None else pool)


@pytest.mark.parametrize("name", TABLE)
def test_presets_without_norm(name):
    made = NonLocalBlock3d.from_preset(name, 8, norm=None)
    identity = TABLE[name][6]
    assert made.norm is None and made.theta.weight.any()
    assert bool(made.out.weight.any()) != identity
    # mmcv's block has a bias where it has no norm.
    assert (made.out.bias is not None) == (TABLE[name][4] or name.startswith("mmaction"))
    assert not identity or not made.out.bias.any()
    chosen = NonLocalBlock3d.from_preset(name, 8, norm=None, zero_init=None)
    assert chosen.out.weight.any()


@pytest.mark.parametrize("name", ["mmaction_i3d", "mmaction_slowonly"])
@pytest.mark.parametrize("norm", ["batch", None])
def test_concatenation_of_mmcv_starts_as_its_convolution_does(name, norm):
    made = NonLocalBlock2d.from_preset(name, 1024, kind="concat", norm=norm)
    assert made.concat_weight.std().item() == pytest.approx(2**0.5, rel=0.1)
    assert made.theta.weight.std().item() == pytest.approx(0.01, rel=0.05)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TABLE)
def test_any_kind_goes_with_a_preset(name, kind):
    made = NonLocalBlock3d.from_preset(name, 8, kind=kind)
    region = kind.startswith("region")
    assert made.pool_order == ("after" if region else TABLE[name][2])
    assert made.scale == (None if kind == "concat" else TABLE[name][3])


@pytest.mark.parametrize("name", TABLE)
def test_what_a_system_offers_are_options(name):
    assert set(PRESETS[name].offers) <= set(BlockOptions._fields)
    assert set(PRESETS[name].dims) <= set(BLOCKS)
    for dims in BLOCKS:
        assert set(preset_options(name, dims, {})) <= set(BlockOptions._fields)


def test_overrides_win_and_mistakes_are_named():
    made = NonLocalBlock2d.from_preset("mmaction_i3d", 8, pool=None, scale=0.5, inner=3)
    assert (made.pool_size, made.scale, made.inner) == (None, 0.5, 3)
    with pytest.raises(ValueError, match="did you mean 'slowfast'"):
        NonLocalBlock3d.from_preset("slow_fast", 8)
    for dims in (0, 4, None):
        with pytest.raises(ValueError, match=f"dims to be 1, 2 or 3, got {dims}; pass"):
            preset_options("tsm", dims, {})
    with pytest.raises(TypeError, match="got 'pools'; did you mean 'pool'"):
        NonLocalBlock3d.from_preset("tsm", 8, pools=None)
    with pytest.raises(ValueError, match="no scale with kind 'concat'"):
        NonLocalBlock3d.from_preset("tsm", 8, kind="concat", scale=1.0)
