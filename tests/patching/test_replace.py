"""What `replace_nonlocal` leaves alone, what it refuses, and the way back."""

import copy
import pickle

import pytest
import torch
from torch import nn

import nlkernels
from nlkernels import replace_nonlocal, restore_nonlocal
from tests.patching.blocks import Net, randomised, results
from tests.patching.packages.lib.non_local_concatenation import NONLocalBlock3D as Concatenation
from tests.patching.packages.lib.non_local_embedded_gaussian import NONLocalBlock3D as Embedded
from tests.patching.packages.ops.rnl import NONLocalBlock3D as Regions
from tests.patching.packages.ops.rnl import _NonLocalBlockND as Activated
from tests.patching.packages.slowfast.models.nonlocal_helper import Nonlocal

CLIP = (2, 3, 4, 8, 8)


def net(block=None):
    return randomised(Net(Nonlocal(8, 4, (1, 2, 2)) if block is None else block))


def losses(model, steps, optimizer=None, patch_at=None):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    found = []
    for step in range(steps):
        if step == patch_at:
            replace_nonlocal(model, backend="chunked")
        x = torch.randn(CLIP, generator=torch.Generator().manual_seed(step)).double()
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return torch.tensor(found, dtype=torch.float64)


def test_a_training_goes_on_where_it_was():
    model = net().double()
    plain = losses(copy.deepcopy(model), 6)
    patched = losses(model, 6, patch_at=3)
    torch.testing.assert_close(patched, plain, rtol=1e-9, atol=1e-12)
    assert (plain[1:] - plain[:-1]).abs().min() > 1e-6


def test_everything_stays_the_same_object():
    model = net()
    before = {name: id(m) for name, m in model.named_modules()}
    state = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    parameters = [id(p) for p in model.parameters()]
    names = sorted(vars(model.layer[1]))
    report = replace_nonlocal(model, backend="chunked")
    assert {name: id(m) for name, m in model.named_modules()} == before
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == state
    assert [id(p) for p in model.parameters()] == parameters
    assert isinstance(model.layer[1], Nonlocal) and "computed by nlkernels" in repr(model)
    report.restore()
    report.restore()
    assert type(model.layer[1]) is Nonlocal and sorted(vars(model.layer[1])) == names
    assert model.layer[1].forward.__func__ is Nonlocal.forward
    assert "nlkernels" not in repr(model)


def test_report_names_everything_and_check_measures():
    model = net().train()
    buffers = copy.deepcopy(dict(model.named_buffers()))
    draw = torch.random.get_rng_state()
    with replace_nonlocal(model, backend="chunked", check=CLIP) as report:
        (row,) = report
        assert row[:7] == ("layer.1", "slowfast", "softmax", "before", 256, 64, "chunked")
        assert row.saved_mib > 0 and report.difference < 1e-4
        assert "256 x 64" in str(report) and "differ by" in str(report)
        assert all(p.grad is None for p in model.parameters())
        assert torch.equal(torch.random.get_rng_state(), draw)
        for name, buffer in model.named_buffers():
            assert torch.equal(buffer, buffers[name]), name
    assert type(model.layer[1]) is Nonlocal


@pytest.mark.parametrize("check", [True, torch.ones(1, 8, 2, 4, 4)], ids=["true", "tensor"])
def test_check_of_a_block_itself(check):
    block = randomised(Nonlocal(8, 4)).eval()
    report = replace_nonlocal(block, backend="chunked", check=check)
    assert report[0].where == "" and "(the model)" in str(report)


def test_a_failed_check_gives_the_model_back(monkeypatch):
    from nlkernels.patching.view import View

    model, right = net(), View.forward

    def wrong(self, x):
        out = right(self, x)
        return out if x.dtype == torch.float64 else out * 1.001

    monkeypatch.setattr(View, "forward", wrong)
    with pytest.raises(RuntimeError, match=r"answer as before, got\n  layer.1: .*error"):
        replace_nonlocal(model, check=CLIP)
    assert type(model.layer[1]) is Nonlocal


def test_a_block_that_computes_something_else_is_refused(monkeypatch):
    model = net()
    model.layer[1].dim_inner = 9  # another scale than that of its width
    with pytest.raises(ValueError, match=r"layer.1: it is no block of slowfast as published"):
        replace_nonlocal(model)
    assert type(model.layer[1]) is Nonlocal


class Subclass(Nonlocal):
    pass


