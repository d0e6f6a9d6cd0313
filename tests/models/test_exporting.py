"""Whether a system's network computes the same with exported weights: converted, or refused."""

import pytest
import torch
from torch import nn

from nlkernels import cli
from nlkernels.models import create_model
from nlkernels.models.convert import export_foreign, load_foreign
from nlkernels.modules import ChannelGate
from nlkernels.modules.layers import Affine

SMALL = {"num_classes": 5, "width": 0.125}
RUNNING = ("running_mean", "running_var", "_rm", "_riv")


def network(name, seed=0, **options):
    """A small network in float64 all parts of which change what they see, in evaluation mode."""
    torch.manual_seed(seed)
    model = create_model(name, **SMALL, **options).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm3d | Affine):
            nn.init.uniform_(module.weight, 0.3, 0.6)
            nn.init.normal_(module.bias, std=0.3)
        if isinstance(module, nn.BatchNorm3d):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
        elif isinstance(module, nn.Conv3d) and module.bias is not None:
            nn.init.normal_(module.weight, std=0.5 * module.in_channels**-0.5)
            nn.init.normal_(module.bias, std=0.3)
        elif isinstance(module, ChannelGate):
            nn.init.normal_(module.expand.weight, std=0.3)
    return model


def assert_computes_the_same(source, target, **options):
    """The target with the source's weights, through the target's system."""
    state = export_foreign(source, target.design.system, **options)
    load_foreign(target, state, target.design.system)
    clip = torch.randn(1, 3, 8, 48, 40, dtype=torch.float64)
    with torch.no_grad():
        expected = source(clip)
        torch.testing.assert_close(target(clip), expected, rtol=1e-9, atol=1e-9)
    return state


# Source, its options, target, its options, norm to export: other forms of norm, bias and scale.
CONVERTED = {
    "factors-for-batch-norms": (
        "tushar_i3d_r50_32x2",
        {"norm": "affine"},
        "tushar_i3d_r50_32x2",
        {},
        None,
    ),
    "factors-and-epsilon": (
        "slowfast_c2d_r50_8x8",
        {"norm": "affine", "norm_eps": 1e-3},
        "slowfast_c2d_r50_8x8",
        {"norm_eps": 1e-3},
        None,
    ),
    "no-norm-behind-blocks": ("i3d_r50_128x1_ungrouped", {}, "tushar_i3d_r50_32x2", {}, None),
    "bias-into-the-mean": ("tsm_r50", {}, "mmaction_tsm_r50", {}, None),
    "no-bias": ("mmaction_tsm_r50", {}, "tsm_r50", {}, None),
    "own-bias": ("mmaction_tsm_r50", {"block": {"out_bias": True}}, "mmaction_tsm_r50", {}, None),
    "parts-that-the-port-always-has": (
        "i3d_r50_32x2",
        {"block": {"norm": None, "out_bias": False, "qkv_bias": False}},
        "tushar_i3d_r50_32x2",
        {},
        None,
    ),
    "scale-and-epsilon": (
        "tushar_i3d_r50_32x2",
        {"block": {"scale": 0.5, "norm_eps": 1e-2}},
        "i3d_r50_32x2",
        {},
        None,
    ),
    "folded": ("i3d_r50_8x8", {}, "i3d_r50_32x4_ungrouped", {}, "affine"),
    "unfolded": ("i3d_r50_32x4_ungrouped", {}, "i3d_r50_8x8", {}, "batch"),
}


@pytest.mark.parametrize("case", CONVERTED.values(), ids=CONVERTED)
def test_other_forms_of_the_same_function_are_converted(case):
    name, options, other, others, norm = case
    source = network(name, blocks=5, **options)
    before = {key: tensor.clone() for key, tensor in source.state_dict().items()}
    target = network(other, seed=1, blocks=5, **others)
    assert_computes_the_same(source, target, norm=norm)
    assert all(torch.equal(before[key], tensor) for key, tensor in source.state_dict().items())


def test_the_forms_show_in_the_keys():
    affine = network("pytorchvideo_c2d_r50_8x8", norm="affine")
    state = export_foreign(affine)
    assert torch.equal(state["blocks.0.norm.running_mean"], torch.zeros(8, dtype=torch.float64))
    assert state["blocks.0.norm.running_var"].unique().tolist() == [1 - 1e-5]
    folded = export_foreign(network("c2d_r50_8x8", blocks=5), norm="affine")
    assert not [key for key in folded if key.endswith(RUNNING)]
    assert not [key for key in folded if "nonlocal" in key and "_bn_" in key]
    with pytest.raises(ValueError, match="expected norm for tsm to be one of batch, got 'affine'"):
        export_foreign(network("tsm_r50"), norm="affine")


