"""What every network has to work with: backends, memory formats, precisions, compilers, export."""

import pytest
import torch
from torch.nn import functional as F

from nlkernels import set_nonlocal_backend
from nlkernels.models import create_model, list_models
from nlkernels.models.registry import registered

# One of each builder and kind of block; the others are gates.
FAST = {
    "c2d_tiny": 2,
    "i3d_r50_8x8": 1,
    "mmaction_i3d_r50_32x2": 1,
    "rnl_tsm_r50": 5,
    "inception_nl_flow": 2,
}
KINDS = {"mmaction_i3d_r50_32x2": "dot_product"}


def _blocks(name):
    design = registered(name).design
    return FAST.get(name) or max(getattr(design, "places", (0, 2)))


EVERY = [
    pytest.param(name, marks=() if name in FAST else pytest.mark.gate) for name in list_models()
]
# A compiler takes half a minute for the deep ones.
SOME = [pytest.param(name, marks=() if name == "c2d_tiny" else pytest.mark.gate) for name in FAST]


def small(name):
    """A narrow network whose blocks change their input, and a clip for it."""
    torch.manual_seed(0)
    block = {"kind": KINDS[name]} if name in KINDS else {}
    model = create_model(
        name,
        num_classes=5,
        width=0.125,
        blocks=_blocks(name),
        block={**block, "zero_init": None},
        dropout=0.0,
    )
    channels = getattr(getattr(model, "design", None), "in_channels", 3)
    frames = max(4, getattr(model, "min_frames", 1))
    size = 64 if registered(name).family == "inception" else 32
    return model, torch.randn(2, channels, frames, size, size + 8)


@pytest.mark.parametrize("name", EVERY)
def test_fast_and_naive_blocks_agree(name):
    model, clip = small(name)
    model = model.double().eval()
    results = {}
    for backend in ("auto", "reference"):
        assert set_nonlocal_backend(model, backend) >= _blocks(name)
        model.zero_grad()
        logits = model(clip.double())
        logits.square().sum().backward()
        gradients = [each.grad for each in model.parameters() if each.requires_grad]
        results[backend] = [logits.detach(), *gradients]
    # A bias of phi adds a constant to a row of scores: its gradient is what rounding leaves.
    largest = max(naive.abs().max().item() for naive in results["reference"])
    for fast, naive in zip(*results.values(), strict=True):
        torch.testing.assert_close(fast, naive, rtol=1e-8, atol=1e-12 * largest)


@pytest.mark.parametrize("name", EVERY)
def test_channels_last(name):
    model, clip = small(name)
    model = model.eval()
    with torch.no_grad():
        expected = model(clip)
        model = model.to(memory_format=torch.channels_last_3d)
        found = model(clip.to(memory_format=torch.channels_last_3d))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", EVERY)
def test_autocast_trains(name):
    model, clip = small(name)
    # oneDNN's bfloat16 gradients of 3x1x1 kernels are wrong on maps of a few pixels (torch 2.13).
    with torch.backends.mkldnn.flags(enabled=False):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(clip)
            loss = F.cross_entropy(logits.float(), torch.tensor([0, 4]))
        loss.backward()
    trained = [each for each in model.parameters() if each.requires_grad]
    assert all(each.grad is not None and each.grad.isfinite().all() for each in trained)
    assert all(each.grad.dtype == torch.float32 for each in trained)
    model.eval()
    with torch.no_grad():
        exact = model(clip)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = model(clip).float()
    torch.testing.assert_close(rounded, exact, rtol=0.1, atol=0.1 * exact.abs().max().item())


@pytest.mark.parametrize("name", EVERY)
def test_export(name):
    model, clip = small(name)
    model = model.eval()
    exported = torch.export.export(model, (clip,)).module()
    with torch.no_grad():
        torch.testing.assert_close(exported(clip), model(clip), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SOME)
def test_compile_trains(name):
    """What Dynamo and autograd's tracing make of a step, in one graph."""
    model, clip = small(name)
    results = []
    for step in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        F.cross_entropy(step(clip), torch.tensor([0, 4])).backward()
        results.append([each.grad for each in model.parameters() if each.requires_grad])
    for plain, traced in zip(*results, strict=True):
        atol = 1e-4 * max(plain.abs().max().item(), 1e-3)
        torch.testing.assert_close(traced, plain, rtol=1e-3, atol=atol)


@pytest.mark.parametrize("name", [each for each in EVERY if each.values[0] != "c2d_tiny"])
def test_probabilities_sum_to_one(name):
    model, clip = small(name)
    with torch.no_grad():
        found = model.eval().probabilities(clip)
    assert found.shape == (2, 5)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(2))
