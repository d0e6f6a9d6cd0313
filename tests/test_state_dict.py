"""Blocks in and out of other systems' state dicts: exact for one system, equal across systems."""

import functools

import numpy as np
import pytest
import torch

from nlkernels import NonLocalBlock1d, NonLocalBlock2d, NonLocalBlock3d
from nlkernels.modules.presets import PRESETS

BLOCKS = {1: NonLocalBlock1d, 2: NonLocalBlock2d, 3: NonLocalBlock3d}
SHAPES = {1: (2, 6, 8), 2: (2, 6, 5, 4), 3: (2, 6, 4, 5, 4)}
BEFORE = (
    *("caffe2", "caffe2_dot", "caffe2_affine", "tushar", "inception_nl", "slowfast"),
    "pytorchvideo",
)
AFTER = ("alexhex7", "tsm", "mmaction_i3d", "mmaction_slowonly", "mindspore")
# What each system's block can be, by preset.
KINDS = {
    **dict.fromkeys(PRESETS, ("softmax", "dot_product")),
    **dict.fromkeys(AFTER, ("softmax", "gaussian", "dot_product", "concat")),
    **dict.fromkeys(("tushar", "inception_nl", "tsm"), ("softmax",)),
    "rnl": ("region_softmax", "region_relu"),
}
NORMS = {
    "caffe2": ("batch", "affine", None),
    "caffe2_dot": ("batch", "affine", None),
    "caffe2_affine": ("affine", None),
    **dict.fromkeys(("tushar", "inception_nl", "slowfast"), ("batch",)),
    **dict.fromkeys(("pytorchvideo", *AFTER, "rnl"), ("batch", None)),
}


# Presets whose layouts and conversions are another's.
TWINS = ("caffe2_dot", "inception_nl", "tsm")


def make(preset, dims=3, dtype=torch.float64, **options):
    """A system's block in evaluation mode, of which every weight and statistic matters."""
    block = BLOCKS[dims].from_preset(preset, 6, zero_init=None, **options)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.5)
        if options.get("norm", PRESETS[preset].options.get("norm", "batch")) == "batch":
            block.norm.running_mean.normal_(std=0.5)
            block.norm.running_var.uniform_(0.5, 2)
            block.norm.num_batches_tracked += 7
    return block.to(dtype).eval()


def forms():
    """Every system's block: preset, kind and norm."""
    return [
        (preset, kind, norm)
        for preset in PRESETS
        for kind in KINDS[preset]
        for norm in NORMS[preset]
    ]


def stated(theirs, preset):
    """The norm, where keys alone do not tell it from a batch norm without statistics."""
    affine = preset in ("caffe2", "caffe2_dot") and any(key.endswith("bn_s") for key in theirs)
    lost = affine and not any(key.endswith("bn_rm") for key in theirs)
    return {"norm": "affine"} if lost else {}


def out_bias(preset, norm):
    """Whether a system's block has a bias in out."""
    if preset.startswith("mmaction"):
        return {"out_bias": norm is None}
    return {"out_bias": preset != "mindspore"}


@pytest.mark.parametrize("pool", ["default", None])
@pytest.mark.parametrize(("preset", "kind", "norm"), forms())
def test_one_system_gives_back_what_it_got(preset, kind, norm, pool):
    if preset == "mindspore" and kind == "gaussian" and pool is not None:
        pool = None  # its gaussian kind cannot pool
    for dims in (1, 2, 3):
        extra = {"region_kernel": (3,) * dims} if preset == "rnl" else {}
        made = make(
            preset, dims, kind=kind, norm=norm, pool=pool, **out_bias(preset, norm), **extra
        )
        options = {"kind": kind, "pool": pool}
        theirs = made.to_foreign(preset, prefix="module.nl.", **options)
        assert all(key.startswith("module.nl.") for key in theirs)
        imported = {**options, **stated(theirs, preset)}
        found = BLOCKS[dims].from_foreign(theirs, preset, prefix="module.nl.", **imported)
        assert_equal(found.to_foreign(preset, prefix="module.nl.", **options), theirs)
        x = torch.randn(SHAPES[dims], dtype=torch.float64)
        assert torch.equal(found.eval()(x), made(x))


