"""timm's own block, replaced: outputs, gradients, statistics and keys stay."""

import pytest

from nlkernels import replace_nonlocal
from tests.patching.test_blocks import check_module

timm = pytest.importorskip("timm.layers", reason="timm is in no environment of the Makefile")


@pytest.mark.parametrize("rd_ratio", [1 / 8, 1 / 2])
@pytest.mark.parametrize("use_scale", [True, False])
def test_block(use_scale, rd_ratio):
    check_module(timm.NonLocalAttn(16, use_scale=use_scale, rd_ratio=rd_ratio), (2, 16, 5, 6))


def test_bilinear_transforms_are_no_such_blocks():
    with pytest.raises(ValueError, match="without any"):
        replace_nonlocal(timm.BatNonLocalAttn(16))
