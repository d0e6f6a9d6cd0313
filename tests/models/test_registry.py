"""Registry: names, options and what a mistake in them says."""

import importlib.util
from pathlib import Path

import pytest
import torch

from nlkernels.models import create_model, list_models, register_model

GROUPED = {"temporal_group": 4}
# One of each builder.
NAMES = ["c2d_r50_8x8", "c2d_tiny", "i3d_r50_8x8", "hassony2_i3d_rgb", "tsm_r50"]
SETTINGS = ("8x8", "32x2", "32x4", "32x4_ungrouped", "128x1", "128x1_ungrouped")
PUBLISHED = {
    *(
        f"{family}_r{depth}_{setting}"
        for family in ("c2d", "i3d")
        for depth in (50, 101)
        for setting in SETTINGS
    ),
    "c2d_tiny",
    "tushar_i3d_r50_32x2",
    "slowfast_c2d_r50_8x8",
    "slowfast_c2d_r101_8x8",
    "slowfast_c2d_nopool_r50_8x8",
    "slowfast_i3d_r50_8x8",
    "slowfast_i3d_r101_8x8",
    "slowfast_slow_r50_4x16",
    "slowfast_slow_r50_8x8",
    "pytorchvideo_c2d_r50_8x8",
    "pytorchvideo_i3d_r50_8x8",
    "pytorchvideo_slow_r50_8x8",
    "mmaction_c2d_r50_8x8",
    "mmaction_c2d_r50_16x4",
    "mmaction_c2d_nopool_r50_8x8",
    "mmaction_c2d_nopool_r101_8x8",
    "mmaction_i3d_r50_32x2",
    "mmaction_i3d_heavy_r50_32x2",
    "mmaction_slowonly_r50_4x16",
    "mmaction_slowonly_r50_8x8",
    "mmaction_tsm_r50",
    "mmaction_tsm_r101",
    "tsm_r50",
    "tsm_r101",
    "rnl_tsm_r50",
    "mindspore_i3d_r50_32",
    *(f"hassony2_i3d_{modality}" for modality in ("rgb", "flow")),
    *(f"piergiaj_i3d_{modality}" for modality in ("rgb", "flow")),
    *(f"inception_nl_{modality}" for modality in ("rgb", "flow")),
}


def test_every_published_network_is_there():
    assert list_models() == sorted(PUBLISHED)


def test_list_models_filters():
    assert list_models("c2d_r50*") == sorted(f"c2d_r50_{setting}" for setting in SETTINGS)
    assert list_models("nothing*") == []
    assert list_models(system="rnl") == ["rnl_tsm_r50"]
    assert list_models("*flow", family="inception") == [
        "hassony2_i3d_flow",
        "inception_nl_flow",
        "piergiaj_i3d_flow",
    ]
    assert list_models(family="slowonly", system="pytorchvideo") == ["pytorchvideo_slow_r50_8x8"]
    with pytest.raises(ValueError, match="did you mean 'caffe2'"):
        list_models(system="cafe2")
    with pytest.raises(ValueError, match="expected family to be one of c2d, i3d"):
        list_models(family="slowfast")


def test_names_say_the_setting():
    assert not [name for name in list_models("*_8x8") if "heavy" in name]


def blocks_of(name, **options):
    """(layer, index), kind and frames of a group of each block of a network."""
    with torch.device("meta"):
        model = create_model(name, num_classes=2, width=0.125, blocks=5, **options)
    return [
        ((layer, index), unit.nl.kind, unit.nl.temporal_group)
        for layer in (1, 2, 3, 4)
        for index, unit in enumerate(model.get_submodule(f"layer{layer}"))
        if unit.nl is not None
    ]


KIND_OF = {
    "c2d_r50_8x8": "softmax",
    "slowfast_i3d_r101_8x8": "softmax",
    "slowfast_slow_r50_4x16": "dot_product",
    "slowfast_slow_r50_8x8": "dot_product",
    "mmaction_slowonly_r50_8x8": "softmax",
    "mindspore_i3d_r50_32": "dot_product",
    "rnl_tsm_r50": "region_softmax",
}


@pytest.mark.parametrize("name", KIND_OF)
def test_blocks_have_the_kind_of_the_published_network(name):
    assert {kind for _, kind, _ in blocks_of(name)} == {KIND_OF[name]}


def test_the_kind_that_one_asks_for_wins():
    for block in ({"kind": "softmax"}, {"preset": "slowfast"}):
        assert {kind for _, kind, _ in blocks_of("slowfast_slow_r50_8x8", block=block)} == {
            "softmax"
        }


