"""Published parameters and FLOPs of every network, and what the zoo says of each."""

import pytest
import torch

from nlkernels.models import create_model, list_models
from nlkernels.models.costs import costs
from nlkernels.models.registry import registered
from nlkernels.models.zoo import RESULTS, SOURCES, WEIGHTS, describe

NL = {"blocks": 5}


def _nl(kind):
    return {"blocks": 5, "block": {"kind": kind}}


def _row(name, frames, size, options, parameters, published):
    blocks = options.get("blocks", 0)
    kind = options.get("block", {}).get("kind", "")
    gate = [pytest.mark.gate] if "r101" in name or frames > 32 else []
    identifier = "-".join(filter(None, (name, f"{frames}x{size}", f"blocks{blocks}", kind)))
    return pytest.param(
        name, frames, size, options, parameters, published, id=identifier, marks=gate
    )


# The original's four networks in its settings: parameters, then multiply-adds without and with 5
# blocks, in groups of 4 frames where its code groups, at 224 pixels and once at 256.
CAFFE2_SETTINGS = (("32x2", 32, 224), ("8x8", 8, 224), ("32x4", 32, 224), ("128x1", 128, 224))
CAFFE2 = {
    "c2d_r50": ("24.328M", "31.686M", "20.2 28.4", "19.3 27.4", "77.2 115.3", "80.9 119.1"),
    "i3d_r50": ("28.043M", "35.402M", "32.8 41.0", "28.1 36.2", "112.4 150.6", "131.3 169.5"),
    "c2d_r101": ("43.320M", "50.678M", "35.1 43.2", "34.1 42.3", "136.6 174.7", "140.3 178.5"),
    "i3d_r101": ("51.754M", "59.113M", "51.4 59.5", "46.7 54.8", "186.6 224.8", "205.5 243.7"),
}
CAFFE2_256 = {
    "c2d_r50": "26.5 38.3",
    "i3d_r50": "42.9 54.7",
    "c2d_r101": "45.9 57.7",
    "i3d_r101": "67.2 79.0",
}
# Networks with factors for norms have blocks without any: 7 350 272 numbers instead of 7 358 464.
AFFINE = {"c2d_r50": "31.678M", "i3d_r50": "35.394M", "c2d_r101": "50.670M", "i3d_r101": "59.104M"}


def _caffe2_rows():
    for network, (plain, with_blocks, *flops) in CAFFE2.items():
        settings = [*zip(CAFFE2_SETTINGS, flops, strict=True)]
        settings.append((("32x2", 32, 256), CAFFE2_256[network]))
        for (setting, frames, size), pair in settings:
            affine = setting in ("32x4", "128x1")
            counts = (plain, AFFINE[network] if affine else with_blocks)
            for blocks, count, flop in zip((0, 5), counts, pair.split(), strict=True):
                name = f"{network}_{setting}"
                yield _row(name, frames, size, {"blocks": blocks}, count, f"{flop}G")


# Of the others as their repositories print them.
OTHERS = [
    _row("mmaction_c2d_nopool_r50_8x8", 8, 224, {}, "24.3M", "33G"),
    _row("mmaction_c2d_nopool_r101_8x8", 8, 224, {}, "43.3M", "63G"),
    _row("mmaction_c2d_r50_8x8", 8, 224, {}, "24.3M", "19G"),
    _row("mmaction_c2d_r50_16x4", 16, 224, {}, "24.3M", "39G"),
    _row("mmaction_i3d_r50_32x2", 32, 256, {}, "28.0M", "43.5G"),
    _row("mmaction_i3d_heavy_r50_32x2", 32, 256, {}, "33.0M", "166.3G"),
    _row("mmaction_i3d_r50_32x2", 32, 256, _nl("dot_product"), "35.4M", "59.3G"),
    _row("mmaction_i3d_r50_32x2", 32, 256, _nl("softmax"), "35.4M", "59.3G"),
    _row("mmaction_i3d_r50_32x2", 32, 256, _nl("gaussian"), "31.7M", "56.5G"),
    _row("mmaction_slowonly_r50_4x16", 4, 256, NL, "39.81M", "43.2G"),
    _row("mmaction_slowonly_r50_8x8", 8, 256, NL, "39.81M", "96.7G"),
    _row("mmaction_tsm_r50", 8, 224, {}, "24.33M", "32.9G"),
    _row("mmaction_tsm_r50", 8, 224, _nl("dot_product"), "31.68M", "61.3G"),
    _row("mmaction_tsm_r50", 8, 224, _nl("softmax"), "31.68M", "61.3G"),
    _row("mmaction_tsm_r50", 8, 224, _nl("gaussian"), "28.0M", "59.1G"),
    _row("pytorchvideo_c2d_r50_8x8", 8, 256, {}, "24.33M", "25.89G"),
    _row("pytorchvideo_i3d_r50_8x8", 8, 256, {}, "28.04M", "37.53G"),
    _row("tushar_i3d_r50_32x2", 32, 224, NL, "35.402M", "41.0G"),
]


