"""What every network has to work with: backends, memory formats, precisions, compilers, export."""

import pytest
import torch
from torch.nn import functional as F

from nlkernels import set_nonlocal_backend
from nlkernels.models import create_model, list_models
from nlkernels.models.blocks import Bottleneck
from nlkernels.models.i3d_inception import Mixed
from nlkernels.models.registry import registered
from nlkernels.modules.base import NonLocalBlock
from tests.ops.cpp_attention import threads

# One of each builder and kind of block; the others are gates.
FAST = {
    "c2d_tiny": 2,
    "i3d_r50_8x8": 1,
    "mmaction_i3d_r50_32x2": 1,
    "rnl_tsm_r50": 5,
    "inception_nl_flow": 2,
}
KINDS = {
    "mmaction_i3d_r50_32x2": "dot_product",
    # All blocks that fit, each of which cubes what it gets, overflow where no norm takes it back.
    "slowfast_slow_r50_4x16": "softmax",
    "slowfast_slow_r50_8x8": "softmax",
}


# Of seed 0 one number lies so near a rectifier's corner that rounding moves it to the other side.
SEEDS = {"slowfast_c2d_r101_8x8": 1}


def _blocks(name):
    design = registered(name).design
    return FAST.get(name) or max(getattr(design, "places", (0, 2)))


EVERY = [
    pytest.param(name, marks=() if name in FAST else pytest.mark.gate) for name in list_models()
]
# A compiler takes half a minute for the deep ones; two heads and a stem of their own beside them.
SOME = [
    pytest.param(name, marks=() if name == "c2d_tiny" else pytest.mark.gate)
    for name in (*FAST, "slowfast_c2d_r50_8x8", "slowfast_slow_r50_4x16", "mindspore_i3d_r50_32")
]


def small(name):
    """A narrow network whose blocks change their input, and a clip for it."""
    torch.manual_seed(SEEDS.get(name, 0))
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
def test_channels_last_stays(name):
    """Every layer and block puts out what it takes in."""
    model, clip = small(name)
    model, broken = model.eval().to(memory_format=torch.channels_last_3d), []

    def check(module, _inputs, output):
        if not output.is_contiguous(memory_format=torch.channels_last_3d):
            broken.append(type(module).__name__)

    for module in model.modules():
        if isinstance(module, Bottleneck | Mixed | NonLocalBlock):
            module.register_forward_hook(check)
    # With one thread, and in float64, torch's convolutions are not oneDNN's and return NCDHW.
    with threads(2):
        model(clip.to(memory_format=torch.channels_last_3d)).sum().backward()
    assert broken == []


@pytest.mark.parametrize("name", EVERY)
def test_gradients_by_channels_last(name):
    model, clip = small(name)
    model, clip, gradients = model.eval().double(), clip.double(), []
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        model = model.to(memory_format=layout)
        model.zero_grad()
        F.cross_entropy(model(clip.to(memory_format=layout)), torch.tensor([0, 4])).backward()
        gradients.append([each.grad.clone() for each in model.parameters() if each.requires_grad])
    largest = max(gradient.abs().max().item() for gradient in gradients[0])
    assert 0 < largest < float("inf")
    for found, expected in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12 * largest)


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
def test_checkpointing_under_autocast(name):
    """The same step: gradients, and statistics that count a batch once."""
    results = []
    for checkpointing in (False, True):
        model, clip = small(name)
        model.checkpointing = checkpointing
        with torch.backends.mkldnn.flags(enabled=False):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = F.cross_entropy(model(clip).float(), torch.tensor([0, 4]))
            loss.backward()
        trained = [each.grad for each in model.parameters() if each.requires_grad]
        results.append([*trained, *model.buffers()])
    for plain, again in zip(*results, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", EVERY)
def test_export(name):
    model, clip = small(name)
    model = model.eval()
    exported = torch.export.export(model, (clip,)).module()
    with torch.no_grad():
        torch.testing.assert_close(exported(clip), model(clip), rtol=1e-5, atol=1e-6)


def test_export_of_any_size():
    model, clip = small("c2d_tiny")
    model.eval().checkpointing = True  # of which inference knows nothing
    sizes = dict.fromkeys((0, 2, 3, 4), torch.export.Dim.AUTO)
    exported = torch.export.export(model, (clip,), dynamic_shapes=(sizes,)).module()
    for shape in ((2, 3, 4, 32, 40), (3, 3, 6, 48, 36)):
        clip = torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(exported(clip), model(clip), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("name", SOME)
def test_compile_trains(name, checkpointing):
    """What Dynamo and autograd's tracing make of a step, in one graph."""
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        model, clip = small(name)
        model.checkpointing = checkpointing
        step = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        F.cross_entropy(step(clip), torch.tensor([0, 4])).backward()
        gradients = [each.grad for each in model.parameters() if each.requires_grad]
        results.append([*gradients, *model.buffers()])
    for plain, traced in zip(*results, strict=True):
        atol = 1e-4 * max(plain.abs().max().item(), 1e-3)
        torch.testing.assert_close(traced, plain, rtol=1e-3, atol=atol)


@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "bfloat16"])
def test_compiled_checkpointing_changes_nothing(mixed):
    """In compiled code the same numbers, statistics among them, whether they are kept or not."""
    torch._dynamo.reset()
    results = []
    for checkpointing in (False, True):
        model, clip = small("c2d_tiny")
        model.checkpointing = checkpointing
        step = torch.compile(model, backend="aot_eager", fullgraph=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
            loss = F.cross_entropy(step(clip).float(), torch.tensor([0, 4]))
        loss.backward()
        results.append([*(each.grad for each in model.parameters()), *model.buffers()])
    for kept, again in zip(*results, strict=True):
        torch.testing.assert_close(again, kept, rtol=0, atol=0)


@pytest.mark.parametrize("name", SOME)
def test_compile_takes_clips_of_other_sizes(name):
    """For inference, in one graph of sizes that are not known."""
    torch._dynamo.reset()
    model, clip = small(name)
    model.eval()
    compiled = torch.compile(model, backend="eager", dynamic=True, fullgraph=True)
    larger = torch.randn(3, clip.shape[1], *(size + 8 for size in clip.shape[2:]))
    for each in (clip, larger):
        with torch.no_grad():
            torch.testing.assert_close(compiled(each), model(each), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [each for each in EVERY if each.values[0] != "c2d_tiny"])
def test_probabilities_sum_to_one(name):
    model, clip = small(name)
    with torch.no_grad():
        found = model.eval().probabilities(clip)
    assert found.shape == (2, 5)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(2))