PADDING, STRIDE = "pool1_padding 0 instead of 1", "stem_stride_t 1 instead of 2"
# Name, options, target, what the error says.
REFUSED = {
    "order": (
        "mmaction_i3d_r50_32x2",
        {"blocks": 5, "block": {"preset": "caffe2"}},
        None,
        r"mmaction has, got .*layer2\.1\.nl: pool_order 'before' instead of 'after'",
    ),
    "padding": ("mmaction_i3d_r50_32x2", {"pool1_padding": 0}, None, PADDING),
    "stride": ("mmaction_i3d_r50_32x2", {"stem_stride_t": 1}, None, STRIDE),
    "shift": ("c2d_r50_8x8", {"shift": "blockres"}, None, "shift 'blockres' instead of None"),
    "pool2": ("i3d_r50_8x8", {"pool2": 0}, None, "pool2 0 instead of 2"),
    "inner": ("i3d_r50_8x8", {"blocks": 1, "block": {"inner": 16}}, None, "inner 16 instead of 64"),
    "pool": (
        "i3d_r50_32x2",
        {"blocks": 5, "block": {"pool": None}},
        "tushar",
        r"layer3\.1\.nl: pool None instead of \(1, 2, 2\)",
    ),
    "large-pool": (
        "tsm_r50",
        {"blocks": 5, "block": {"pool": (1, 4, 4)}},
        None,
        r"pool \(1, 4, 4\) instead of \(1, 2, 2\)",
    ),
    "group": (
        "i3d_r50_32x2",
        {"blocks": 5, "layer_block": {2: {"temporal_group": 2}}},
        "tushar",
        r"layer2\.1\.nl: temporal_group 2 instead of None",
    ),
    "scale-of-a-gaussian": (
        "mindspore_i3d_r50_32",
        {"blocks": 1, "block": {"kind": "gaussian", "pool": None, "scale": 0.5}},
        None,
        r"nl: scale 0\.5 instead of 1",
    ),
    "pooled-gaussian": (
        "mindspore_i3d_r50_32",
        {"blocks": 1, "block": {"kind": "gaussian", "pool": (1, 2, 2)}},
        None,
        r"nl: pool \(1, 2, 2\) instead of None",
    ),
    "inception": ("hassony2_i3d_rgb", {"padding": "same"}, None, "padding 'same' instead of 'tem"),
    "images": ("c2d_r50_8x8", {}, "torchvision", PADDING),
    "images-shift": ("tsm_r50", {}, "torchvision", "shift 'blockres' instead of None"),
    "other-norm": (
        "i3d_r50_8x8",
        {"blocks": 1, "block": {"norm": nn.InstanceNorm3d, "zero_init": None}},
        None,
        "to be zero|expected a norm that is a batch norm",
    ),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_a_network_that_would_compute_something_else_is_refused(case):
    name, options, system, message = case
    with pytest.raises(ValueError, match=message):
        export_foreign(network(name, **options), system)


# What a system's own configuration has: the weights go out as they are, and come in without a word.
OFFERED = {
    "caffe2": ("i3d_r50_8x8", {"norm_eps": 1e-4, "block": {"scale": 1.0, "norm_eps": 1e-4}}),
    "caffe2-unpooled": ("c2d_r50_32x2", {"block": {"pool": None, "qkv_bias": False}}),
    "caffe2-dot": ("i3d_r50_32x4", {"block": {"kind": "dot_product"}}),
    "slowfast": ("slowfast_i3d_r50_8x8", {"pool2": 0, "block": {"pool": (1, 4, 4)}}),
    "slowfast-truncated": (
        "slowfast_i3d_r50_8x8",
        {"inflated": ((1, 0, 0), (1, 0), (1, 0), (0, 1))},
    ),
    "mmaction": ("mmaction_i3d_r50_32x2", {"block": {"scale": None, "pool": None}}),
    "mmaction-unnormed": ("mmaction_slowonly_r50_8x8", {"block": {"norm": None}}),
    "mmaction-heavy-stem": ("mmaction_i3d_heavy_r50_32x2", {"norm_eps": 1e-3}),
    "mmaction-shift": ("mmaction_tsm_r50", {"shift": None, "pool2": 3}),
    "tsm": ("tsm_r50", {"shift": "block", "shift_div": 4, "pool2": 3}),
    "rnl": ("rnl_tsm_r50", {"block": {"kind": "region_relu", "region_l2norm": True}}),
}


@pytest.mark.parametrize("case", OFFERED.values(), ids=OFFERED)
def test_what_a_system_lets_one_choose_goes_through_as_it_is(case):
    name, options = case
    model, other = (network(name, seed=seed, blocks=5, **options) for seed in (0, 1))
    state = export_foreign(model)
    report = load_foreign(other, state, model.design.system)
    assert report.notes == ()
    for mine, theirs in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_network_of_its_own_system_is_compared_as_well():
    blobs = export_foreign(network("i3d_r50_8x8", blocks=5))
    conv_first = network("i3d_r50_8x8", blocks=5, block={"preset": "alexhex7"})
    with pytest.raises(ValueError, match=r"pool_order 'after' instead of 'before'.*'caffe2'"):
        load_foreign(conv_first, blobs)
    padded = network("i3d_r50_8x8", blocks=5, pool1_padding=1)
    report = load_foreign(padded, blobs)
    assert report.notes == ("pool1_padding 1 instead of 0",)
    # What was said once is no reason to refuse the way back.
    assert export_foreign(padded, like=report).keys() == blobs.keys()
    with pytest.raises(ValueError, match="pool1_padding 1 instead of 0"):
        export_foreign(padded)


def test_fresh_blocks_may_be_of_any_system():
    model = network("i3d_r50_8x8", blocks=5, block={"preset": "alexhex7"})
    plain = export_foreign(network("i3d_r50_8x8"))
    assert load_foreign(model, plain, new=("blocks",)).notes == ()


def test_batch_norms_do_not_go_into_factors_by_themselves():
    model = network("i3d_r50_32x4", blocks=5)
    blobs = export_foreign(network("i3d_r50_8x8", blocks=5))
    with pytest.raises(ValueError, match=r"(?s)unexpected \(116\).*--rewrite affine.*bn_to_affine"):
        load_foreign(model, blobs)
    with pytest.raises(ValueError, match="create the model with norm='batch'"):
        load_foreign(network("tsm_r50", norm="affine"), export_foreign(network("tsm_r50")), "tsm")


def stripped(name, **options):
    """A checkpoint without running statistics, as the original strips it for fine-tuning."""
    state = export_foreign(network(name, blocks=5, **options))
    return {key: tensor for key, tensor in state.items() if not key.endswith(RUNNING)}


@pytest.mark.parametrize("name", ["i3d_r50_8x8", "slowfast_i3d_r50_8x8"])
def test_statistics_may_start_fresh(name):
    blobs, model = stripped(name), create_model(name, **SMALL, blocks=5).double()
    with pytest.raises(ValueError, match=r"\(--new statistics\) starts fresh ones"):
        load_foreign(model, blobs)
    report = load_foreign(model, blobs, new=("statistics",))
    assert set(report.new) == {key for key in model.state_dict() if key.endswith(RUNNING[:2])}
    assert len(report.new) == 116
    for entry, tensor in model.state_dict().items():
        if entry.endswith(RUNNING[:2]):
            assert tensor.unique().tolist() == [float(entry.endswith("var"))]
    exported = export_foreign(model, like=report)
    assert exported.keys() == blobs.keys()
    assert all(torch.equal(exported[key], blobs[key]) for key in blobs)


def test_statistics_and_classifier_start_fresh_together():
    blobs = {key: tensor for key, tensor in stripped("c2d_r50_8x8").items() if "pred" not in key}
    model = create_model("c2d_r50_8x8", **SMALL, blocks=5)
    with pytest.raises(ValueError, match="the others may be new as well"):
        load_foreign(model, blobs)
    report = load_foreign(model, blobs, new=("statistics", "classifier"))
    assert len(report.new) == 116 + 2


def test_some_statistics_alone_are_a_loss():
    blobs = export_foreign(network("c2d_r50_8x8", blocks=5))
    del blobs["res2_0_branch2a_bn_rm"]
    with pytest.raises(ValueError, match=r"missing \(1\): res2_0_branch2a_bn_rm"):
        load_foreign(create_model("c2d_r50_8x8", **SMALL, blocks=5), blobs, new=("statistics",))


def test_nlk_convert_says_what_may_start_fresh(capsys):
    assert cli.main(["convert", "a.pkl", "b.safetensors", "--new", "statistic"]) == 2
    expected = "expected --new to be one of blocks, classifier, statistics, got 'statistic'"
    assert f"{expected}; did you mean 'statistics'?" in capsys.readouterr().err
