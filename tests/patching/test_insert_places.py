"""What blocks can stand behind, what finding their channels leaves alone, and the way back."""

import copy

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


class Children(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv3d(3, 8, 1), nn.Conv3d(8, 8, 1)

    def forward(self, x):
        for layer in self.children():
            x = layer(x)
        return x


class Keyed(nn.Conv3d):
    def __init_subclass__(cls, key, **options):
        super().__init_subclass__(**options)


def shared():
    model = Plain()
    model.again = model.stem
    return model


def assert_plain(model, keys):
    assert list(model.state_dict()) == keys
    assert not any("nonlocal_original" in vars(type(m)) for m in model.modules())
    assert not any(name.startswith("nonlocal") for m in model.modules() for name in vars(m))


def own_forward(model):
    own = model.stem.forward
    model.stem.forward = lambda x: own(x)
    return model


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    ("make", "at", "message"),
    [
        (lambda: Plain(head=torch.jit.script(nn.Conv3d(8, 4, 1))), "head", "ScriptModule"),
        (lambda: Plain(head=Keyed(8, 4, 1)), "head", "class that can be derived from.*'key'"),
        (lambda: own_forward(Plain(head=nn.Conv3d(8, 4, 1))), "stem", "forward of its own"),
        (lambda: Plain(stem=Children()), "stem", "go(es)? through its children"),
        (lambda: torch.compile(Plain(), backend="eager"), "_orig_mod.stem", "one module"),
        (shared, "again", "one module"),
        (lambda: torch.compile(nn.DataParallel(Plain()), backend="eager"), "_orig_mod", "wrapper"),
    ],
    ids=["scripted", "keyword", "instance forward", "children", "twice", "shared", "wrapper"],
)
@pytest.mark.parametrize("found", [{"clip": CLIP}, {"channels": 8}], ids=["run", "channels"])
def test_places_that_cannot_be_extended_are_refused(make, at, message, found):
    model = make()
    keys = list(model.state_dict())
    others = [name for name in ("stem", "head") if name != at]
    with pytest.raises(ValueError, match=f"insert_nonlocal: expected .*{message}.*; "):
        insert_nonlocal(model, at=[*others, at], **found)
    assert_plain(model, keys)


def test_a_failure_on_the_way_changes_nothing(monkeypatch):
    model = Plain()
    keys = list(model.state_dict())

    def refuse(name, module):
        raise RuntimeError("no child for me")

    model.head.add_module = refuse
    with pytest.raises(RuntimeError, match="no child for me"):
        insert_nonlocal(model, at=["stem", "head"], channels=[8, 4])
    assert_plain(model, keys)


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


@pytest.mark.parametrize(
    ("wrap", "at", "name"),
    [
        (lambda m: m, "", "nl"),
        (lambda m: m, "stem", "stem.nl"),
        (nn.DataParallel, "stem", "module.stem.nl"),
        (nn.DataParallel, "module.stem", "module.stem.nl"),
        (nn.DataParallel, "", "module.nl"),
        (lambda m: torch.compile(m, backend="eager"), "", "_orig_mod.nl"),
    ],
)
def test_blocks_bear_the_names_of_their_keys(wrap, at, name):
    model = Plain()
    wrapped, keys = wrap(model), list(model.state_dict())
    report = insert_nonlocal(wrapped, at=[at], clip=CLIP)
    assert list(report.blocks) == [row.where for row in report] == [name]
    assert f"{name}.theta.weight" in wrapped.state_dict()
    calls = []
    report.blocks[name].register_forward_hook(lambda *_: calls.append(1))
    model(torch.randn(CLIP))
    assert calls == [1]
    report.restore()
    assert_plain(model, keys)


def test_a_report_takes_back_its_own_only():
    model = nn.Sequential(Nonlocal(8, 4), nn.Sequential(nn.Conv3d(8, 8, 1)))
    stale = replace_nonlocal(model)
    restore_nonlocal(model)
    report = replace_nonlocal(model)
    stale.restore()
    assert type(model[0]) is not Nonlocal
    report.restore()
    assert type(model[0]) is Nonlocal
    stale = insert_nonlocal(model, at=["1"], channels=8)
    del model[1].nl
    report = insert_nonlocal(model, at=["1"], channels=8)
    stale.restore()
    assert model[1].nl is report.blocks["1.nl"]


def test_what_the_caller_removed_or_wrapped_does_not_stop_the_way_back():
    model, x = Plain(nn.Sequential(nn.Conv3d(3, 8, 1))), torch.randn(CLIP)
    keys, expected = list(model.state_dict()), model(x)
    removed = copy.deepcopy(model)
    with insert_nonlocal(removed, at=["stem", "head", ""], channels=[8, 4, 4]):
        del removed.stem.nl, removed.head.nl
    assert_plain(removed, keys)
    torch.testing.assert_close(removed(x), expected)
    with insert_nonlocal(model, at=["stem", "head"], channels=[8, 4]):
        for place in (model.stem, model.head):
            place.nl = nn.Sequential(place.nl)
    assert_plain(model, keys)


class Pathways(Plain):
    """Takes a list, and assigns into it, as PySlowFast's models do."""

    def forward(self, clips):
        clips[0] = self.stem(clips[0])
        return self.head(clips[0])


@pytest.mark.parametrize("of", [torch.ones, tuple], ids=["tensors", "shapes"])
def test_a_model_of_pathways(of):
    model, clips = Pathways(), [of(CLIP)]
    report = insert_nonlocal(model, at=["stem"], clip=clips)
    assert tuple(report.blocks["stem.nl"].theta.weight.shape)[1] == 8
    assert len(clips) == 1 and (torch.is_tensor(clips[0]) == (of is torch.ones))
    assert tuple(model([torch.ones(CLIP)]).shape) == (2, 4, 2, 6, 6)


def test_a_parametrized_place_is_refused():
    model = Plain(stem=weight_norm(nn.Conv3d(3, 8, 1)))
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match="without parametrizations, got weight with some; insert"):
        insert_nonlocal(model, at=["stem"], clip=CLIP)
    assert list(model.state_dict()) == keys


def test_modules_that_only_a_closure_calls_are_left_as_they_are():
    model = Plain()
    norm = model.norm = nn.BatchNorm3d(4)
    model.last = lambda x: norm(x)
    own = Plain.forward
    model.__class__ = type("Closed", (Plain,), {"forward": lambda m, x: m.last(own(m, x))})
    insert_nonlocal(model, at=["stem"], clip=torch.randn(CLIP))
    assert norm.num_batches_tracked == 0 and torch.equal(norm.running_mean, torch.zeros(4))
