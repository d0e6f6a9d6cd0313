"""The output projection in the state of dot-product attention: what it computes, and when."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nlkernels import NonLocalBlock3d
from tests.helpers import SHORT, assert_not_worse
from tests.modules.by_hand import features
from tests.modules.test_block_regions import Calls

ATTENTION = "dot_product_forward"


def made(norm="batch", dtype=torch.float64, **options):
    torch.manual_seed(1)
    block = NonLocalBlock3d(16, kind="dot_product", norm=norm, zero_init=None, **options)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return block.to(dtype).eval()


def names(block, x):
    with torch.no_grad(), Calls() as calls:
        out = block(x)
    return out, set(calls.counts)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("norm", ["batch", "affine", None])
@pytest.mark.parametrize("order", ["before", "after"])
def test_computes_what_training_does(order, norm, layout):
    block = made(norm, pool_order=order, scale=0.7)
    x = features(1, 16, 4, 6, 6).contiguous(memory_format=layout)
    got, called = names(block, x)
    assert not any(ATTENTION in name for name in called)
    torch.testing.assert_close(got, block(x).detach(), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=SHORT.get)
def test_keeps_the_rule(dtype):
    block, x = made(dtype=dtype), features(1, 16, 4, 8, 8, dtype=dtype)
    same, truth = (made(dtype=own) for own in (dtype, torch.float64))
    truth.load_state_dict(block.state_dict())
    same.set_backend("reference")
    got, called = names(block, x)
    assert not any(ATTENTION in name for name in called)
    with torch.no_grad():
        assert_not_worse("out", got, same(x), truth(x.double()), 2)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 16, 4, 6, 6), {}),  # each item has a state
        ((1, 16, 4, 6, 6), {"temporal_group": 2}),
        ((1, 16, 1, 3, 3), {}),  # few positions: the weight itself costs more
        ((1, 16, 4, 6, 6), {"kind": "softmax"}),
    ],
)
def test_stays_apart_where_it_does_not_pay(shape, options):
    options = {"kind": "dot_product", **options}
    block = NonLocalBlock3d(16, zero_init=None, **options).double().eval()
    x = features(*shape)
    got, called = names(block, x)
    assert any(f"{options['kind']}_forward" in name for name in called)
    torch.testing.assert_close(got, block(x).detach(), rtol=1e-11, atol=1e-12)


def test_computes_less():
    block, x = made(pool=None), features(1, 16, 4, 8, 8)
    counts = []
    for context in (torch.no_grad(), torch.enable_grad()):
        with context, FlopCounterMode(display=False) as counter:
            block(x)
        counts.append(counter.get_total_flops())
    positions, channels, depth = 256, 16, 8
    apart = positions * depth * depth + positions * depth * channels
    folded = (positions + depth) * channels * depth
    assert counts[1] - counts[0] == 2 * (apart - folded)