PLACES = {
    "i3d_r101_8x8": (6, 13, 20),
    "slowfast_c2d_r101_8x8": (1, 3, 5),
    "slowfast_c2d_r50_8x8": (1, 3, 5),
    "slowfast_slow_r50_8x8": (1, 3, 5),
    "c2d_r50_8x8": (6, 13, 20),
    "tsm_r101": (0, 2, 4),
    "mmaction_slowonly_r50_8x8": (0, 2, 4),
}


@pytest.mark.parametrize("name", PLACES)
def test_where_blocks_go_in_a_deep_network(name):
    """Named for its depth or brought to it by the option."""
    found = [place for place, _, _ in blocks_of(name, depth=101)]
    assert [index for layer, index in found if layer == 3] == list(PLACES[name])


def test_texts_name_layers_too():
    """As JSON leaves them behind."""
    groups = [group for _, _, group in blocks_of("c2d_r50_8x8", layer_block={"2": GROUPED})]
    assert groups == [4, 4, None, None, None]


def test_register_model_refuses_a_name_twice():
    def c2d_tiny(*, num_classes, width=1.0):
        raise NotImplementedError

    with pytest.raises(ValueError, match=r"expected a new name, got 'c2d_tiny' again"):
        register_model(c2d_tiny)


def test_package_is_importable_under_its_full_name_only():
    init = Path(__file__).resolve().parents[2] / "models" / "__init__.py"
    spec = importlib.util.spec_from_file_location("models", init)
    with pytest.raises(ImportError, match=r"import this package as 'nlkernels\.models'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


MISTAKES = {
    "unknown-name": (
        "i3d_r50_8x",
        {},
        ValueError,
        r"expected one of the \d+ names of list_models\(\), got 'i3d_r50_8x'; "
        r"did you mean 'i3d_r50_8x8'\?",
    ),
    "unknown-name-far-away": ("zzz", {}, ValueError, r"got 'zzz'; nlk models lists them"),
    "unknown-option": (
        "c2d_tiny",
        {"block_s": 2},
        TypeError,
        r"options of c2d_tiny among blocks, block, dropout, checkpointing, got 'block_s'; did you",
    ),
    "block-count": ("c2d_tiny", {"blocks": 3}, ValueError, r"blocks to be one of 0, 1, 2, got 3"),
    "block-count-resnet": (
        "i3d_r50_8x8",
        {"blocks": 2},
        ValueError,
        r"i3d_r50_8x8: expected blocks to be one of 0, 1, 5, 10, got 2",
    ),
    "block-count-inception": (
        "inception_nl_flow",
        {"blocks": 5},
        ValueError,
        r"blocks to be one of 0, 2, got 5; pass one of these, or names of mixed layers",
    ),
    "block-place": (
        "i3d_r50_8x8",
        {"blocks": [(3, 6)]},
        ValueError,
        r"different bottlenecks \(layer, index\) with layers of 3, 4, 6, 3 .*got \(3, 6\)",
    ),
    "block-place-twice": ("tsm_r50", {"blocks": [(2, 0)] * 2}, ValueError, r"got \(2, 0\); count"),
    "block-place-inception": (
        "inception_nl_rgb",
        {"blocks": ["mixed3"]},
        ValueError,
        r"got 'mixed3'; did you mean 'mixed3c'|'mixed3b'",
    ),
    "design-depth": ("tsm_r50", {"depth": 34}, ValueError, r"depth to be one of 50, 101, got 34"),
    "design-padding": (
        "i3d_r50_8x8",
        {"pool1_padding": 2},
        ValueError,
        r"i3d_r50_8x8: expected pool1_padding 0 or 1, got 2; the pool is 3 pixels wide",
    ),
    "design-kernel": ("i3d_r50_8x8", {"stem_kernel_t": 4}, ValueError, r"an odd stem_kernel_t"),
    "design-stride": ("i3d_r50_8x8", {"stem_stride_t": 0}, ValueError, r"positive int, got 0"),
    "design-eps": ("i3d_r50_8x8", {"norm_eps": 0.0}, ValueError, r"norm_eps > 0, got 0\.0"),
    "design-inflated": ("i3d_r50_8x8", {"inflated": ((1,),)}, ValueError, r"be four patterns"),
    "layer-block": ("c2d_r50_8x8", {"layer_block": 4}, TypeError, r"options by layer, got 4; pass"),
    "layer-block-options": (
        "c2d_r50_8x8",
        {"layer_block": {2: 4}},
        TypeError,
        r"options by layer, got {2: 4}; pass for example {2: {'temporal_group': 4}}",
    ),
    "layer-block-option": (
        "c2d_r50_8x8",
        {"layer_block": {2: {"temporal_grup": 4}}},
        TypeError,
        r"in layer_block\[2\], got 'temporal_grup'; did you mean 'temporal_group'\?",
    ),
    **{
        f"layer-block-{layer}": (
            "c2d_r50_8x8",
            {"layer_block": {layer: GROUPED}},
            ValueError,
            rf"layers of layer_block to be 1 to 4, got {layer!r}; the original's res3 is layer 2",
        )
        for layer in (0, 5, "res3", True)
    },
    "layer-block-twice": (
        "c2d_r50_8x8",
        {"layer_block": {2: GROUPED, "2": GROUPED}},
        ValueError,
        r"layers of layer_block to be 1 to 4, got '2'",
    ),
    "design-head": ("i3d_r50_8x8", {"head": "mean"}, ValueError, r"head to be one of 'global'"),
    "padding-inception": (
        "hassony2_i3d_rgb",
        {"padding": "temporl"},
        ValueError,
        r"hassony2_i3d_rgb: expected padding .*did you mean 'temporal'",
    ),
    "block-count-bool": ("c2d_tiny", {"blocks": True}, ValueError, r"one of 0, 1, 2, got True"),
    "block-not-a-mapping": ("c2d_tiny", {"block": "softmax"}, TypeError, r"got 'softmax'; pass"),
    "block-option": (
        "c2d_tiny",
        {"block": {"pool_ordr": "after"}},
        TypeError,
        r"got 'pool_ordr'; did you mean 'pool_order'\?",
    ),
    "block-option-of-the-model": (
        "c2d_tiny",
        {"block": {"dim": 64}},
        TypeError,
        r"c2d_tiny: expected block options among variant, .*got 'dim'",
    ),
    "block-variant": (
        "c2d_r50_8x8",
        {"block": {"variant": "loca"}},
        ValueError,
        r"one of nonlocal, local, got 'loca'; did you mean 'local'\?",
    ),
    "width-zero": ("c2d_tiny", {"width": 0.0}, ValueError, r"expected width > 0, got 0\.0"),
    "width-nan": ("c2d_tiny", {"width": float("nan")}, ValueError, r"expected width > 0, got nan"),
    "width-text": ("c2d_tiny", {"width": "half"}, TypeError, r"width to be a number, got 'half'"),
    "classes-zero": ("c2d_tiny", {"num_classes": 0}, ValueError, r"num_classes >= 1, got 0"),
    "classes-float": ("c2d_tiny", {"num_classes": 2.0}, TypeError, r"to be an int, got 2\.0"),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_in_create_model(mistake):
    name, options, error, message = mistake
    with pytest.raises(error, match=message):
        create_model(name, **{"num_classes": 2, **options})


BAD_CLIPS = {
    "list": ([[0.0]], TypeError, r"expected a floating-point clip, got list"),
    "uint8": (torch.zeros(1, 3, 8, 48, 48, dtype=torch.uint8), TypeError, r"got torch\.uint8"),
    "rank": (torch.zeros(3, 8, 48, 48), ValueError, r"\(B, 3, T, H, W\), got \(3, 8, 48, 48\)"),
    "frames-first": (torch.zeros(1, 8, 3, 48, 48), ValueError, r"the colour channels second"),
    "small": (torch.zeros(1, 3, 1, 7, 48), ValueError, r"expected at least .* pixels, got \(1, 3"),
}


@pytest.mark.parametrize("bad", BAD_CLIPS.values(), ids=BAD_CLIPS.keys())
@pytest.mark.parametrize("name", NAMES)
def test_mistakes_in_clips(name, bad):
    clip, error, message = bad
    with torch.device("meta"):
        model = create_model(name, num_classes=2, width=0.125)
    with pytest.raises(error, match=rf"{name}: .*{message}"):
        model(clip)


def test_widths_round_to_multiples_of_eight():
    channels = {
        width: [
            layer.conv.out_channels
            for layer in create_model("c2d_tiny", num_classes=2, width=width).layers
        ]
        for width in (0.1, 0.7, 1, 1.5)
    }
    assert channels == {
        0.1: [8, 8, 8, 8, 8, 16],
        0.7: [8, 24, 24, 48, 48, 88],
        1: [16, 32, 32, 64, 64, 128],
        1.5: [24, 48, 48, 96, 96, 192],
    }
