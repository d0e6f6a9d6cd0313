"""Golden adapters: altered cases of the public networks, against formulas that read their keys."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from nlkernels.models.convert import export_foreign
from nlkernels.modules.base import NonLocalBlock
from tests.golden_cases import GoldenCase, assert_same_state, normal, parameter
from tests.golden_formulas import doubles, normed, of_frames, of_mmcv, of_regions
from tests.golden_models import NETWORKS, loaded
from tests.golden_outputs import outputs

GOLDEN = Path(__file__).parent / "golden"


def altered(stem, clip, outputs, *, entry=lambda key, shape: (key, shape), unit=None, **config):
    """A case like one of the folder with another clip and other settings.

    `entry` says what becomes of a key and its shape: (key, shape), a list of such, each with a rule
    of its own where the old one does not do, or None.
    """
    record = json.loads((GOLDEN / f"{stem}.json").read_text())
    state = {}
    for key, shape, rule in record["state"]:
        found = entry(key, shape)
        for new, size, *own in found if isinstance(found, list) else filter(None, [found]):
            state[new] = parameter(new, tuple(size), *(own or [rule]))
    record["config"] = {**record["config"], **config}
    record["source"] |= {} if unit is None else {"unit": unit}
    record["outputs"] = {name: {"shape": list(shape)} for name, shape in outputs.items()}
    return GoldenCase(record, state, {"clip": normal("clip", clip)})


def run(case):
    """The model and its outputs in float64, once keys and values come back as they were."""
    model, report = loaded(case)
    assert not report.notes
    assert_same_state(export_foreign(model, like=report), case.state)
    return model, outputs(model, case, torch.float64)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


def around_block(model, path, case):
    """What goes into a block of a model and what comes out, in float64."""
    seen = {}
    block = model.double().get_submodule(f"{path}.nl")
    assert isinstance(block, NonLocalBlock)
    handle = block.register_forward_hook(lambda _block, inputs, y: seen.update(x=inputs[0], y=y))
    outputs(model, case, torch.float64)
    handle.remove()
    return seen["x"], seen["y"]


@pytest.mark.parametrize("told", [{}, {"num_segments": 4}], ids=["shown", "told"])
def test_mmaction_s_networks_of_frames_have_no_shift(told):
    """The recogniser of frames, a plain ResNet: segments alone make no TSM of it."""
    unit, results = "ResNet + TSNHead", {"logits": (2, 20)}
    case = altered("mm_c2d_r50", (8, 3, 64, 48), results, unit=unit, **told)
    _, found = run(case)
    close(found["logits"], of_frames(case).view(2, 4, -1).mean(1))


def test_mmaction_s_tsm_without_shifts_wraps_what_has_a_block():
    def entry(key, shape):
        return key.replace(".conv.net.", ".conv."), shape

    results = {"res3": (4, 512, 8, 6), "logits": (1, 20)}
    case = altered(
        *("mm_tsm_r50_nl_dot_product", (4, 3, 64, 48), results),
        **{"entry": entry, "is_shift": False, "num_segments": 4},
    )

    def block(state, name, x):
        if f"{name}.theta.conv.weight" not in state:
            return x
        clip = x.view(1, 4, *x.shape[1:]).transpose(1, 2)
        z = of_mmcv(
            *(state, name, clip, lambda y: normed(state, f"{name}.conv_out.bn", y)), dot=True
        )
        return z.transpose(1, 2).flatten(0, 1)

    _, found = run(case)
    close(found["logits"], of_frames(case, block).mean(0, keepdim=True))


def without_norm(key, shape):
    if "conv_out.conv.weight" in key:
        return [(key, shape), (key.replace("weight", "bias"), shape[:1], "bias")]
    return (
        None if "conv_out.bn." in key else (key.replace("phi.0", "phi").replace("g.0", "g"), shape)
    )


def group_norm(key, shape):
    if "conv_out.bn." not in key:
        return key, shape
    kept = key.endswith(("weight", "bias"))
    return (key.replace("conv_out.bn.", "conv_out.gn."), shape) if kept else None


def reduced(key, shape):
    if "non_local_block" not in key or "bn" in key:
        return key, shape
    axis = 1 if "conv_out" in key else 0
    return key, [size // 2 if place == axis else size for place, size in enumerate(shape)]


GN = {"type": "GN", "num_groups": 32}
MMCV = {
    "nothing": (
        {},
        without_norm,
        lambda state, name, y: y,
    ),
    "groups": (
        {"sub_sample": True, "norm_cfg": GN},
        group_norm,
        lambda state, name, y: F.group_norm(
            y, 32, state[f"{name}.gn.weight"], state[f"{name}.gn.bias"]
        ),
    ),
    "instances": (
        {"sub_sample": True, "norm_cfg": {"type": "IN3d"}},
        lambda key, shape: None if "conv_out.bn." in key else (key, shape),
        lambda state, name, y: F.instance_norm(y),
    ),
    "epsilon": (
        {"sub_sample": True, "norm_cfg": {"type": "BN3d", "eps": 1e-3, "requires_grad": True}},
        lambda key, shape: (key, shape),
        lambda state, name, y: normed(state, f"{name}.bn", y, eps=1e-3),
    ),
    "reduction": (
        {"sub_sample": True, "norm_cfg": "BN3d", "reduction": 4},
        reduced,
        lambda state, name, y: normed(state, f"{name}.bn", y),
    ),
}


@pytest.mark.parametrize(("block", "entry", "norm"), MMCV.values(), ids=MMCV)
def test_options_of_mmcv_s_block(block, entry, norm):
    """Its own defaults: scale, neither pool nor norm, half of the channels."""
    stem, results = "mm_slowonly_r50_nl_embedded_gaussian", {"logits": (1, 20)}
    case = altered(stem, (1, 3, 2, 32, 64), results, entry=entry, non_local_cfg=block)
    model, _ = run(case)
    state, name = doubles(case), "backbone.layer3.2.non_local_block"
    x, y = around_block(model, "layer3.2", case)
    expected = of_mmcv(
        *(state, name, x, lambda out: norm(state, f"{name}.conv_out", out)),
        pool=block.get("sub_sample", False),
    )
    close(y, expected)


@pytest.mark.parametrize("system", ["TSM", "RNL"])
def test_a_deep_tsm_shifts_every_other_bottleneck(system):
    def entry(key, shape):
        if ".layer" not in key:
            return key, shape
        owner, layer, index, part = key.replace(".net.", ".").split(".", 3)
        deeper = range(5, 23) if (layer, index) == ("layer3", "5") else [int(index)]
        shifted = part.replace("conv1.", "conv1.net.")
        return [(f"{owner}.{layer}.{n}.{part if n % 2 else shifted}", shape) for n in deeper]

    case = altered("tsm_r50", (1, 6, 32, 32), {"logits": (1, 20)}, entry=entry, num_segments=2)
    case.record["system"] = system
    model, _ = run(case)
    assert len(model.layer3) == 23
    case.record["config"]["non_local"] = True
    with pytest.raises(ValueError, match="expected depth 50 for non_local, got 101"):
        loaded(case)


def resized(ratio=2, kernel=None):
    """Keys of the region blocks with other channels inside, or another kernel for both layers."""

    def entry(key, shape):
        if ".nl." not in key or ".W.1." in key:
            return key, shape
        axis = 1 if ".W.0.weight" in key else 0
        if ".W.0.bias" not in key:
            shape = [size * 2 // ratio if n == axis else size for n, size in enumerate(shape)]
        if ".penta." in key and kernel is not None:
            return None if max(kernel) == 1 else (key, [*shape[:2], *kernel])
        return key, shape

    return entry


REGIONS = {
    "relu": ({"activation": "relu"}, resized(), {"relu": True}),
    "l2norm": ({"use_norm": True}, resized(), {"l2norm": True}),
    "pool": ({"sub_sample": True}, resized(), {"pool": True}),
    "ratio": ({"ratio": 4}, resized(ratio=4), {}),
    "kernel": ({"ks": [1, 5, 5]}, resized(kernel=(1, 5, 5)), {}),
    "cube": ({"ks": 3}, resized(kernel=(3, 3, 3)), {}),
    "layers": (
        {"ks": {"layer2": [3, 3, 3], "layer3": [3, 3, 3]}},
        resized(kernel=(3, 3, 3)),
        {},
    ),
    "point": ({"ks": 1}, resized(kernel=(1, 1, 1)), {}),
}


@pytest.mark.parametrize(("config", "entry", "form"), REGIONS.values(), ids=REGIONS)
def test_options_of_region_blocks(config, entry, form):
    results = {"logits": (1, 20)}
    case = altered("rnl_tsm_r50", (1, 6, 32, 64), results, entry=entry, num_segments=2, **config)
    model, _ = run(case)
    x, y = around_block(model, "layer3.2", case)
    close(y, of_regions(doubles(case), "base_model.layer3.2.nl", x, **form))


def test_slowfast_s_counts_of_bottlenecks_with_kernels_over_time():
    counts = {4: 2, 5: 1}

    def entry(key, shape):
        stage, _, rest = key.partition(".")
        if rest.endswith("branch2.a.weight") and int(stage[1:]) in counts:
            index = int(rest.removeprefix("pathway0_res").partition(".")[0])
            shape = [*shape[:2], 3 if index < counts[int(stage[1:])] else 1, 1, 1]
        return key, shape

    case = altered(
        *("sf_slow_nln_4x16_r50", (1, 3, 4, 64, 64), {"probabilities": (1, 20)}),
        **{"entry": entry, "num_block_temp_kernel": [[3], [4], [2], [1]]},
    )
    model, _ = run(case)
    kernels = [
        [unit.conv1.kernel_size[0] for unit in model.get_submodule(f"layer{n}")] for n in (3, 4)
    ]
    assert kernels == [[3, 3, 1, 1, 1, 1], [3, 1, 1]]


HEADS = {"softmax": lambda x: x.softmax(-1), "sigmoid": torch.sigmoid, "none": lambda x: x}


@pytest.mark.parametrize("head", HEADS)
def test_slowfast_s_heads(head):
    """The activation stands before the average over locations, be they asked for or not."""
    shapes = {"res5": (1, 2048, 4, 3, 3), "probabilities": (1, 20)}
    case = altered("sf_slow_nln_4x16_r50", (1, 3, 4, 96, 80), shapes, head_act=head)
    _, found = run(case)
    state = doubles(case)
    windows = F.avg_pool3d(found["res5"], (4, 2, 2), 1).movedim(1, -1)
    logits = F.linear(windows, state["head.projection.weight"], state["head.projection.bias"])
    close(found["probabilities"], HEADS[head](logits).mean(dim=(1, 2, 3)))


def test_stages_and_results_of_the_original():
    """More than one location, of which only the average is asked for, and blobs in between."""
    shapes = {
        **{"conv1": (1, 64, 4, 48, 48), "pool1": (1, 64, 4, 23, 23), "res2": (1, 256, 4, 23, 23)},
        **{"pool2": (1, 256, 2, 23, 23), "res5": (1, 2048, 2, 3, 3), "pool5": (1, 2048, 1, 2, 2)},
        "probabilities": (1, 20),
    }
    case = altered("c2_c2d_r50_nl_8x8", (1, 3, 4, 96, 96), shapes, pool5_kernel=[2, 2, 2])
    _, found = run(case)
    state, clip = doubles(case), torch.from_numpy(case.inputs["clip"]).double()
    conv1 = F.conv3d(clip, state["conv1_w"], None, (1, 2, 2), (0, 3, 3))
    scale, shift, mean, variance = (state[f"res_conv1_bn_{end}"] for end in ("s", "b", "rm", "riv"))
    stem = F.batch_norm(conv1, mean, variance, scale, shift, eps=1.0000001e-5).relu()
    close(found["conv1"], conv1)
    close(found["pool1"], F.max_pool3d(stem, (1, 3, 3), (1, 2, 2)))
    close(found["pool2"], F.max_pool3d(found["res2"], (2, 1, 1)))
    close(found["pool5"], F.avg_pool3d(found["res5"], 2, 1))
    weight = state["pred_w"].flatten(1)
    logits = F.linear(found["pool5"].movedim(1, -1), weight, state["pred_b"])
    close(found["probabilities"], logits.softmax(-1).mean(dim=(1, 2, 3)))


def test_mmaction_s_first_convolution_ends_behind_its_norm():
    shapes = {"conv1": (2, 64, 32, 24), "logits": (1, 20)}
    case = altered("mm_tsm_r50", (2, 3, 64, 48), shapes, num_segments=2)
    _, found = run(case)
    state, clip = doubles(case), torch.from_numpy(case.inputs["clip"]).double()
    conv1 = F.conv2d(clip, state["backbone.conv1.conv.weight"], None, 2, 3)
    close(found["conv1"], normed(state, "backbone.conv1.bn", conv1).relu())


def test_pools_of_inception():
    shapes = {
        **{"conv3d_1a_7x7": (1, 64, 4, 32, 32), "maxPool3d_2a_3x3": (1, 64, 4, 16, 16)},
        **{"mixed_3c": (1, 480, 4, 8, 8), "maxPool3d_4a_3x3": (1, 480, 2, 4, 4), "logits": (20,)},
    }
    case = altered("inc_i3d_flow_plain", (1, 2, 8, 64, 64), shapes)
    _, found = run(case)
    flat = F.pad(found["conv3d_1a_7x7"], (0, 1, 0, 1))
    close(found["maxPool3d_2a_3x3"], F.max_pool3d(flat, (1, 3, 3), (1, 2, 2), ceil_mode=True))
    cube = F.pad(found["mixed_3c"], (0, 1, 0, 1, 0, 1))
    close(found["maxPool3d_4a_3x3"], F.max_pool3d(cube, 3, 2, ceil_mode=True))


def test_affine_networks_with_idle_factors_behind_blocks():
    """The original's converter writes them, its networks ignore them; they are kept."""

    def entry(key, shape):
        if key.startswith("nonlocal_") and key.endswith("_out_b"):
            norm = key.removesuffix("out_b") + "bn_"
            factors = (f"{norm}s", shape, "bn_weight"), (f"{norm}b", shape, "bn_bias")
            return [(key, shape), *factors]
        return key, shape

    clip, shapes = (1, 3, 8, 64, 64), {"res3": (1, 512, 4, 8, 8)}
    plain = altered("c2_i3d_r50_nl_32x4_affine", clip, shapes)
    idle = altered("c2_i3d_r50_nl_32x4_affine", clip, shapes, entry=entry)
    assert len(idle.state) == len(plain.state) + 10
    close(run(idle)[1]["res3"], run(plain)[1]["res3"])


