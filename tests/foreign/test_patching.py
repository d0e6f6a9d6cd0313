"""pytorchvideo's and mmcv's own blocks, replaced: outputs, gradients, statistics and keys stay."""

import copy
import itertools

import pytest
import torch

from nlkernels import replace_nonlocal
from tests.patching.blocks import Net, randomised
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


def small():
    """Blocks of both packages in one network."""
    norm = {"type": "BN3d"}
    blocks = video.create_nonlocal(dim_in=8, dim_inner=4, pool_size=(1, 2, 2))
    return Net(torch.nn.Sequential(blocks, mmcv.NonLocal3d(8, sub_sample=True, norm_cfg=norm)))


def resnet():
    """pytorchvideo's builder, with its blocks behind blocks 1 and 3 of res3 and res4."""
    package = pytest.importorskip(
        "pytorchvideo.models.resnet", reason="pytorchvideo's networks import torchvision and fvcore"
    )
    model = package.create_resnet(
        model_num_class=5, stem_dim_out=8, head_pool_kernel_size=(1, 1, 1), dropout_rate=0
    )
    for stage, width in ((2, 64), (3, 128)):
        blocks = model.blocks[stage].res_blocks
        for place in (1, 3):
            made = video.create_nonlocal(dim_in=width, dim_inner=width // 2, pool_size=(1, 2, 2))
            blocks[place] = torch.nn.Sequential(blocks[place], made)
    return model


@pytest.mark.parametrize("make", [small, resnet])
def test_a_whole_network(make):
    model = make().double()
    for module in model.modules():
        if isinstance(module, video.NonLocal | mmcv.NonLocal3d):
            randomised(module)
    theirs, keys = copy.deepcopy(model), list(model.state_dict())
    classes = {name: type(module) for name, module in model.named_modules()}
    report = replace_nonlocal(model, backend="chunked")
    assert len(report) == {small: 2, resnet: 4}[make]
    assert losses(model) == pytest.approx(losses(theirs), rel=1e-9)
    report.restore()
    assert list(model.state_dict()) == keys
    assert {name: type(module) for name, module in model.named_modules()} == classes


def losses(model):
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), []
    for step in range(2):
        x = torch.randn(2, 3, 4, 32, 32, generator=torch.Generator().manual_seed(step)).double()
        loss = torch.nn.functional.cross_entropy(model(x), torch.tensor([0, step]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found
