"""The channel gate as a module: its function, its start, training, and other systems' weights."""

import copy

import pytest
import torch
from torch import nn

import nlkernels
from nlkernels import ChannelGate, _ext
from tests.helpers import assert_not_worse

SHAPES = [(3, 8, 2, 5, 4), (2, 8, 6, 7), (4, 8, 9)]
RNL_KEYS = [
    *("W_k.weight", "W_k.bias", "W_v1.weight", "W_v1.bias", "bn1.weight", "bn1.bias"),
    *("bn1.running_mean", "bn1.running_var", "bn1.num_batches_tracked"),
    *("W_v2.weight", "W_v2.bias"),
]


def made(dim=8, dtype=torch.float64, device="cpu", **options):
    """A gate whose every parameter and statistic matters."""
    gate = ChannelGate(dim, **options)
    for parameter in gate.parameters():
        nn.init.normal_(parameter, std=0.5)
    nn.init.uniform_(gate.norm.running_var, 0.5, 2)
    nn.init.normal_(gate.norm.running_mean)
    return gate.to(device, dtype)


class Plain(nn.Module):
    """The published gate written out in plain PyTorch, with its own keys."""

    def __init__(self, dim, reduction=2):
        super().__init__()
        self.W_k = nn.Conv3d(dim, 1, 1)
        self.W_v1 = nn.Linear(dim, dim // reduction)
        self.bn1 = nn.BatchNorm1d(dim // reduction, eps=1e-5, momentum=0.01)
        self.W_v2 = nn.Linear(dim // reduction, dim)

    def forward(self, x):
        rows = x.flatten(2)
        shares = self.W_k(x).flatten(2).softmax(-1)
        context = torch.matmul(rows, shares.mT).squeeze(-1)
        out = self.W_v2(torch.relu(self.bn1(self.W_v1(context))))
        return x + out.view(*x.shape[:2], *[1] * (x.dim() - 2))


def step(module, x, grad):
    """Output, gradients of x and of all parameters, statistics afterwards."""
    x = x.detach().requires_grad_()
    out = module(x)
    grads = torch.autograd.grad(out, [x, *module.parameters()], grad)
    statistics = [b.clone() for b in module.buffers()]
    return [out.detach(), *grads, *statistics]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("backend", ["reference", "chunked", None])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("reduction", [1, 2, 3])
def test_gate_equals_the_published_one(reduction, training, backend, device):
    gate = made(reduction=reduction, backend=backend, device=device).train(training)
    plain = Plain(8, reduction).to(device, torch.float64).train(training)
    plain.load_state_dict(gate.to_foreign("rnl"))
    x, grad = torch.randn(2, *SHAPES[0], dtype=torch.float64, device=device)
    for got, want in zip(step(gate, x, grad), step(plain, x, grad), strict=True):
        torch.testing.assert_close(got.reshape(want.shape), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_not_worse_than_pytorch(dtype, device):
    plain = Plain(32).eval()
    x = torch.randn(3, 32, 4, 7, 7)
    gate = ChannelGate.from_foreign(plain.state_dict()).eval()
    low, rounded = (m.to(device, dtype) for m in (gate, copy.deepcopy(plain)))
    truth = copy.deepcopy(rounded).double()(x.to(device, dtype).double())
    same = rounded(x.to(device, dtype))
    assert_not_worse("out", low(x.to(device, dtype)), same, truth, 2)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_new_gate_is_the_identity_and_learns(shape, device):
    gate, x = ChannelGate(8).to(device), torch.randn(shape, device=device)
    assert torch.equal(gate(x), x)
    assert not torch.equal(ChannelGate(8, zero_init=False).to(device)(x), x)
    target = x.flip(1)
    optimiser = torch.optim.SGD(gate.parameters(), 0.3)
    losses = []
    for number in range(20):
        loss = (gate(x) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        losses.append(loss.item())
        if number == 0:
            assert gate.expand.weight.grad.abs().max() > 0 and gate.expand.bias.grad.any()
        optimiser.step()
    assert losses[-1] < losses[0]
    # A parameter without a gradient would stop distributed training.
    assert all(p.grad is not None for p in gate.parameters())
    assert not gate.score.bias.grad.any() and gate.score.weight.grad.abs().max() > 0


def test_gradients_of_gradients():
    gate = made(4).eval()
    x = torch.randn(2, 4, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(gate, x, nondet_tol=0)
    assert torch.autograd.gradgradcheck(gate, x, nondet_tol=0)


def test_autocast_and_inference_mode(device):
    gate, x = ChannelGate(8, zero_init=False).to(device).eval(), torch.randn(SHAPES[0])
    x = x.to(device)
    full = gate(x)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = gate(x)
        out.sum().backward()
    torch.testing.assert_close(out, full, rtol=0.05, atol=0.05)
    assert all(p.grad.dtype == torch.float32 for p in gate.parameters())
    with torch.inference_mode():
        assert torch.equal(gate(x), full)


def test_fullgraph_compile():
    torch._dynamo.reset()
    gate = made().eval()
    compiled = torch.compile(gate, fullgraph=True, backend="aot_eager")
    x = torch.randn(SHAPES[0], dtype=torch.float64)
    torch.testing.assert_close(compiled(x), gate(x), rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("repeatable")
def test_repeats_are_bitwise_equal(device):
    x, grad = torch.randn(2, *SHAPES[0], dtype=torch.float64, device=device)
    gate = made(device=device).eval()
    first = step(gate, x, grad)
    for _ in range(20):
        assert all(map(torch.equal, step(gate, x, grad), first))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d], ids=str)
def test_memory_format_stays(layout, device):
    x = torch.randn(SHAPES[0], device=device).contiguous(memory_format=layout)
    assert made(dtype=torch.float32, device=device).eval()(x).stride() == x.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_import_and_export_return_the_same_keys_and_arrays(dtype):
    theirs = Plain(12, 3).to(dtype)
    theirs(torch.randn(4, 12, 2, 3, 3, dtype=dtype))
    state = {f"module.cg.{k}": v for k, v in theirs.state_dict().items()}
    arrays = {k: v.numpy() for k, v in state.items()}
    for given in (state, arrays, {"module.other": 1, **state}):
        gate = ChannelGate.from_foreign(given, "rnl", prefix="module.cg.", norm_eps=1e-3)
        assert (gate.dim, gate.reduction, gate.norm.eps) == (12, 3, 1e-3)
        back = gate.to_foreign("rnl", prefix="module.cg.")
        assert list(back) == [f"module.cg.{key}" for key in RNL_KEYS] == list(state)
        for key, tensor in state.items():
            assert torch.equal(back[key], tensor) and back[key].dtype == tensor.dtype
    back["module.cg.W_k.weight"].zero_()
    assert gate.score.weight.any(), "exports are copies"
    del state["module.cg.bn1.num_batches_tracked"]
    assert ChannelGate.from_foreign(state, prefix="module.cg.").norm.num_batches_tracked == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("W_k.bias"), r"missing \['W_k.bias'\] and unknown \[\]"),
        (lambda s: s.update({"W_k2.bias": s["W_k.bias"]}), r"unknown \['W_k2.bias'\]"),
        (lambda s: s.update({"W_v2.bias": s["W_k.bias"]}), r"W_v2.bias of \(8,\), got \(1,\)"),
        (lambda s: s.update({"W_k.weight": torch.ones(1, 8, 3, 1, 1)}), r"got \(1, 8, 3, 1, 1\)"),
    ],
    ids=["missing", "unknown", "shape", "kernel"],
)
def test_import_refuses_what_is_no_gate(change, message):
    state = Plain(8).state_dict()
    change(state)
    with pytest.raises(ValueError, match=f"ChannelGate.from_foreign: expected .*{message}"):
        ChannelGate.from_foreign(state)
    with pytest.raises(ValueError, match="preset to be one of rnl, got 'tsm'"):
        ChannelGate(8).to_foreign("tsm")


def test_import_keeps_dtypes_and_reads_any_byte_order():
    state = Plain(8, 4).state_dict()
    low = {k: v.half() if k.startswith("W_v") else v for k, v in state.items()}
    gate = ChannelGate.from_foreign(low)
    assert gate.reduce.weight.dtype == torch.float16 and gate.score.weight.dtype == torch.float32
    swapped = {k: v.numpy() for k, v in state.items()}
    swapped = {k: v.astype(v.dtype.newbyteorder(">")) for k, v in swapped.items()}
    for given in (low, swapped):
        back = ChannelGate.from_foreign(given).to_foreign()
        want = low if given is low else state
        assert all(torch.equal(back[k], v) and back[k].dtype == v.dtype for k, v in want.items())


@pytest.mark.parametrize("size", [(), (8,), (3, 8), (9, 8), (0, 8), (4, 8, 1)], ids=str)
def test_import_refuses_hidden_layers_of_no_reduction(size):
    state = {**Plain(8).state_dict(), "W_v1.weight": torch.ones(size)}
    with pytest.raises(ValueError, match=r"W_v1.weight of .C // reduction, C. for a whole reduct"):
        ChannelGate.from_foreign(state)
    with pytest.raises(TypeError, match="expected a mapping of keys to arrays, got list"):
        ChannelGate.from_foreign([])


def test_backend_is_switched_and_explained(device):
    gate, x = ChannelGate(8).to(device), torch.zeros(SHAPES[0], device=device)
    assert nlkernels.set_nonlocal_backend(nn.Sequential(gate, nn.ReLU()), "reference") == 1
    assert gate.backend == gate.explain(x).backend == "reference"
    gate.set_backend("sdpa")
    fastest = "cpp" if x.device.type == "cpu" and not _ext.missing() else "chunked"
    assert gate.explain(x).backend == fastest and torch.equal(gate(x), x)
    with pytest.raises(ValueError, match="did you mean 'chunked'"):
        ChannelGate(8, backend="chunky")


def test_printed_gate_says_whether_it_is_still_the_identity():
    gate = ChannelGate(8, reduction=4)
    assert "(8, reduction=4, backend=auto, output still zero" in repr(gate).replace("\n  ", "")
    nn.init.ones_(gate.expand.bias)
    gate.set_backend("chunked")
    assert "backend=chunked, output not zero" in repr(gate)
    with torch.device("meta"):
        assert "zero" not in repr(ChannelGate(8))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0,), {}, "dim of 1 or more, got 0"),
        (("8",), {}, "dim of 1 or more, got '8'"),
        ((8,), {"reduction": 0}, "reduction of 1 or more, got 0"),
        ((8,), {"reduction": 16}, "reduction of at most dim=8, got 16"),
        ((8,), {"norm_eps": -1.0}, "norm_eps to be a finite number of 0 or more, got -1.0"),
        ((8,), {"norm_momentum": 2}, "norm_momentum to be a number from 0 to 1 or None, got 2"),
    ],
)
def test_gate_refuses_wrong_options(arguments, options, message):
    with pytest.raises(ValueError, match=f"ChannelGate: expected {message}; "):
        ChannelGate(*arguments, **options)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (None, TypeError, "expected a tensor, got NoneType; convert"),
        (torch.zeros(2, 8, 4).half(), TypeError, "input of torch.float32, got .*; cast it"),
        (torch.zeros(2, 8, 4, device="meta"), ValueError, "input on cpu, got .*; move it"),
        (torch.zeros(2, 4, 4), ValueError, r"\(B, 8, positions\) .* got \(2, 4, 4\)"),
        (torch.zeros(2, 8), ValueError, r"1 to 3 axes of positions, got \(2, 8\)"),
        (torch.zeros(2, 8, 0), ValueError, r"got \(2, 8, 0\)"),
        (torch.zeros(1, 8, 4), ValueError, r"more than one item .* got \(1, 8, 4\) .*norm.eval"),
    ],
    ids=["none", "half", "meta", "channels", "rank", "empty", "one_item"],
)
def test_gate_refuses_wrong_inputs(x, error, message):
    with pytest.raises(error, match=f"ChannelGate: expected .*{message}|ChannelGate: {message}"):
        ChannelGate(8)(x)


def test_one_item_is_enough_once_the_norm_is_frozen(device):
    gate, x = ChannelGate(8).to(device), torch.zeros(1, 8, 4, device=device)
    gate.norm.eval()
    assert gate(x).shape == x.shape
    assert ChannelGate(8).to(device).eval()(x[:0]).shape == (0, 8, 4)
