"""Layers of replaced blocks that are no plain ones: with a forward of their own, parametrized,
wrapped or pruned; before and after the replacement."""

import copy
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from nlkernels import NonLocalBlock3d, replace_nonlocal
from tests.patching.blocks import assert_same, randomised, results, with_backward
from tests.patching.packages.lib.non_local_embedded_gaussian import NONLocalBlock3D as Embedded
from tests.patching.packages.lib.non_local_gaussian import NONLocalBlock3D as Gaussian
from tests.patching.packages.slowfast.models.nonlocal_helper import Nonlocal

SHAPE = (2, 8, 3, 6, 5)


def block(made=None):
    return randomised(Nonlocal(8, 4, (1, 2, 2)) if made is None else made).double()


def clip():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def replaced(module):
    replace_nonlocal(module, backend="chunked")
    return module


def tripled(layer):
    """The layer with a forward of its instance, as programs that move weights give it one."""
    own = layer.forward
    layer.forward = lambda x: 3 * own(x)


@pytest.mark.parametrize("name", ["conv_theta", "conv_out", "bn", "pool"])
def test_forwards_of_instances_run(name):
    theirs, ours = (block().eval() for _ in range(2))
    ours.load_state_dict(theirs.state_dict())
    replaced(ours)
    for each in (theirs, ours):
        tripled(each.get_submodule(name))
    torch.testing.assert_close(ours(clip()), theirs(clip()), rtol=1e-9, atol=1e-9)
    assert f"{name} has a forward of its own" in ours.explain(clip()).problem


def test_forwards_of_instances_may_be_there_before():
    model = nn.Sequential(block(), block()).eval()
    tripled(model[1].conv_theta)
    expected = model(clip())
    torch.testing.assert_close(replaced(model)(clip()), expected, rtol=1e-9, atol=1e-9)


def test_forwards_of_instances_of_our_own_blocks_run():
    own = randomised(NonLocalBlock3d(8, backend="chunked")).double().eval()
    other = copy.deepcopy(own)
    tripled(other.theta)
    with torch.no_grad():
        own.theta.weight.mul_(3)
        own.theta.bias.mul_(3)
    torch.testing.assert_close(other(clip()), own(clip()), rtol=1e-9, atol=1e-9)


def calls_of_spectral_norm(monkeypatch, module):
    found, own = Counter(), parametrizations._SpectralNorm.forward

    def counted(self, weight):
        found["calls"] += 1
        return own(self, weight)

    monkeypatch.setattr(parametrizations._SpectralNorm, "forward", counted)
    module(clip())
    monkeypatch.undo()
    return found["calls"]


def test_parametrized_weights_are_computed_once(monkeypatch):
    made = block()
    parametrizations.spectral_norm(made.conv_out)
    assert calls_of_spectral_norm(monkeypatch, made) == 1
    assert calls_of_spectral_norm(monkeypatch, replaced(made)) == 1
    own = NonLocalBlock3d(8, backend="chunked").double()
    parametrizations.spectral_norm(own.out)
    assert calls_of_spectral_norm(monkeypatch, own) == 1
    report = replace_nonlocal(nn.Sequential(block(made.nonlocal_original(8, 4))), check=SHAPE)
    assert report[0].queries == 90


