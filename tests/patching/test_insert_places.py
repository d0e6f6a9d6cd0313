"""What blocks can stand behind, what finding their channels leaves alone, and the way back."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations

from nlkernels import insert_nonlocal, replace_nonlocal, restore_nonlocal
from tests.patching.packages.slowfast.models.nonlocal_helper import Nonlocal

CLIP = (2, 3, 2, 6, 6)


class Plain(nn.Module):
    def __init__(self, stem=None, head=None):
        super().__init__()
        self.stem = nn.Conv3d(3, 8, 1) if stem is None else stem
        self.head = nn.Conv3d(8, 4, 1) if head is None else head

    def forward(self, x):
        return self.head(self.stem(x))


def assert_plain(model, keys):
    assert list(model.state_dict()) == keys
    assert not any("nonlocal_original" in vars(type(m)) for m in model.modules())
    assert not any(name.startswith("nonlocal") for m in model.modules() for name in vars(m))


class Remembers(Plain):
    """What keeps things from its calls, in its own attributes and in containers of those."""

    def __init__(self, needs_data):
        super().__init__()
        self.grid, self.seen, self.needs_data = None, {"outputs": []}, needs_data
        self.register_buffer("calls", torch.zeros(()))
        self.plain = torch.ones(())

    def forward(self, x):
        x = self.stem(x)
        if self.needs_data and x.sum().item() > 1e9:
            return x
        if self.grid is None:
            self.grid = torch.linspace(-1, 1, x.shape[-1], device=x.device)
        self.seen["outputs"].append(x)
        self.calls += 1
        self.plain += 1
        return self.head(x * self.grid)


@pytest.mark.parametrize("needs_data", [False, True], ids=["meta", "random numbers"])
def test_finding_the_channels_leaves_the_model_alone(needs_data):
    model, calls, x = Remembers(needs_data), [], torch.randn(CLIP)
    kept = x.clone()
    for module in model.modules():
        module.register_forward_hook(lambda *_: calls.append("after"))
        module.register_forward_pre_hook(lambda *_: calls.append("before"))
    tensors = {name: id(t) for name, t in model.state_dict(keep_vars=True).items()}
    report = insert_nonlocal(model, at=["stem"], clip=x)
    assert report.blocks["stem.nl"].dim == 8 and report[0].queries == 72
    assert model.grid is None and not model.seen["outputs"] and not calls and model.training
    assert model.calls == 0 and model.plain == 1 and torch.equal(x, kept)
    now = {name: id(t) for name, t in model.state_dict(keep_vars=True).items()}
    assert {name: now[name] for name in tensors} == tensors
    assert model(x).shape == (2, 4, 2, 6, 6) and len(calls) == 6


def test_models_that_cannot_be_copied_or_have_no_shapes_yet():
    model = Plain()
    model.generator = (number for number in range(3))
    with pytest.raises(ValueError, match=r"model that can be copied.*; pass channels="):
        insert_nonlocal(model, at=["stem"], clip=CLIP)
    assert insert_nonlocal(model, at=["stem"], channels=8).blocks["stem.nl"].dim == 8
    with pytest.raises(ValueError, match=r"shapes of all parameters.*; run the model once"):
        insert_nonlocal(Plain(nn.LazyConv3d(8, 1)), at=["stem"], clip=CLIP)


def test_a_parametrized_module_is_given_back_after_its_parametrization():
    model, x = Plain(), torch.randn(CLIP)
    keys, expected = list(model.state_dict()), model(x)
    report = insert_nonlocal(model, at=["stem", "head"], channels=[8, 4])
    weight_norm(model.stem)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="stem to be as it was exchanged"):
            report.restore()
        torch.testing.assert_close(model(x), expected)
        assert all(key in model.state_dict() for key in ("head.nl.theta.weight", "head.weight"))
    remove_parametrizations(model.stem, "weight")
    report.restore()
    assert_plain(model, sorted(keys, key=["stem.bias", "stem.weight", *keys[2:]].index))
    torch.testing.assert_close(model(x), expected)


def test_a_parametrized_block_is_given_back_after_its_parametrization():
    model = nn.Sequential(Nonlocal(8, 4), Nonlocal(8, 4))
    model[1].scale = nn.Parameter(torch.ones(1))
    report = replace_nonlocal(model)
    register_parametrization(model[1], "scale", nn.Identity())
    for restore in (report.restore, lambda: restore_nonlocal(model)):
        with pytest.raises(RuntimeError, match="1 to be as it was exchanged"):
            restore()
        assert type(model[0]) is not Nonlocal and model[1].scale == 1
    remove_parametrizations(model[1], "scale")
    assert restore_nonlocal(model) == 2 and type(model[0]) is type(model[1]) is Nonlocal
