"""What `check=` runs a model on, what it tells apart, and what it refuses to judge."""

import math
import re

import pytest
import torch
from torch import nn

from nlkernels import insert_nonlocal, replace_nonlocal
from nlkernels.patching import clips
from nlkernels.patching.view import View
from tests.patching.blocks import Net, randomised, with_backward
from tests.patching.packages.slowfast.models.nonlocal_helper import Nonlocal

CLIP = (2, 3, 4, 8, 8)


@pytest.fixture(autouse=True)
def checks_alone(monkeypatch):
    """The trial of each block in float64 has tests of its own, and takes most of the time."""
    monkeypatch.setattr("nlkernels.patching.replace.difference", lambda module, view: "")
    torch.manual_seed(0)


def net():
    """In float64, where no luck of roundings decides."""
    return randomised(Net(Nonlocal(8, 4, (1, 2, 2)))).double()


class Wrapped(nn.Module):
    """A network with something before or behind it."""

    def __init__(self, before=None, behind=None, inside=None):
        super().__init__()
        self.net = net() if inside is None else inside
        self.before, self.behind = before or (lambda x: x), behind or (lambda x: x)

    def forward(self, x):
        return self.behind(self.net(self.before(x)))


class Casting(Wrapped):
    """A network in a region of autocast of its own."""

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.net(x).float()


def defective(monkeypatch, factor):
    """Replaced blocks answer wrongly."""
    right = View.forward
    monkeypatch.setattr(View, "forward", lambda self, x: right(self, x) * factor)


def coarse(how):
    model = nn.Sequential(net().stem, randomised(Nonlocal(8, 4, (1, 2, 2)))).float().eval()
    if how == "cast":
        return Wrapped(lambda x: x.bfloat16(), inside=model.bfloat16())
    if how == "region":
        return Casting(inside=model)
    if how == "behind":
        return nn.Sequential(
            model, Wrapped(lambda x: x.bfloat16(), inside=nn.Linear(8, 8).bfloat16())
        )
    return model


@pytest.mark.parametrize("how", ["autocast", "cast", "region"])
@pytest.mark.parametrize("factor", [None, 1.1])
def test_dtypes_coarser_than_the_clip(how, factor, monkeypatch):
    if factor is not None:
        defective(monkeypatch, factor)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        for seed in range(2):
            torch.manual_seed(seed)
            model = coarse(how)
            if factor is None:
                assert replace_nonlocal(model, check=CLIP).difference < 0.05
            else:
                with pytest.raises(RuntimeError, match="each block to answer as before"):
                    replace_nonlocal(model, check=CLIP)


def test_a_coarse_layer_behind_the_blocks():
    model = coarse("behind")
    out = clips.outputs(model, torch.randn(1, 3, 2, 6, 8))
    assert clips.eps_of(model, {}, out) == torch.finfo(torch.bfloat16).eps


def failure_of(model, clip):
    try:
        replace_nonlocal(model, check=clip).restore()
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("make", [torch.zeros, torch.ones], ids=["zeros", "ones"])
@pytest.mark.parametrize("training", [True, False])
def test_constant_clips(make, training, monkeypatch):
    layers = [nn.Conv3d(3, 16, 3, padding=1), Nonlocal(16, 8, (1, 2, 2))]
    layers += [nn.Conv3d(16, 16, 3, padding=1), Nonlocal(16, 8, (1, 2, 2))]
    model = nn.Sequential(*layers).train(training)
    for block in (model[1], model[3]):
        nn.init.ones_(block.bn.weight)
    says_so = r"% of its input's positions are equal, .* its shape"
    clip = make(1, 3, 4, 28, 28)
    said = failure_of(model, clip)
    assert not said or re.search(says_so, said)
    with monkeypatch.context() as patched:
        patched.setattr(clips, "excess_of", lambda block, seen: "")
        said = failure_of(model, clip)
        assert not said or re.search(says_so, said)
        defective(patched, 1.5)
        with pytest.raises(RuntimeError, match=rf"the model's outputs as before(.|\n)*{says_so}"):
            replace_nonlocal(model, check=clip)
    defective(monkeypatch, 1.01)
    with pytest.raises(RuntimeError, match=says_so):
        replace_nonlocal(model, check=clip)
    with pytest.raises(RuntimeError, match=r"3: output: \w+ error [^;]*\nthe model is as it was"):
        replace_nonlocal(model, check=(1, 3, 4, 28, 28))


