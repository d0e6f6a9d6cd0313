"""Blocks of the stand-ins, one for each option, and what is compared of them."""

import copy

import torch
from torch import nn

from nlkernels.patching.view import View
from tests.patching.packages.lib import (
    non_local_concatenation,
    non_local_dot_product,
    non_local_embedded_gaussian,
    non_local_gaussian,
)
from tests.patching.packages.ops import non_local, rnl
from tests.patching.packages.slowfast.models.nonlocal_helper import Nonlocal
from tests.patching.packages.timm.layers.non_local_attn import NonLocalAttn

_FILES = (
    non_local_gaussian,
    non_local_embedded_gaussian,
    non_local_dot_product,
    non_local_concatenation,
    non_local,
)
SHAPES = {1: (2, 8, 11), 2: (2, 8, 6, 5), 3: (2, 8, 3, 6, 5)}


def _named():
    for kind in ("softmax", "dot_product"):
        for pool in (None, (1, 1, 1), (1, 2, 2), (2, 1, 2)):
            for norm in ("bn", "layer", None):
                arguments = (8, 4, pool, kind, norm)
                yield f"slowfast-{kind}-{pool}-{norm}", 3, lambda a=arguments: Nonlocal(*a)
    for file in _FILES:
        short = file.__name__.rpartition(".")[2]
        for dims in SHAPES:
            made = getattr(file, f"NONLocalBlock{dims}D")
            for sub in (True, False):
                for norm in (True, False):
                    options = {"sub_sample": sub, "bn_layer": norm}
                    label = f"{short}-{dims}d-{'sub' if sub else 'all'}-{'bn' if norm else 'bare'}"
                    yield label, dims, lambda m=made, o=options: m(8, **o)
        yield f"{short}-nd", 2, lambda m=file._NonLocalBlockND: m(8, dimension=2)
    for kernel in ([3, 3, 3], [1, 3, 5], [1, 1, 1]):
        for activation in ("softmax", "relu"):
            for sub in (True, False):
                for l2norm in (True, False):
                    options = {"activation": activation, "use_norm": l2norm, "bn_layer": not l2norm}
                    label = f"rnl-{tuple(kernel)}-{activation}-{sub}-{l2norm}"
                    yield (
                        label,
                        3,
                        lambda a=(2, kernel, sub), o=options: rnl._NonLocalBlockND(8, *a, **o),
                    )
    for scaled in (True, False):
        yield f"timm-{scaled}", 2, lambda s=scaled: NonLocalAttn(8, s, rd_channels=4)


BLOCKS = {label.replace(" ", ""): (dims, make) for label, dims, make in _named()}


def randomised(module):
    """Weights of which every one matters; a mask stays."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if not name.endswith("mask"):
                parameter.normal_(std=0.4)
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.4)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    return module


def results(module, x, backward=True):
    """Output, gradients and buffers of a copy."""
    module = copy.deepcopy(module)
    x = x.clone().requires_grad_()
    out = module(x)
    found = {"out": out.detach()}
    if backward:
        out.backward(torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out).cos())
        found["grad:x"] = x.grad
        found |= {f"grad:{n}": p.grad for n, p in module.named_parameters() if p.grad is not None}
    return found | {f"after:{name}": buffer for name, buffer in module.named_buffers()}


def assert_same(found, expected, tolerance):
    """Relative to the largest number of an output or buffer, and of all gradients."""
    assert found.keys() == expected.keys()
    gradients = [t.abs().max().item() for name, t in expected.items() if name.startswith("grad")]
    for name, tensor in expected.items():
        scale = max(tensor.abs().max().item(), 1e-30)
        if name.startswith("grad"):
            scale = max(gradients)
        difference = (found[name].double() - tensor.double()).abs().max().item()
        assert difference <= tolerance * scale, (name, difference / scale)


class Net(nn.Module):
    """A small network around a block for clips."""

    def __init__(self, block, channels=8):
        super().__init__()
        self.stem = nn.Conv3d(3, channels, (1, 3, 3), padding=(0, 1, 1))
        self.layer = nn.Sequential(nn.Conv3d(channels, channels, 1), block)
        self.head = nn.Linear(channels, 3)

    def forward(self, x):
        return self.head(self.layer(self.stem(x).relu()).mean((2, 3, 4)))


class Backward(torch.autograd.Function):
    """The identity, whose backward is a function's."""

    @staticmethod
    def forward(ctx, y, change):
        ctx.change = change
        return y.clone()

    @staticmethod
    def backward(ctx, grad):
        return ctx.change(grad), None


def with_backward(monkeypatch, change):
    """Replaced blocks have the backward that a function makes of their own."""
    right = View.forward
    monkeypatch.setattr(View, "forward", lambda self, x: Backward.apply(right(self, x), change))
