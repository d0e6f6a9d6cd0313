"""pytorchvideo's block against ours with its weights, for every option that it has."""

import functools

import pytest
import torch

from nlkernels import NonLocalBlock3d
from tests.foreign.agreement import assert_same_block, assert_same_state, randomise

theirs = pytest.importorskip(
    "pytorchvideo.layers.nonlocal_net", reason="pytorchvideo is only in the foreign environment"
)

POOLS = [None, (1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 1, 3)]
# Their arguments and our options.
NORMS = {
    "bn": ({}, {}),
    "bn_eps": ({"norm_eps": 1e-3, "norm_momentum": 0.3}, {"norm_eps": 1e-3, "norm_momentum": 0.3}),
    "sync": ({"norm": torch.nn.SyncBatchNorm}, {}),
    "none": ({"norm": None}, {}),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("pool", POOLS, ids=str)
@pytest.mark.parametrize("kind", ["softmax", "dot_product"])
def test_block(kind, pool, norm, training):
    arguments, options = NORMS[norm]
    made = theirs.create_nonlocal(
        dim_in=6, dim_inner=3, pool_size=pool, instantiation=kind, **arguments
    )
    options = {"kind": kind, "pool": pool, **options}
    shape = (2, 6, 4, 5, 6)
    check = functools.partial(assert_same_block, training=training)
    check(made, NonLocalBlock3d, "pytorchvideo", options, shape)
    check(randomise(made), NonLocalBlock3d, "pytorchvideo", options, shape)


def test_another_norm():
    norm = functools.partial(torch.nn.GroupNorm, 3)
    projections = [torch.nn.Conv3d(6, 4, 1) for _ in range(3)]
    made = theirs.NonLocal(
        conv_theta=projections[0],
        conv_phi=projections[1],
        conv_g=projections[2],
        conv_out=torch.nn.Conv3d(4, 6, 1),
        norm=norm(6),
        instantiation="softmax",
    )
    options = {"norm": norm, "pool": None}
    assert_same_block(randomise(made), NonLocalBlock3d, "pytorchvideo", options, (2, 6, 2, 3, 4))


def test_new_blocks_start_alike():
    theirs_started = theirs.create_nonlocal(dim_in=6, dim_inner=3)
    ours_started = NonLocalBlock3d.from_preset("pytorchvideo", 6).to_foreign("pytorchvideo")
    state = theirs_started.state_dict()
    norm = {key: tensor for key, tensor in state.items() if key.startswith("norm.")}
    assert_same_state({key: ours_started[key] for key in norm}, norm)
    assert {key: t.shape for key, t in ours_started.items()} == {
        k: t.shape for k, t in state.items()
    }