@pytest.mark.parametrize(("target", "kind", "target_norm"), forms())
def test_every_system_computes_what_another_does(target, kind, target_norm):
    """Default conversions, and those to a norm that is asked for."""
    reached = 0
    sources = [form for form in forms() if form[0] not in TWINS]
    for source, source_kind, norm in sources:
        same_order = (source in BEFORE) == (target in BEFORE)
        pools = ["default", None] if same_order else [None]
        if "mindspore" in (source, target) and kind == "gaussian":
            pools = [None]
        for pool in pools if source_kind == kind and (source == "rnl") == (target == "rnl") else []:
            made = make(source, kind=kind, norm=norm, pool=pool, **out_bias(source, norm))
            if kind == "gaussian" and pool is None:
                assert made.scale in (None, 1.0)
            options = {"kind": kind, "pool": pool}
            for asked in ({}, {"norm": target_norm}):
                homeless = target == "mindspore" and asked.get("norm", "batch") is None
                if homeless and (norm is not None or made.out.bias is not None):
                    with pytest.raises(ValueError, match=r"expected out\.bias to be zero"):
                        made.to_foreign(target, **options, **asked)
                    continue
                theirs = made.to_foreign(target, **options, **asked)
                imported = {**options, **stated(theirs, target)}
                found = NonLocalBlock3d.from_foreign(theirs, target, **imported).eval()
                x = torch.randn(SHAPES[3], dtype=torch.float64)
                torch.testing.assert_close(found(x), made(x), rtol=1e-10, atol=1e-11)
                reached += 1
    assert reached >= len(NORMS[target])


def test_the_scale_moves_into_theta():
    made = make("slowfast", pool=None)
    theirs = made.to_foreign("alexhex7", pool=None)
    torch.testing.assert_close(theirs["theta.weight"], made.theta.weight.detach() / 3**0.5)
    torch.testing.assert_close(theirs["theta.bias"], made.theta.bias.detach() / 3**0.5)
    region = make("rnl", scale=0.25, region_kernel=(3, 3, 3))
    found = NonLocalBlock3d.from_foreign(region.to_foreign("rnl"), "rnl").eval()
    x = torch.randn(SHAPES[3], dtype=torch.float64)
    torch.testing.assert_close(found(x), region(x), rtol=1e-10, atol=1e-11)


def test_a_bias_moves_into_the_running_mean():
    made = make("slowfast", pool=None)
    theirs = made.to_foreign("mmaction_slowonly", pool=None)
    assert "conv_out.conv.bias" not in theirs
    moved = made.norm.running_mean - made.out.bias.detach()
    torch.testing.assert_close(theirs["conv_out.bn.running_mean"], moved)
    assert theirs["conv_out.bn.num_batches_tracked"] == 7