@pytest.mark.gate
def test_folders_whose_files_have_other_names(tmp_path):
    """Cases are taken by what they hold; what a folder has none of is skipped, and why is said."""
    for stem, name in (("c2_bn_to_affine", "folding"), ("tsm_r50", "network")):
        shutil.copy(GOLDEN / f"{stem}.json", tmp_path / f"{name}.json")
    chosen = ("tests/models/test_blobs.py", "tests/models/files/test_golden_files.py")
    command = [sys.executable, "-m", "pytest", "-q", "-rs", *chosen]
    found = subprocess.run(
        [*command, "-m", "not gate", "-k", "original or files or conversion or pickles"],
        cwd=GOLDEN.parents[1],
        env={**os.environ, "NLKERNELS_GOLDEN": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout
    assert f"no network of the Caffe2 original among the golden cases in {tmp_path}" in found.stdout
    assert "7 passed, 2 skipped" in found.stdout


REFUSED = {
    "style": ("mm_i3d_r50", {"inflate_style": "3x3x3"}, "inflate_style '3x1x1', got '3x3x3'"),
    "stride": ("mm_i3d_r50", {"style": "caffe"}, "style 'pytorch', got 'caffe'"),
    "groups": ("c2_c2d_r50_nl_8x8", {"RESNETS.NUM_GROUPS": 32}, "RESNETS.NUM_GROUPS 1, got 32"),
    "arch": ("sf_c2d_nln_8x8_r50", {"arch": "x3d"}, "arch 'c2d' or 'i3d' .*, got 'x3d'"),
    "consensus": ("tsm_r50", {"consensus": "identity"}, "consensus 'avg', got 'identity'"),
}


@pytest.mark.parametrize(("stem", "config", "part"), REFUSED.values(), ids=REFUSED)
def test_settings_that_no_network_has(stem, config, part):
    case = altered(stem, (1, 3, 4, 32, 32), {}, **config)
    system = case.record["system"].split()[0]
    with pytest.raises(ValueError, match=f"golden case: expected {part}"):
        NETWORKS[system](case.record["config"], case)


@pytest.mark.parametrize(("name", "head"), [("pool9", "softmax"), ("res5", "relu")])
def test_activations_and_heads_that_do_not_exist(name, head):
    shapes = {name: (1, 2048, 4, 2, 2), "probabilities": (1, 20)}
    case = altered("sf_slow_nln_4x16_r50", (1, 3, 4, 64, 64), shapes, head_act=head)
    with pytest.raises(ValueError, match=r"golden case: expected .* got '(pool9|relu)'"):
        run(case)
