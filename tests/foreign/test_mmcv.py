"""mmcv's blocks against ours with their weights, for every option that they have.

Their concatenation divides its scores in place after a ReLU, which autograd refuses: for that mode
outputs are compared, gradients cannot be.
"""

import functools
import itertools

import pytest
import torch

from nlkernels import NonLocalBlock1d, NonLocalBlock2d, NonLocalBlock3d
from tests.foreign.agreement import assert_same_block, randomise

theirs = pytest.importorskip(
    "mmcv.cnn.bricks.non_local", reason="mmcv-lite is only in the foreign environment"
)

BLOCKS = {
    1: (NonLocalBlock1d, theirs.NonLocal1d, (2, 6, 9)),
    2: (NonLocalBlock2d, theirs.NonLocal2d, (2, 6, 5, 4)),
    3: (NonLocalBlock3d, theirs.NonLocal3d, (2, 6, 3, 5, 4)),
}
KINDS = {
    "gaussian": "gaussian",
    "embedded_gaussian": "softmax",
    "dot_product": "dot_product",
    "concatenation": "concat",
}
NORMS = ("none", "BN", "BN-eps", "GN", "IN", "SyncBN")


def norm_options(name, dims):
    """norm_cfg, our options, and whether to train: several processes train a SyncBN."""
    instance = getattr(torch.nn, f"InstanceNorm{dims}d")
    return {
        "none": (None, {}, [True]),
        "BN": ({"type": f"BN{dims}d"}, {}, [True, False]),
        "BN-eps": (
            {"type": f"BN{dims}d", "eps": 1e-3, "momentum": 0.3},
            {"norm_eps": 1e-3, "norm_momentum": 0.3},
            [True],
        ),
        "GN": (
            {"type": "GN", "num_groups": 3},
            {"norm": functools.partial(torch.nn.GroupNorm, 3)},
            [True],
        ),
        "IN": ({"type": f"IN{dims}d"}, {"norm": instance}, [True]),
        "SyncBN": ({"type": "SyncBN"}, {}, [False]),
    }[name]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("sub_sample", [True, False], ids=["sub", "nosub"])
@pytest.mark.parametrize("mode", KINDS)
@pytest.mark.parametrize("dims", BLOCKS)
def test_block(dims, mode, sub_sample, norm):
    ours, make, shape = BLOCKS[dims]
    norm_cfg, options, trained = norm_options(norm, dims)
    if mode in ("embedded_gaussian", "dot_product"):  # the keys show the others
        options["kind"] = KINDS[mode]
    switches = itertools.product((True, False), (1, 2, 6), (True, False), trained)
    for use_scale, reduction, zeros_init, training in switches:
        made = make(
            shape[1],
            sub_sample=sub_sample,
            reduction=reduction,
            use_scale=use_scale,
            norm_cfg=norm_cfg,
            mode=mode,
            zeros_init=zeros_init,
        )
        preset = "mmaction_slowonly" if use_scale else "mmaction_i3d"
        check = functools.partial(
            assert_same_block,
            training=training,
            backward=mode != "concatenation",
            single=norm != "IN" or reduction == 2,
            medians=norm == "IN",
        )
        check(made, ours, preset, options, shape)
        check(randomise(made), ours, preset, options, shape)