def other_forward(self, x):
    return x


def refused(how, monkeypatch):
    block = Nonlocal(8, 4)
    if how == "subclass":
        block = Subclass(8, 4)
    elif how == "instance":
        block.forward = block.forward
    elif how == "exchanged":
        monkeypatch.setattr(Nonlocal, "forward", other_forward)
    elif how == "again":
        replace_nonlocal(block, backend="chunked")
    else:
        block.instantiation = "concat"
    return block


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("subclass", "is a subclass of"),
        ("instance", "has a forward of its own"),
        ("exchanged", "was exchanged for .*other_forward"),
        ("again", "replaced or extended already"),
        ("option", "instantiation 'concat'"),
    ],
)
def test_refusals_change_nothing(how, why, monkeypatch):
    model = nn.ModuleDict({"good": Embedded(8), "odd": refused(how, monkeypatch)})
    with pytest.raises(ValueError, match=rf"odd: .*{why}.*\n.*only=\['good'\]"):
        replace_nonlocal(model)
    assert type(model["good"]) is Embedded
    assert len(replace_nonlocal(model, only="g*")) == 1


def test_mistakes():
    with pytest.raises(ValueError, match="without any; build it with blocks"):
        replace_nonlocal(nn.Conv3d(3, 8, 1))
    with pytest.raises(ValueError, match=r"some of layer.1, got 'layer.9'"):
        replace_nonlocal(net(), only=["layer.1", "layer.9"])
    with pytest.raises(ValueError, match="expected backend to be one of"):
        replace_nonlocal(net(), backend="fast")
    with pytest.raises(TypeError, match="expected a module, got dict"):
        replace_nonlocal({})
    with pytest.raises(ValueError, match="a clip as a tensor, its shape or True, got 'big'"):
        replace_nonlocal(net(), check="big")


def test_hooks_run_as_before():
    model = net().double()
    x = torch.randn(CLIP).double()
    calls = []

    def hooked(model):
        block = model.layer[1]
        for place in (block, block.conv_theta, block.pool, block.bn):
            name = type(place).__name__
            place.register_forward_hook(lambda m, i, o, n=name: calls.append((n, "out", o.sum())))
            place.register_forward_pre_hook(
                lambda m, i, n=name: calls.append((n, "in", i[0].sum()))
            )
            place.register_full_backward_hook(
                lambda m, i, o, n=name: calls.append((n, "back", o[0].sum()))
            )
        return block

    hooked(model)
    for patched in (False, True):
        if patched:
            replace_nonlocal(model, backend="chunked")
        results_of = model(x)
        results_of.sum().backward()
    half = len(calls) // 2
    assert half == 12 and [c[:2] for c in calls[:half]] == [c[:2] for c in calls[half:]]
    for one, other in zip(calls[:half], calls[half:], strict=True):
        torch.testing.assert_close(one[2], other[2], rtol=1e-9, atol=1e-9)


def test_layers_that_were_exchanged_run_themselves():
    model = net().double()
    replace_nonlocal(model, backend="chunked")
    block, x = model.layer[1], torch.randn(2, 8, 3, 6, 5).double()
    expected = block(x)
    block.conv_phi = nn.Sequential(block.conv_phi, nn.Identity())
    assert "conv_phi" not in block._modules or block.explain(x).problem.endswith(
        "phi is a Sequential of its own kind"
    )
    torch.testing.assert_close(block(x), expected)
    torch.nn.utils.parametrizations.weight_norm(block.conv_theta)
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("made", [Nonlocal(8, 4, (1, 2, 2)), Regions(8, 2, [1, 3, 3], False)])
def test_outputs_lie_as_inputs(made):
    replace_nonlocal(made, backend="chunked")
    x = torch.randn(2, 8, 2, 6, 5)
    for form in (torch.contiguous_format, torch.channels_last_3d):
        given = x.contiguous(memory_format=form)
        assert made(given).stride() == given.stride()


def test_maps_are_theirs_on_demand_and_ours_by_row():
    block = randomised(Embedded(8)).double().eval()
    x = torch.randn(1, 8, 2, 6, 5).double()
    out, weights = block(x, return_nl_map=True)
    replace_nonlocal(block, backend="chunked")
    again, same = block(x, return_nl_map=True)
    assert torch.equal(same, weights) and torch.equal(again, out)
    row = block.attention_map(x, query=(1, 2, 3))
    torch.testing.assert_close(row.flatten(), weights[0, 1 * 30 + 2 * 5 + 3])
    hooked = randomised(Concatenation(8)).double()
    before = results(hooked, x)
    replace_nonlocal(hooked)
    seen = []
    hooked.concat_project[1].register_forward_hook(lambda m, i, o: seen.append(o.shape))
    assert torch.equal(hooked(x), before["out"]) and seen == [(1, 1, 60, 12)]