def test_nudges_change_every_number_by_its_last_bit_or_the_usual_one():
    eps = 2.0**-7
    x = torch.tensor([0.0, 1.0, -8.0, 1e-3])
    change = (clips.nudged(x, eps) - x).abs() / eps
    rms = math.sqrt((1 + 64) / 4)
    torch.testing.assert_close(change, torch.tensor([rms, rms, 8.0, rms]), rtol=1e-3, atol=0)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        x = torch.zeros(2, 3, dtype=dtype)
        assert (clips.nudged(x, torch.finfo(dtype).eps) != 0).all()


def test_models_that_change_their_clip():
    model = Wrapped(lambda x: x.sub_(0.45).div_(0.225))
    clip = torch.randn(CLIP).double()
    kept = clip.clone()
    assert replace_nonlocal(model, check=clip).difference < 1e-4
    assert torch.equal(clip, kept)
    wrapped = Wrapped(lambda x: x.sub_(float(x.mean())))  # asks for values: no run on "meta"
    insert_nonlocal(wrapped, at=["net.stem"], clip=clip)
    assert torch.equal(clip, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_random_layers_of_blocks(dtype, monkeypatch):
    model = net().to(dtype)
    block = model.layer[1]
    block.conv_out = nn.Sequential(block.conv_out, nn.Dropout(0.3))
    state = torch.get_rng_state()
    replace_nonlocal(model, check=CLIP).restore()
    assert torch.equal(torch.get_rng_state(), state)
    defective(monkeypatch, 1.01)
    with pytest.raises(RuntimeError, match="each block to answer as before"):
        replace_nonlocal(model, check=CLIP)
    assert torch.equal(torch.get_rng_state(), state)


def broken(message):
    def change(grad):
        raise RuntimeError(message)

    return change


@pytest.mark.parametrize("made_inside", [False, True])
def test_gradients_in_inference_mode(made_inside, monkeypatch):
    with torch.inference_mode(made_inside):
        model = net()
    with torch.inference_mode():
        replace_nonlocal(model, check=CLIP).restore()
        with_backward(monkeypatch, lambda grad: grad * 1.01)
        with pytest.raises(RuntimeError, match=r"before, got\n  layer.1: gradient of x: "):
            replace_nonlocal(model, check=CLIP)
    assert_untouched(model)


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("out of memory", "^out of memory$"),
        ("has been modified by an inplace operation", r"layer.1: gradient of x: none, where the"),
    ],
)
def test_backwards_that_fail(message, said, monkeypatch):
    model = net()
    with_backward(monkeypatch, broken(message))
    with pytest.raises(RuntimeError, match=said):
        replace_nonlocal(model, check=CLIP)
    assert_untouched(model)


def test_parameters_without_a_gradient(monkeypatch):
    model = net()
    right = View.forward

    def forgetful(self, x):
        bias = self.module.bn.bias.requires_grad_(False)
        try:
            return right(self, x)
        finally:
            bias.requires_grad_()

    monkeypatch.setattr(View, "forward", forgetful)
    with pytest.raises(RuntimeError, match=r"layer.1: gradients of parameters: max error"):
        replace_nonlocal(model, check=CLIP)
    assert_untouched(model)


class Pathways(nn.Module):
    """Takes a list of two pathways, into which it assigns."""

    def __init__(self):
        super().__init__()
        self.slow, self.fast = net(), nn.Conv3d(3, 3, 1).double()

    def forward(self, x):
        if not isinstance(x, list) or len(x) != 2:
            raise AssertionError
        x[1] = self.fast(x[1])
        x[0] = self.slow(x[0]) + x[1].mean()
        return x