def _printed(number, like):
    """A number with the unit and as many decimals as the published one."""
    unit = {"M": 1e6, "G": 1e9}[like[-1]]
    decimals = len(like.rstrip("MG").partition(".")[2])
    return f"{number / unit:.{decimals}f}{like[-1]}"


@pytest.mark.parametrize(
    ("name", "frames", "size", "options", "parameters", "published"), [*_caffe2_rows(), *OTHERS]
)
def test_costs_are_the_published_ones(name, frames, size, options, parameters, published):
    found = costs(name, frames, size, **options)
    assert _printed(found.parameters, parameters) == parameters
    assert _printed(found.published, published) == published
    assert found.executed <= found.multiply_adds


def test_blocks_of_tsm_add_what_is_published():
    plain, with_blocks = costs("tsm_r50", 8, 224), costs("tsm_r50", 8, 224, blocks=5)
    assert _printed(with_blocks.parameters, "31.7M") == "31.7M"
    assert _printed(plain.published, "33G") == "33G"
    assert _printed(with_blocks.published - plain.published, "28.4G") == "28.4G"


# Numbers of parameters that are known exactly.
PARAMETERS = [
    ("inception_nl_flow", {}, 400, 12_675_312),
    ("inception_nl_flow", {"blocks": 2}, 400, 12_675_312 + 989_552),
    ("inception_nl_flow", {}, 51, 12_317_587),
    ("rnl_tsm_r50", {"blocks": 0}, 400, 24_327_632),
    ("rnl_tsm_r50", {}, 400, 24_327_632 + 3_801_088 + 263_937),
    ("i3d_r50_8x8", NL, 400, 28_043_472 + 7_358_464),
    ("i3d_r50_32x4", NL, 400, 28_043_472 + 7_350_272),
    ("mmaction_i3d_r50_32x2", NL, 400, 28_043_472 + 7_354_368),
    ("mmaction_i3d_r50_32x2", _nl("gaussian"), 400, 28_043_472 + 3_680_256),
    # 2 D numbers more in each block.
    ("mmaction_i3d_r50_32x2", _nl("concat"), 400, 28_043_472 + 7_354_368 + 4 * 256 + 6 * 512),
    ("mindspore_i3d_r50_32", NL, 400, 28_043_472 + 7_354_368),
]


@pytest.mark.parametrize(("name", "options", "classes", "count"), PARAMETERS, ids=str)
def test_parameters(name, options, classes, count):
    with torch.device("meta"):
        model = create_model(name, num_classes=classes, **options)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_reassociated_kinds_execute_less():
    for kind in ("dot_product", "concat"):
        found = costs("mmaction_i3d_r50_32x2", 32, 256, **_nl(kind))
        assert found.executed < 0.95 * found.multiply_adds
    plain = costs("c2d_r50_8x8", 8, 224)
    assert plain.executed == plain.multiply_adds == plain.published


def test_every_model_is_described():
    for name in list_models():
        record = describe(name)
        assert record.name == name
        assert record.input.frames >= 4 and record.input.size >= 48
        assert (record.source is None) == (record.system is None) == (record.licence is None)
    assert {registered(name).system for name in list_models()} - {None} == set(SOURCES)
    assert set(RESULTS) <= set(list_models())


def test_results_fit_their_networks():
    with torch.device("meta"):
        for name, results in RESULTS.items():
            for result in results:
                assert 0 < result.top1 < (result.top5 or 100) < 101
                model = create_model(name, num_classes=2, width=0.125, blocks=result.blocks)
                kinds = {getattr(module, "kind", None) for module in model.modules()} - {None}
                assert bool(kinds) == (result.kind is not None)


LICENCES = {
    "i3d_r50_8x8": "repository: CC-BY-NC-4.0; weights: CC-BY-NC-4.0",
    "c2d_r101_8x8": "repository: CC-BY-NC-4.0; weights: none published",
    "i3d_r50_32x4_ungrouped": "repository: CC-BY-NC-4.0; weights: none published",
    "mmaction_i3d_r50_32x2": "repository: Apache-2.0; weights: not stated",
    "pytorchvideo_slow_r50_8x8": "repository: Apache-2.0; weights: not stated",
    "c2d_tiny": None,
}


@pytest.mark.parametrize(("name", "licence"), LICENCES.items(), ids=LICENCES)
def test_licences_are_those_that_are_stated(name, licence):
    """A repository licenses its code; of weights only the original's says something."""
    assert describe(name).licence == licence
    assert set(WEIGHTS) <= set(list_models())


def test_results_of_other_recipes_are_told_apart():
    plain = {each.recipe: each for each in describe("mmaction_i3d_r50_32x2").results if not each[0]}
    assert (plain[""].top1, plain["dense"].top1, plain["dense"].top5) == (73.47, 73.77, 91.35)
    for results in RESULTS.values():
        assert len({(each.blocks, each.kind, each.recipe) for each in results}) == len(results)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"describe: expected .* did you mean 'tsm_r50'"):
        describe("tsm_r5")