def test_region_layers_that_were_exchanged_or_have_hooks_run_themselves():
    block = randomised(Activated(8, 2, [3, 3, 3], False, activation="relu")).double()
    x, seen = torch.randn(1, 8, 2, 6, 5).double(), []
    handle = block.relu.register_forward_hook(lambda m, i, o: seen.append(o.shape))
    replace_nonlocal(block, backend="chunked")
    block(x)
    assert seen == [(1, 60, 60)]
    handle.remove()
    block.penta = nn.Conv3d(4, 4, 3, padding=1, groups=4).double()  # it has a bias
    found = block(x)
    restore_nonlocal(block)
    expected = block(x)
    torch.testing.assert_close(found, expected)
    replace_nonlocal(block, backend="chunked")
    block.relu = nn.GELU()
    found = block(x)
    restore_nonlocal(block)
    assert torch.equal(found, block(x)) and not torch.allclose(found, expected)
    with pytest.raises(ValueError, match="a GELU of its own kind"):
        replace_nonlocal(block)


def test_stored_maps_of_another_forward_are_dropped():
    block, x = randomised(Regions(8, 2, [3, 3, 3], False)), torch.randn(1, 8, 2, 6, 5)
    block(x)
    with replace_nonlocal(block, backend="chunked"):
        assert block.attention_maps is None
        block(x)
        assert block.attention_maps is None
    block(x)
    assert block.attention_maps.shape == (1, 60, 60)


def test_copies_and_pickles_are_replaced_too(tmp_path):
    model = net().eval()
    x = torch.randn(CLIP)
    replace_nonlocal(model, backend="chunked")
    expected = model(x)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert "computed by nlkernels" in repr(other) and other.layer[1] is not model.layer[1]
        torch.testing.assert_close(other(x), expected, rtol=0, atol=0)
        assert restore_nonlocal(other) == 1 and type(other.layer[1]) is Nonlocal
        torch.testing.assert_close(other(x), expected)
    with pytest.raises(TypeError, match="restore_nonlocal: expected a module"):
        restore_nonlocal([])


@pytest.mark.gate
def test_compiled_before_and_after():
    model = net().eval()
    x = torch.randn(CLIP)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = compiled(x)
    with replace_nonlocal(compiled, backend="chunked", check=CLIP) as report:
        assert report[0].where == "_orig_mod.layer.1"
        torch.testing.assert_close(compiled(x), expected)
        with torch.profiler.profile() as profile:
            compiled(x)
        assert any("block_project" in event.key for event in profile.key_averages())
    with torch.profiler.profile() as profile:
        compiled(x)
    assert not any("block_project" in event.key for event in profile.key_averages())


@pytest.mark.gate
def test_data_parallel_wrappers(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = net().double()
        twin = copy.deepcopy(model)
        wrapped = nn.parallel.DistributedDataParallel(model)
        report = replace_nonlocal(wrapped, backend="chunked", check=torch.randn(CLIP).double())
        assert report[0].where == "module.layer.1"
        torch.testing.assert_close(losses(wrapped, 3), losses(twin, 3), rtol=1e-9, atol=1e-12)
        with pytest.raises(ValueError, match="before it is distributed"):
            nlkernels.insert_nonlocal(wrapped, at=["module.stem"])
    finally:
        torch.distributed.destroy_process_group()


def test_backends_and_memory_of_replaced_blocks():
    model = net()
    replace_nonlocal(model, backend="chunked")
    block, x = model.layer[1], torch.randn(1, 8, 3, 6, 5)
    assert block.explain(x).backend == "chunked"
    assert nlkernels.set_nonlocal_backend(model, "reference") == 1
    assert block.explain(x).backend == "reference" and block.footprint(x.shape).queries == 90
    block.set_backend("chunked")
    block.recompute = True
    model(torch.randn(CLIP)).sum().backward()
    restore_nonlocal(model)
    assert not {"backend", "recompute", "fused"} & vars(block).keys()
    model.to("meta")
    assert len(replace_nonlocal(model)) == 1