@pytest.mark.parametrize(
    "given",
    [[(2, 3, 2, 8, 8), (2, 3, 4, 8, 8)], [torch.randn(2, 3, 2, 8, 8).double(), (2, 3, 4, 8, 8)]],
    ids=["shapes", "tensors"],
)
def test_clips_of_pathways(given):
    kept = list(given)
    model = Pathways()
    report = replace_nonlocal(model, check=given)
    assert report[0].queries == 2 * 64 and report.difference < 1e-4
    assert all(a is b for a, b in zip(given, kept, strict=True))


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ((2, 3, 4, 8, 8), r"takes, got \(2, 3, 4, 8, 8\) float64 on cpu \(AssertionError: \);"),
        ([torch.randn(2, 3, 2, 8, 8)], r"takes, got \[\(2, 3, 2, 8, 8\) float32 on cpu\] "),
        ([torch.randn(2, 2), "big"], r"or True, got \[\(2, 2\) float32 on cpu, 'big'\]; pass"),
        ([], r"or True, got \[\]; pass"),
        ((2, 3, 0), r"or True, got \(2, 3, 0\); pass"),
    ],
    ids=["shape", "short", "mixed", "empty", "zero"],
)
def test_clips_that_are_refused(given, error):
    model = Pathways()
    with pytest.raises(ValueError, match=error) as raised:
        replace_nonlocal(model, check=given)
    assert "tensor(" not in str(raised.value)
    assert_untouched(model)


def assert_untouched(model):
    blocks = [m for m in model.modules() if isinstance(m, Nonlocal)]
    assert blocks and all(type(m) is Nonlocal and not m._forward_pre_hooks for m in blocks)


class Half(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.idle = net(), net()

    def forward(self, x):
        return self.used(x)


def test_blocks_that_are_not_called():
    model = Half()
    with pytest.raises(
        RuntimeError,
        match=r"no call of idle.layer.1; check the others with only=\['used.layer.1'\], and",
    ):
        replace_nonlocal(model, check=CLIP)
    assert_untouched(model)
    assert replace_nonlocal(model, check=CLIP, only="used.*").difference < 1e-4
    assert replace_nonlocal(model, only="idle.*").difference is None


class Answer:
    def __init__(self, logits):
        self.logits = logits


@pytest.mark.parametrize(
    ("behind", "kinds"),
    [
        (Answer, r"\['Answer'\]"),
        (lambda x: x.argmax(1), r"\['\(2,\) int64 on cpu'\]"),
        (lambda x: x * math.nan, r"\['\(2, 3\) float64 on cpu'\]"),
    ],
    ids=["object", "integers", "nan"],
)
def test_outputs_without_numbers_to_compare(behind, kinds):
    model = Wrapped(behind=behind)
    with pytest.raises(RuntimeError, match=f"with finite numbers, .* got {kinds}; check a part"):
        replace_nonlocal(model, check=CLIP)
    assert_untouched(model)


def test_outputs_that_are_not_finite():
    model = Wrapped(behind=lambda x: (x, torch.cat([x, torch.full_like(x, -math.inf)])))
    assert replace_nonlocal(model, check=CLIP).difference < 1e-4
    one = torch.tensor([1.0, 4.0, math.inf, -math.inf, math.nan])
    assert clips.apart([one], [one + torch.tensor([1.0, 0, 0, 0, 0])]) == 0.25
    for place, value in ((2, -math.inf), (3, math.nan), (4, 0.0), (0, math.inf), (1, math.nan)):
        other = one.clone()
        other[place] = value
        assert math.isnan(clips.apart([one], [other]))
        assert math.isnan(clips.apart([other], [one]))
        assert not clips.same_outputs(1.0, clips.apart([one], [other]), 1.0)


def test_integer_clips(monkeypatch):
    clip = torch.randint(0, 255, CLIP, dtype=torch.uint8)
    model = Wrapped(lambda x: x.double() / 255)
    replace_nonlocal(model, check=clip).restore()
    monkeypatch.setattr(clips, "excess_of", lambda block, seen: "")
    defective(monkeypatch, 1.001)
    with pytest.raises(RuntimeError, match=r"outputs as before.* where last bits of what blocks"):
        replace_nonlocal(model, check=clip)


def test_compiled_parts_are_not_compiled_for_a_check():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = Wrapped(inside=torch.compile(net().eval(), backend=backend, fullgraph=True))
    assert replace_nonlocal(model, check=CLIP).difference < 1e-4
    assert not graphs