@pytest.mark.parametrize("name", ["conv_theta", "conv_out"])
@pytest.mark.parametrize(
    "change",
    [
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
    ],
    ids=["weight_norm", "spectral_norm", "prune", "weight", "spectral", "orthogonal"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_computed_weights(change, name):
    """Blocks in float32 are tried in float64."""
    theirs = block().float()
    change(theirs.get_submodule(name))
    theirs(clip().float())
    ours = block().float()
    change(ours.get_submodule(name))
    ours.load_state_dict(theirs.state_dict())
    replaced(ours)
    for training in (True, False):
        expected = results_of(theirs.train(training))
        assert_same(results_of(ours.train(training)), expected, 1e-4)


def results_of(module):
    """Output, gradients and buffers; the weights of some of these layers cannot be copied."""
    module.zero_grad()
    out = module(clip().float())
    out.square().sum().backward()
    found = {f"grad:{name}": p.grad.clone() for name, p in module.named_parameters()}
    found |= {f"after:{name}": buffer.clone() for name, buffer in module.named_buffers()}
    return found | {"out": out.detach()}


def wrap(module, name, *more):
    parent, _, last = name.rpartition(".")
    parent = module.get_submodule(parent)
    setattr(parent, last, nn.Sequential(getattr(parent, last), *more))


WRAPPED = {
    "conv_out": (Nonlocal, "conv_out", [nn.Dropout()]),
    "conv_g": (Nonlocal, "conv_g", []),
    "pool": (Nonlocal, "pool", []),
    "g": (Embedded, "g", []),
    "g.0": (Embedded, "g.0", [nn.Dropout()]),
    "g of all": (Embedded, "g", [nn.Tanh()]),
    "theta": (Embedded, "theta", [nn.Tanh()]),
    "theta alone": (Embedded, "theta", []),
    "phi.1": (Embedded, "phi.1", []),
    "W": (Embedded, "W", [nn.Dropout()]),
    "W.0": (Embedded, "W.0", [nn.Tanh()]),
    "gaussian g": (Gaussian, "g", [nn.Tanh()]),
    "gaussian phi": (Gaussian, "phi", []),
}


@pytest.mark.parametrize("early", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("case", WRAPPED)
def test_wrapped_layers_run_one_by_one(case, early):
    cls, name, more = WRAPPED[case]
    sizes = {Nonlocal: (8, 4, (1, 2, 2))}.get(cls, (8,))
    bare = (False, True) if cls is not Nonlocal and "pool" not in name and "1" not in name else ()
    for sub_sample in bare or (True,):
        options = {} if cls is Nonlocal else {"sub_sample": sub_sample}
        if not sub_sample and name in ("g.0", "phi"):
            continue
        theirs = block(cls(*sizes, **options)).eval()
        ours = copy.deepcopy(theirs)
        wrap(theirs, name, *more)
        if early:
            wrap(ours, name, *more)
        replaced(ours.eval())
        if not early:
            wrap(ours, name, *more)
        assert_same(results(ours.eval(), clip()), results(theirs.eval(), clip()), 1e-9)


def test_poolings_that_differ_run_themselves():
    theirs = block(Embedded(8))
    ours = replaced(copy.deepcopy(theirs))
    for each in (theirs, ours):
        each.phi[1] = nn.MaxPool3d((1, 1, 2))
        each.g[1] = nn.MaxPool3d((1, 2, 1))
    x = torch.randn(1, 8, 2, 6, 6, dtype=torch.float64)
    assert_same(results(ours, x), results(theirs, x), 1e-9)


class Opaque(nn.Module):
    """Its width is nowhere to be read."""

    def __init__(self, layer):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x):
        return nn.functional.conv3d(x, self.weight, self.bias)


def test_layers_of_unknown_width():
    theirs = block().eval()
    ours = replaced(copy.deepcopy(theirs))
    for name in ("conv_out", "conv_g"):
        for each in (theirs, ours):
            setattr(each, name, Opaque(getattr(each, name)))
        assert torch.equal(ours(clip()), theirs(clip()))
        with pytest.raises(NotImplementedError, match=r"got a layer of Opaque, of unknown width"):
            ours.explain(clip())
        kept = type(theirs)
        with pytest.raises(ValueError, match=r"\(the model\): it has a layer of Opaque, of unk"):
            replace_nonlocal(theirs)
        assert type(theirs) is kept


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")
def test_factor_is_a_number_while_torch_traces():
    """Sizes of tensors are none then."""
    made, found = replaced(block()), []

    def noted(x):
        found.append(made.nonlocal_view(made)._factor)
        return x + 1

    torch.jit.trace(noted, clip(), check_trace=False)
    assert [type(each) for each in found] == [float]


def test_errors_name_the_class():
    made = replaced(block())
    with pytest.raises(ValueError, match=r"^Nonlocal: expected \(B, 8, T, H, W\)"):
        made(torch.randn(1, 7, 2, 6, 6).double())
    with pytest.raises(ValueError, match=r"^Nonlocal.footprint: expected input_size"):
        made.footprint((1, 7, 2, 6, 6))


@pytest.mark.parametrize("default", ["cpu", "meta"])
@pytest.mark.parametrize("steps", [0, 10**9])
def test_wrong_gradients_are_seen(steps, default, monkeypatch):
    with_backward(monkeypatch, lambda grad: grad * 1.0001)
    made = block()
    made.bn.num_batches_tracked.fill_(steps)
    with torch.device(default), pytest.raises(ValueError, match=r"its gradient of .* differs by"):
        replace_nonlocal(made)


def test_blocks_are_tried_in_inference_mode():
    made, expected = block(), block()
    expected.load_state_dict(made.state_dict())
    with torch.inference_mode():
        replaced(made)
    assert_same(results(made, clip()), results(expected, clip()), 1e-9)


def test_patterns_of_any_iterable():
    model = nn.ModuleList([block(), block(), block()])
    report = replace_nonlocal(model, only=(name for name in ("0", "2")))
    assert list(report.blocks) == ["0", "2"]


def test_reasons_are_one_line():
    made = block()
    made.conv_theta = nn.Conv3d(5, 4, 1)
    with pytest.raises(ValueError, match=r"it cannot be tried: RuntimeError: Given"):
        replace_nonlocal(made)
