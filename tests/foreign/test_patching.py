"""pytorchvideo's and mmcv's own blocks, replaced: outputs, gradients, statistics and keys stay."""

import itertools

import pytest
import torch

from tests.patching.test_blocks import check_module

video = pytest.importorskip(
    "pytorchvideo.layers.nonlocal_net", reason="pytorchvideo is only in the foreign environment"
)
mmcv = pytest.importorskip(
    "mmcv.cnn.bricks.non_local", reason="mmcv-lite is only in the foreign environment"
)
MMCV = {
    1: (mmcv.NonLocal1d, (2, 6, 9)),
    2: (mmcv.NonLocal2d, (2, 6, 5, 4)),
    3: (mmcv.NonLocal3d, (2, 6, 3, 5, 4)),
}


@pytest.mark.parametrize("norm", [torch.nn.BatchNorm3d, None], ids=["bn", "none"])
@pytest.mark.parametrize("pool", [None, (1, 2, 2), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("kind", ["softmax", "dot_product"])
def test_pytorchvideo(kind, pool, norm):
    made = video.create_nonlocal(
        dim_in=6, dim_inner=3, pool_size=pool, instantiation=kind, norm=norm
    )
    check_module(made, (2, 6, 4, 5, 6))


@pytest.mark.parametrize("norm", ["none", "BN", "GN"])
@pytest.mark.parametrize("sub_sample", [True, False], ids=["sub", "nosub"])
@pytest.mark.parametrize("mode", ["gaussian", "embedded_gaussian", "dot_product", "concatenation"])
@pytest.mark.parametrize("dims", MMCV)
def test_mmcv(dims, mode, sub_sample, norm):
    make, shape = MMCV[dims]
    norm_cfg = {"none": None, "BN": {"type": f"BN{dims}d"}, "GN": {"type": "GN", "num_groups": 3}}
    for use_scale, reduction in itertools.product((True, False), (1, 2)):
        made = make(
            6,
            mode=mode,
            sub_sample=sub_sample,
            norm_cfg=norm_cfg[norm],
            use_scale=use_scale,
            reduction=reduction,
        )
        # Their concatenation changes in place what its own backward needs.
        check_module(made, shape, backward=mode != "concatenation")