def test_another_epsilon_moves_into_gamma():
    made = make("slowfast", norm_eps=0.1)
    x = torch.randn(SHAPES[3], dtype=torch.float64)
    assert_equal(
        made.to_foreign("slowfast", norm_eps=0.1),
        NonLocalBlock3d.from_foreign(
            made.to_foreign("slowfast", norm_eps=0.1), "slowfast", norm_eps=0.1
        ).to_foreign("slowfast", norm_eps=0.1),
    )
    found = NonLocalBlock3d.from_foreign(made.to_foreign("slowfast"), "slowfast").eval()
    assert found.norm.eps == 1e-5
    torch.testing.assert_close(found(x), made(x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("source", "options", "target", "message"),
    [
        ("slowfast", {}, "alexhex7", "expected pool_order after, got a block with before"),
        ("alexhex7", {"pool": (2, 2, 2)}, "alexhex7", r"expected pool \(1, 2, 2\)"),
        ("slowfast", {"pool": None}, "tushar", r"expected pool \(1, 2, 2\), got a block with None"),
        ("alexhex7", {"kind": "concat"}, "tsm", "expected kind softmax, got a block with concat"),
        ("rnl", {}, "tsm", "expected kind softmax, got a block with region_softmax"),
        ("alexhex7", {"kind": "relu", "pool": None}, "slowfast", "got a block with relu"),
        ("alexhex7", {"kind": "gaussian", "scale": 0.5}, "alexhex7", "expected scale 1, got"),
        ("rnl", {"scale": 0.5, "region_l2norm": True}, "rnl", "expected scale 1, got"),
        ("tsm", {"scale": 0.0}, "tsm", "scale 1, got a block with 0; no factor leads from 0"),
        ("alexhex7", {"kind": "gaussian"}, "mindspore", "its gaussian kind has none"),
        ("slowfast", {"temporal_group": 2, "pool": (1, 2, 2)}, "tushar", "expected temporal_group"),
        (
            "pytorchvideo",
            {"norm": functools.partial(torch.nn.GroupNorm, 2)},
            "slowfast",
            "conversion of another module to a batch norm",
        ),
    ],
    ids=str,
)
def test_other_functions_are_refused(source, options, target, message):
    block = NonLocalBlock3d.from_preset(source, 6, **options)
    with pytest.raises(ValueError, match=message):
        block.to_foreign(target)


def test_kind_and_pool_show_in_the_keys():
    for preset in AFTER:
        for kind in ("gaussian", "concat"):
            if kind in KINDS[preset]:
                made = make(preset, kind=kind, pool=None)
                found = NonLocalBlock3d.from_foreign(made.to_foreign(preset), preset)
                assert (found.kind, found.pool) == (kind, None)
        if preset != "tsm":
            made = make(preset, kind="softmax")
            found = NonLocalBlock3d.from_foreign(made.to_foreign(preset), preset, kind="softmax")
            assert found.pool_size == (1, 2, 2)


@pytest.mark.parametrize(("shown", "asked"), [("default", None), (None, (1, 2, 2))], ids=str)
def test_keys_and_options_must_agree(shown, asked):
    theirs = make("alexhex7", pool=shown).to_foreign("alexhex7", pool=shown)
    with pytest.raises(ValueError, match="which the keys show"):
        NonLocalBlock3d.from_foreign(theirs, "alexhex7", pool=asked)
    with pytest.raises(ValueError, match="expected inner=3, which the weights have, got 4"):
        NonLocalBlock3d.from_foreign(theirs, "alexhex7", inner=4)


@pytest.mark.parametrize("array", [np.asarray, torch.as_tensor], ids=["numpy", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_any_arrays_come_back_in_their_dtype(dtype, array):
    theirs = {k: array(t) for k, t in make("tsm", dtype=dtype).to_foreign("tsm").items()}
    block = NonLocalBlock3d.from_foreign(theirs, "tsm")
    assert block.g.weight.dtype == dtype and block.training
    back = block.to_foreign("tsm")
    assert_equal(back, {key: torch.as_tensor(value) for key, value in theirs.items()})
    block.g.weight.data.zero_()
    assert theirs["g.0.weight"].any() and back["g.0.weight"].any()


def test_arrays_of_another_byte_order():
    theirs = make("caffe2").to_foreign("caffe2", prefix="nonlocal_conv3_1_")
    swapped = {key: tensor.numpy().astype(">f8") for key, tensor in theirs.items()}
    swapped |= {"nonlocal_conv3_1_g_w_momentum": np.zeros(3), "lr": np.float32(0.1)}
    block = NonLocalBlock3d.from_foreign(swapped, "caffe2", prefix="nonlocal_conv3_1_")
    assert_equal(block.to_foreign("caffe2", prefix="nonlocal_conv3_1_"), theirs)


def test_the_count_of_batches_may_be_absent():
    theirs = make("tsm").to_foreign("tsm")
    assert theirs.pop("W.1.num_batches_tracked") == 7
    block = NonLocalBlock3d.from_foreign(theirs, "tsm")
    assert block.norm.num_batches_tracked == 0 and block.norm.num_batches_tracked.dim() == 0


@pytest.mark.parametrize("inner", [5, 64, 80])
def test_off_mask_weights_of_regions_do_not_matter(inner):
    made = NonLocalBlock3d.from_preset("rnl", 4, inner=inner, region_kernel=(1, 3, 5))
    theirs = made.to_foreign("rnl")
    groups = max(inner // 32, 1)
    assert theirs["penta.weight"].shape == (inner, inner // groups, 1, 3, 5)
    assert torch.equal(theirs["penta.mask"].sum((1, 2, 3, 4)), torch.full((inner,), 15.0))
    noisy = dict(theirs)
    noise = torch.full_like(theirs["penta.weight"], torch.nan)
    noisy["penta.weight"] = torch.where(theirs["penta.mask"] > 0, theirs["penta.weight"], noise)
    found = NonLocalBlock3d.from_foreign(noisy, "rnl")
    assert torch.equal(found.region.weight, made.region.weight)
    assert_equal(found.to_foreign("rnl"), theirs)
    noisy["penta.mask"] = torch.ones_like(noisy["penta.mask"])
    with pytest.raises(ValueError, match=r"expected penta.mask to be 1 where"):
        NonLocalBlock3d.from_foreign(noisy, "rnl")


def test_regions_that_have_no_groups_are_refused():
    block = NonLocalBlock3d.from_preset("rnl", 4, inner=100)
    with pytest.raises(ValueError, match="expected inner to be a multiple of inner // 32"):
        block.to_foreign("rnl")


@pytest.mark.parametrize("preset", ["caffe2", "caffe2_dot"])
def test_a_batch_norm_without_statistics_is_no_affine_one(preset):
    theirs = make(preset).to_foreign(preset)
    stripped = {k: v for k, v in theirs.items() if not k.endswith(("_rm", "_riv"))}
    with pytest.raises(ValueError, match=r"got bn_b, bn_s; pass norm='affine' or preset 'caffe2_a"):
        NonLocalBlock3d.from_foreign(stripped, preset)
    for chosen, options in ((preset, {"norm": "affine"}), ("caffe2_affine", {})):
        found = NonLocalBlock3d.from_foreign(stripped, chosen, **options)
        assert_equal(found.to_foreign(chosen, **options), stripped)
        assert list(found.norm.state_dict()) == ["weight", "bias"]


def test_mindspores_gaussian_block_is_one_that_runs_there():
    made = NonLocalBlock3d.from_preset("mindspore", 8, kind="gaussian")
    theirs = made.to_foreign("mindspore")
    assert made.pool is None and "g.weight" in theirs
    assert NonLocalBlock3d.from_foreign(theirs, "mindspore").kind == "gaussian"
    pooled = NonLocalBlock3d.from_preset("mindspore", 8, kind="gaussian", pool=(1, 2, 2))
    with pytest.raises(ValueError, match="its gaussian kind has none"):
        pooled.to_foreign("mindspore")


@pytest.mark.parametrize("option", [{"inner": 4}, {"init": "kaiming"}, {"backend": "chunked"}])
def test_export_refuses_options_without_effect(option):
    made = make("tsm")
    assert_equal(made.to_foreign("tsm", inner=3), made.to_foreign("tsm"))
    with pytest.raises(ValueError, match=next(iter(option))):
        made.to_foreign("tsm", **option)
    region = make("rnl", region_kernel=(3, 1, 3))
    assert_equal(region.to_foreign("rnl", region_kernel=[3, 1, 3]), region.to_foreign("rnl"))
    with pytest.raises(
        ValueError, match=r"expected region_kernel=\(3, 1, 3\), which the block has"
    ):
        region.to_foreign("rnl", region_kernel=(3, 3, 3))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"pool": 3}, ValueError, "expected pool to be three positive sizes"),
        ({"scale": "x"}, ValueError, "expected scale to be a finite number"),
        ({"norm_eps": "x"}, ValueError, "expected norm_eps to be a finite number"),
        ({"norm": "bn"}, ValueError, "expected norm to be one of batch, affine, got 'bn'"),
        ({"norm": torch.nn.BatchNorm3d(6)}, TypeError, "expected norm to make a module"),
    ],
    ids=["pool", "scale", "norm_eps", "norm", "module"],
)
def test_values_that_no_block_has_are_refused(options, error, message):
    made = make("slowfast")
    theirs = made.to_foreign("slowfast")
    with pytest.raises(error, match=message):
        NonLocalBlock3d.from_foreign(theirs, "slowfast", **options)
    with pytest.raises(error, match=message):
        made.to_foreign("slowfast", **options)


def test_groups_of_slowfast_become_frames():
    theirs = make("slowfast").to_foreign("slowfast")
    load = functools.partial(NonLocalBlock3d.from_foreign, theirs, "slowfast")
    assert load(groups=4, frames=16).temporal_group == 4
    assert load(groups=1, frames=16).temporal_group is None
    with pytest.raises(ValueError, match="expected groups and frames"):
        load(groups=3, frames=16)


def test_one_error_lists_all_faults():
    theirs = make("tsm").to_foreign("tsm", prefix="nl.")
    theirs["nl.W.0.weight"] = theirs["nl.W.0.weight"][:, :2]
    theirs["nl.extra"] = theirs.pop("nl.theta.bias")
    with pytest.raises(ValueError, match="expected exactly the keys") as caught:
        NonLocalBlock3d.from_foreign(theirs, "tsm", prefix="nl.")
    lines = str(caught.value).splitlines()
    assert "missing: nl.theta.bias" in lines[1]
    assert "wrong shape: nl.W.0.weight (6, 2, 1, 1, 1), not (6, 3, 1, 1, 1)" in lines[2]
    assert "unexpected: nl.extra" in lines[3]


@pytest.mark.parametrize(
    ("state", "options", "error", "message"),
    [
        (
            {},
            {},
            ValueError,
            "expected the key g.0.weight or g.weight, got none; the nearest of its 0",
        ),
        (None, {}, ValueError, "there are blocks behind prefix 'module.nl.'"),
        (None, {"prefix": "module.nl.", "knd": "softmax"}, TypeError, "got 'knd'"),
        (None, {"prefix": "module.nl.", "kind": "concat"}, ValueError, "expected kind softmax"),
        ({"g.weight": [1.0]}, {}, TypeError, "expected g.weight to be an array"),
        ({"g.weight": torch.ones(3, 6, 1, 1)}, {}, ValueError, "NonLocalBlock2d"),
        ([], {}, TypeError, "expected a mapping"),
    ],
    ids=["empty", "prefix", "option", "kind", "list", "rank", "no-mapping"],
)
def test_errors_say_what_was_expected(state, options, error, message):
    if state is None:
        state = make("tsm").to_foreign("tsm", prefix="module.nl.")
    with pytest.raises(error, match=message):
        NonLocalBlock3d.from_foreign(state, "tsm", **options)


def test_a_group_norm_needs_its_groups():
    norm = functools.partial(torch.nn.GroupNorm, 2)
    made = NonLocalBlock2d.from_preset("mmaction_i3d", 6, norm=norm)
    theirs = made.to_foreign("mmaction_i3d")
    assert "conv_out.gn.weight" in theirs
    with pytest.raises(ValueError, match="pass norm"):
        NonLocalBlock2d.from_foreign(theirs, "mmaction_i3d")
    found = NonLocalBlock2d.from_foreign(theirs, "mmaction_i3d", norm=norm)
    assert_equal(found.to_foreign("mmaction_i3d", norm=norm), theirs)


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key], tensor), key
