"""The measured shapes are those of the published networks."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import region
from benchmarks.checks import eager
from benchmarks.registry import CASES, KINDS, Case, select_cases
from nlkernels.models import create_model
from nlkernels.modules import NonLocalBlock3d


def strided(size: int, *layers: tuple[int, int, int]) -> int:
    """Size after convolutions or pools given as (kernel, stride, padding)."""
    for kernel, stride, padding in layers:
        size = (size + 2 * padding - kernel) // stride + 1
    return size


STEM = ((7, 2, 3), (3, 2, 0))  # conv1, unpadded pool1
RES3 = (*STEM, (3, 2, 1))
RES4 = (*RES3, (3, 2, 1))
PADDED_RES3 = ((7, 2, 3), (3, 2, 1), (3, 2, 1))
HALVE = (2, 2, 0)

# system/stage -> (frames entering, temporal layers, spatial layers, key pooling, channels, inner)
ARCHITECTURE = {
    "c2d_r50_8x8/res3": (8, (HALVE,), RES3, 2, 512, 256),
    "c2d_r50_8x8/res4": (8, (HALVE,), RES4, 2, 1024, 512),
    "c2d_r50_128x1/res3": (128, ((5, 2, 2), HALVE, HALVE), RES3, 2, 512, 256),
    "c2d_r50_128x1/res4": (128, ((5, 2, 2), HALVE, HALVE), RES4, 2, 1024, 512),
    "tsm_r50_8seg/layer2": (8, (), PADDED_RES3, 2, 512, 256),
    "tsm_r50_8seg/layer3": (8, (), (*PADDED_RES3, (3, 2, 1)), 2, 1024, 512),
    "rnl_r50_8seg/layer2": (8, (), PADDED_RES3, 1, 512, 256),
    "rnl_r50_8seg/layer3": (8, (), (*PADDED_RES3, (3, 2, 1)), 1, 1024, 512),
    "rnl_r50_16seg/layer2": (16, (), PADDED_RES3, 1, 512, 256),
    "rnl_r50_16seg/layer3": (16, (), (*PADDED_RES3, (3, 2, 1)), 1, 1024, 512),
    "inception_flow_64/mixed_3c": (64, (HALVE,), (HALVE, HALVE, HALVE), 2, 480, 240),
    "inception_flow_64/mixed_4d": (64, (HALVE, HALVE), (HALVE,) * 4, 2, 512, 256),
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}-{case.kind}")
def test_shape_follows_from_the_architecture(case: Case) -> None:
    layer, size = case.name.split("@")
    frames, temporal, spatial, pool, channels, inner = ARCHITECTURE[layer]
    t, side = strided(frames, *temporal), strided(int(size), *spatial)
    d = {"gaussian": channels, "concat": 1}.get(case.kind, inner)
    assert (case.n, case.m) == (t * side**2, t * (side // pool) ** 2)
    assert (case.d, case.v) == (d, inner)


@pytest.mark.parametrize("size", [224, 256])
def test_shape_is_what_the_model_feeds_its_blocks(size: int) -> None:
    with torch.device("meta"):
        model = create_model("c2d_r50_8x8", num_classes=4, blocks=5).eval()
    blocks = [module for module in model.modules() if isinstance(module, NonLocalBlock3d)]
    seen = []

    def record(block: NonLocalBlock3d, x: torch.Tensor) -> torch.Tensor:
        _, _, frames, height, width = x.shape
        keys = frames * (height // 2) * (width // 2)
        seen.append((frames * height * width, keys, block.theta.out_channels))
        return x

    for block in blocks:
        block.forward = partial(record, block)
    model(torch.empty(1, 3, 8, size, size, device="meta"))
    expected = {
        stage: next((c.n, c.m, c.d) for c in select_cases([f"c2d_r50_8x8/{stage}@{size}"]))
        for stage in ("res3", "res4")
    }
    assert seen == [expected["res3"]] * 2 + [expected["res4"]] * 3


def test_acceptance_case() -> None:
    (case,) = select_cases(["acceptance"], ["softmax"])
    assert (case.batch, case.n, case.m, case.d, case.v) == (2, 12544, 3136, 256, 256)


def test_cases_of_the_targets() -> None:
    found = {
        (case.batch, case.n, case.m, case.d, case.v)
        for case in select_cases(["targets"], ["softmax", "gaussian"])
    }
    wanted = {
        (2, 12544, 3136, 256, 256),
        (8, 3136, 784, 256, 256),
        (8, 784, 196, 512, 512),
        (2, 3136, 784, 1024, 512),
    }
    assert wanted <= found
    (clip,) = select_cases(["targets"], ["region"], cases=region.CASES)
    assert (clip.batch, clip.channels, clip.positions) == (1, 256, (8, 28, 28))
    assert clip.taps == (3, 7, 7)


def test_names_and_kinds_are_unique() -> None:
    assert len({(case.name, case.kind) for case in CASES}) == len(CASES)
    assert {case.kind for case in CASES} == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_nominal_flop_is_that_of_the_two_products(kind: str) -> None:
    case = Case("tiny", kind, 2, 12, 8, 6, 4)
    if kind == "concat":  # scores are sums of two numbers
        case = replace(case, d=1)
    query, key = torch.randn(2, 12, case.d), torch.randn(2, 8, case.d)
    value = torch.randn(2, 8, 4)
    with FlopCounterMode(display=False) as counter:
        eager(query, key, value, case.scale, kind=kind)
    assert counter.get_total_flops() == case.flop("forward")
    assert case.flop("forward_backward") == 3.5 * case.flop("forward")


def test_fewest_flop_are_those_of_the_reassociated_form() -> None:
    query, key, value = (
        torch.randn(2, rows, width, requires_grad=True)
        for rows, width in ((60, 6), (40, 6), (40, 4))
    )
    case = Case("tiny", "dot_product", 2, 60, 40, 6, 4)
    with FlopCounterMode(display=False) as counter:
        out = query @ (key.mT @ value)
        assert counter.get_total_flops() == case.least_flop("forward")
        out.sum().backward()
    assert counter.get_total_flops() == case.least_flop("forward_backward")
    few = replace(case, m=2)
    assert few.least_flop("forward") == few.flop("forward")
    softmax = replace(case, kind="softmax")
    assert softmax.least_flop("forward_backward") == softmax.flop("forward_backward")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ((["res9"],), "res9"),
        ((["quick"], ["convolution"]), "convolution"),
        ((["quick"], ["softmax"], 0), "batch"),
        ((["inception_flow_64/*"], ["gaussian"]), "gaussian"),
    ],
    ids=["case", "kind", "batch", "empty"],
)
def test_wrong_selection_is_an_error(arguments: tuple, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        select_cases(*arguments)
