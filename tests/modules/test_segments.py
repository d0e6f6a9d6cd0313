"""Frames to clips and back: the same numbers in the same memory, and the published keys."""

import pytest
import torch
from torch import nn

from nlkernels import ChannelGate, NonLocalBlock3d, SegmentBlock

FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
formats = pytest.mark.parametrize("layout", list(FORMATS))


class Watch(nn.Module):
    """Keeps what it is given; returns what `change` makes of it."""

    def __init__(self, change=lambda x: x):
        super().__init__()
        self.change, self.seen = change, None

    def forward(self, x):
        self.seen = x
        return self.change(x)


def frames(layout="nchw", clips=2, segments=4, device="cpu", dtype=torch.float64):
    x = torch.randn(clips * segments, 8, 5, 6, device=device, dtype=dtype)
    return x.contiguous(memory_format=FORMATS[layout])


@formats
def test_clips_are_views_of_the_frames_and_back(layout, device):
    gate, nl, x = Watch(), Watch(), frames(layout, device=device)
    out = SegmentBlock(nn.Identity(), nl, 4, gate=gate)(x)
    for clip in (gate.seen, nl.seen):
        assert clip.shape == (2, 8, 4, 5, 6)
        assert clip.data_ptr() == x.data_ptr()
        for n, t in ((0, 0), (1, 0), (1, 3)):
            assert torch.equal(clip[n, :, t], x[4 * n + t])
    assert out.data_ptr() == x.data_ptr() and out.stride() == x.stride()
    if layout == "channels_last":
        assert nl.seen.is_contiguous(memory_format=torch.channels_last_3d)


@formats
def test_a_sum_that_begins_with_the_clip_goes_back_without_a_copy(layout, device):
    x, returned = frames(layout, device=device), []

    def residual(clip):
        returned.append(clip + clip.contiguous().sin())
        return returned[-1]

    out = SegmentBlock(nn.Identity(), Watch(residual), 4)(x)
    assert out.data_ptr() == returned[0].data_ptr() and out.stride() == x.stride()


@formats
@pytest.mark.parametrize("kind", ["softmax", "dot_product"])
def test_gate_and_block_keep_the_layout_of_the_frames(kind, layout, device):
    nl = NonLocalBlock3d(8, kind=kind, zero_init=None)
    made = SegmentBlock(nn.Identity(), nl, 4, gate=ChannelGate(8, zero_init=False))
    made, x = made.to(device).double(), frames(layout, device=device).requires_grad_()
    returned = []
    made.nl.register_forward_hook(lambda module, given, out: returned.append(out))
    out = made(x)
    assert out.stride() == x.stride() and out.data_ptr() == returned[0].data_ptr()
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    assert grad.shape == x.shape and grad.isfinite().all()


@formats
@pytest.mark.parametrize("gated", [True, False], ids=["gate", "no_gate"])
def test_equals_clips_made_by_copying(gated, layout, device):
    nl = NonLocalBlock3d(8, zero_init=None, init="default")
    gate = ChannelGate(8, zero_init=False) if gated else None
    block = nn.Sequential(nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8))
    made = SegmentBlock(block, nl, 4, gate=gate).to(device).double()
    x = frames(layout, device=device).requires_grad_()
    out = made(x)
    clip = made.block(x).contiguous().view(2, 4, 8, 3, 3).permute(0, 2, 1, 3, 4).contiguous()
    clip = made.nl(clip if gate is None else made.cg(clip))
    expected = clip.permute(0, 2, 1, 3, 4).reshape(8, 8, 3, 3)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-12)
    grad = torch.randn_like(out)
    for got, want in zip(
        torch.autograd.grad(out, [x, *made.parameters()], grad),
        torch.autograd.grad(expected, [x, *made.parameters()], grad),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_new_parts_leave_the_block_as_it_is(device):
    conv = nn.Conv2d(8, 16, 1, dtype=torch.float64, device=device)
    parts = (m.to(device).double() for m in (NonLocalBlock3d(16), ChannelGate(16)))
    nl, gate = parts
    x = frames(device=device)
    assert torch.equal(SegmentBlock(conv, nl, 4, gate)(x), conv(x))


def test_fullgraph_compile():
    torch._dynamo.reset()
    made = SegmentBlock(nn.Identity(), NonLocalBlock3d(8, zero_init=None), 4).double()
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    for layout in FORMATS:
        x = frames(layout)
        torch.testing.assert_close(compiled(x), made(x), rtol=1e-11, atol=1e-12)


def test_names_are_those_of_published_checkpoints():
    conv, nl, gate = nn.Conv2d(8, 8, 1), NonLocalBlock3d(8), ChannelGate(8)

    def prefixes(made):
        return list(dict.fromkeys(key.split(".")[0] for key in made.state_dict()))

    assert prefixes(SegmentBlock(conv, nl, 4)) == ["block", "nl"]
    assert prefixes(SegmentBlock(conv, nl, 4, gate=gate)) == ["block", "cg", "nl"]
    assert prefixes(SegmentBlock(conv, None, 4, gate=gate)) == ["block", "cg"]
    theirs = SegmentBlock(conv, nl, 4, nl_name="non_local_block")
    assert prefixes(theirs) == ["block", "non_local_block"]
    assert repr(theirs).startswith("SegmentBlock(\n  segments=4\n")


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((None, nn.Identity(), 4), {}, TypeError, "block to be a module, got NoneType"),
        ((nn.Identity(), 4, nn.Identity()), {}, TypeError, "nl to be a module, got int; the order"),
        ((nn.Identity(), None, 4), {}, ValueError, "nl or gate, got None for both"),
        ((nn.Identity(), nn.Identity(), 0), {}, ValueError, "segments of 1 or more, got 0"),
        ((nn.Identity(), nn.Identity(), 2.0), {}, ValueError, "segments of 1 or more, got 2.0"),
        ((nn.Identity(), nn.Identity(), 2), {"nl_name": "x"}, ValueError, "nl_name to be one of"),
    ],
)
def test_wrong_parts_are_refused(arguments, options, error, message):
    with pytest.raises(error, match=f"SegmentBlock: expected {message}"):
        SegmentBlock(*arguments, **options)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(6, 8, 2, 2), ValueError, r"multiple of segments=4, got \(6, 8, 2, 2\) .*; ev"),
        (torch.zeros(2, 8, 4, 2, 2), ValueError, r"got \(2, 8, 4, 2, 2\)"),
        ([1], TypeError, "got list; pass one tensor"),
    ],
)
def test_wrong_frames_are_refused_before_the_block_runs(x, error, message):
    block = Watch()
    with pytest.raises(error, match=f"SegmentBlock: expected a batch of frames .*{message}"):
        SegmentBlock(block, nn.Identity(), 4)(x)
    assert block.seen is None


def test_a_block_that_returns_no_frames_is_named():
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ValueError, match=r"the block to return frames .* got \(4, 8\)"):
        SegmentBlock(pooled, nn.Identity(), 4)(torch.zeros(4, 8, 2, 2))
